"""What a conversion is asked for, as types: the ``spec`` of a CheckpointConversion, whoever has written it.  Pure.

    flags    -----.
    document ------> Spec --JSON--> worker        paths of this machine, and nothing of a cluster

Defaults and bounds are those of crds/checkpointconversions.yaml (the tests hold them together).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from ckpt2pt.core import names
from ckpt2pt.errors import UsageError
from ckpt2pt.kube.conversion.names import FILE_STEM, GROUP_VERSION, KIND_WORD, NAME

Json = dict[str, object]
Content = Literal["Param", "ExpAvg", "ExpAvgSq"]
Level = Literal["Digest", "None", "Full"]
LEVELS: Mapping[str, Level] = {"digest": "Digest", "none": "None", "full": "Full"}
"""How a result is verified, as flags and as documents say it."""
CONTENTS: Mapping[str, Content] = {"param": "Param", "exp_avg": "ExpAvg", "exp_avg_sq": "ExpAvgSq"}
"""The tensors of Megatron's optimizer, as it calls them and as documents do."""

SourceFormat = Literal[
    "Auto", "MindSpore", "Ckpt", "Safetensors", "Megatron", "MSAdapter", "MindFormers", "HuggingFace"
]
"""MindSpore is either of its two formats of files."""
TargetFormat = Literal["Megatron06", "Megatron", "TorchDist", "MindSpore", "Torch", "Safetensors", "MindFormers"]
Trainer = Literal["PyNative", "Graph"]
"""Torch is what the source is, as torch would have saved it."""
MEGATRON: frozenset[SourceFormat] = frozenset({"Megatron", "MSAdapter"})
"""Sources that have the layout of Megatron-LM, and say themselves what metadata would say."""

Names = Literal["Auto", "Mcore", "Legacy"]
TransformerImpl = Literal["Auto", "Local", "TransformerEngine"]
"""What a run of Megatron after 0.6 calls its parameters, and which layers it is built of; Auto is what metadata says."""
RELEASE = r"^0\.([7-9]|1[0-9])\Z"
"""Releases that load a result of the format Megatron."""

Word = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=0)]
Size = Annotated[int, Meta(ge=1)]
Name = Annotated[str, Meta(pattern=NAME[:-1] + r"\Z", max_length=253)]


