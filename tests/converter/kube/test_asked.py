"""Flags: those of the reference unchanged, and what they become."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import build_parser
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import UsageError
from ckpt2pt.kube.asked import spec_of, stages_of
from ckpt2pt.kube.conversion.schema import Spec
from conversions import request_of

NEEDED = ["--num-layers", "8", "--ms-path", "ms", "--param-map-path", "meta", "--megatron-path", "out"]


def parse(*flags: str, command: str = "convert") -> argparse.Namespace:
    return build_parser().parse_args([command, *NEEDED, *flags])


def request(*flags: str) -> Request:
    return request_of(parse(*flags))


def test_the_references_own_command_lines_parse_unchanged(golden_set: Path) -> None:
    text = golden_set / "command.txt"
    lines = [line for line in text.read_text().splitlines() if "convert_ckpt2pt.py" in line] if text.exists() else []
    if not lines:
        pytest.skip("the committed subset does not keep the command lines")
    for line in lines:
        words = shlex.split(line)
        flags = words[next(n for n, w in enumerate(words) if w.endswith("convert_ckpt2pt.py")) + 1 :]
        made = request_of(build_parser().parse_args(["convert", *flags]))
        assert made.in_process
        assert made.full is ("--convert-param-only" not in flags)
        assert str(made.source) == flags[flags.index("--ms-path") + 1]
        assert made.topology.tensor == int(flags[flags.index("--tp-size") + 1])
        assert made.topology.noop == (frozenset({6, 7}) if "--noop" in flags else frozenset())


def test_defaults_convert_everything_whole() -> None:
    made = request()
    cut = made.topology
    assert (cut.tensor, cut.pipeline, cut.virtual, cut.data, cut.context) == (1, 1, 1, 1, 1)
    assert (made.full, made.source_format, made.iteration, made.verify, made.overwrite) == (
        True,
        None,
        None,
        "digest",
        False,
    )


@pytest.mark.parametrize(
    "words", [["1,3,2,2"], ["1 3 2 2"], ["1, 3, 2, 2"], ["1", "3", "2", "2"], ["1,3", "2,2"]], ids=str
)
def test_uneven_stages_are_a_list(words: list[str]) -> None:
    made = request("--stage-list", *words, "--pp-size", "2", "--vpp-size", "2")
    assert made.topology.layers_per_stage == (1, 3, 2, 2)


@pytest.mark.parametrize(
    "flags",
    [
        ["--stage-list", "a,b"], ["--tp-size", "0"], ["--tp-size", "x"], ["--pp-size", "3"], ["--noop", "-1"],
        ["--stage-list", "3,4", "--pp-size", "2"], ["--iteration", "0"], ["--iteration", "-1"], ["--process-limit", "0"],
        ["--process_timeout", "0"], ["--process_timeout", "nan"], ["--process_timeout", "1e30"], ["--target-dp-size", "0"], ["--src-model-format", "pt"], ["--unknown"], ["--verify", "x"],
        ["--num-layer", "4"], ["stray"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_flags_are_wrong_usage(flags: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        request(*flags)
    assert caught.value.hint


@pytest.mark.parametrize("flag", ["--ms-path", "--param-map-path", "--megatron-path"])
@pytest.mark.parametrize("command", ["convert", "plan", "verify"])
def test_a_missing_flag_is_named(flag: str, command: str) -> None:
    at = NEEDED.index(flag)
    with pytest.raises(UsageError, match=flag):
        request_of(build_parser().parse_args([command, *NEEDED[:at], *NEEDED[at + 2 :]]))


@pytest.mark.parametrize("words", [["--source", "ms"], ["--ms-path", "ms"]], ids=str)
@pytest.mark.parametrize("target", [["--target", "out"], ["--megatron-path", "out"]], ids=str)
def test_each_place_has_a_name_of_its_own_and_that_of_the_reference(words: list[str], target: list[str]) -> None:
    given = ["convert", "--num-layers", "8", "--param-map-path", "meta", *words, *target]
    found = spec_of(build_parser().parse_args(given))
    assert (found.source.path, found.metadata.path, found.target.path) == ("ms", "meta", "out")


def places(*words: str) -> Spec:
    return spec_of(build_parser().parse_args(["convert", *words]))


def test_a_source_of_megatron_needs_no_metadata() -> None:
    found = places("--source", "old", "--source-format", "megatron", "--target", "new")
    assert (found.source.format, found.metadata.path) == ("Megatron", "")
    assert places("--source", "old", "--target", "new").metadata.path == "", "it may be one"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("--source-format megatron --megatron-path old", "which of them"),
        ("--source old --ms-path old --target new", "--source and --ms-path are both given"),
        ("--source old --target new --megatron-path new", "--target and --megatron-path are both given"),
        ("--target new --source-format megatron", "--source or --ms-path is missing"),
        ("--source old", "--target or --megatron-path is missing"),
        ("--source old --source-format ckpt --target new", "--param-map-path is missing"),
        ("--ms-path old --megatron-path new", "--param-map-path is missing"),
    ],
)
def test_places_that_say_too_much_or_too_little_are_wrong_usage(words: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        places(*words.split())


@pytest.mark.parametrize(
    ("index", "flags", "stages"),
    [
        (None, [], (0, 1, 2, 3)), ("", [], (0, 1, 2, 3)), ("2", [], (2,)), ("0", [], (0,)), ("2", ["--stage", "3"], (3,)),
        (None, ["--stage", "3", "--stage", "1", "--stage", "3"], (1, 3)),
    ],
)  # fmt: skip
def test_the_stages_are_those_given_or_the_pods_or_all(
    index: str | None, flags: list[str], stages: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    if index is not None:
        monkeypatch.setenv("JOB_COMPLETION_INDEX", index)
    options = parse("--pp-size", "4", *flags)
    assert stages_of(options, request_of(options)) == stages


@pytest.mark.parametrize(("index", "flags"), [("4", []), ("x", []), ("-1", []), ("²", []), (None, ["--stage", "4"])])
def test_a_stage_that_does_not_exist_is_refused(
    index: str | None, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    if index is not None:
        monkeypatch.setenv("JOB_COMPLETION_INDEX", index)
    options = parse("--pp-size", "4", *flags)
    with pytest.raises(UsageError, match=r"stage|JOB_COMPLETION_INDEX"):
        stages_of(options, request_of(options))
