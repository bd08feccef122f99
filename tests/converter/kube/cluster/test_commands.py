"""From options to requests: filled templates, ranks waited for, exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apiserver import Answer, Server
from ckpt2pt.cli.commands import main
from ckpt2pt.cli.programs.kubectl import kubectl
from ckpt2pt.kube.cluster import commands
from ckpt2pt.kube.cluster.api import Connection
from ckpt2pt.kube.conversion.template import name_for
from ckptfiles import Tensor, ckpt
from documents import changed, write
from mindformers_made import Model, save_sharded

ANSWERS: dict[str, Answer] = {"POST": (201, {}), "GET": (200, {"status": {"phase": "Succeeded"}}), "PATCH": (200, {})}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    server = Server(lambda method, *_: ANSWERS[method])

    def connect(*_: object) -> Connection:
        return Connection(server=server.url, context=None, token=lambda: None, namespace="ml", direct=True)

    monkeypatch.setattr(commands, "connect", connect)
    with server.running():
        yield server


@pytest.fixture
def submit(server: Any, tmp_path: Path) -> Callable[..., int]:
    path = write(
        tmp_path / "a.yaml", changed(("spec.source.path", "ms-${step}"), ("spec.parallelism", {"pipeline": 2}))
    )
    return lambda *words: main(["submit", "-f", str(path), *words])


def save(root: Path, rank: int, step: int) -> None:
    path = root / f"rank_{rank}" / f"network_rank_{rank}-0_{step}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ckpt([Tensor("a", "float32", (1,), b"\0\0\0\0")]))
    path.chmod(0o400)


def test_a_template_is_filled_and_sent_under_its_own_name(
    submit: Callable[..., int], server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--epoch", "0", "--step", "500", "--set", "spec.dryRun=true", "-n", "own", "--output", "name")
    assert submit(*words) == 0
    [(_, path, body, _)] = server.asked
    assert "/namespaces/own/" in path
    assert (body["spec"]["source"]["path"], body["spec"]["dryRun"]) == ("ms-500", True)
    assert capsys.readouterr().out.strip() == body["metadata"]["name"] == name_for("demo", 0, 500)


def test_what_would_be_sent_can_be_seen(
    submit: Callable[..., int], server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit("--step", "5", "--name", "mine", "--print") == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["name"] == "mine"
    assert server.asked == []


@pytest.mark.parametrize("field", ["spec.parallelism.pipelines=2", "spec.verify=Fully", "spec.colour=red"])
def test_what_would_be_sent_is_checked_field_by_field(
    field: str, submit: Callable[..., int], server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit("--step", "5", "--name", "mine", "--print", "--set", field) == 64
    reported = capsys.readouterr()
    assert (reported.out, server.asked) == ("", [])
    assert field.partition("=")[0].rpartition(".")[2] in reported.err


def test_a_document_that_is_wrong_is_refused_here(submit: Callable[..., int], server: Any) -> None:
    assert submit("--step", "5", "--set", "spec.parallelism.pipeline=3") == 64
    assert submit() == 64, "nobody says which step"
    assert server.asked == []


def test_epoch_and_step_come_from_the_files_once_every_rank_has_saved(
    submit: Callable[..., int], server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "ms", 0, 500)
    assert submit("--ready-in", str(tmp_path / "ms"), "--readiness-timeout", "0") == 66
    assert "rank_1 is missing" in capsys.readouterr().err
    save(tmp_path / "ms", 1, 500)
    assert submit("--ready-in", str(tmp_path / "ms")) == 0
    [(_, _, body, _)] = server.asked
    assert body["metadata"]["name"] == name_for("demo", 0, 500)
    assert submit("--ready-in", str(tmp_path / "ms"), "--step", "600", "--readiness-timeout", "0") == 65


def test_an_iteration_of_mindformers_is_waited_for(
    submit: Callable[..., int], server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "checkpoint"
    folder = save_sharded(root, Model().arrays, {}, ranks=2, iteration=500)
    (root / "latest_checkpointed_iteration.txt").unlink()
    (folder / "metadata.json").rename(tmp_path / "late")
    words = ["--set", "spec.source.format=MindFormers", "--set", "spec.target.format=TorchDist"]
    words += ["--set", "spec.readiness.settleSeconds=0", "--set", "spec.source.iteration=${iteration}"]
    words += ["--ready-in", str(root), "--readiness-timeout", "0"]
    assert submit(*words) == 66
    assert "checkpoint 500 is incomplete: metadata.json is not there" in capsys.readouterr().err
    assert server.asked == []
    (tmp_path / "late").rename(folder / "metadata.json")
    assert submit(*words, "--step", "500") == 0
    assert submit(*words) == 0
    for _, _, body, _ in server.asked:
        assert body["metadata"]["name"] == name_for("demo", 0, 500)
        assert body["spec"]["source"]["iteration"] == 500


def test_a_wait_ends_with_the_conversions_code(
    submit: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit("--step", "5", "--wait") == 0
    assert "Succeeded" in capsys.readouterr().out
    bad = {"phase": "Failed", "stageStatuses": [{"stage": 1, "state": "Failed", "reason": "DigestMismatch"}]}
    monkeypatch.setitem(ANSWERS, "GET", (200, {"status": bad}))
    assert submit("--step", "5", "--wait", "--output", "json") == 76
    assert json.loads(capsys.readouterr().out)["status"] == bad


def test_a_json_template_needs_no_yaml(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    path = tmp_path / "a.json"
    path.write_text(json.dumps(changed()))
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.delitem(sys.modules, "ckpt2pt.kube.conversion.document", raising=False)
    assert main(["submit", "-f", str(path)]) == 0
    for text in ("[]", "{"):
        path.write_text(text)
        assert main(["submit", "-f", str(path)]) == 64


def test_the_plugin(server: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert kubectl(["watch", "demo"]) == 0
    assert kubectl(["retry", "demo"]) == 64
    monkeypatch.setitem(ANSWERS, "GET", (200, {"status": {"phase": "Failed"}}))
    assert kubectl(["retry", "demo"]) == 0
    monkeypatch.setitem(ANSWERS, "GET", (200, {"status": {"phase": "Running"}}))
    assert kubectl(["cancel", "demo", "-n", "own"]) == 0
    assert [asked[0] for asked in server.asked] == ["GET", "GET", "GET", "PATCH", "GET", "PATCH"]
    assert "/namespaces/own/checkpointconversions/demo" in server.asked[-1][1]
    assert "tried again" in capsys.readouterr().out
    monkeypatch.setitem(ANSWERS, "GET", (200, {"items": []}))
    assert kubectl(["logs", "demo", "0"]) == 66
