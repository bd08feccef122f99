"""Flags as they are declared: every command that converts has the same ones."""

from __future__ import annotations

import pytest

from ckpt2pt.cli.commands import build_parser

PLACES = ["--ms-path", "ms", "--param-map-path", "meta", "--megatron-path", "out"]


@pytest.mark.parametrize("command", ["convert", "plan", "watch", "verify"])
def test_each_command_that_converts_knows_all_of_a_conversion(command: str) -> None:
    words = [command, *PLACES, "--num-layers", "8", "--tp-size", "2", "--target-tp-size", "4", "--stage-list", "3,5"]
    options = build_parser().parse_args(words)
    assert (options.num_layers, options.tp_size, options.target_tp_size) == (8, 2, 4)
    assert (options.stage_list, options.spec) == ([(3, 5)], None)


def test_a_spec_is_all_that_is_needed() -> None:
    options = build_parser().parse_args(["convert", "--spec", "{}"])
    assert options.source is options.ms_path is options.target is None


def test_the_format_of_the_source_has_the_spelling_of_the_reference_too() -> None:
    words = ["convert", "--src-model-format", "safetensors"]
    assert build_parser().parse_args(words).source_format == "safetensors"
