"""A conversion into Megatron's torch_dist, from any format: each worker writes a ``.distcp``, the last to finish joins them.

source --run.targets.source--> global tensors --torch_dist.slots--> files, moves --rank.RankTask--> __0_0.distcp ...
                             state, files of all ranks --torch_dist--> common.pt, metadata.json, .metadata --publish.merged-->
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt2pt.core.fill import moves_of, replicas_of
from ckpt2pt.core.params import EMBEDDING, check_expert_parallel
from ckpt2pt.core.progress import Advance
from ckpt2pt.core.reshard import vocabulary_rows
from ckpt2pt.core.slots import source_of
from ckpt2pt.core.tensor import Key
from ckpt2pt.core.topology import Rank
from ckpt2pt.errors import TryAgainError, ref
from ckpt2pt.formats.folders import keep_apart
from ckpt2pt.formats.megatron.loads import SHARDINGS, WEIGHTS, Releases
from ckpt2pt.formats.torch_dist.common import COMMON
from ckpt2pt.formats.torch_dist.common_out import METADATA_JSON, SHARDING, common_tree, write_common
from ckpt2pt.formats.torch_dist.keys import layers_of
from ckpt2pt.formats.torch_dist.metadata_out import write_metadata
from ckpt2pt.formats.torch_dist.slots import Division, tensors_of
from ckpt2pt.formats.torch_dist.write import DistcpFile
from ckpt2pt.io.digests import sha256
from ckpt2pt.io.paths import is_file, status
from ckpt2pt.io.records import Json
from ckpt2pt.publish import TORCH_DIST, Target
from ckpt2pt.publish.merged import publish_merged
from ckpt2pt.run.conversion import Conversion
from ckpt2pt.run.rank import RankTask
from ckpt2pt.run.targets.request import DistRequest
from ckpt2pt.run.targets.source import Reading, Source, located, paths_of, read_source, views_of

if TYPE_CHECKING:
    from ckpt2pt.verification.report import Difference, Report

_NO_OPTIMIZER = " with --no-load-optim --no-load-rng (it holds parameters only)"


@dataclass(frozen=True)
class Found:
    """A source that was read as far as its headers, and how its conversion is divided."""

    request: DistRequest
    source: Source
    division: Division

    @property
    def identity_options(self) -> Json:
        """What decides what is written."""
        more: Json = {"chainedOptimizers": True} if self.chained else {}
        more |= {} if self.division.rows is None else {"vocabulary": self.division.rows}
        return {**self.request.identity_options(), "format": "TorchDist", "virtualPipeline": 1, **more}

    @property
    def expert(self) -> int:
        """Expert parallel size of the run to come: that of the source where nobody says it."""
        return self.request.target_expert or self.source.checkpoint.expert

    @property
    def chained(self) -> bool:
        """Whether that run has an optimizer of experts: where their ranks, or their cut, are not those of dense parameters.

        Megatron-LM core_v0.19.0, megatron/core/tensor_parallel/layers.py (``use_expert_pgs``).
        """
        args = self.source.state.args
        tensor, own = (args.get(name) for name in ("tensor_model_parallel_size", "expert_tensor_parallel_size"))
        apart = type(own) is int and type(tensor) is int and own != tensor
        return self.division.layers.experts > 0 and (self.expert > 1 or apart)

    @property
    def releases(self) -> Releases:
        """Which releases load the result."""
        return SHARDINGS[SHARDING] if self.request.full else WEIGHTS

    @property
    def facts(self) -> Json:
        """Where what is no tensor is from."""
        return {**self.source.facts, "random generators": "none are written: a run begins with those of its seed"}

    @cached_property
    def target(self) -> Target:
        """The folder that the result goes into."""
        identity = self.source.identity(self.identity_options)
        return Target(
            root=self.request.target,
            iteration=self.source.state.iteration,
            identity=identity,
            ranks=dict.fromkeys(self.division.ranks(), identity),
            stages=self.division.pipeline,
            tensor=self.division.tensor,
            full=self.request.full,
            kind=TORCH_DIST,
        )

    def listed(self, rank: Rank) -> list[str]:
        """The file of a worker, below the folder of the result."""
        return [self.division.file(rank)[0].name]

    def compare(self, rank: Rank, advance: Advance) -> tuple[Report, Mapping[str, int]]:
        """Compare the file of a worker, which is there, with the source; the CRC-32 of it."""
        from ckpt2pt.verification.report import Findings  # noqa: PLC0415 - numpy, and only when asked for
        from ckpt2pt.verification.torch_dist import compare_parts  # noqa: PLC0415 - the same

        division, folder = self.division, self.target.folder
        file, _ = division.file(rank)
        findings, crcs = Findings(), dict[str, int]()
        path = folder / file.name
        seen = status(path)
        if seen and seen.st_size == file.lay_out().nbytes:  # else the manifest tells that it was cut
            crcs.update(compare_parts(division.result, list(division.layers.numbers), file, path, findings, advance))
        return findings.report(folder, 0), crcs

    @property
    def sizes(self) -> Json:
        """Arguments that the tensors themselves tell, and those of the run that the source is of."""
        checkpoint, division = self.source.checkpoint, self.division
        found: Json = {
            "num_layers": len(division.layers.numbers),
            "tensor_model_parallel_size": checkpoint.tensor,
            "pipeline_model_parallel_size": checkpoint.pipeline,
        }
        if embedding := division.index.get(Key("param", EMBEDDING)):
            found["hidden_size"] = embedding.fused[1]
        if division.rows is not None:
            found["padded_vocab_size"] = division.rows
        if division.layers.experts:
            found |= {"num_experts": division.layers.experts, "expert_model_parallel_size": self.expert}
        return found

    def compare_rest(self) -> Iterator[Difference]:
        """Compare what is no tensor with the source, where the result is complete."""
        from ckpt2pt.verification.torch_dist import compare_common  # noqa: PLC0415 - numpy, and only when asked for

        if is_file(self.target.folder / COMMON):
            state = self.source.state
            tree, _ = common_tree(state, self.sizes, full=self.request.full, chained=self.chained)
            yield from compare_common(tree, state.scaler if self.request.full else None, self.target.folder)


def find(request: DistRequest, stages: Sequence[int] | None = None) -> Found:
    """Read the headers of the source, and prove that everything is there that ``stages`` of the work need, or all.

    Nothing is written.
    """
    source = read_source(request)
    layers = layers_of(source.index, source.where, source.state.args.get("moe_layer_freq"))
    check_expert_parallel(layers.experts, request.target_expert or 1, source.where)
    held = source.index.get(Key("param", EMBEDDING))
    # A model of transformers has as many rows as tokens; every training has saved its padding.
    pads = held is not None and source.checkpoint.format == "huggingface"
    division = Division(
        rows=vocabulary_rows(source.state.args, held.fused[0], request.topology.tensor) if held and pads else None,
        index=source.index,
        layers=layers,
        tensor=request.topology.tensor,
        pipeline=request.topology.pipeline,
        dtype=source.dtype,
        full=request.full,
        where=source.where,
    )
    division.check()
    source = located(source, None if stages is None else {name for pp in stages for name in division.names(pp)})
    division = replace(division, index=source.index)
    found = Found(replace(request, found=None), source, division)
    keep_apart(found.target, {request.source: ref("source.path"), request.metadata: ref("metadata.path")})
    _common(found)  # refuses what it lacks before the first byte is written
    return found


def _common(found: Found) -> bytes:
    return write_common(found.source.state, found.sizes, full=found.request.full, chained=found.chained)


def _prove(found: Found, file: DistcpFile, partials: Mapping[str, Path], heed: Callable[[], None]) -> Mapping[str, int]:
    from ckpt2pt.verification.torch_dist import prove_parts  # noqa: PLC0415 - numpy, and only when asked for

    division = found.division
    return prove_parts(division.result, list(division.layers.numbers), file, partials[file.name], heed)


def _plan(found: Found, rank: Rank, target: Target) -> RankTask:
    request, division = found.request, found.division
    file, slots = division.file(rank)
    tensors = {slot.key: source_of(division.index, slot.key, division.where) for slot in slots.slots}
    moves = moves_of(division.index, [slots], division.where)
    compared = {tensor.key: tensor for tensor in tensors.values()} if not rank[0] else {}
    return RankTask(
        rank=rank,
        target=target,
        reading=Reading(found.source, paths_of(views_of(tensors.values())), partial(_prove, found, file)),
        verify=request.verify,
        repair=request.overwrite,
        files=[file],
        moves=lambda: moves,
        copies=[pair for tensor in compared.values() for pair in replicas_of(tensor)],
        source_bytes=sum(move.nbytes for move in moves),
        facts={"source": division.where, "parts": digest_of(file)},
    )


def digest_of(file: DistcpFile) -> str:
    """SHA-256 of what a file holds, and where."""
    return sha256(repr((file.name, file.parts, file.objects)).encode()).hexdigest()


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
    found = find(request, stages)
    return Conversion(
        target=found.target,
        pace=request.pace,
        verify=request.verify,
        overwrite=request.overwrite,
        identity_options=found.identity_options,
        facts={"assumed": dict(found.source.state.assumed)},
        inputs={(tp, pp): inputs for pp in stages for tp, inputs in enumerate(_inputs(found, pp))},
        conflicts=(),
        warnings=found.source.remarks,
        how_to_load="" if request.full else _NO_OPTIMIZER,
        prepare=partial(_plan, found),
        join=partial(publish_merged, partial(_merge, found), repair=request.overwrite),
    )


def _inputs(found: Found, pp: int) -> list[list[Json]]:
    """The files that a stage is read from, as those of its first worker."""
    names = dict.fromkeys(found.division.names(pp))
    paths = paths_of(views_of(tensor for key, tensor in found.division.index.items() if key.name in names))
    return [found.source.inputs(paths), *([] for _ in range(1, found.division.tensor))]
