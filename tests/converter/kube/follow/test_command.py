"""The command that watches is tested with what it follows, in test_watch.py; here, what it makes of its options.

Trainings of MindFormers, which it alone makes one of to be followed, are followed here.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import build_parser, main
from ckpt2pt.core.foldernames import TRACKER
from ckpt2pt.errors import UsageError
from ckpt2pt.kube.follow import command
from ckpt2pt.kube.follow.watch import Following, Training
from ckpt2pt.kube.worker.account import Account
from documents import changed, write
from goldens import golden_root
from mindformers_made import LAUNCH, Model, save_sharded

FLAGS = ["--num-layers", "4", "--ms-path", "a", "--param-map-path", "b", "--megatron-path", "c"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Following]:
    """How it would follow."""
    found: list[Following] = []

    def watch(_: Training, how: Following, **__: object) -> int:
        found.append(how)
        return 0

    monkeypatch.setattr(command, "watch", watch)
    return found


def follow(*words: str) -> Account:
    options = build_parser().parse_args(["watch", *words], argparse.Namespace(account=Account()))
    assert command.watch_command(options, lambda *_: None) == 0
    account: Account = options.account
    return account


def test_the_defaults(asked: list[Following]) -> None:
    account = follow(*FLAGS, "--pp-size", "2")
    assert asked == [Following(keep=0, interval=30.0, settle=10.0)]
    assert (account.following, account.stages) == (True, range(2))


def test_a_document_decides_over_the_defaults_and_a_flag_over_the_document(
    asked: list[Following], tmp_path: Path
) -> None:
    document = changed(
        ("spec.follow", {"keep": 3, "intervalSeconds": 5}),
        ("spec.readiness", {"settleSeconds": 7, "timeoutSeconds": 0}),
    )
    words = ["-f", str(write(tmp_path / "a.yaml", document)), "--volume", f"training={tmp_path}"]
    follow(*words)
    follow(*words, "--keep", "0", "--interval", "0.5", "--settle", "0")
    assert asked == [Following(keep=3, interval=5, settle=7), Following(keep=0, interval=0.5, settle=0)]


def test_looking_again_without_a_pause_is_refused(asked: list[Following]) -> None:
    with pytest.raises(UsageError, match="--interval is 0"):
        follow(*FLAGS, "--interval", "0")
    assert asked == []


def test_a_document_without_follow_can_be_followed(asked: list[Following], tmp_path: Path) -> None:
    follow("-f", str(write(tmp_path / "a.yaml", changed())), "--volume", f"training={tmp_path}")
    assert asked == [Following(keep=0, interval=30.0, settle=10.0)]


# ------------------------------------------------------------------------------------------------------- MindFormers


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """The folder that a training saves into, beside its launch script."""
    (tmp_path / "launch.sh").write_text(LAUNCH)
    return tmp_path / "checkpoint"


def saved(training: Path, *iterations: int) -> None:
    for iteration in iterations:
        save_sharded(training, Model().arrays, {"output_layer.weight": (2, 1)}, ranks=2, iteration=iteration)


def words(training: Path, target: str = "torch_dist", *more: str) -> list[str]:
    said = ["--use-interleaved-weight-layout-mlp", "true", "--use-contiguous-weight-layout-attention", "false"]
    paths = ["--source", str(training), "--target", str(training.parent / "out"), "--target-format", target]
    launch = ["--param-map-path", str(training.parent / "launch.sh")]
    return [
        "watch",
        "--once",
        "--settle",
        "0",
        "--multiprocess-off",
        "--progress",
        "none",
        *paths,
        *launch,
        *said,
        *more,
    ]


def results(training: Path) -> list[str]:
    return sorted(path.name for path in (training.parent / "out").glob("*"))


@pytest.mark.parametrize("target", ["torch_dist", "megatron"])
def test_each_complete_iteration_of_mindformers_is_converted_and_the_last_are_kept(
    training: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(training, 3, 4)
    save = training / "iteration_00000004"
    (training / TRACKER).write_text("3")
    (save / "metadata.json").rename(training / "late")
    assert main(words(training, target)) == 66
    said = capsys.readouterr().err
    assert "checkpoint 4 is incomplete: metadata.json is not there" in said
    assert results(training) == ["iter_0000003", TRACKER]
    (training / "late").rename(save / "metadata.json")  # and the tracker does not follow, as after an asynchronous save
    assert main(words(training, target, "--keep", "2", "--output", "json")) == 0
    assert json.loads(capsys.readouterr().out)["iteration"] == 4
    saved(training, 5)
    assert main(words(training, target, "--keep", "2", "--output", "json")) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == [3]
    assert results(training) == ["iter_0000004", "iter_0000005", TRACKER]
    assert main(words(training, target)) == 0
    assert "every checkpoint that is there was converted before" in capsys.readouterr().err


def test_a_result_of_another_kind_stays(training: Path) -> None:
    saved(training, 3)
    assert main(words(training, "megatron")) == 0
    saved(training, 4)
    assert main(words(training, "torch_dist", "--keep", "1")) == 0
    assert results(training) == ["iter_0000003", "iter_0000004", TRACKER]


def test_the_save_that_is_going_on_is_waited_for(training: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(training)) == 64, "nothing tells what it will be"
    said = words(training, "torch_dist", "--source-format", "mindformers")
    assert main(said) == 66
    assert f"source folder {training} is not there" in capsys.readouterr().err
    saved(training, 3)
    part = next((training / "iteration_00000003").glob("*-opt-0000001-*"))
    part.rename(part.with_suffix(".tmp"))
    (training / TRACKER).unlink()
    assert main([*said, "--settle", "60", "--readiness-timeout", "0.3"]) == 75
    assert f"{part.stem}.tmp is being written" in capsys.readouterr().err
    part.with_suffix(".tmp").rename(part)
    assert main([*said, "--readiness-timeout", "30"]) == 0


@pytest.mark.parametrize(("name", "layers"), [("qwen3_pynative_1rank", 2), ("qwen3_tp2pp2", 4)])
def test_what_the_real_writers_saved_is_followed(training: Path, name: str, layers: int) -> None:
    shutil.copytree(golden_root() / "mindformers" / name / "checkpoint", training)
    sizes = {"hidden-size 8": "hidden-size 32", "ffn-hidden-size 12": "ffn-hidden-size 48", "channels 4": "channels 8"}
    launch = LAUNCH
    for own, theirs in sizes.items():
        launch = launch.replace(f"--{own}", f"--{theirs}").replace(f"kv-{own}", f"kv-{theirs}")
    (training.parent / "launch.sh").write_text(
        launch.replace("--vocab-size 16", "--vocab-size 64").replace("layers 2", f"layers {layers}")
    )
    assert main(words(training)) == 0
    iteration = int((training / TRACKER).read_text())
    assert results(training) == [f"iter_{iteration:07d}", TRACKER]


def test_only_results_with_a_folder_for_each_iteration_are_followed(training: Path) -> None:
    saved(training, 3)
    for target in ("safetensors", "torch"):
        assert main(words(training, target)) == 64
    assert results(training) == []
