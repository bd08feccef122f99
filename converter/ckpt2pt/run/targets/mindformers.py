"""A conversion into weights for MindFormers, Checkpoint 2.0, from any format of Megatron-LM: the road back.

source --run.targets.source--> tensors --mindformers.write--> iteration_00000500/checkpoint-model-0000000-0000004.safetensors ...
                                                              metadata.json, common.json --publish.merged-->  the tracker
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt2pt.core.index import Index, find, without_gaps
from ckpt2pt.core.params import EMBEDDING
from ckpt2pt.core.slots import source_of
from ckpt2pt.core.tensor import Key
from ckpt2pt.errors import FormatError, ref
from ckpt2pt.formats.folders import keep_apart
from ckpt2pt.formats.huggingface.views import Heads
from ckpt2pt.formats.mindformers.flags import CONTIGUOUS, INTERLEAVED, check_sizes, read_flags
from ckpt2pt.formats.mindformers.folder import COMMON, METADATA
from ckpt2pt.formats.mindformers.layouts import Layouts, groups_of, same_in_both
from ckpt2pt.formats.mindformers.write import Form, common_of, files_of, metadata_of, stored_weights
from ckpt2pt.formats.safetensors import ShardFile
from ckpt2pt.io.records import Json
from ckpt2pt.publish import MINDFORMERS, Kind
from ckpt2pt.run.conversion import Conversion
from ckpt2pt.run.targets.request import MindFormersRequest
from ckpt2pt.run.targets.shards import Shards
from ckpt2pt.run.targets.shards import conversion_of as conversion_of_shards
from ckpt2pt.run.targets.source import Source, located, read_source

if TYPE_CHECKING:
    from ckpt2pt.verification.huggingface import ExpectedFiles
    from ckpt2pt.verification.report import Findings

_RESULT = "the result"


@dataclass(frozen=True)
class Found(Shards):
    """A source that was read as far as its headers, how its parameters are fused, and the files that they become."""

    request: MindFormersRequest
    form: Form
    said: tuple[str, ...]

    @property
    def kind(self) -> Kind:
        """How the folder of the result is laid out."""
        return MINDFORMERS

    @property
    def identity_options(self) -> Json:
        """What decides what is written."""
        form = self.form
        return {
            **self.request.identity_options(),
            "tensor": self.members,
            "format": "MindFormers",
            "virtualPipeline": 1,
            "trainer": form.trainer,
            INTERLEAVED: form.interleaved,
            CONTIGUOUS: form.heads is not None,
            "shardBytes": self.request.shard_bytes,
        }

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know before the result is used."""
        embedding = find(self.index, Key("param", EMBEDDING))
        rows = () if embedding is None else (f"vocab_size of the model is {embedding.fused[0]}, padding included",)
        return (*self.source.remarks, *self.said, *rows)

    def _files(self) -> Mapping[str, bytes]:
        """What makes a checkpoint of the tensors; one file alone needs no metadata."""
        several = {METADATA: metadata_of(self.shards)} if len(self.shards) > 1 else {}
        return {**several, COMMON: common_of(self.source.state.iteration, self.source.state.args)}

    @cached_property
    def expected(self) -> ExpectedFiles:
        """What has to be in the result."""
        from ckpt2pt.verification.huggingface import ExpectedFiles  # noqa: PLC0415 - numpy, and only when asked for

        weights = [weight for file in self.shards for weight in file.weights]
        heads = self.form.heads
        layouts = Layouts(
            shapes={weight.name: weight.shape for weight in weights},
            interleaved=self.form.interleaved,
            contiguous=(heads.queries, heads.channels) if heads else None,
            heads=_whole(self.source.state.args.get("num_attention_heads")),
            gated=_gated(self.index),
            where=self.source.where,
        )
        return ExpectedFiles(
            index=self.index, layouts=layouts, dtypes={weight.name: weight.dtype for weight in weights}
        )

    def compare_file(
        self, shard: ShardFile, path: Path, findings: Findings, advance: Callable[[int], None]
    ) -> Mapping[str, int]:
        """Compare a file, final or not, with the source; the CRC-32 of it, by its name."""
        from ckpt2pt.verification.huggingface import compare_stored  # noqa: PLC0415 - numpy, and only when asked for

        names = frozenset(weight.name for weight in shard.weights)
        return compare_stored(self.expected, names, path, shard.name, findings, advance)


def find_weights(request: MindFormersRequest) -> Found:
    """Read the headers of the source, and prove that MindFormers has a place for all of it.  Nothing is written."""
    source = located(read_source(request), None)
    where, index = source.where, without_gaps(source.index)
    if source.dtype not in {"bfloat16", "float16", "float32"}:
        raise FormatError(f"weights are {source.dtype}", where=where, hint="give a checkpoint of an ordinary training")
    form, said = _form(request, source, index)
    found = Found(request, source, index, files_of(stored_weights(index, form, where), request.shard_bytes), form, said)
    keep_apart(found.target, {request.source: ref("source.path"), request.metadata: ref("metadata.path")})
    return found


def _form(request: MindFormersRequest, source: Source, index: Index) -> tuple[Form, tuple[str, ...]]:
    """How the training to come orders the rows of fused weights, and where that is from.

    Raises :class:`UsageError` for a static graph where nothing says it.
    """
    said, where, remarks = read_flags(request.mindformers), source.checkpoint.path, list[str]()
    pynative, interleaved, heads = request.trainer == "pynative", False, None
    names = [key.name for key in index if key.role == "param"]
    fc1 = next((name for name in names if name.endswith("linear_fc1.weight") and ".experts." not in name), None)
    if fc1 and _gated(index):
        interleaved, why = said.flag(INTERLEAVED, pynative=pynative, matter=fc1, where=where, of=_RESULT)
        remarks.append(f"{INTERLEAVED} is {interleaved}: {why}")
    sizes = _sizes(source)
    qkv = groups_of(
        {key.name: tensor.fused for key, tensor in index.items() if key.role == "param"}, {**sizes, **said.sizes}
    )
    if qkv and not same_in_both(source_of(index, Key("param", qkv[0]), source.where).fused, qkv[1]):
        contiguous, why = said.flag(CONTIGUOUS, pynative=pynative, matter=qkv[0], where=where, of=_RESULT)
        remarks.append(f"{CONTIGUOUS} is {contiguous}: {why}")
        if contiguous:
            queries, channels = qkv[1] or said.missing_heads(qkv[0], where)
            rows = source_of(index, Key("param", qkv[0]), source.where).fused[0]
            heads = Heads(groups=rows // ((queries + 2) * channels), queries=queries, channels=channels)
    check_sizes(said, sizes)
    return Form(trainer=request.trainer, interleaved=interleaved, heads=heads, dtype=source.dtype), tuple(remarks)


def _sizes(source: Source) -> dict[str, int]:
    names = ("num_attention_heads", "num_query_groups", "kv_channels", "hidden_size", "ffn_hidden_size")
    found = {name: _whole(source.state.args.get(name)) for name in names}
    return {"num_layers": source.layers} | {name: value for name, value in found.items() if value}


def _whole(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None


def _gated(index: Index) -> bool:
    return any(
        len(tensor.shape) > len(tensor.fused) for key, tensor in index.items() if key.name.endswith("linear_fc1.weight")
    )


def conversion_of(request: MindFormersRequest, stages: Sequence[int]) -> Conversion:
    """What is converted: the given stages of the work."""
    return conversion_of_shards(
        find_weights(request),
        stages,
        " in the trainer of " + ("PyNative mode" if request.trainer == "pynative" else "the static graph"),
    )
