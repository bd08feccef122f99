"""A conversion into weights for Hugging Face transformers, from any format: a worker for each file, the last to finish adds the rest.

source --run.targets.source--> tensors, arguments --huggingface.families, config--> class, config.json
                               tensors --huggingface.write--> files --rank.RankTask--> model-00001-of-00004.safetensors ...
                               index, tokenizer, config.json --publish.merged-->
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt2pt.core.fill import moves_of, replicas_of
from ckpt2pt.core.index import Index, without_gaps
from ckpt2pt.core.params import EMBEDDING, expert_count
from ckpt2pt.core.progress import Advance
from ckpt2pt.core.slots import source_of
from ckpt2pt.core.tensor import Key
from ckpt2pt.core.topology import Rank
from ckpt2pt.errors import FormatError, MissingInputError, TryAgainError, ref
from ckpt2pt.formats.folders import keep_apart
from ckpt2pt.formats.huggingface.config import Config, config_of
from ckpt2pt.formats.huggingface.families import Model, model_of
from ckpt2pt.formats.huggingface.write import (
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    ShardFile,
    as_json,
    index_of,
    shards_of,
    weights_of,
)
from ckpt2pt.formats.megatron.loads import Releases
from ckpt2pt.io.digests import sha256
from ckpt2pt.io.inputs import InputFile
from ckpt2pt.io.paths import is_file, status
from ckpt2pt.io.records import Json
from ckpt2pt.publish import HUGGINGFACE, Target
from ckpt2pt.publish.kinds import TOKENIZER_FILES
from ckpt2pt.publish.merged import publish_merged
from ckpt2pt.run.conversion import Conversion
from ckpt2pt.run.rank import RankTask
from ckpt2pt.run.targets.request import HuggingFaceRequest
from ckpt2pt.run.targets.source import Reading, Source, located, paths_of, read_source, views_of

if TYPE_CHECKING:
    from ckpt2pt.verification.huggingface import ExpectedShards
    from ckpt2pt.verification.report import Report

_MAX_TOKENIZER_BYTES = 64 << 20


@dataclass(frozen=True)
class Found:
    """A source that was read as far as its headers, the class that it becomes, and its files; ``tokenizer`` holds those of one, by name."""

    request: HuggingFaceRequest
    source: Source
    index: Index
    model: Model
    config: Config
    shards: tuple[ShardFile, ...]
    tokenizer: Mapping[str, bytes]

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
    def releases(self) -> Releases:
        """No release of Megatron-LM loads the result."""
        return {}

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

    @property
    def pipeline(self) -> int:
        """Number of stages, which divide the files."""
        return self.request.topology.pipeline

    @property
    def members(self) -> int:
        """The most files of a stage: each is a rank's."""
        return -(-len(self.shards) // self.pipeline)

    def shard(self, rank: Rank) -> ShardFile | None:
        """The file of a rank; the last ones may have none."""
        number = rank[1] * self.members + rank[0]
        return self.shards[number] if number < len(self.shards) else None

    @cached_property
    def target(self) -> Target:
        """The folder that the result goes into."""
        identity = self.source.identity(self.identity_options)
        merged = tuple(name for name in HUGGINGFACE.merged if name in self.files)
        return Target(
            root=self.request.target,
            iteration=self.source.state.iteration,
            identity=identity,
            ranks={(tp, pp): identity for pp in range(self.pipeline) for tp in range(self.members)},
            stages=self.pipeline,
            tensor=self.members,
            full=False,
            kind=replace(HUGGINGFACE, merged=merged),
        )

    @cached_property
    def files(self) -> Mapping[str, bytes]:
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
            zeros=frozenset(one.name for shard in self.shards for one in shard.weights if one.tensor is None),
        )

    def listed(self, rank: Rank) -> list[str]:
        """The file of a rank, below the folder of the result."""
        shard = self.shard(rank)
        return [shard.name] if shard else []

    def compare(self, rank: Rank, advance: Advance) -> tuple[Report, Mapping[str, int]]:
        """Compare the file of a rank, which is there, with the source; the CRC-32 of it."""
        from ckpt2pt.verification.huggingface import compare_shard  # noqa: PLC0415 - numpy, and only when asked for
        from ckpt2pt.verification.report import Findings  # noqa: PLC0415 - the same

        shard, folder = self.shard(rank), self.target.folder
        findings, crcs = Findings(), dict[str, int]()
        seen = status(folder / shard.name) if shard else None
        if shard and seen and seen.st_size == shard.lay_out().nbytes:  # else the manifest tells that it was cut
            names = frozenset(weight.name for weight in shard.weights)
            crcs.update(compare_shard(self.expected, names, folder / shard.name, shard.name, findings, advance))
        return findings.report(folder, 0), crcs


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
    found = Found(request, source, index, model, config, shards, _tokenizer(request.tokenizer))
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