class _Fields(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Fields named as in a document; a field that is not given is left out of the JSON."""


class Rules(_Fields, frozen=True, kw_only=True):
    """Names of one's own, as in a rule file."""

    layer_modules: dict[Word, Word] = {}
    modules: dict[Word, Word] = {}
    ignore: tuple[Word, ...] = ()
    pickle_globals: tuple[Word, ...] = ()


class Model(_Fields, frozen=True, kw_only=True):
    """Layers, no-op layers included; None is what the metadata states."""

    num_layers: Size | None = None
    noop_layers: tuple[Count, ...] | None = None
    layers_per_stage: tuple[Count, ...] | None = None
    rules: Rules = Rules()


class Parallelism(_Fields, frozen=True, kw_only=True):
    """Parallel sizes of a training; None is what the metadata states."""

    tensor: Size | None = None
    pipeline: Size | None = None
    virtual_pipeline: Size | None = None
    data: Size | None = None
    context: Size | None = None


class Degrees(_Fields, frozen=True, kw_only=True):
    """Parallel sizes of the result; None is that of the source."""

    tensor: Size | None = None
    pipeline: Size | None = None
    virtual_pipeline: Size | None = None
    expert: Size | None = None


class Place(_Fields, frozen=True, kw_only=True):
    """A folder: ``path`` is relative to the root of ``volume``, as a pod has it, or one of this machine without a volume."""

    volume: Json = {}
    path: str = ""

    def below(self, root: str) -> str:
        """The folder, where the volume is mounted at ``root``."""
        return below(root, self.path)


class MindFormers(_Fields, frozen=True, kw_only=True):
    """What nothing in a checkpoint of MindFormers tells; ``config`` is the YAML of its training, as paths of the source are."""

    config: Word | None = None
    use_interleaved_weight_layout_mlp: bool | None = None
    use_contiguous_weight_layout_attention: bool | None = None


class Source(Place, frozen=True, kw_only=True):
    """The checkpoint to convert: the output of a training of MindSpore or MindFormers, or a Megatron folder."""

    format: SourceFormat = "Auto"
    mindformers: MindFormers = MindFormers()
    opt_shard_info_path: str | None = None
    iteration: Size | None = None
    path: str = "."


class MindSporeFiles(_Fields, frozen=True, kw_only=True):
    """The files of a MindSpore result: one for each (tp, pp), or for every rank; ``contents`` are what is taken of the optimizer."""

    format: Literal["Ckpt", "Safetensors"] = "Ckpt"
    prefix: Annotated[str, Meta(pattern=FILE_STEM[:-1] + r"\Z", max_length=128)] = "network"
    all_replicas: bool = False
    contents: tuple[Content, ...] = ("Param", "ExpAvg", "ExpAvgSq")


class HuggingFaceFiles(_Fields, frozen=True, kw_only=True):
    """What the arguments of a training do not say, or not truly, of a result for Hugging Face transformers.

    ``tokenizer_path`` is a folder with the files of a tokenizer, on the volume of the source.
    """

    vocab_size: Size | None = None
    rope_scaling_factor: Annotated[float, Meta(ge=1)] | None = None
    tokenizer_path: Word | None = None


class Target(Place, frozen=True, kw_only=True):
    """The folder of the result."""

    format: TargetFormat = "Megatron06"
    names: Names = "Auto"
    megatron_version: Annotated[str, Meta(pattern=RELEASE)] | None = None
    transformer_impl: TransformerImpl = "Auto"
    overwrite: bool = False
    parallelism: Degrees = Degrees()
    mindspore: MindSporeFiles = MindSporeFiles()
    huggingface: HuggingFaceFiles = HuggingFaceFiles()
    trainer: Trainer = "PyNative"
    data_parallel: Size | None = None
    zero_consumed_samples: bool = False


class Workload(_Fields, frozen=True, kw_only=True):
    """An object of a cluster that comes to an end."""

    api_version: Annotated[str, Meta(pattern=GROUP_VERSION[:-1] + r"\Z", max_length=253)] | None = None
    kind: Annotated[str, Meta(pattern=KIND_WORD[:-1] + r"\Z", max_length=253)] | None = None
    name: Name | None = None


class Follow(_Fields, frozen=True, kw_only=True):
    """Each new checkpoint of a running training is converted; ``until`` names the training, ``keep`` 0 keeps every result."""

    until: Workload | None = None
    keep: Count = 0
    interval_seconds: Size = 30


class Readiness(_Fields, frozen=True, kw_only=True):
    """How long a worker waits for a checkpoint to become complete (0: not at all), and how long its files must have rested."""

    timeout_seconds: Annotated[float, Meta(ge=0)] = 300
    settle_seconds: Annotated[float, Meta(ge=0)] = 10


class Secret(_Fields, frozen=True, kw_only=True):
    """The name of one."""

    name: Name | None = None


class Pod(_Fields, frozen=True, kw_only=True):
    """What only matters to the pods of a cluster, of which names are looked at."""

    scheduler_name: Name | None = None
    priority_class_name: Name | None = None
    runtime_class_name: Name | None = None
    queue_name: Name | None = None
    image_pull_secrets: tuple[Secret, ...] = ()


class Processes(_Fields, frozen=True, kw_only=True):
    """How many stages and ranks are converted at a time, and for how long."""

    max_parallel_stages: Size | None = None
    processes: Size = 2
    rank_timeout_seconds: Annotated[float, Meta(gt=0)] | None = None
    co_schedule: bool = False


class Retries(_Fields, frozen=True, kw_only=True):
    """What happens to a stage that fails for a reason that may pass."""

    per_stage: Count = 3
    memory_growth_percent: Count = 50
    max_memory: str | int | float | None = None
    max_failed_stages: Count | None = None


class Spec(_Fields, frozen=True, kw_only=True):
    """A conversion.  Without ``numLayers`` and parallel sizes they are learnt from the metadata.

    ``metadata`` without a path is what a Megatron source says itself.  With it, an import proves that its param maps are those.
    """

    mode: Literal["Full", "ParamsOnly"] = "Full"
    dry_run: bool = False
    model: Model = Model()
    parallelism: Parallelism = Parallelism()
    source: Source = Source()
    metadata: Place = Place()
    target: Target = Target()
    verify: Level = "Digest"
    start_after: Workload | None = None
    follow: Follow | None = None
    workers: Processes = Processes()
    retries: Retries = Retries()
    readiness: Readiness = Readiness()
    pending_deadline_seconds: Size = 900
    active_deadline_seconds: Size | None = None
    ttl_seconds_after_finished: Count | None = None
    suspend: bool = False
    cancel: bool = False


def below(root: str, path: str) -> str:
    """A path relative to a volume, where that is mounted at ``root``."""
    return root if path == "." else f"{root}/{path}"


def rules_of(given: names.Rules) -> Rules:
    """Rules from a rule file."""
    return Rules(
        layer_modules=dict(given.layer_modules),
        modules=dict(given.modules),
        ignore=given.ignore,
        pickle_globals=given.pickle_globals,
    )


def to_json(spec: Spec) -> str:
    """The text that :func:`from_json` reads."""
    return msgspec.json.encode(spec).decode()


def from_json(text: str, where: str) -> Spec:
    """A spec with folders of this machine in the place of volumes."""
    try:
        return msgspec.json.decode(text, type=Spec, strict=True)
    except (msgspec.MsgspecError, RecursionError) as error:
        hint = "give the JSON of a spec, as a Job has it in its arguments"
        raise UsageError(f"not the spec of a conversion: {error}", where=where, hint=hint) from error
