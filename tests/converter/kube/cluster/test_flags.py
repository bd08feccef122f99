"""Flags of submit and of the plugin."""

from __future__ import annotations

import argparse

import pytest

from ckpt2pt.cli.commands import build_parser
from ckpt2pt.cli.programs.kubectl import build_kubectl_parser, kubectl


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (found,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(found.choices)


def test_submit_is_the_same_behind_both_doors() -> None:
    words = [
        "submit",
        "-f",
        "a.yaml",
        "--set",
        "a=b",
        "--set",
        "c=d",
        "--run",
        "r",
        "--epoch",
        "1",
        "--wait",
        "-n",
        "ml",
    ]
    for parser in (build_parser(), build_kubectl_parser()):
        options = parser.parse_args(words)
        assert (options.set, options.training, options.epoch, options.wait, options.namespace) == (
            ["a=b", "c=d"],
            "r",
            1,
            True,
            "ml",
        )
        assert callable(options.run)


def test_every_flag_of_the_plugin_has_help() -> None:
    for name, parser in commands(build_kubectl_parser()).items():
        assert all(action.help for action in parser._actions), name


@pytest.mark.parametrize("words", [[], ["logs", "x"], ["logs", "x", "first"], ["retry"], ["transmogrify"]])
def test_wrong_usage_is_64(words: list[str]) -> None:
    assert kubectl(words) == 64
