"""What conversions into weights in ``.safetensors`` share; each of them is tested in test_huggingface.py and test_mindformers.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.run.targets.request import MindFormersRequest
from hfsets import save_megatron

REQUEST = "ckpt2pt.kube.tensors.MindFormersRequest"


def test_files_that_another_version_divided_otherwise_are_not_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = save_megatron("moe", tmp_path / "megatron"), tmp_path / "out"
    words = ["convert", "--source", str(source), "--target", str(out), "--progress", "none"]
    monkeypatch.setattr(REQUEST, partial(MindFormersRequest, shard_bytes=20_000))
    assert main([*words, "--target-format", "mindformers"]) == 0
    [folder] = out.glob("iteration_*")
    for name in ("latest_checkpointed_iteration.txt", f"{folder.name}/.ckpt2pt/report.json"):
        (out / name).unlink()
    monkeypatch.setattr("ckpt2pt.run.targets.shards.digest_of", lambda _: "another")
    assert main([*words, "--target-format", "mindformers"]) == 75
    assert "another version of ckpt2pt" in capsys.readouterr().err
