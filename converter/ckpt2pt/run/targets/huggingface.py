"""A conversion into weights for Hugging Face transformers, from any format: a worker for each file, the last to finish adds the rest.

source --run.targets.source--> tensors, arguments --huggingface.families, config--> class, config.json
                               tensors --huggingface.write--> files --rank.RankTask--> model-00001-of-00004.safetensors ...
                               index, tokenizer, config.json --publish.merged-->
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt2pt.core.index import without_gaps
from ckpt2pt.core.params import EMBEDDING, expert_count
from ckpt2pt.core.slots import source_of
from ckpt2pt.core.tensor import Key
from ckpt2pt.errors import FormatError, MissingInputError, ref
from ckpt2pt.formats.folders import keep_apart
from ckpt2pt.formats.huggingface.config import Config, config_of
from ckpt2pt.formats.huggingface.families import Model, model_of
from ckpt2pt.formats.huggingface.write import (
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    as_json,
    index_of,
    shards_of,
    weights_of,
)
from ckpt2pt.formats.safetensors import ShardFile
from ckpt2pt.io.digests import sha256
from ckpt2pt.io.inputs import InputFile
from ckpt2pt.io.paths import is_file
from ckpt2pt.io.records import Json
from ckpt2pt.publish import HUGGINGFACE, Kind
from ckpt2pt.publish.kinds import TOKENIZER_FILES
from ckpt2pt.run.conversion import Conversion
from ckpt2pt.run.targets.request import HuggingFaceRequest
from ckpt2pt.run.targets.shards import Shards
from ckpt2pt.run.targets.shards import conversion_of as conversion_of_shards
from ckpt2pt.run.targets.source import located, read_source

if TYPE_CHECKING:
    from ckpt2pt.verification.huggingface import ExpectedShards
    from ckpt2pt.verification.report import Findings

_MAX_TOKENIZER_BYTES = 64 << 20


@dataclass(frozen=True)
class Found(Shards):
    """A source that was read as far as its headers, the class that it becomes, and its files; ``tokenizer`` holds those of one, by name."""

    request: HuggingFaceRequest
    model: Model
    config: Config
    tokenizer: Mapping[str, bytes]

    @property
    def kind(self) -> Kind:
        """How the folder of the result is laid out."""
        return HUGGINGFACE

    @property
    def identity_options(self) -> Json:
        """What decides what is written."""
        return {
            **self.request.identity_options(),
            "tensor": self.members,
            "format": "Safetensors",
            "virtualPipeline": 1,
            "class": self.model.family.architecture,
            "config": dict(self.config.fields),
            "shardBytes": self.request.shard_bytes,
            "tokenizer": {name: sha256(content).hexdigest() for name, content in self.tokenizer.items()},
        }

    @property
    def facts(self) -> Json:
        """Where what is no tensor is from."""
        found = {"class": f"{self.model.family.architecture}, by the arguments and the parameters"}
        listed = ", ".join(self.tokenizer) or "none is written"
        return {**self.source.facts, **found, "tokenizer": listed}

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know before the result is used."""
        return (*self.source.remarks, *self.config.remarks)

    def _files(self) -> Mapping[str, bytes]:
        """The files that make a model of the tensors, config.json last: no program takes a folder without it for one."""
        index = {INDEX: index_of(self.shards)} if len(self.shards) > 1 else {}
        ids = {name: self.config.fields[name] for name in ("bos_token_id", "eos_token_id") if self.config.fields[name]}
        return {
            **index,
            **self.tokenizer,
            GENERATION_CONFIG: as_json({"_from_model_config": True, **ids}),
            CONFIG: as_json(self.config.fields),
        }

    @cached_property
    def expected(self) -> ExpectedShards:
        """What has to be in the result."""
        from ckpt2pt.verification.huggingface import ExpectedShards  # noqa: PLC0415 - numpy, and only when asked for

        return ExpectedShards(
            index=self.index,
            family=self.model.family,
            heads=self.config.heads,
            vocabulary=self.config.vocabulary,
            dtype=self.source.dtype,
            zeros=frozenset(one.name for shard in self.shards for one in shard.weights if not one.parts),
        )

    def compare_file(
        self, shard: ShardFile, path: Path, findings: Findings, advance: Callable[[int], None]
    ) -> Mapping[str, int]:
        """Compare a file, final or not, with the source; the CRC-32 of it, by its name."""
        from ckpt2pt.verification.huggingface import compare_shard  # noqa: PLC0415 - numpy, and only when asked for

        names = frozenset(weight.name for weight in shard.weights)
        return compare_shard(self.expected, names, path, shard.name, findings, advance)


def find(request: HuggingFaceRequest) -> Found:
    """Read the headers of the source, and prove that a class holds all of it.  Nothing is written."""
    source = located(read_source(replace(request, full=False)), None)
    where, index = source.where, without_gaps(source.index)
    if not source.state.args:
        raise MissingInputError(
            "nothing states the arguments of the training, which config.json is made from",
            where=source.state.where,
            hint=f"give a pt_meta, or the launch script of the training, in {ref('metadata.path')}",
            field="metadata.path",
        )
    if source.dtype not in {"bfloat16", "float16", "float32"}:
        raise FormatError(f"weights are {source.dtype}", where=where, hint="give a checkpoint of an ordinary training")
    names = dict.fromkeys(key.name for key in index)
    model = model_of(source.state, names, layers=source.layers, experts=expert_count(names))
    rows = source_of(index, Key("param", EMBEDDING), where).fused[0]
    config = config_of(model, rows, source.dtype, request.choices)
    shards = shards_of(weights_of(index, model, config, source.dtype, where), request.shard_bytes)
    found = Found(request, source, index, shards, model, config, _tokenizer(request.tokenizer))
    read = {request.source: ref("source.path"), request.metadata: ref("metadata.path")}
    keep_apart(found.target, {**read, request.tokenizer: ref("target.huggingface.tokenizerPath")})
    return found


def _tokenizer(folder: Path | None) -> dict[str, bytes]:
    """The files of a tokenizer.  Raises :class:`MissingInputError` for a folder that holds none."""
    option, found = ref("target.huggingface.tokenizerPath"), dict[str, bytes]()
    for name in TOKENIZER_FILES if folder else ():
        assert folder is not None
        if is_file(folder / name, option):
            with InputFile(folder / name, option) as file:
                if file.size > _MAX_TOKENIZER_BYTES:
                    raise FormatError(
                        f"{file.size:,} bytes are too many for a file of a tokenizer",
                        where=folder / name,
                        hint=f"check {option}",
                        field="target.huggingface.tokenizerPath",
                    )
                found[name] = bytes(file.read(0, file.size))
    if folder and not found:
        raise MissingInputError(
            "no file of a tokenizer is there",
            where=folder,
            hint=f"give a folder with one of {', '.join(TOKENIZER_FILES[:5])}",
            field="target.huggingface.tokenizerPath",
        )
    return found


def conversion_of(request: HuggingFaceRequest, stages: Sequence[int]) -> Conversion:
    """What is converted: the given stages of the work."""
    found = find(request)
    return conversion_of_shards(found, stages, f" as {found.model.family.architecture}")
