"""What the source holds for one rank of the result, read for the proof alone; a Megatron checkpoint by its own reader.

    rank_R/*.ckpt, shards --sharded--> entries --names--> (role, canonical name) --core.index--> tensors

The planner looks for the source of each parameter that pt_meta names; here each entry of the source is given its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.index import Collector, Index
from ckpt2pt.core.names import NameTable
from ckpt2pt.core.params import EMBEDDING, HEAD
from ckpt2pt.core.stated import Statement
from ckpt2pt.core.tensor import ROLES, Key
from ckpt2pt.core.topology import Rank
from ckpt2pt.discover import Discovered
from ckpt2pt.discover.checkpoint import kind_of
from ckpt2pt.discover.request import Request
from ckpt2pt.formats.mindspore import statement_of
from ckpt2pt.formats.mindspore.ranks import SourceFile
from ckpt2pt.formats.mindspore.source import collect, collect_entries, kept
from ckpt2pt.formats.ptmeta.metadata import RankMeta
from ckpt2pt.verification.sharded import expected_index
from ckpt2pt.verification.tensors import Held


def held_for(request: Request, chosen: Discovered, rank: Rank, meta: RankMeta) -> tuple[Held, Statement]:
    """The tensors for a rank of the result, and what the source states of optimizer and scheduler.

    The tensors are those of the rank's own file, or all of them where the layout changes.
    """
    alike, table = request.source_topology is None, NameTable(request.rules)
    scalars: Mapping[str, TensorRef] = {}
    if request.source_format == "torch_dist":
        from ckpt2pt.discover.distributed import tensors_for  # noqa: PLC0415 - each kind loads what it needs

        tensors = tensors_for(request, chosen, rank)
    elif request.from_megatron:
        from ckpt2pt.discover.stored import tensors_for  # noqa: PLC0415

        tensors = tensors_for(request, chosen, rank)
    elif alike:
        tensors, scalars = _of_rank(request, chosen, rank, meta, table)
    else:
        tensors, scalars = kept(chosen.identity, partial(_all, request, chosen, table), "proof")
    held = Held(
        tensors=tensors,
        layout=None if alike else request.topology,
        template=meta.template,
        iteration=chosen.training_step.iteration,
        roles=ROLES if request.full else ROLES[:1],
    )
    statement = statement_of(scalars) if scalars else kind_of(request).stated(request, chosen, rank)
    return held, statement


def _all(request: Request, chosen: Discovered, table: NameTable) -> tuple[Index, Mapping[str, TensorRef]]:
    def read(_: Rank, file: SourceFile) -> Mapping[str, TensorRef]:
        return expected_index(file)

    return collect(chosen.files, request.source_layout, table, str(request.source), read)


def _of_rank(
    request: Request, chosen: Discovered, rank: Rank, meta: RankMeta, table: NameTable
) -> tuple[Index, Mapping[str, TensorRef]]:
    file = chosen.files[rank]
    collector = Collector(1, str(file.path))
    seen: set[Key] = set()

    def wanted(key: Key) -> bool:
        seen.add(key)
        return request.full or key.role == "param"

    scalars = collect_entries(collector, 0, expected_index(file), table, str(file.path), wanted)
    if meta.tied and 0 < rank[1] == request.topology.pipeline - 1:
        # A last stage without a copy of its own takes the first stage's: both ends hold the same values.
        own = {key.role for key in seen if key.name in {EMBEDDING, HEAD}}

        def missing(key: Key) -> bool:
            return key.name == EMBEDDING and key.role not in own and (request.full or key.role == "param")

        first = chosen.files[rank[0], 0]
        if any(role not in own for role in ("param", "exp_avg", "exp_avg_sq")[: 3 if request.full else 1]):
            collect_entries(collector, 0, expected_index(first), table, str(first.path), missing)
    return collector.index(partial=True), scalars
