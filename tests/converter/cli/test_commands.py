"""The edge: exit codes, help, and errors that a machine can read."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt import errors
from ckpt2pt.cli import commands as cli
from ckpt2pt.cli.commands import build_parser, main
from ckpt2pt.core.topology import Topology
from ckpt2pt.kube.worker import termination
from handmade import Handmade


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """The command line owns its process: signals and logging."""
    handlers, before = logging.getLogger().handlers[:], signal.getsignal(signal.SIGTERM)
    yield
    logging.getLogger().handlers[:] = handlers
    signal.signal(signal.SIGTERM, before)


def commands() -> dict[str, argparse.ArgumentParser]:
    actions = build_parser()._actions
    (found,) = [a for a in actions if isinstance(a, argparse._SubParsersAction)]
    return dict(found.choices)


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    made = Handmade(topology=Topology(num_layers=2))
    request = made.write(tmp_path)
    paths = ["--ms-path", request.source, "--param-map-path", request.metadata, "--megatron-path", request.target]
    return ["--num-layers", "2", *map(str, paths)]


@pytest.mark.parametrize("command", ["", *commands()])
def test_help_is_there_for_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert "usage: ckpt2pt" in capsys.readouterr().out


def test_help_of_verify_says_what_is_equal_without_being_the_same() -> None:
    assert "any NaN equals any other" in " ".join(commands()["verify"].format_help().split())


def test_help_lists_every_exit_code() -> None:
    text = build_parser().format_help()
    for code, identity_options in errors.EXIT_CODES.items():
        assert f"{code}  {identity_options}" in text


@pytest.mark.parametrize("command", commands())
def test_every_flag_has_help(command: str) -> None:
    silent = [a.option_strings or a.dest for a in commands()[command]._actions if not a.help]
    assert not silent


@pytest.mark.parametrize("command", commands())
def test_help_tells_every_default(command: str) -> None:
    parser = commands()[command]
    words = " ".join(parser.format_help().split())
    for action in parser._actions:
        value = action.default
        if action.option_strings and value not in (None, [], argparse.SUPPRESS) and value is not False:
            shown = " ".join(value) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else value
            assert re.search(rf"{action.option_strings[-1]} .*?default:? \$?{re.escape(str(shown))}\b", words), shown


def test_a_plan_predicts_for_as_many_workers_as_convert_takes() -> None:
    limits = {name: commands()[name].get_default("process_limit") for name in ("convert", "plan", "watch")}
    assert len(set(limits.values())) == 1


@pytest.mark.parametrize("command", commands())
def test_no_flag_takes_an_empty_path_or_an_endless_time(command: str) -> None:
    kinds = {a.dest: a.type for a in commands()[command]._actions}
    assert [flag for flag, kind in kinds.items() if kind is Path] == [], "use ckpt2pt.io.flags.path"
    checked_later = {"process_timeout"}
    assert [f for f, kind in kinds.items() if kind is float and f not in checked_later] == [], "use flags.seconds"


def test_a_signal_while_an_error_is_reported_does_not_take_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    real = termination.message_of

    def reported(error: errors.Ckpt2ptError) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(error)

    monkeypatch.setattr(termination, "message_of", reported)
    assert main(["convert"]) == 64


@pytest.mark.parametrize(
    ("flag", "place", "code"),
    [
        pytest.param("--megatron-path", "file", 64, id="a-file-for-the-target"),
        pytest.param("--megatron-path", "file/below", 64, id="a-target-below-a-file"),
        pytest.param("--megatron-path", "loop", 64, id="a-loop-for-the-target"),
        pytest.param("--megatron-path", "x" * 300, 64, id="a-long-name-for-the-target"),
        pytest.param("--ms-path", "file", 66, id="a-file-for-the-source"),
        pytest.param("--ms-path", "loop", 66, id="a-loop-for-the-source"),
        pytest.param("--ms-path", "x" * 300, 66, id="a-long-name-for-the-source"),
        pytest.param("--param-map-path", "file", 66, id="a-file-for-the-metadata"),
        pytest.param("--param-map-path", "loop", 66, id="a-loop-for-the-metadata"),
        pytest.param("--param-map-path", "x" * 300, 66, id="a-long-name-for-the-metadata"),
        pytest.param("--rules", "pt_meta", 64, id="a-folder-for-the-rules"),
        pytest.param("--rules", "loop", 66, id="a-loop-for-the-rules"),
    ],
)
def test_a_path_that_can_never_be_right_is_not_tried_again(
    flag: str, place: str, code: int, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert main(["convert", *flags, "--multiprocess-off", "--progress", "none", flag, str(tmp_path / place)]) == code
    reported = capsys.readouterr().err
    assert "hint:" in reported
    assert "permission" not in reported
    assert "mount" not in reported


@pytest.mark.parametrize("name", ["args_tp00_pp000.pt", "param_map_buffer0_dp0tp0pp0vpp0.json"])
def test_metadata_that_is_a_dead_link_is_named_by_its_own_flag(
    name: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next((tmp_path).rglob(name))
    path.unlink()
    path.symlink_to("nowhere")
    assert main(["convert", *flags, "--multiprocess-off", "--progress", "none"]) == 66
    assert "check --param-map-path" in capsys.readouterr().err


def test_a_conversion_ends_with_0_and_a_document(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", *flags, "--multiprocess-off", "--output", "json", "--progress", "none"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["iteration"], document["published"], document["ranksConverted"]) == (12, True, 1)
    assert main(["verify", *flags, "--output", "json"]) == 0


def test_a_plan_writes_nothing(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *flags, "--output", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["iteration"] == 12
    assert not (tmp_path / "out").exists()


def test_a_result_that_differs_ends_with_76(flags: list[str], tmp_path: Path) -> None:
    assert main(["convert", *flags, "--multiprocess-off", "--progress", "none"]) == 0
    path = next((tmp_path / "out").rglob("distrib_optim.pt"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert main(["verify", *flags, "--level", "digest"]) == 76


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        pytest.param(["convert"], 64, id="usage"),
        pytest.param([], 64, id="no-command"),
        pytest.param(["inspect", "/no/such/file"], 66, id="missing"),
        pytest.param(["inspect", "{source}/broken.ckpt"], 65, id="input"),
    ],
)
def test_wrong_input_has_its_code(arguments: list[str], code: int, tmp_path: Path) -> None:
    (tmp_path / "broken.ckpt").write_bytes(b"\xff" * 100)
    assert main([word.format(source=tmp_path) for word in arguments]) == code


class_of_code: dict[str, tuple[BaseException, int]] = {
    kind.__name__: (kind("w", where="x", hint="m"), kind.exit_code)
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.Ckpt2ptError)
} | {
    "bug": (ZeroDivisionError("oops"), 70), "memory": (MemoryError(), 75), "ctrl-c": (KeyboardInterrupt(), 75),
}  # fmt: skip


@pytest.mark.parametrize("case", class_of_code)
def test_each_kind_of_failure_has_its_code(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error, code = class_of_code[case]

    def fail(_: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(cli, "_inspect", fail)
    assert main(["inspect", "x"]) == code
    seen = capsys.readouterr()
    assert seen.out == ""
    assert ("Traceback" in seen.err) is (case == "bug")


def test_errors_are_json_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "/no/such/file", "--log-format", "json"]) == 66
    document: dict[str, Any] = json.loads(capsys.readouterr().err)
    assert (document["level"], document["error"], document["exitCode"]) == ("error", "MissingInputError", 66)
    assert document["what"]
    assert document["where"] == "/no/such/file"
    assert document["hint"]


def test_wrong_usage_is_json_too_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--log-format", "json", "--unknown"]) == 64
    assert json.loads(capsys.readouterr().err)["error"] == "UsageError"


def test_a_pod_converts_the_stage_of_its_index(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    assert main(["convert", *flags]) == 64
    assert "JOB_COMPLETION_INDEX 1 does not exist among 1 stages" in capsys.readouterr().err


def test_a_bug_is_one_line_of_json_for_a_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a bug of ours")

    monkeypatch.setattr("ckpt2pt.show.checkpoint.inspect", broken)
    assert main(["inspect", str(tmp_path), "--log-format", "json"]) == 70
    [line] = capsys.readouterr().err.splitlines()
    document = json.loads(line)
    assert (document["level"], document["error"], document["exitCode"]) == ("error", "ValueError", 70)
    assert "this is a bug" in document["what"]
    assert "in broken" in document["traceback"]


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["a", "--tp-size", "2"], "--tp-size"),
        (["a", "--ignore", "args"], "--ignore"),
        (["a", "--reader", "torch"], "--reader"),
        (["a", "b", "--param-map-path", "m"], "--param-map-path"),
        (["a", "b", "--level", "digest"], "--level"),
        (["a", "b", "--stage", "1"], "--stage"),
        (["--source", "a", "--target", "b", "--ignore-padding"], "--ignore-padding"),
    ],
    ids=str,
)
def test_an_option_of_another_way_to_verify_is_refused(
    words: list[str], flag: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *words]) == 64
    assert f"{flag} is given, and decides nothing where " in capfd.readouterr().err
