"""The parameters of MindFormers as those of the canonical table: what lies where in a stored tensor.  Pure.

    mlp.linear_fc1 (2f, h)                   gate and up, row by row or one after the other
    self_attention.linear_qkv                queries, key and value of each group, or [Q; K; V]
    self_attention.linear_qkv, latent        [q_down (or q); kv_down]; linear_qb, linear_kvb, k_layernorm are the other names
    mlp.experts.weight1 (E, h, 2f)           [gate, up] of each expert, transposed; (E * h, 2f) of the static graph
    mlp.experts.weight2 (E, f, h)

MindFormers 2.1.0, mindformers/parallel_core/training_graph/transformer (mlp.py, attention.py, multi_latent_attention.py,
moe/experts.py) and mindformers/pynative/transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ckpt2pt.core.extents import Shape
from ckpt2pt.core.params import is_gated
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.mindformers.regions import Region, rows

LAYER = re.compile(r"((?:decoder\.layers\.\d{1,9}|mtp\.layers\.\d{1,9}\.transformer_layer)\.)(.+)")
_HINT = "check that the checkpoint is complete, and that all files are of one save"
_ATTENTION = "self_attention."
LATENT = {"linear_qb": "linear_q_up_proj", "linear_kvb": "linear_kv_up_proj", "k_layernorm": "kv_layernorm"}
IGNORED = (".mlp.router.fi_accu", ".mlp.router.expert_load", ".mlp.tokens_per_expert")
"""Counters of the router, which no other framework has."""


class Fused(NamedTuple):
    """A canonical parameter: its natural axes, the shape that users know, and its regions in the stored tensor."""

    name: str
    shape: Shape
    fused: Shape
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layouts:
    """How a model fuses its parameters.  ``shapes`` are those of all weights, by name.

    ``interleaved`` says that gate and up alternate; ``groups`` are (queries of a group, channels of a head) where linear_qkv is
    [Q; K; V], else None; ``heads`` is the number of heads where somebody says it.
    """

    shapes: Mapping[str, Shape]
    interleaved: bool
    contiguous: tuple[int, int] | None
    heads: int | None
    gated: bool
    where: str
    _known: dict[str, tuple[Fused, ...]] = field(default_factory=dict[str, tuple[Fused, ...]])

    def of(self, name: str) -> tuple[Fused, ...]:
        """What a stored weight is; any state of the optimizer is fused as its weight is.  Raises :class:`FormatError`."""
        found = self._known.get(name)
        if found is None:
            found = self._known[name] = tuple(self._of(name, self.shapes[name]))
        return found

    def _of(self, name: str, shape: Shape) -> Iterator[Fused]:
        layer = LAYER.fullmatch(name)
        prefix, inner = layer.groups() if layer else ("", name)
        module, _, leaf = inner.rpartition(".")
        if module == "mlp.experts" and leaf in {"weight1", "weight2"}:
            yield from self._experts(prefix, leaf, shape)
        elif module.endswith(".linear_fc1") and self.gated:
            yield self._gated(name, shape)
        elif module.startswith(_ATTENTION) and self.is_latent(prefix):
            yield from self._latent(prefix, module.removeprefix(_ATTENTION), leaf, shape)
        elif module == "self_attention.linear_qkv" and self.contiguous:
            yield Fused(name, shape, shape, tuple(self._groups(name, shape, *self.contiguous)))
        else:
            own = f"{prefix}mlp.router.expert_bias" if inner == "mlp.expert_bias" else name
            yield Fused(own, shape, shape, (rows(shape),) if shape else (Region((), (), (), (), ()),))

    def is_latent(self, prefix: str) -> bool:
        """Whether the attention of a layer is multi-latent."""
        names = (f"{prefix}self_attention.{module}.weight" for module in ("linear_kvb", "linear_kv_up_proj"))
        return any(name in self.shapes for name in names)

    def _gated(self, name: str, shape: Shape) -> Fused:
        half, rest = shape[0] // 2, shape[1:]
        if shape[0] % 2:
            raise self._wrong(name, shape, "an odd number of rows")
        first, step = (1, 2) if self.interleaved else (half, 1)
        zeros, axes = (0,) * len(rest), tuple(range(1, len(shape)))
        regions = tuple(
            Region(
                (one, 0, *zeros),
                (1, half, *rest),
                (one * first, *zeros),
                (None, 0, *axes),
                (1, step, *(1,) * len(rest)),
            )
            for one in range(2)
        )
        return Fused(name, (2, half, *rest), shape, regions)

    def _groups(self, name: str, shape: Shape, queries: int, channels: int) -> Iterator[Region]:
        """[Q; K; V] -> queries, key and value of each group."""
        each = (queries + 2) * channels
        if shape[0] % each:
            raise self._wrong(name, shape, f"no multiple of {each} rows")
        groups = shape[0] // each
        for group in range(groups):
            at = group * each
            for kind, count in ((0, queries), (queries, 1), (queries + 1, 1)):
                first = kind * groups + group * count
                yield rows(shape, first * channels, at=at + kind * channels, count=count * channels)

    def _latent(self, prefix: str, module: str, leaf: str, shape: Shape) -> Iterator[Fused]:
        if module != "linear_qkv":
            yield _renamed(f"{prefix}{_ATTENTION}{LATENT.get(module, module)}.{leaf}", shape)
            return
        kv_rank = self._columns(f"{prefix}self_attention.linear_kvb.weight")
        lora = f"{prefix}self_attention.linear_qb.weight"
        query = "linear_q_down_proj" if lora in self.shapes else "linear_q_proj"
        count = self._columns(lora) if lora in self.shapes else self._query_rows(prefix, shape, kv_rank)
        if not 0 < count < shape[0] - kv_rank:
            raise self._wrong(
                f"{prefix}self_attention.linear_qkv.{leaf}", shape, f"{count} rows of queries, and a rank of {kv_rank}"
            )
        for own, first, length in ((query, 0, count), ("linear_kv_down_proj", count, shape[0] - count)):
            part = (length, *shape[1:])
            yield Fused(f"{prefix}{_ATTENTION}{own}.{leaf}", part, part, (rows(part, first),))

    def _query_rows(self, prefix: str, shape: Shape, kv_rank: int) -> int:
        """Rows of queries without a low rank of their own: heads * (qk + rope), followed by ``kv_rank`` + rope rows."""
        values = self._columns(f"{prefix}self_attention.linear_proj.weight")
        keys = self.shapes[f"{prefix}self_attention.linear_kvb.weight"][0] - values
        if not self.heads or (shape[0] - kv_rank - keys) % (self.heads + 1):
            raise self._wrong(f"{prefix}self_attention.linear_qkv.weight", shape, f"num_attention_heads {self.heads}")
        return shape[0] - kv_rank - (shape[0] - kv_rank - keys) // (self.heads + 1)

    def _columns(self, name: str) -> int:
        shape = self.shapes.get(name, ())
        if len(shape) != 2:
            raise self._wrong(name, shape, "no matrix")
        return shape[1]

    def _experts(self, prefix: str, leaf: str, shape: Shape) -> Iterator[Fused]:
        """Each expert's linear layer, of which the stored tensor has the transposed one."""
        name = f"{prefix}mlp.experts.{leaf}"
        experts = expert_count_of(self.shapes, prefix)
        inner, columns = (shape[-2] if len(shape) == 3 else shape[0] // max(1, experts)), shape[-1]
        if (
            len(shape) not in {2, 3}
            or not experts
            or inner * experts != (shape[0] * shape[1] if len(shape) == 3 else shape[0])
        ):
            raise self._wrong(name, shape, f"{experts} experts")
        lead = 1 if len(shape) == 3 else 0
        axes, steps = (1 + lead, lead), (1, 1)
        module = "linear_fc1" if leaf == "weight1" else "linear_fc2"
        halves = 2 if leaf == "weight1" and self.gated else 1
        if columns % halves:
            raise self._wrong(name, shape, "an odd number of columns")
        for expert in range(experts):
            own = f"{prefix}mlp.experts.local_experts.{expert}.{module}.weight"
            first = (expert, 0) if lead else (expert * inner,)
            part, fused = columns // halves, (columns, inner)
            if halves == 1:
                yield Fused(own, fused, fused, (Region((0, 0), fused, (*first, 0), axes, steps),))
                continue
            regions = tuple(
                Region((half, 0, 0), (1, part, inner), (*first, half * part), (None, *axes), (1, *steps))
                for half in range(2)
            )
            yield Fused(own, (2, part, inner), fused, regions)

    def _wrong(self, name: str, shape: Shape, why: str) -> FormatError:
        return FormatError(
            f"{name} has the shape {list(shape)}, which does not go with {why}", where=self.where, hint=_HINT
        )


def _renamed(name: str, shape: Shape) -> Fused:
    return Fused(name, shape, shape, (rows(shape),))


def expert_count_of(shapes: Mapping[str, Shape], prefix: str) -> int:
    """Experts of a layer: rows of its router, or the first axis of their weights."""
    router, weights = (shapes.get(f"{prefix}mlp.{name}", ()) for name in ("router.weight", "experts.weight1"))
    return router[0] if router else weights[0] if len(weights) == 3 else 0


def gated(shapes: Mapping[str, Shape], where: str) -> bool:
    """Whether the MLP, or that of experts, has a gate: twice as many columns of ``weight1`` as rows of ``weight2``."""
    for name, shape in shapes.items():
        other = shapes.get(name.replace(".weight1", ".weight2"), ())
        if name.endswith(".mlp.experts.weight1") and len(shape) == len(other) >= 2:
            experts = expert_count_of(shapes, name.removesuffix("mlp.experts.weight1"))
            inner = other[1] if len(other) == 3 else other[0] // max(1, experts)
            if shape[-1] in {inner, 2 * inner}:
                return shape[-1] == 2 * inner
            raise FormatError(f"{name} has the shape {list(shape)}, and weight2 {list(other)}", where=where, hint=_HINT)
    return is_gated(shapes, where)


def interleavable(shapes: Mapping[str, Shape]) -> str | None:
    """A weight of which the order of rows matters where the MLP has a gate."""
    return next(
        (name for name in shapes if name.endswith((".mlp.linear_fc1.weight", ".shared_experts.linear_fc1.weight"))),
        None,
    )


def groups_of(shapes: Mapping[str, Shape], sizes: Mapping[str, int]) -> tuple[str, tuple[int, int] | None] | None:
    """A linear_qkv whose rows may be in either order, with (queries of a group, channels of a head) where these are known.

    None where there is none: with one group both orders are the same, and latent attention has no such weight.
    """
    for name, shape in shapes.items():
        if not name.endswith(".self_attention.linear_qkv.weight"):
            continue
        prefix = name.removesuffix("linear_qkv.weight")
        if any(f"{prefix}{module}.weight" in shapes for module in ("linear_kvb", "linear_kv_up_proj")):
            continue
        projected = shapes.get(f"{prefix}linear_proj.weight", (0, 0))[-1]
        norm = shapes.get(f"{prefix}q_layernorm.weight") or ()
        heads, channels = sizes.get("num_attention_heads"), norm[0] if len(norm) == 1 else sizes.get("kv_channels")
        if not channels and heads and projected and not projected % heads:
            channels = projected // heads
        return name, _counted(shape, projected, channels)
    return None


def _counted(shape: Shape, projected: int, channels: int | None) -> tuple[int, int] | None:
    """(queries of a group, channels) by the rows of linear_qkv and the columns of linear_proj, which are those of all queries."""
    left = shape[0] - projected
    if not channels or projected < channels or projected % channels or left <= 0 or left % (2 * channels):
        return None
    heads, groups = projected // channels, left // (2 * channels)
    return None if heads % groups else (heads // groups, channels)


def same_in_both(shape: Shape, counted: tuple[int, int] | None) -> bool:
    """Whether both orders of linear_qkv are the same: one group."""
    return counted is not None and shape[0] == (counted[0] + 2) * counted[1]
