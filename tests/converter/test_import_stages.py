"""Conversions to MindSpore as a document, a worker of a stage and a waiting one have them."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from ckpt2pt.cli.commands import main
from ckpt2pt.core.progress import SILENCE
from ckpt2pt.discover import request as asked
from ckpt2pt.errors import FormatError, MissingInputError, TimedOutError, UsageError
from ckpt2pt.kube.conversion.schema import MindSporeFiles, Model, Parallelism, Place, Readiness, Source, Spec, Target
from ckpt2pt.kube.conversion.spec import parse, worker_spec
from ckpt2pt.kube.resolve import resolve
from ckpt2pt.kube.worker.account import Account
from ckpt2pt.kube.worker.waiting import request_when_complete
from ckpt2pt.run.conversion import run
from conversions import request_for
from documents import ABSENT, changed, claim, write
from goldens import golden_sets

SET = next(folder for folder in golden_sets() if folder.name == "b_st_tp2pp2_safetensors")


def spec_of(target: Path, **more: Any) -> Spec:
    files = MindSporeFiles(format="Safetensors")
    return Spec(
        source=Source(path=str(SET / "A")), target=Target(path=str(target), format="MindSpore", mindspore=files), **more
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("rank_*/*")}


def test_the_spec_says_which_direction_it_is(tmp_path: Path) -> None:
    request = resolve(spec_of(tmp_path))
    assert request.files == asked.MindSporeFiles(format="safetensors")
    assert (request.topology.pipeline, request.metadata, request.source_format) == (2, None, "megatron")
    assert request_for(SET, tmp_path).files is None


def test_stages_of_an_import_one_after_the_other(tmp_path: Path) -> None:
    """As workers of a Job do them: the report comes with the last one, and what is there is kept."""
    request = resolve(spec_of(tmp_path / "ms", parallelism=Parallelism(pipeline=2)), in_process=True)
    first = run(request, [1], SILENCE)
    assert (first.published, first.converted) == (False, ((0, 1), (1, 1)))
    assert sorted(files_of(tmp_path / "ms")) == ["rank_2/network.safetensors", "rank_3/network.safetensors"]
    assert run(request, [0], SILENCE).published
    assert files_of(tmp_path / "ms") == files_of(SET / "ms")
    again = run(request, [0, 1], SILENCE)
    assert (again.converted, len(again.kept), again.published) == ((), 4, True)


def test_the_worker_of_a_document_gets_the_import(tmp_path: Path) -> None:
    document = changed(
        ("spec.model", {"numLayers": 4}),
        ("spec.parallelism", {"tensor": 2, "pipeline": 2}),
        ("spec.metadata", ABSENT),
        ("spec.target", {"path": "back", "format": "MindSpore", "mindspore": {"prefix": "model", "allReplicas": True}}),
    )
    found = worker_spec(parse(document), {"source": "/in", "target": "/out"})
    assert found.metadata == Place()
    assert found.target.mindspore == MindSporeFiles(prefix="model", all_replicas=True)
    request = resolve(replace(found, source=replace(found.source, path=str(SET / "A"))))
    assert request.files == asked.MindSporeFiles(prefix="model", copies=True)
    assert (str(request.target), request.topology.noop) == ("/out/back", frozenset())


@pytest.mark.parametrize("dry", [False, True])
def test_a_document_is_carried_out_on_this_machine(
    dry: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = changed(
        ("spec.dryRun", dry),
        ("spec.model", {"numLayers": 4}),
        ("spec.parallelism", {"tensor": 2, "pipeline": 2}),
        ("spec.source.path", "A"),
        ("spec.metadata", ABSENT),
        (
            "spec.target",
            {"volume": claim("out"), "path": "ms", "format": "MindSpore", "mindspore": {"format": "Safetensors"}},
        ),
    )
    words = ["--volume", f"training={SET}", "--volume", f"out={tmp_path}", "--output", "json"]
    assert main(["run", "-f", str(write(tmp_path / "import.yaml", document)), *words]) == 0
    status = json.loads(capsys.readouterr().out)["status"]
    assert (status["phase"], status["stageSummary"]) == ("Planned" if dry else "Succeeded", "1/1" if dry else "2/2")
    assert status["outputPath"] == "ms"
    if dry:
        assert not (tmp_path / "ms").exists()
    else:
        assert files_of(tmp_path / "ms") == files_of(SET / "ms")
        assert (tmp_path / status["reportPath"]).is_file()


def test_no_training_is_followed_to_mindspore(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--source", str(SET / "A"), "--target", str(tmp_path), "--target-format", "mindspore", "--once"]
    assert main(["watch", *words]) == 64
    assert "--target-format is mindspore, and a training is followed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ([("spec.target.format", "MindSpore"), ("spec.follow", {})], "spec.follow"),
        ([("spec.target.mindspore", {"prefix": "x"})], "spec.target.mindspore"),
        ([("spec.target.format", "MindSpore"), ("spec.target.mindspore", {"prefix": "a/b"})], "prefix"),
        ([("spec.metadata", ABSENT)], "spec.metadata"),
    ],
)
def test_what_a_document_cannot_ask_for(changes: list[tuple[str, Any]], field: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse(changed(*changes))
    assert field in str(refused.value)


@pytest.mark.parametrize("prefix", ["", ".x", "a/b", "rank_0", "network_breakpoint"])
def test_names_of_files_that_no_conversion_would_read(prefix: str) -> None:
    files = MindSporeFiles(prefix=prefix)
    with pytest.raises(UsageError) as refused:
        resolve(Spec(target=Target(format="MindSpore", mindspore=files)))
    assert refused.value.field == "target.mindspore.prefix"


def test_the_iteration_that_is_asked_for(tmp_path: Path) -> None:
    source = tmp_path / "A"
    shutil.copytree(SET / "A" / "iter_0000002", source / "iter_0000002")
    shutil.copytree(SET / "A" / "iter_0000002", source / "iter_0000004")
    (source / "latest_checkpointed_iteration.txt").write_text("4")
    spec = Spec(
        source=Source(path=str(source), iteration=2), target=Target(path=str(tmp_path / "ms"), format="MindSpore")
    )
    done = run(resolve(spec, in_process=True), [0, 1], SILENCE)
    assert str(source / "iter_0000002") in str((done.target.rank_manifest(0, 0) or {})["source"])
    other = Spec(source=Source(path=str(source), iteration=3), target=spec.target)
    with pytest.raises(MissingInputError, match="there is no iteration 3"):
        run(resolve(other), [0, 1], SILENCE)


# ------------------------------------------------------------------------------------------------------------- waiting


def test_a_checkpoint_that_is_being_copied_is_waited_for(tmp_path: Path) -> None:
    source, folder = tmp_path / "A", SET / "A" / "iter_0000002"

    def copy() -> None:
        for rank in sorted(folder.iterdir()):
            time.sleep(0.2)
            shutil.copytree(rank, source / folder.name / rank.name)

    spec = Spec(
        model=Model(num_layers=4),
        parallelism=Parallelism(tensor=2, pipeline=2),
        source=Source(path=str(source)),
        target=Target(path=str(tmp_path / "ms"), format="MindSpore"),
    )
    spec = replace(spec, readiness=Readiness(timeout_seconds=60, settle_seconds=0.5))
    copying = threading.Thread(target=copy)
    copying.start()
    request = request_when_complete(spec, Account(), in_process=True)
    copying.join()
    assert run(request, [0, 1], SILENCE).published


@pytest.mark.parametrize(
    ("damage", "error", "what"),
    [("gone", MissingInputError, "not there"), ("short", FormatError, "\\S"), ("fresh", TimedOutError, "written to")],
)
def test_what_a_wait_in_vain_says(damage: str, error: type[Exception], what: str, tmp_path: Path) -> None:
    source = tmp_path / "A"
    if damage != "gone":
        shutil.copytree(SET / "A", source)
    if damage == "short":
        os.truncate(next(source.glob("iter_*/mp_rank_01_001/model_optim_rng.pt")), 1000)
    if damage == "fresh":
        next(source.glob("iter_*/mp_rank_01_001/model_optim_rng.pt")).touch()
    spec = Spec(
        source=Source(path=str(source)),
        target=Target(path=str(tmp_path / "ms"), format="MindSpore"),
        readiness=Readiness(timeout_seconds=0.2, settle_seconds=60 if damage == "fresh" else 0),
    )
    with pytest.raises(error, match=what):
        request_when_complete(spec, Account())
    assert not (tmp_path / "ms").exists()
