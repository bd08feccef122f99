"""A training is followed: every new checkpoint once, when it is whole, and the last results stay."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.cli import commands as cli
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import InputError, InterruptedRunError
from ckpt2pt.kube.follow.watch import Following, training_of, watch
from ckpt2pt.publish import TRACKER
from conversions import Quiet, request_of
from documents import changed, write
from handmade import Handmade
from workers import wait_for

CUT = Topology(num_layers=4, pipeline=2)


class Training:
    """Saves checkpoints as MindSpore does: all under temporary names, then renamed, then without the right to write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source, self.target = folder / "ms", folder / "out"
        self.metadata = self.write(0, folder / "first").metadata

    def write(self, iteration: int, folder: Path) -> Any:
        return Handmade(topology=CUT, iteration=iteration).write(folder)

    def save(self, iteration: int, *ranks: int) -> None:
        """A save of some ranks, of all when none is named."""
        made = self.write(iteration, self.folder / f"made-{iteration}")
        for rank in ranks or (0, 1):
            for path in (made.source / f"rank_{rank}").glob("*.ckpt"):
                home = self.source / f"rank_{rank}" / path.name
                home.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, home.with_suffix(".tmp")).rename(home).chmod(0o400)

    def flags(self) -> list[str]:
        paths = ["--ms-path", self.source, "--param-map-path", self.metadata, "--megatron-path", self.target]
        return ["--num-layers", "4", "--pp-size", "2", "--multiprocess-off", "--progress", "none", *map(str, paths)]

    def results(self) -> list[str]:
        return sorted(path.name for path in self.target.glob("*"))


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path)


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def once(training: Training, *more: str) -> int:
    return cli.main(["watch", "--once", *training.flags(), *more])


def test_nothing_to_do_is_no_error_and_is_said(training: Training, capsys: pytest.CaptureFixture[str]) -> None:
    training.source.mkdir(exist_ok=True)
    assert once(training) == 0
    assert training.results() == []
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"ckpt2pt: nothing is converted: checkpoint in {training.source} is incomplete: rank_0 is missing"
    )


def test_one_round_of_a_folder_that_is_not_there_ends_at_once(
    training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(training.source, ignore_errors=True)
    for more in ([], ["--readiness-timeout", "0.2"], ["--stop-on-error"]):
        assert once(training, *more) == 66
        reported = capsys.readouterr().err
        assert f"source folder {training.source} is not there" in reported
        assert "--ms-path" in reported


def test_a_checkpoint_that_is_there_already_is_said(training: Training, capsys: pytest.CaptureFixture[str]) -> None:
    training.save(10)
    once(training, "--settle", "0")
    capsys.readouterr()
    assert once(training, "--settle", "0") == 0
    assert (
        capsys.readouterr().err
        == "ckpt2pt: nothing is converted: every checkpoint that is there was converted before\n"
    )


def test_each_whole_checkpoint_is_converted_and_the_last_are_kept(
    training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    training.save(10)
    training.save(20)
    training.save(30, 0)
    assert once(training, "--keep", "2", "--output", "json") == 0
    assert training.results() == ["iter_0000010", "iter_0000020", TRACKER]
    training.save(30, 1)
    assert once(training, "--keep", "2") == 0
    assert training.results() == ["iter_0000020", "iter_0000030", TRACKER]
    assert (training.target / TRACKER).read_text() == "30"
    assert "removed the results of iterations [10]" in capsys.readouterr().out


def test_a_restart_does_nothing_twice_and_never_goes_back(
    training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    for iteration in (10, 20):
        training.save(iteration)
    once(training, "--keep", "1")
    capsys.readouterr()
    assert once(training, "--keep", "1") == 0
    assert capsys.readouterr().out == ""
    assert training.results() == ["iter_0000020", TRACKER]


def test_of_many_old_checkpoints_only_those_that_are_kept_are_converted(training: Training) -> None:
    for iteration in (10, 20, 30):
        training.save(iteration)
    once(training, "--keep", "1")
    assert training.results() == ["iter_0000030", TRACKER]


def test_one_that_is_being_written_is_left_alone(training: Training, capsys: pytest.CaptureFixture[str]) -> None:
    training.save(10)
    [file] = (training.source / "rank_1").glob("*.ckpt")
    file.chmod(0o600)
    assert once(training) == 0
    assert training.results() == []
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("ckpt2pt: nothing is converted: checkpoint 0_10 is incomplete: rank_1 may still be written")
    assert once(training, "--settle", "0") == 0
    assert training.results() == ["iter_0000010", TRACKER]


def shorten(training: Training, iteration: int) -> Path:
    [file] = (training.source / "rank_1").glob(f"*-0_{iteration}.ckpt")
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-3])
    file.chmod(0o400)
    return file


def rest(training: Training) -> None:
    """A while ago is when everything was written."""
    for path in training.source.glob("*/*"):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 60))


