"""An import into another parallel layout: global tensors of the Megatron checkpoint, cut as the MindSpore training will be."""

from __future__ import annotations

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.index import Index
from ckpt2pt.core.layout import weight_decay_groups
from ckpt2pt.core.names import NameTable
from ckpt2pt.core.reshard import Wanted, reshard
from ckpt2pt.core.tensor import Key, Role
from ckpt2pt.core.topology import Rank, Topology
from ckpt2pt.formats.megatron.headers import MegatronRank
from ckpt2pt.formats.mindspore.entries import Entry
from ckpt2pt.run.back.request import BackRequest

Groups = list[dict[str, object]]
Twins = tuple[tuple[TensorRef, TensorRef], ...]


def relaid(
    request: BackRequest, tensors: Index, source: Topology, layout: Topology, rank: Rank, first: MegatronRank
) -> tuple[tuple[Entry, ...], Twins]:
    """Every parameter of a rank of the result, and its moments; and pairs of copies that must be equal.

    ``first`` is the checkpoint's first rank.
    """
    sizes = {name: value for name, value in first.template.args.items() if isinstance(value, int)}
    tied = first.template.args.get("untie_embeddings_and_output_weights") is False
    wanted = Wanted(topology=layout, source_tensor=source.tensor, sizes=sizes, tied=tied, where=str(request.source))
    made = reshard(_selected(tensors, request), rank, wanted, NameTable(request.rules))
    return tuple(_entry(name, ref) for name, ref in made.entries.items()), made.copies


def _entry(name: str, ref: TensorRef) -> Entry:
    role = next((moment for moment in ("exp_avg_sq", "exp_avg") if name.startswith(f"{moment}.")), "param")
    return Entry(name=name, dtype="float32", shape=ref.shape, source=ref, role=role)


def _selected(index: Index, request: BackRequest) -> Index:
    """Main parameters under the role of weights, and the moments that are asked for, parameter by parameter."""
    weight: Role = "main_param" if request.full else "param"
    roles: dict[Role, Role] = {"param": weight, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    kinds = request.contents if request.full else ("param",)
    return {
        Key(role, name): tensor._replace(key=Key(role, name))
        for name in dict.fromkeys(key.name for key in index)
        for role, stored in roles.items()
        if role in kinds and (tensor := index.get(Key(stored, name)))
    }


def groups_in_order(groups: Groups, entries: tuple[Entry, ...]) -> Groups:
    """The parameter groups in the order in which a rank's parameters need them: with weight decay, and without."""
    role = entries[0].role if entries else ""  # each parameter once, whichever of its tensors are imported
    weights = [entry.source for entry in entries if entry.role == role and isinstance(entry.source, TensorRef)]
    by_kind = {group.get("wd_mult") != 0: group for group in groups}
    order = weight_decay_groups(weights)
    return [by_kind[kind] for kind in order] if set(order) <= set(by_kind) else groups
