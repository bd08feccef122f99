"""Find everything a conversion needs and prove that it fits together: headers only, nothing is written.

source    --training | stored-->  files of each rank at one iteration, its tensors, the clock
metadata  --metadata---------->   template, buffers                                            } -> LegacyRank for each rank
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt2pt.core.foldernames import is_iteration
from ckpt2pt.core.names import NameTable
from ckpt2pt.core.stated import Statement
from ckpt2pt.core.topology import Rank
from ckpt2pt.discover.checkpoint import INFO, Discovered, Filled, Inputs, changed, inputs_of, kind_of, only_growing
from ckpt2pt.discover.metadata import answers, check_metadata, inputs_of_metadata, meta_of
from ckpt2pt.discover.request import Request, digest
from ckpt2pt.errors import ref
from ckpt2pt.formats.folders import keep_apart
from ckpt2pt.formats.megatron.legacy import LegacyRank, check_layers, plan_rank
from ckpt2pt.formats.megatron.payload import FilePayload
from ckpt2pt.formats.mindspore.ranks import SourceFile
from ckpt2pt.formats.mindspore.source import files_for
from ckpt2pt.formats.ptmeta.metadata import METADATA, RankMeta
from ckpt2pt.io.records import Json
from ckpt2pt.publish import MINDSPORE, Target

__all__ = [
    "Discovered",
    "Prepared",
    "changed",
    "discover",
    "distinct",
    "inputs_of",
    "meta_of",
    "only_growing",
    "prepare",
    "prepare_all",
    "prove_unchanged",
    "target_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared(Filled):
    """One rank, ready to run; ``stated`` is what the source says of optimizer and scheduler."""

    files: tuple[FilePayload, ...]
    plan: LegacyRank
    meta: RankMeta
    stated: Statement


@only_growing()
def discover(request: Request, keep: Collection[Rank] = ()) -> Discovered:
    """Choose the checkpoint, and make sure that all ranks are at the same step.

    The headers of ``keep`` stay in the result, as far as memory allows.
    """
    check_metadata(request)
    found = kind_of(request).find(request, keep)
    inputs = _inputs(request.topology.ranks(), found.files, request)
    found.prove_unchanged()
    every = distinct(inputs.values())
    options_digest = digest({"options": request.identity_options(), "iteration": found.training_step.iteration})
    chosen = Discovered(
        files=found.files,
        training_step=found.training_step,
        identity=digest([options_digest, every]),
        options_digest=options_digest,
        base=_base(request, found.training_step.iteration, every),
        ranks={rank: _identity(options_digest, inputs[rank], inputs[rank[0], 0]) for rank in inputs},
        inputs=inputs,
        headers=found.headers,
    )
    if request.files and request.files.merged:  # beside their shards, by default
        return chosen
    source, here = ref("source.path"), request.source
    of_iteration = bool(request.files) and is_iteration(here.name)  # whatever else is in a Megatron root is no result's
    read = {request.shard_info: INFO, request.metadata: METADATA, here: source}
    keep_apart(target_of(request, chosen), {**read, here.parent: source} if of_iteration else read)
    return chosen


def _base(request: Request, iteration: int, inputs: Sequence[Mapping[str, object]]) -> str:
    """The metadata is left out: for parameters alone it needs no maps, which may be added for the full conversion."""
    sources = [one for one in inputs if "metadata" not in one]
    return digest([{**request.identity_options(), "mode": None}, iteration, sources])


def _identity(options_digest: str, inputs: Inputs, first: Inputs) -> str:
    """Of a rank: what is asked for, what it is read from, and what the first stage is read from."""
    return digest([options_digest, [*inputs, *first]])


def prove_unchanged(request: Request, chosen: Discovered, rank: Rank) -> None:
    """Refuse a rank whose files are not those that were surveyed: what was read may be of two checkpoints."""
    first = rank[0], 0
    inputs = _inputs((rank, first), chosen.files, request)
    now = _identity(chosen.options_digest, inputs[rank], inputs[first])
    if now != chosen.ranks[rank]:
        raise changed(chosen.read_for(rank, request)[0].path)


def target_of(request: Request, chosen: Discovered) -> Target:
    """The folder that the chosen checkpoint goes into."""
    if request.files:
        kind = MINDSPORE
        if request.files.merged:
            from ckpt2pt.discover.merged import target_kind  # noqa: PLC0415 - for combine

            kind = target_kind(chosen.files[0, 0], request.source)
        return Target(
            root=request.target,
            iteration=chosen.training_step.iteration,
            identity=chosen.identity,
            stages=request.topology.pipeline,
            tensor=request.topology.tensor,
            kind=kind,
        )
    return Target(
        root=request.target,
        iteration=chosen.training_step.iteration,
        identity=chosen.identity,
        options_digest=chosen.options_digest,
        ranks=chosen.ranks,
        base=chosen.base,
        full=request.full,
        stages=request.topology.pipeline,
        tensor=request.topology.tensor,
    )


@only_growing()
def prepare(request: Request, chosen: Discovered, rank: Rank) -> Prepared:
    """Index one rank's file, or its group's shards, and plan every copy."""
    with answers(request):
        return _prepare(request, chosen, rank)


def _prepare(request: Request, chosen: Discovered, rank: Rank) -> Prepared:
    meta = meta_of(request, rank)
    where = str(request.source if request.source_topology else chosen.files[rank].path)
    check_layers(meta.chunks, request.topology, pp=rank[1], where=str(request.metadata or request.source))
    held, stated = kind_of(request).read(request, chosen, rank, meta)
    table = NameTable(request.rules)
    plan = plan_rank(held, meta, rank[1], request.topology, table, full=request.full, where=where, stated=stated.names)
    made = plan.lay_out(meta.template, chosen.training_step, stated, reference_samples=request.reference_samples)
    files, slots = zip(*made, strict=True)
    return Prepared(source=where, index=held.index, files=files, slots=slots, plan=plan, meta=meta, stated=stated)


def prepare_all(request: Request, chosen: Discovered, stages: Iterable[int]) -> Iterator[tuple[Rank, Prepared]]:
    """Every rank of the given stages, one at a time: the plans of a thousand would not fit into memory."""
    for rank in ((tp, pp) for pp in stages for tp in range(request.topology.tensor)):
        yield rank, prepare(request, chosen, rank)


def _inputs(ranks: Iterable[Rank], files: Mapping[Rank, SourceFile], request: Request) -> dict[Rank, Inputs]:
    """What each rank is read from: sources by name, size and time, the small metadata files by content.

    The time matters: a retrained checkpoint has the same header and size.  A rank of the last stage may read a tied
    embedding of the first, so that is counted with every rank.  Where the layout changes, ranks share all sources.
    """
    sources: dict[Path, Inputs] = {}
    found: dict[Rank, Inputs] = {}
    for rank in ranks:
        needed = files_for(rank, files, request)
        sources |= {file.path: inputs_of(file, request.source) for file in needed if file.path not in sources}
        found[rank] = [*(one for file in needed for one in sources[file.path]), *inputs_of_metadata(request, rank)]
    return found


def distinct(inputs: Iterable[Sequence[Json]]) -> tuple[Json, ...]:
    """Each input of several ranks once."""
    return tuple({id(one): one for listed in inputs for one in listed}.values())
