"""A conversion of any kind by one spec: the format of the target decides, and nobody else has to know."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from ckpt2pt.core.progress import SILENCE
from ckpt2pt.errors import UsageError
from ckpt2pt.kube.conversion import schema
from ckpt2pt.kube.resolve import resolve
from ckpt2pt.run.dispatch import AnyRequest, pipeline_of, run, verify
from goldens import golden_root
from mcoresets import odd_set, script_of


def spec_of(kind: schema.TargetFormat, tmp_path: Path) -> schema.Spec:
    if kind == "Megatron":
        source, metadata, sizes = odd_set() / "ms", script_of(odd_set(), tmp_path), schema.Parallelism()
    else:
        folder = golden_root() / "megatron06" / "b_tp2pp2"
        source, metadata, sizes = folder / "ms", folder / "pt_meta", schema.Parallelism(tensor=2, pipeline=2)
    return schema.Spec(
        parallelism=sizes,
        source=schema.Source(path=str(source), format="MindSpore"),
        metadata=schema.Place(path=str(metadata)),
        target=schema.Target(path=str(tmp_path / "out"), format=kind),
    )


@pytest.mark.parametrize(("kind", "pipeline"), [("Megatron06", 2), ("Megatron", 1)])
def test_result_is_written_and_verified(kind: schema.TargetFormat, pipeline: int, tmp_path: Path) -> None:
    request: AnyRequest = resolve(spec_of(kind, tmp_path), in_process=True)
    stages = range(pipeline_of(request))
    assert len(stages) == pipeline
    assert run(request, stages, SILENCE).published
    assert verify(request, stages, level="full", reporter=SILENCE).differences == ()


def test_torch_reads_results_of_0_6_alone(tmp_path: Path) -> None:
    request = resolve(spec_of("Megatron", tmp_path), in_process=True)
    with pytest.raises(UsageError, match=r"compares results of Megatron-LM 0\.6 alone"):
        verify(request, [0], level="full", reader="torch", reporter=SILENCE)


def test_number_of_stages_is_learnt_from_the_source_where_nobody_says_it(tmp_path: Path) -> None:
    request = resolve(spec_of("Megatron", tmp_path))
    assert pipeline_of(request) == 1
    asked = replace(spec_of("Megatron", tmp_path), parallelism=schema.Parallelism(pipeline=1))
    assert pipeline_of(resolve(asked)) == 1
