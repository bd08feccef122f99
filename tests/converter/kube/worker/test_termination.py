"""The termination message: small, valid, harmless, and there at every end."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt2pt.cli import commands as cli
from ckpt2pt.cli.commands import main
from ckpt2pt.core.foldernames import TRACKER
from ckpt2pt.core.topology import Topology
from ckpt2pt.engine.write import Stop
from ckpt2pt.errors import InputError, MissingInputError
from ckpt2pt.kube.worker.termination import MAX_BYTES, MAX_MESSAGE, message_of, path_of, plain, render, write
from ckpt2pt.publish import Target
from ckpt2pt.publish.locks import locked
from ckpt2pt.run import conversion as run
from ckpt2pt.run.rank import RankTask
from handmade import Handmade


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """As a kubelet leaves it: there, empty."""
    path = tmp_path / "termination-log"
    path.touch()
    return path


@pytest.fixture
def flags(tmp_path: Path, log: Path) -> list[str]:
    request = Handmade(topology=Topology(num_layers=2)).write(tmp_path)
    paths = ["--ms-path", request.source, "--param-map-path", request.metadata, "--megatron-path", request.target]
    return ["--num-layers", "2", *map(str, paths), "--termination-log", str(log)]


def word(log: Path) -> Any:
    return json.loads(log.read_bytes())


# ------------------------------------------------------------------------------------------------------------ the text


@given(st.text(), st.text(), st.text())
def test_a_message_is_one_line_of_bounded_length(what: str, where: str, hint: str) -> None:
    message = message_of(InputError(what, where=where, hint=hint))
    assert len(message) <= MAX_MESSAGE
    assert plain(message) == message.strip()


@given(st.text(max_size=5000), st.integers(0, 3000))
def test_the_document_fits_and_is_plain_json(message: str, stages: int) -> None:
    data = render(65, "InputWrong", message, {"stages": list(range(stages)), "bytes": 1})
    assert len(data) <= MAX_BYTES
    document = json.loads(data.decode())
    assert (document["version"], document["exitCode"], document["bytes"]) == (1, 65, 1)
    assert plain(document["message"]) == document["message"]
    assert not any(byte < 32 for byte in data)


@pytest.mark.parametrize("letter", ["a", "é", "模", "😀", "\ud800", "\u202e", "\x1b", '"', "\\"])
def test_long_messages_of_any_letter_fit(letter: str) -> None:
    data = render(65, "InputWrong", letter * 9000, {"stages": [3], "iteration": 5})
    assert len(data) <= MAX_BYTES
    assert json.loads(data)["stages"] == [3]


@pytest.mark.parametrize("letter", ["a", "模", "😀"])
def test_warnings_give_way_to_what_proves_a_stage(letter: str) -> None:
    data = render(0, "Converted", "", {"stages": [3], "iteration": 5, "warnings": [letter * 300] * 4})
    assert len(data) <= MAX_BYTES
    assert json.loads(data)["stages"] == [3]
    assert ("warnings" in json.loads(data)) == (len(letter.encode()) < 4)


def test_where_and_how_to_hint_survive_a_long_finding() -> None:
    message = message_of(InputError("rank " * 1000, where="/a/path", hint="set spec.source.iteration"))
    assert message.endswith("...; /a/path; set spec.source.iteration")


def test_terminals_are_safe() -> None:
    assert plain("a\x1b[31m\r\nb\u202ec\u2028d\ud800") == "a [31m b c d?"


# ------------------------------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["convert", "--termination-log", "a"], "a"),
        (["convert", "--termination-log=a"], "a"),
        (["convert", "--termination-log", "a", "--termination-log", "b"], "b"),
        (["plan"], "env"),
        (["convert", "--nonsense"], "env"),
        (["inspect", "x"], None),
        ([], None),
        (["convert", "--termination-log"], None),
    ],
)
def test_the_file_is_known_before_the_flags_are(words: list[str], expected: str | None) -> None:
    found = path_of(words, {"CKPT2PT_TERMINATION_LOG": "env"})
    assert found == (Path(expected) if expected else None)
    assert path_of(["convert"], {}) is None


def test_it_is_written_in_place(log: Path) -> None:
    inode = log.stat().st_ino
    log.write_text("x" * 9000)
    write(log, b"{}")
    assert (log.stat().st_ino, log.read_bytes()) == (inode, b"{}")


@pytest.mark.parametrize("kind", ["folder", "fifo", "nowhere", "nul"])
def test_a_file_that_cannot_be_written_is_a_warning(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = {"folder": tmp_path, "fifo": tmp_path / "f", "nowhere": tmp_path / "a" / "b", "nul": Path("a\0b")}
    os.mkfifo(paths["fifo"])
    write(paths[kind], b"{}")
    assert "could not be written" in caplog.text


def test_a_signal_does_not_cut_it_short(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.fdopen

    def interrupted(fd: int, mode: str) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return before(fd, mode)

    monkeypatch.setattr(os, "fdopen", interrupted)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    write(log, b"{}")
    assert log.read_bytes() == b"{}"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# -------------------------------------------------------------------------------------------------------- at every end


def test_success(flags: list[str], log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    assert main(["convert", *flags, "--progress", "none"]) == 0
    document = word(log)
    assert document.pop("seconds") > 0
    assert document.pop("throughput") > 0
    assert document.pop("bytes") == document.pop("bytesTotal") > 0
    assert document.pop("bytesWritten") > 0
    assert document == {
        "version": 1, "stages": [0], "exitCode": 0, "reason": "Converted", "message": "", "iteration": 12,
        "outputPath": "iter_0000012", "files": 2, "verified": "digest",
    }  # fmt: skip


def test_it_names_the_conversion_and_the_level_of_verification(
    flags: list[str], log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT2PT_CONVERSION_UID", "uid-1")
    for level, known in (("none", "none"), ("full", "full"), ("digest", "digest")):
        assert main(["convert", *flags, "--progress", "none", "--verify", level]) == 0
        assert (word(log)["conversion"], word(log)["verified"]) == ("uid-1", known)


def test_a_target_that_is_taken_is_no_wrong_usage(flags: list[str], log: Path) -> None:
    assert main(["convert", *flags, "--progress", "none"]) == 0
    assert main(["convert", *flags, "--progress", "none", "--zero-consumed-samples"]) == 64
    assert (word(log)["exitCode"], word(log)["reason"]) == (64, "TargetConflict")
    assert "another conversion" in word(log)["message"]
    assert "verified" not in word(log)


def test_a_plan(flags: list[str], log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *flags, "--output", "json"]) == 0
    document, shown = word(log), json.loads(capsys.readouterr().out)
    assert (document["exitCode"], document["reason"], document["iteration"]) == (0, "Planned", 12)
    assert document["plan"] == {
        "files": 2, "bytes": shown["bytesToWrite"], "memory": shown["memoryBytes"], "freeSpace": shown["bytesFree"], "ranks": 1,
    }  # fmt: skip
    assert "bytes" not in document


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        pytest.param(["--nonsense"], 64, "WrongUsage", id="unknown-flag"),
        pytest.param(["--stage", "5"], 64, "WrongUsage", id="no-such-stage"),
        pytest.param(["--iteration", "7"], 65, "InputWrong", id="input"),
        pytest.param(["--tp-size", "2"], 65, "InputWrong", id="not-what-pt-meta-states"),
        pytest.param(["--param-map-path", "none"], 66, "InputMissing", id="missing"),
    ],
)
def test_errors(flags: list[str], log: Path, words: list[str], code: int, reason: str) -> None:
    assert main(["convert", *flags, *words]) == code
    document = word(log)
    assert (document["exitCode"], document["reason"]) == (code, reason)
    assert document["message"].count("; ") >= 2


@pytest.mark.parametrize(
    ("bug", "code", "text"),
    [
        (ZeroDivisionError("oops"), 70, "ZeroDivisionError: oops"),
        (KeyboardInterrupt(), 75, "SIGINT"),
        (MemoryError(), 75, "out of memory"),
    ],
    ids=["bug", "ctrl-c", "memory"],
)
def test_other_ends(
    flags: list[str], log: Path, bug: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> int:
        raise bug

    monkeypatch.setattr(cli, "_convert", fail)
    assert main(["convert", *flags]) == code
    assert word(log)["exitCode"] == code
    assert text in word(log)["message"]


def test_a_message_that_cannot_be_written_changes_nothing(flags: list[str], tmp_path: Path) -> None:
    assert main(["convert", *flags, "--progress", "none", "--termination-log", str(tmp_path)]) == 0


def test_sigterm_before_and_in_the_middle(flags: list[str], log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any, **_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        next(arg for arg in args if isinstance(arg, Stop)).check()

    for place, name in ((run, "discover"), (RankTask, "run")):
        log.write_text("")
        with monkeypatch.context() as patch:
            patch.setattr(place, name, stopped)
            assert main(["convert", *flags, "--progress", "none"]) == 75
        document = word(log)
        assert (document["exitCode"], document["reason"]) == (75, "TryAgain")
        assert "SIGTERM" in document["message"]
        assert ("bytesTotal" in document) is (name == "run")


@pytest.mark.parametrize(
    ("place", "name"),
    [(Target, "publish_stage"), (Target, "publish_iteration"), (run, "_source_checksums"), (run.Outcome, "document")],
    ids=["recorded", "published", "returned", "shown"],
)
def test_a_signal_after_the_end_denies_nothing(
    flags: list[str], log: Path, tmp_path: Path, place: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker looks after the folder meanwhile, so that this one has to wait before it publishes."""
    real = getattr(place, name)

    def stopped(*args: Any, **words: Any) -> Any:
        found = real(*args, **words)
        if name == "publish_stage":
            ours = ExitStack()
            ours.enter_context(locked(args[0].state / "claim.lock", "publishing"))
            Timer(0.2, ours.close).start()
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(place, name, stopped)
    assert main(["convert", *flags, "--progress", "none"]) == 0
    assert word(log)["exitCode"] == 0
    assert len(list(tmp_path.rglob(TRACKER))) == 1


def test_missing_inputs_name_the_folder(flags: list[str], log: Path, tmp_path: Path) -> None:
    assert main(["convert", *flags, "--ms-path", str(tmp_path / "none")]) == MissingInputError.exit_code
    assert str(tmp_path / "none") in word(log)["message"]
    assert "seconds" in word(log)