def _prove(
    found: Found, shard: ShardFile | None, partials: Mapping[str, Path], heed: Callable[[], None]
) -> Mapping[str, int]:
    from ckpt2pt.verification.huggingface import prove_shard  # noqa: PLC0415 - numpy, and only when asked for

    if shard is None:
        return {}
    names = frozenset(weight.name for weight in shard.weights)
    return prove_shard(found.expected, names, partials[shard.name], shard.name, heed)


def _plan(found: Found, rank: Rank, target: Target) -> RankTask:
    request, shard, where = found.request, found.shard(rank), found.source.where
    tensors = list(shard.index().values()) if shard else []
    moves = moves_of(shard.index(), [shard.slots()], where) if shard else ()
    # What ranks of the source hold twice is compared once, by the first worker.
    copied = [] if any(rank) else [pair for one in found.source.index.values() for pair in replicas_of(one)]
    return RankTask(
        rank=rank,
        target=target,
        reading=Reading(found.source, paths_of(views_of(tensors)), partial(_prove, found, shard)),
        verify=request.verify,
        repair=request.overwrite,
        files=[shard] if shard else [],
        moves=lambda: moves,
        copies=copied,
        source_bytes=sum(move.nbytes for move in moves),
        facts={"source": where, "shard": digest_of(shard)},
    )


def digest_of(shard: ShardFile | None) -> str:
    """SHA-256 of what a file holds, and where."""
    held = [] if shard is None else [(one.name, one.dtype, one.shape) for one in shard.weights]
    return sha256(repr((shard and shard.name, held)).encode()).hexdigest()


def _merge(found: Found, target: Target) -> Mapping[str, bytes]:
    """The files that make a model of those of all workers, which are there as this version of ckpt2pt would write them."""
    for rank in target.ranks:
        if (target.manifest_of(rank) or {}).get("shard") != digest_of(found.shard(rank)):
            raise TryAgainError(
                "a file was written by another version of ckpt2pt, which divides the tensors otherwise",
                where=target.folder,
                hint=f"run all stages with one version, with {ref('target.overwrite')}",
            )
    return found.files


def conversion_of(request: HuggingFaceRequest, stages: Sequence[int]) -> Conversion:
    """What is converted: the given stages of the work."""
    found = find(request)
    return Conversion(
        target=found.target,
        pace=request.pace,
        verify=request.verify,
        overwrite=request.overwrite,
        identity_options=found.identity_options,
        facts={"assumed": dict(found.source.state.assumed)},
        inputs={(tp, pp): _inputs(found, (tp, pp)) for pp in stages for tp in range(found.members)},
        conflicts=(),
        warnings=found.remarks,
        how_to_load=f" as {found.model.family.architecture}",
        prepare=partial(_plan, found),
        join=partial(publish_merged, partial(_merge, found), repair=request.overwrite),
    )


def _inputs(found: Found, rank: Rank) -> list[Json]:
    """The files that a rank is read from."""
    shard = found.shard(rank)
    return found.source.inputs(paths_of(views_of(shard.index().values() if shard else ())))