def test_broken_checkpoints_are_reported_each_once_and_the_newest_decides(
    training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    for iteration in (10, 20, 30):
        training.save(iteration)
    names = [shorten(training, iteration).name for iteration in (10, 30)]
    assert once(training) == 65
    err = capsys.readouterr().err
    for name in names:
        assert err.count(f"is incomplete: rank_1 is broken ({name}: ") == 1
    assert training.results() == ["iter_0000020", TRACKER], "what is whole is converted nevertheless"
    assert once(training, "--stop-on-error") == 65
    assert once(training, "--forgive-broken-save") == 0
    assert f"rank_1 is broken ({names[-1]}: " in capsys.readouterr().err
    training.save(40)
    assert once(training) == 0, "a newer one could be converted"


@pytest.mark.parametrize("left", ["rank", "step", "temporary"])
def test_an_incomplete_checkpoint_is_reported_when_it_has_rested(
    left: str, training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    if left != "rank":
        training.save(10)
    training.save(20, 0)
    if left == "temporary":
        training.save(20, 1)
        [file] = (training.source / "rank_1").glob("*-0_20.ckpt")
        file.rename(file.with_suffix(".tmp"))
    assert once(training) == 0, "others may still come"
    idle = "nothing is converted: checkpoint 0_20 is incomplete" in capsys.readouterr().err
    assert idle == (left == "rank"), "said when nothing else was done"
    rest(training)
    code, text = {
        "rank": (66, "rank_1 is missing"),
        "step": (65, "rank_1 is at 0_10"),
        "temporary": (75, "rank_1 is being written ("),
    }[left]
    said = training.folder / "last-word"
    assert once(training, "--termination-log", str(said)) == code
    assert capsys.readouterr().err.count(f"checkpoint 0_20 is incomplete: {text}") == 1
    assert text in json.loads(said.read_text())["message"]


def test_a_follower_tells_what_is_broken_once_and_its_status_until_one_succeeds(
    training: Training, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.save(10)
    shorten(training, 10)
    request = request_of(cli.build_parser().parse_args(["watch", *training.flags()]))
    laments: list[int] = []
    rounds = iter([None, None, lambda: training.save(20), None])

    def pause(_: float) -> None:
        try:
            happens = next(rounds)
        except StopIteration:
            raise InterruptedRunError("enough", where="here", hint="none") from None
        if happens:
            happens()

    monkeypatch.setattr("ckpt2pt.kube.follow.watch.time.sleep", pause)
    received: list[int] = []
    with pytest.raises(InterruptedRunError, match="enough"):
        watch(
            training_of(request, 10.0),
            Following(),
            reporter=Quiet,
            hear=lambda outcome, _: received.append(outcome.target.iteration),
            on_failure=lambda error: laments.append(error.exit_code),
        )
    assert ["rank_1 is broken" in record.getMessage() for record in caplog.records].count(True) == 1
    assert received == [20]
    assert laments == [65, 65, 65], "after a success no more"


def test_a_follower_waits_for_its_source_and_says_so_once(
    training: Training, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="ckpt2pt")
    request = request_of(cli.build_parser().parse_args(["watch", *training.flags()]))
    rounds = iter([None, training.source.mkdir, None, lambda: training.save(10)])
    waits: list[str] = []
    received: list[int] = []

    def pause(_: float) -> None:
        happens = next(rounds, "end")
        if happens == "end":
            raise InterruptedRunError("enough", where="here", hint="none")
        if callable(happens):
            happens()

    monkeypatch.setattr("ckpt2pt.kube.follow.watch.time.sleep", pause)
    with pytest.raises(InterruptedRunError, match="enough"):
        watch(
            training_of(request, 10.0),
            Following(),
            reporter=Quiet,
            hear=lambda outcome, _: received.append(outcome.target.iteration),
            wait=waits.append,
        )
    reported = [record.getMessage() for record in caplog.records]
    assert reported == [
        f"waiting: source folder {training.source} is not there",
        f"waiting: checkpoint in {training.source} is incomplete: rank_0 is missing; rank_1 is missing",
    ]
    assert received == [10]
    assert waits[-1] == "", "with a checkpoint there is nothing to wait for"


def test_what_is_incomplete_ends_no_watch_and_what_is_broken_does(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.save(10, 0)
    rest(training)
    request = request_of(cli.build_parser().parse_args(["watch", *training.flags()]))
    laments: list[int] = []

    def breaks(_: float) -> None:
        training.save(10, 1)
        shorten(training, 10)

    monkeypatch.setattr("ckpt2pt.kube.follow.watch.time.sleep", breaks)
    with pytest.raises(InputError, match="rank_1 is broken"):
        watch(
            training_of(request, 10.0),
            Following(stop_on_error=True),
            reporter=Quiet,
            hear=lambda *_: None,
            on_failure=lambda error: laments.append(error.exit_code),
        )
    assert laments == [66, 65]


def damage(training: Training, iteration: int) -> None:
    [file] = (training.source / "rank_1").glob(f"*-0_{iteration}.ckpt")
    file.chmod(0o600)
    file.write_bytes(file.read_bytes().replace(b"encoder.final_norm", b"encoder.Final_norm"))
    file.chmod(0o400)


def test_an_error_of_one_does_not_stop_the_next(training: Training, capsys: pytest.CaptureFixture[str]) -> None:
    for iteration in (10, 20):
        training.save(iteration)
    damage(training, 10)
    assert once(training) == 65
    assert (training.target / TRACKER).read_text() == "20"
    assert "checkpoint 0_10 is not converted: " in capsys.readouterr().err
    assert once(training, "--stop-on-error") == 0, "there is a newer one"


def test_or_it_does_when_asked_to(training: Training) -> None:
    training.save(10)
    damage(training, 10)
    assert once(training, "--stop-on-error") == 65


def test_a_document_says_the_same(training: Training, tmp_path: Path) -> None:
    training.save(10)
    document = changed(
        ("spec.parallelism", {"pipeline": 2}),
        ("spec.metadata.path", str(training.metadata.relative_to(tmp_path))),
    )
    path = write(tmp_path / "a.yaml", document)
    words = ["watch", "--once", "--progress", "none", "-f", str(path), "--volume", f"training={tmp_path}"]
    assert cli.main(words) == 0
    assert training.results() == ["iter_0000010", TRACKER]
    document["spec"]["dryRun"] = True
    write(path, document)
    assert cli.main(words) == 64


def test_a_document_says_how_the_training_is_followed(training: Training, tmp_path: Path) -> None:
    for iteration in (10, 20, 30):
        training.save(iteration)
    until = {"apiVersion": "batch/v1", "kind": "Job", "name": "pretrain"}
    document = changed(
        ("spec.parallelism", {"pipeline": 2}),
        ("spec.metadata.path", str(training.metadata.relative_to(tmp_path))),
        ("spec.follow", {"keep": 2, "until": until}),
    )
    path = write(tmp_path / "a.yaml", document)
    words = ["--progress", "none", "-f", str(path), "--volume", f"training={tmp_path}"]
    assert cli.main(["watch", "--once", *words]) == 0
    assert training.results() == ["iter_0000020", "iter_0000030", TRACKER]
    assert cli.main(["watch", "--once", "--keep", "1", *words]) == 0, "a flag decides"
    training.save(40)
    assert cli.main(["watch", "--once", "--keep", "1", *words]) == 0
    assert training.results() == ["iter_0000040", TRACKER]


def test_without_flags_it_says_which_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["watch", "--once"]) == 64
    assert "--ms-path is missing" in capsys.readouterr().err


def test_a_last_look_that_finds_nothing_new_tells_what_is_converted_already(training: Training, tmp_path: Path) -> None:
    reported = tmp_path / "reported"
    training.save(10)
    for _ in range(2):
        assert once(training, "--termination-log", str(reported)) == 0
        assert json.loads(reported.read_text())["iteration"] == 10


class LastWord:
    """Sends the signal when every rank is done, and nothing looks for it any more."""

    def begin(self, totals: object, iteration: int) -> None: ...
    def advance(self, rank: object, nbytes: int) -> None: ...
    def end(self, rank: object) -> None: ...
    def close(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_that_comes_too_late_for_a_conversion_ends_the_watch(training: Training) -> None:
    training.save(10)
    request = request_of(cli.build_parser().parse_args(["watch", *training.flags()]))
    received: list[int] = []
    with pytest.raises(InterruptedRunError, match="SIGTERM"):
        watch(
            training_of(request, 10.0),
            Following(interval=0.01),
            reporter=LastWord,
            hear=lambda outcome, _: received.append(outcome.target.iteration),
        )
    assert received == [10], "what was converted is reported"


def test_with_once_it_waits_for_the_newest_and_then_converts_what_is_whole(
    training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    training.save(10)
    training.save(20, 0)
    message = training.folder / "last-word"
    words = ["--readiness-timeout", "0.2", "--termination-log", str(message)]
    assert once(training, *words) == 65
    assert training.results() == ["iter_0000010", TRACKER]
    assert "after 0.2 s the checkpoint 0_20 is incomplete: rank_1 is at 0_10" in capsys.readouterr().err
    said = json.loads(message.read_text())
    assert (said["exitCode"], said["reason"], said["iteration"]) == (65, "InputWrong", 10)
    training.save(20, 1)
    assert once(training, *words) == 0
    said = json.loads(message.read_text())
    assert (said["reason"], said["iteration"], said["message"]) == ("Converted", 20, "")
    assert (said["stages"], said["verified"]) == ([0, 1], "digest")
    assert once(training, *words) == 0
    assert json.loads(message.read_text())["verified"] == "digest", "a worker before it has converted what there is"


def test_of_one_that_cannot_be_converted_the_last_word_says_why(training: Training) -> None:
    training.save(10)
    damage(training, 10)
    message = training.folder / "last-word"
    assert once(training, "--termination-log", str(message)) == 65
    said = json.loads(message.read_text())
    assert said["reason"] == "InputWrong"
    assert "rank_1" in said["message"]


@pytest.mark.timeout(300)
def test_a_running_watch_receives_new_checkpoints_and_ends_with_a_signal(training: Training) -> None:
    words = [sys.executable, "-m", "ckpt2pt", "watch", "--interval", "0.1", *training.flags(), "--output", "json"]
    reported = training.folder / "reported"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with reported.open("w") as out:
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.PIPE, text=True, env=buffered)
    try:
        for iteration in (10, 20):
            training.save(iteration)
            # It is reported after the tracker has been written, and a signal between the two would end the watch as well.
            wait_for(lambda text=f'"iteration": {iteration}': text in reported.read_text(), 100)  # type: ignore[misc]
            assert (training.target / TRACKER).read_text() == str(iteration)
    finally:
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    decoder, found, text = json.JSONDecoder(), list[int](), reported.read_text().strip()
    while text:
        document, end = decoder.raw_decode(text)
        found.append(document["iteration"])
        text = text[end:].strip()
    assert found == [10, 20]
