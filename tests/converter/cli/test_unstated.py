"""Options for what a checkpoint of one format alone does not tell: words that are none are refused by the flag."""

from __future__ import annotations

import pytest

from ckpt2pt.cli.commands import build_parser, main

WORDS = ["plan", "--source", "a", "--target", "b"]


@pytest.mark.parametrize(
    "given",
    [
        ["--rope-scaling-factor", "0"],
        ["--rope-scaling-factor", "nan"],
        ["--rope-scaling-factor", "inf"],
        ["--vocab-size", "many"],
        ["--tokenizer-from", ""],
        ["--use-interleaved-weight-layout-mlp", "perhaps"],
    ],
)
def test_a_word_that_is_no_value_is_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, *given]) == 64
    assert given[0] in capsys.readouterr().err


def test_what_is_given_is_kept() -> None:
    options = build_parser().parse_args([*WORDS, "--rope-scaling-factor", "32", "--use-interleaved-weight-layout-mlp", "True"])  # fmt: skip
    assert options.rope_scaling_factor == 32.0
    assert options.use_interleaved_weight_layout_mlp is True
