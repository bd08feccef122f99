"""Every option against every format of source and target: used, or refused by its name, in flags, documents and the library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from msgspec import convert, to_builtins

import ckpt2pt
from ckpt2pt.cli.commands import main
from ckpt2pt.errors import FIELDS, Ckpt2ptError, UsageError
from ckpt2pt.kube.conversion import schema
from ckpt2pt.kube.conversion.spec import parse
from ckpt2pt.kube.conversion.spelling import ARGUMENTS, of_command
from ckpt2pt.kube.conversion.usable import TARGETS, USES, Framework, unused
from ckpt2pt.kube.resolve import resolve_any
from documents import changed

FORMATS = {
    "Megatron06": "megatron06",
    "Megatron": "megatron",
    "TorchDist": "torch_dist",
    "MindSpore": "mindspore",
    "Torch": "torch",
    "Safetensors": "safetensors",
    "MindFormers": "mindformers",
}
OF_ALL = {
    # decide something of every result, or have to agree with what is found
    "model.numLayers", "model.noopLayers", "model.rules", "parallelism.tensor", "parallelism.pipeline",
    "source.path", "source.format", "source.iteration", "metadata.path", "target.path", "target.format",
    "target.overwrite", "verify",
}  # fmt: skip
OF_A_RUN = ("dryRun", "startAfter", "follow", "workers", "readiness", "retries", "suspend", "cancel")
GIVEN: Mapping[str, tuple[object, str]] = {
    "mode": ("ParamsOnly", ""),
    "target.parallelism.tensor": (2, "2"),
    "target.parallelism.pipeline": (2, "2"),
    "model.layersPerStage": ([1, 1], "1,1"),
    "parallelism.virtualPipeline": (2, "2"),
    "parallelism.data": (2, "2"),
    "parallelism.context": (2, "2"),
    "source.optShardInfoPath": ("info", "info"),
    "source.mindformers.config": ("train.yaml", "train.yaml"),
    "source.mindformers.useInterleavedWeightLayoutMlp": (True, "true"),
    "source.mindformers.useContiguousWeightLayoutAttention": (False, "false"),
    "target.trainer": ("Graph", "graph"),
    "target.names": ("Legacy", "legacy"),
    "target.transformerImpl": ("Local", "local"),
    "target.megatronVersion": ("0.12", "0.12"),
    "target.parallelism.virtualPipeline": (2, "2"),
    "target.parallelism.expert": (2, "2"),
    "target.dataParallel": (2, "2"),
    "target.zeroConsumedSamples": (True, ""),
    "target.mindspore.format": ("Safetensors", "safetensors"),
    "target.mindspore.prefix": ("other", "other"),
    "target.mindspore.allReplicas": (True, ""),
    "target.mindspore.contents": (["Param"], "param"),
    "target.huggingface.vocabSize": (101, "101"),
    "target.huggingface.ropeScalingFactor": (8.0, "8"),
    "target.huggingface.tokenizerPath": ("tokenizer", "tokenizer"),
}
REFUSED = [
    (target, field)
    for target in FORMATS
    for field, use in USES.items()
    if not any(target in targets for targets in use.by_source.values())
]


def of(target: str, field: str, source: str = "Auto") -> schema.Spec:
    document: dict[str, Any] = {"source": {"format": source}, "target": {"format": target}}
    *parents, last = field.split(".")
    place = document
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = GIVEN[field][0]
    return convert(document, schema.Spec)


def test_every_option_is_in_the_table_or_counts_for_every_result() -> None:
    leaves = {one for one in FIELDS if not any(other.startswith(f"{one}.") for other in FIELDS)}
    assert {one for one in leaves if not one.startswith(OF_A_RUN)} == OF_ALL | USES.keys()
    assert GIVEN.keys() == USES.keys()
    assert TARGETS.keys() == FORMATS.keys() == set(get_args(schema.TargetFormat))


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("field", USES)
def test_a_field_is_used_or_named(field: str, target: str) -> None:
    use = USES[field]
    sources: tuple[Framework, ...] = ("MindSpore", "Megatron", "MindFormers", "HuggingFace")
    for source in sources:
        targets = use.by_source.get(source, frozenset())
        found = [name for name, _ in unused(of(target, field), source)]
        assert found == ([] if target in targets else [field])
    nothing = convert({"target": {"format": target}}, schema.Spec)
    assert not [name for source in (None, *sources) for name in unused(nothing, source)]


@pytest.mark.parametrize(("target", "field"), REFUSED)
def test_a_flag_that_decides_nothing_is_refused_by_its_name(
    target: str, field: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flag = of_command("convert")(field)
    assert flag
    words = ["--source", "ms", "--target", "out", "--param-map-path", "pt_meta", "--target-format", FORMATS[target]]
    for command in ("convert", "plan", "verify"):
        given = [word for word in (flag, GIVEN[field][1]) if word]
        assert main([command, *(str(tmp_path / one) if one in {"ms", "out"} else one for one in words), *given]) == 64
        assert f"{flag} is given, and decides nothing of a result of the format " in capfd.readouterr().err


@pytest.mark.parametrize(("target", "field"), REFUSED)
def test_a_field_of_a_document_that_decides_nothing_is_refused_by_its_name(target: str, field: str) -> None:
    document = changed(("spec.target.format", target), (f"spec.{field}", GIVEN[field][0]))
    with pytest.raises(UsageError, match=f"spec.{field}"):
        parse(document)


@pytest.mark.parametrize(
    ("target", "field"), [(target, field) for target, field in REFUSED if field in ARGUMENTS["convert"]]
)
def test_an_argument_that_decides_nothing_is_refused_by_its_name(target: str, field: str, tmp_path: Path) -> None:
    name = ARGUMENTS["convert"][field]
    value = GIVEN[field][1] if field.startswith(("target.names", "target.tr", "target.meg")) else GIVEN[field][0]
    asked: dict[str, Any] = {name: value, "target_format": FORMATS[target]}
    with pytest.raises(UsageError, match=f"^{name} is given, and decides nothing"):
        ckpt2pt.convert(source=tmp_path / "ms", metadata=tmp_path, target=tmp_path / "out", **asked)


@pytest.mark.parametrize("source_format", ["Ckpt", "Megatron"])
@pytest.mark.parametrize("field", USES)
def test_what_a_source_leaves_no_use_for_is_refused_before_it_is_read(
    field: str, source_format: str, tmp_path: Path
) -> None:
    framework: Framework = "Megatron" if source_format == "Megatron" else "MindSpore"
    for target in FORMATS:
        spec = of(target, field, source_format)
        document = to_builtins(spec)
        document["source"]["path"], document["metadata"] = str(tmp_path / "none"), {"path": str(tmp_path / "none")}
        document["target"]["path"] = str(tmp_path / "out")
        named, error = [name for name, _ in unused(spec, framework)], None
        try:
            resolve_any(convert(document, schema.Spec))
        except Ckpt2ptError as caught:  # what is not there
            error = caught
        if framework == target == "MindSpore" and field in {"model.layersPerStage", "parallelism.virtualPipeline"}:
            named = [field]  # the layout stays
        assert bool(named) == (error is not None and error.exit_code == 64), error
        assert not named or (error and error.field == field)
