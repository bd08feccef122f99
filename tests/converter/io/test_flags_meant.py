"""A misspelt word is answered with the one that was meant, before anything that may be missing because of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import build_parser, main
from ckpt2pt.cli.programs.kubectl import build_kubectl_parser
from ckpt2pt.discover.request import parse_rules
from ckpt2pt.errors import UsageError
from ckpt2pt.kube.conversion.template import fill
from documents import changed, write


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
        ("convert --tp-sz 2", "unrecognized arguments: --tp-sz 2", "did you mean --tp-size?"),
        ("convert --tp 2", "unrecognized arguments: --tp 2", "did you mean --tp-size?"),
        ("convert -tp-size 2", "unrecognized arguments: -tp-size 2", "did you mean --tp-size?"),
        ("convert --num_layers 2", "unrecognized arguments: --num_layers 2", "did you mean --num-layers?"),
        ("convert stray", "unrecognized arguments: stray", "see ckpt2pt convert --help"),
        ("import --formt ckpt", "unrecognized arguments: --formt ckpt", "did you mean --format?"),
        ("inspect --detail", "unrecognized arguments: --detail", "did you mean --details?"),
        ("--verson", "unrecognized arguments: --verson", "did you mean --version?"),
        ("convert --src-model-format chkpt", "invalid choice: 'chkpt'", "did you mean ckpt?"),
        ("verify --overwrite", "unrecognized arguments: --overwrite", "see ckpt2pt verify --help"),
        ("convert", "--source or --ms-path is missing", "give --source or --ms-path"),
        ("", "the following arguments are required: COMMAND", "see ckpt2pt --help"),
        ("inspect", "the following arguments are required: path", "see ckpt2pt inspect --help"),
        ("inspect a b", "unrecognized arguments: b", "see ckpt2pt inspect --help"),
        ("transmogrify", "invalid choice", "see ckpt2pt --help"),
    ],
)
def test_a_wrong_word_is_reported_with_what_was_meant(
    words: str, what: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 64
    reported = capsys.readouterr().err
    assert what in reported
    assert meant in reported
    assert ("did you mean" in reported) == ("did you mean" in meant)


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(dict(a.choices) for a in parser._actions if isinstance(a, argparse._SubParsersAction))


@pytest.mark.parametrize("build", [build_parser, build_kubectl_parser])
def test_every_option_and_command_is_found_again_with_a_letter_missing(
    build: Callable[[], argparse.ArgumentParser],
) -> None:
    root = build()
    for name, parser in commands(root).items():
        with pytest.raises(UsageError) as caught:
            root.parse_args([_shortened(name)])
        assert f"did you mean {name}?" in caught.value.hint
        options = [
            o for o in parser._option_string_actions if len(o) > 6 and "_" not in o and o != "--max-process-limit"
        ]
        for option in options:
            if (wrong := _shortened(option)) not in options:
                with pytest.raises(UsageError) as caught:
                    root.parse_args([name, wrong])
                assert f"did you mean {option}?" in caught.value.hint


@pytest.mark.parametrize(
    ("words", "what", "meant"),
    [
        (["--volume", "trainin=."], "--volume trainin is no volume of the document", "did you mean training?"),
        (["--volume", "x=."], "--volume x is no volume of the document", "the volumes of the document are training"),
    ],
)
def test_a_volume_that_is_not_there_is_reported_before_the_one_that_is_missing(
    words: list[str], what: str, meant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volume = {"volume": {"persistentVolumeClaim": {"claimName": "training"}}, "path": "ms"}
    document = write(tmp_path / "a.yaml", changed(("spec.source", volume)))
    assert main(["run", "-f", str(document), *words]) == 64
    reported = capsys.readouterr().err
    assert what in reported
    assert meant in reported


def test_a_section_of_rules_and_a_field_of_a_template_as_well() -> None:
    with pytest.raises(UsageError) as caught:
        parse_rules({"modlues": {}}, where="x", hint="see the docs")
    assert caught.value.hint == "did you mean modules? see the docs"
    with pytest.raises(UsageError) as caught:
        fill({"spec": {"path": "${stp}"}}, {"step": 1})
    assert caught.value.hint == "did you mean ${step}? known here: ${step}"


def _shortened(word: str) -> str:
    return word[:-2] + word[-1]
