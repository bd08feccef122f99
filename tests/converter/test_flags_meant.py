"""A misspelt word is answered with the one that was meant, before anything that may be missing because of it."""

from __future__ import annotations

import pytest

from ckpt2pt.cli import main


@pytest.mark.parametrize(
    ("words", "what", "meant"),
    [
        ("convrt", "invalid choice: 'convrt'", "did you mean convert?"),
        ("convert --num-layerz 8", "unrecognized arguments: --num-layerz", "did you mean --num-layers?"),
        (
            "plan --tp-sise=2 --ms-path a --param-map-path b --megatron-path c",
            "unrecognized",
            "did you mean --tp-size?",
        ),
        ("convert --src-model-format chkpt", "invalid choice: 'chkpt'", "did you mean ckpt?"),
        ("verify --overwrite", "unrecognized arguments: --overwrite", "see ckpt2pt verify --help"),
        ("convert", "the following arguments are required: --ms-path", "see ckpt2pt convert --help"),
        ("inspect a b", "unrecognized arguments: b", "see ckpt2pt inspect --help"),
        ("transmogrify", "invalid choice", "see ckpt2pt --help"),
    ],
)
def test_a_wrong_word_is_told_with_what_was_meant(
    words: str, what: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 64
    told = capsys.readouterr().err
    assert what in told
    assert meant in told
    assert ("did you mean" in told) == ("did you mean" in meant)
