"""A conversion into Megatron's torch_dist, from any format: each worker writes a ``.distcp``, the last to finish joins them.

source --formats.registry--> global tensors --torch_dist.slots--> files, moves --rank.RankTask--> __0_0.distcp ...
                             state, files of all ranks --torch_dist--> common.pt, metadata.json, .metadata --publish.merged-->
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from ckpt2pt.core.fill import moves_of, replicas_of
from ckpt2pt.core.params import EMBEDDING
from ckpt2pt.core.slots import source_of, weights_alone
from ckpt2pt.core.state import State
from ckpt2pt.core.tensor import Key
from ckpt2pt.core.topology import Rank
from ckpt2pt.discover.checkpoint import changed, only_growing, stat_of
from ckpt2pt.discover.request import digest
from ckpt2pt.engine.write import ReadPieces
from ckpt2pt.errors import MissingInputError, TopologyError, TryAgainError, aside, ref
from ckpt2pt.formats.checkpoint import Checkpoint
from ckpt2pt.formats.folders import keep_apart
from ckpt2pt.formats.mindspore import prove_sources
from ckpt2pt.formats.ptmeta.metadata import read_arguments
from ckpt2pt.formats.registry import read
from ckpt2pt.formats.state import state_of
from ckpt2pt.formats.torch_dist.common_out import METADATA_JSON, write_common
from ckpt2pt.formats.torch_dist.keys import layers_of
from ckpt2pt.formats.torch_dist.metadata_out import write_metadata
from ckpt2pt.formats.torch_dist.slots import Division, tensors_of
from ckpt2pt.formats.torch_dist.write import DistcpFile
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.trees import Global
from ckpt2pt.io.records import Json
from ckpt2pt.publish import TORCH_DIST, Target
from ckpt2pt.run.conversion import Conversion
from ckpt2pt.run.rank import RankTask
from ckpt2pt.run.torch_dist.request import DistRequest

NO_OPTIMIZER = " with --no-load-optim --no-load-rng (it holds parameters only)"
_HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class Found:
    """A source that was read as far as its headers, and how its conversion is divided."""

    request: DistRequest
    checkpoint: Checkpoint
    state: State
    division: Division
    stats: Mapping[str, Json]
    """Of each file: size and time of the last change."""
    remarks: tuple[str, ...]

    @cached_property
    def identity(self) -> str:
        """The digest of what is asked for and what it is made from."""
        return digest([self.identity_options, self.state.iteration, sorted(map(str, self.inputs_of(self.stats)))])

    @property
    def identity_options(self) -> Json:
        """What decides what is written."""
        return self.request.identity_options()

    @property
    def target(self) -> Target:
        """The folder that the result goes into."""
        return Target(
            root=self.request.target,
            iteration=self.state.iteration,
            identity=self.identity,
            ranks=dict.fromkeys(self.division.ranks(), self.identity),
            stages=self.division.pipeline,
            tensor=self.division.tensor,
            full=self.request.full,
            kind=TORCH_DIST,
        )

    def inputs_of(self, paths: Iterable[str]) -> list[Json]:
        """Files of the source, as a manifest lists them."""
        root = f"{self.checkpoint.path}/"
        return [{"source": path.removeprefix(root), **self.stats[path]} for path in paths]

    def prove_unchanged(self, paths: Sequence[str]) -> None:
        """Refuse files that are not those any more whose headers were read."""
        for path in paths:
            if stat_of(Path(path)) != self.stats[path]:
                raise changed(Path(path))


@only_growing()
def find(request: DistRequest) -> Found:
    """Read the headers of the source, and prove that everything is there that the result needs.  Nothing is written."""
    checkpoint = read(
        request.source,
        source_format=request.source_format,
        tensor=request.tensor,
        pipeline=request.pipeline,
        iteration=request.iteration,
        rules=request.rules,
    )
    if checkpoint.iteration is None and request.iteration is None:
        raise MissingInputError(
            "nothing in the checkpoint tells its iteration",
            where=checkpoint.path,
            hint=f"say it with {ref('source.iteration')}",
            field="source.iteration",
        )
    where, index = str(checkpoint.path), checkpoint.index
    if not request.full:
        ignored = weights_alone(index)
        index = {key: tensor for key, tensor in index.items() if key not in ignored}
    given = read_arguments(request.metadata, (0, 0), allow=request.rules.pickle_globals) if request.metadata else None
    state = state_of(checkpoint, given, iteration=request.iteration, zero_samples=request.zero_samples)
    dtype, remarks = _dtype(checkpoint, state)
    division = Division(
        index=index,
        layers=layers_of(index, where),
        tensor=request.topology.tensor,
        pipeline=request.topology.pipeline,
        dtype=dtype,
        full=request.full,
        where=where,
    )
    if division.pipeline > len(division.layers.numbers):
        raise TopologyError(
            f"{division.pipeline} pipeline stages share {len(division.layers.numbers)} layers",
            where=where,
            hint=f"give fewer{aside('target.parallelism.pipeline')}",
            field="target.parallelism.pipeline",
        )
    views = (view for tensor in index.values() for view in (*tensor.views, *tensor.replicas))
    paths = dict.fromkeys(extent.path for view in views for extent in view.storage)
    if given:
        paths[given.path] = None
    stats: dict[str, Json] = {path: {**stat_of(Path(path))} for path in paths}
    found = Found(request, checkpoint, state, division, stats, (*checkpoint.warnings, *remarks))
    keep_apart(found.target, {request.source: ref("source.path"), request.metadata: ref("metadata.path")})
    _common(found)  # refuses what it lacks before the first byte is written
    return found


def _dtype(checkpoint: Checkpoint, state: State) -> tuple[str, tuple[str, ...]]:
    """The type of the weights: their own, unless they are float32 as MindSpeed-Core-MS saves those of any training."""
    own = next(tensor.dtype for key, tensor in checkpoint.index.items() if key.role == "param")
    if checkpoint.format != "mindspore" or own in _HALF:
        return own, ()
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if state.args.get(name) is True:
            return dtype, ()
    if state.args.get("params_dtype") == Global("torch", "float32") or {"bf16", "fp16"} <= state.args.keys():
        return own, ()
    return "bfloat16", ("nothing states the precision of the training: weights are written as bfloat16",)


def _common(found: Found) -> bytes:
    embedding = found.division.index.get(Key("param", EMBEDDING))
    sizes: Json = {
        "num_layers": len(found.division.layers.numbers),
        "tensor_model_parallel_size": found.checkpoint.tensor,
        "pipeline_model_parallel_size": found.checkpoint.pipeline,
    }
    if embedding:
        sizes["hidden_size"] = embedding.fused[1]
    return write_common(found.state, sizes, full=found.request.full)


@dataclass(frozen=True, slots=True)
class _Reading:
    """The source of one worker."""

    found: Found
    file: DistcpFile
    paths: tuple[str, ...]

    def prove_unchanged(self) -> None:
        self.found.prove_unchanged(self.paths)

    def prove_read(self, read: ReadPieces) -> Mapping[str, int]:
        """By the CRC-32 that a file states of itself, or of each record of an archive."""
        if self.found.request.verify == "none":
            return {"verified": 0, "notChecked": len(read), "none": 0}
        kinds = {suffix: [path for path in read if path.endswith(suffix)] for suffix in (".pt", ".distcp")}
        for path in kinds[".pt"]:
            Archive.prove_read(Path(path), read[path])
        known = {path for paths in kinds.values() for path in paths}
        counts = prove_sources((Path(path) for path in read if path not in known), read, every_byte=True)
        return {
            "verified": counts["verified"] + len(kinds[".pt"]),
            "notChecked": counts["notChecked"] + len(kinds[".distcp"]),
            "none": counts["none"],
        }

    def prove_result(self, partials: Mapping[str, Path], heed: Callable[[], None]) -> Mapping[str, int]:
        from ckpt2pt.verification.torch_dist import prove_parts  # noqa: PLC0415 - numpy, and only when asked for

        division = self.found.division
        return prove_parts(division.index, list(division.layers.numbers), self.file, partials[self.file.name], heed)


def _plan(found: Found, rank: Rank, target: Target) -> RankTask:
    request, division = found.request, found.division
    file, slots = division.file(rank)
    tensors = {slot.key: source_of(division.index, slot.key, division.where) for slot in slots.slots}
    views = (view for tensor in tensors.values() for view in tensor.views)
    paths = tuple(dict.fromkeys(extent.path for view in views for extent in view.storage))
    moves = moves_of(division.index, [slots], division.where)
    compared = {tensor.key: tensor for tensor in tensors.values()} if not rank[0] else {}
    return RankTask(
        rank=rank,
        target=target,
        reading=_Reading(found, file, paths),
        verify=request.verify,
        repair=request.overwrite,
        files=[file],
        moves=lambda: moves,
        copies=[pair for tensor in compared.values() for pair in replicas_of(tensor)],
        source_bytes=sum(move.nbytes for move in moves),
        facts={"source": division.where, "parts": digest_of(file)},
        remarks=found.remarks,
    )


def digest_of(file: DistcpFile) -> str:
    """SHA-256 of what a file holds, and where."""
    return hashlib.sha256(repr((file.name, file.parts, file.objects)).encode()).hexdigest()


def _merge(found: Found, target: Target) -> Mapping[str, bytes]:
    """The files that join those of all workers, which are there as this version of ckpt2pt would write them."""
    files: list[DistcpFile] = []
    for rank in found.division.ranks():
        file, _ = found.division.file(rank)
        if (target.manifest_of(rank) or {}).get("parts") != digest_of(file):
            raise TryAgainError(
                f"{file.name} was written by another version of ckpt2pt, which divides the tensors otherwise",
                where=target.folder,
                hint=f"run all stages with one version, with {ref('target.overwrite')}",
            )
        files.append(file)
    tensors = tensors_of(files, str(target.folder))
    objects = {key: item for file in files for key, item in file.items()}
    return {
        "common.pt": _common(found),
        "metadata.json": METADATA_JSON,
        ".metadata": write_metadata(tensors, objects),
    }


def conversion_of(request: DistRequest, stages: Sequence[int]) -> Conversion:
    """What is converted: the given stages of the work."""
    found = find(request)
    return Conversion(
        target=found.target,
        pace=request.pace,
        verify=request.verify,
        overwrite=request.overwrite,
        identity_options=found.identity_options,
        facts={"assumed": dict(found.state.assumed)},
        inputs={(tp, pp): inputs for pp in stages for tp, inputs in enumerate(_inputs(found, pp))},
        conflicts=(),
        warnings=found.remarks,
        how_to_load="" if request.full else NO_OPTIMIZER,
        prepare=partial(_plan, found),
        merge=partial(_merge, found),
    )


def _inputs(found: Found, pp: int) -> list[list[Json]]:
    """The files that a stage is read from, as those of its first worker."""
    names = dict.fromkeys(found.division.names(pp))
    tensors = (tensor for key, tensor in found.division.index.items() if key.name in names)
    views = (view for tensor in tensors for view in (*tensor.views, *tensor.replicas))
    paths = dict.fromkeys(extent.path for view in views for extent in view.storage)
    return [found.inputs_of(paths), *([] for _ in range(1, found.division.tensor))]
