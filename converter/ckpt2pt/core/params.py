"""The one table of parameters: what each format calls them, and along which axis tensor parallelism cuts them.  Pure.

Names: Megatron-LM core (megatron/core/models/gpt/gpt_model.py), whose names are the canonical ones here; Megatron-LM 0.6
(cac60ce4, megatron/model/transformer.py, language_model.py); MindSpeed-Core-MS feature-0.1 (mindspeed_ms/tools/converter).
Cuts: megatron/core/tensor_parallel/layers.py, ``ColumnParallelLinear``, ``RowParallelLinear``, ``VocabParallelEmbedding``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from ckpt2pt.core.extents import Shape
from ckpt2pt.errors import TopologyError, aside


class Kind(NamedTuple):
    """What tensor parallelism cuts of a module: an axis of each of its parameters, None for nothing."""

    cuts: Mapping[str, int | None]
    norm: bool = False
    gated: bool = False
    """Its rows are gate and up, each cut by itself, where the model is gated (swiglu)."""
    padded: bool = False
    """Its rows are tokens, filled up to a multiple that depends on the tensor-parallel size."""


COLUMN = Kind({"weight": 0, "bias": 0})
GATED = Kind({"weight": 0, "bias": 0}, gated=True)
ROW = Kind({"weight": 1, "bias": None})
VOCABULARY = Kind({"weight": 0, "bias": 0}, padded=True)
WHOLE = Kind({"weight": None, "bias": None})
NORM = Kind({"weight": None, "bias": None}, norm=True)
ROUTER = Kind({"weight": None, "bias": None, "expert_bias": None})
GATE = Kind({"gate_weight": None})


class Module(NamedTuple):
    """One row: its name in Megatron core, in Megatron 0.6 and in MindSpeed-Core-MS; empty where that one has no such module.

    An expert's number follows ``local_experts``; canonical names have the global one (core/transformer/moe/experts.py).
    ``fused`` is what stands before ``weight`` and ``bias`` with the layer spec of Transformer Engine, where that differs.

    Multi-latent attention: core/transformer/multi_latent_attention.py.  Its down projections are on every tensor-parallel rank with
    Transformer Engine since 0.13, and cut with the local layer spec and before; here they are whole.  Multi-token prediction
    (core/transformer/multi_token_prediction.py): each of its layers holds a ``transformer_layer`` with the modules of any layer.
    """

    name: str
    legacy: str
    mindspore: str
    kind: Kind
    fused: str = ""


LAYER_MODULES = (
    #      Megatron core                  Megatron 0.6                        MindSpeed-Core-MS
    Module("input_layernorm",             "input_norm",                       "input_norm",            NORM,
           "self_attention.linear_qkv.layer_norm_"),
    Module("self_attention.linear_qkv",   "self_attention.query_key_value",   "attention.qkv_proj",    COLUMN),
    Module("self_attention.q_layernorm",  "",                                 "",                      NORM),
    Module("self_attention.k_layernorm",  "",                                 "",                      NORM),
    Module("self_attention.linear_q_proj", "",                                "",                      COLUMN),
    Module("self_attention.linear_q_down_proj", "",                           "",                      WHOLE),
    Module("self_attention.linear_q_up_proj", "",                             "",                      COLUMN),
    Module("self_attention.linear_kv_down_proj", "",                          "",                      WHOLE),
    Module("self_attention.linear_kv_up_proj", "",                            "",                      COLUMN),
    Module("self_attention.kv_layernorm", "",                                 "",                      NORM,
           "self_attention.linear_kv_up_proj.layer_norm_"),
    Module("self_attention.linear_proj",  "self_attention.dense",             "attention.out_proj",    ROW),
    Module("pre_mlp_layernorm",           "post_attention_norm",              "post_attention_norm",   NORM,
           "mlp.linear_fc1.layer_norm_"),
    Module("mlp.linear_fc1",              "mlp.dense_h_to_4h",                "mlp.mapping",           GATED),
    Module("mlp.linear_fc2",              "mlp.dense_4h_to_h",                "mlp.projection",        ROW),
    Module("mlp.router",                  "",                                 "",                      ROUTER),
    Module("mlp.experts.local_experts.linear_fc1", "",                        "",                      GATED),
    Module("mlp.experts.local_experts.linear_fc2", "",                        "",                      ROW),
    Module("mlp.shared_experts.linear_fc1", "",                               "",                      GATED),
    Module("mlp.shared_experts.linear_fc2", "",                               "",                      ROW),
    Module("mlp.shared_experts",          "",                                 "",                      GATE),
)  # fmt: skip

_EMBEDDING = "language_model.embedding.word_embeddings"
_POSITIONS = "language_model.embedding.position_embeddings"
_NORM = "language_model.encoder.final_norm"
_OUTPUT = "language_model.output_layer"
MODULES = (
    Module("embedding.word_embeddings",     _EMBEDDING,  _EMBEDDING,  VOCABULARY),
    Module("embedding.position_embeddings", _POSITIONS,  _POSITIONS,  WHOLE),
    Module("decoder.final_layernorm",       _NORM,       _NORM,       NORM),
    Module("output_layer",                  _OUTPUT,     _OUTPUT,     VOCABULARY),
    Module("mtp.layers.enorm",              "",          "",          NORM),
    Module("mtp.layers.hnorm",              "",          "",          NORM),
    Module("mtp.layers.eh_proj",            "",          "",          COLUMN),
    Module("mtp.layers.final_layernorm",    "",          "",          NORM),
)  # fmt: skip

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
HEAD = "output_layer.weight"

_LEGACY_LAYER = re.compile(r"language_model\.encoder\.layers\.(\d+)\.(.+)")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_PREDICTION = re.compile(r"mtp\.layers\.\d+\.(?:(transformer_layer)\.)?(.+)")
"""A parameter of a layer that predicts further tokens, or of the transformer layer in it."""
_MODEL_LAYER = re.compile(r"(mtp\.layers\.\d+\.)(?:transformer_layer|mtp_model_layer)\.(.+)")
"""The same as releases call it: by the second name since 0.18."""
_EXPERT = re.compile(r"(?<=\.experts\.local_experts\.)(\d+)\.")
_GROUPED = re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)")
"""An expert's parameter in ``TEGroupedMLP``."""
_Rows = tuple[Mapping[str, Module], Mapping[str, Module]]
"""Of the layers, and outside of them."""
_CANONICAL: _Rows = {row.legacy: row for row in LAYER_MODULES if row.legacy}, {row.legacy: row for row in MODULES}
_ROWS: _Rows = {row.name: row for row in LAYER_MODULES}, {row.name: row for row in MODULES}
FUSED = {f"{row.fused}{leaf}": f"{row.name}.{leaf}" for row in LAYER_MODULES if row.fused for leaf in row.kind.cuts} | {
    f"self_attention.linear_q_up_proj.layer_norm_{leaf}": f"self_attention.q_layernorm.{leaf}" for leaf in NORM.cuts
}
"""Parameters of a layer as Transformer Engine calls them, and distributed checkpoints of any layer spec -> as Megatron's own modules."""
_PLACES = tuple({name: place for place, name in enumerate(rows)} for rows in _ROWS)


class _Name(NamedTuple):
    """A parameter's name in parts: its layer, what follows that, and its row in the table with the leaf of that row."""

    layer: int | None
    inner: str
    row: Module | None
    leaf: str


def _parsed(name: str, pattern: re.Pattern[str] = _LAYER, rows: _Rows = _ROWS) -> _Name:
    found = pattern.fullmatch(name)
    inner = found[2] if found else name
    predicted = None if found else _PREDICTION.fullmatch(name)
    inside = predicted[1] if predicted else found
    spelled = inner if predicted is None else predicted[2] if inside else f"mtp.layers.{predicted[2]}"
    module, _, leaf = _EXPERT.sub("", spelled).rpartition(".")
    row = rows[not inside].get(module)
    known = row if row and leaf in row.kind.cuts else None
    return _Name(int(found[1]) if found else None, inner, known, leaf)


@lru_cache(1 << 12)  # ranks of a stage ask for the same names
def canonical_name(legacy: str, layers: range | None = None) -> str:
    """``language_model.encoder.layers.7.self_attention.dense.weight`` -> ``decoder.layers.7.self_attention.linear_proj.weight``.

    ``layers`` are the global numbers of a chunk's local layers; without it numbers stay what they are.  A parameter outside
    the table keeps its name.
    """
    layer, inner, row, leaf = _parsed(legacy, _LEGACY_LAYER, _CANONICAL)
    if row:
        inner = f"{row.name}.{leaf}"
    if layer is None:
        return inner
    return f"decoder.layers.{layers[layer] if layers else layer}.{inner}"


def legacy_name(name: str) -> str:
    """The inverse of :func:`canonical_name`, with the global number of the layer."""
    layer, inner, row, leaf = _parsed(name)
    if row and row.legacy and not prediction_of(name):
        inner = f"{row.legacy}.{leaf}"
    return inner if layer is None else f"language_model.encoder.layers.{layer}.{inner}"


def legacy_spelling(name: str) -> str:
    """The same for a parameter of a Megatron core model with the layer spec of Transformer Engine or the local one.

    ``decoder.layers.7.mlp.linear_fc1.layer_norm_weight`` -> ``language_model.encoder.layers.7.post_attention_norm.weight``.
    """
    if found := _LAYER.fullmatch(name):
        name = f"decoder.layers.{found[1]}.{_by_modules(found[2])}"
    elif found := _MODEL_LAYER.fullmatch(name):
        name = f"{found[1]}transformer_layer.{_by_modules(found[2])}"
    return legacy_name(name)


def _by_modules(inner: str) -> str:
    """What follows the layer in a name, as the local layer spec has it."""
    return _GROUPED.sub(r"mlp.experts.local_experts.\3.\1.\2", FUSED.get(inner, inner))


def expert_of(name: str) -> int | None:
    """The number of the expert in a name; None where it is of none."""
    found = _EXPERT.search(name)
    return int(found[1]) if found else None


def with_expert(name: str, shift: int) -> str:
    """The name of the expert ``shift`` numbers further on; that of any other parameter stays."""
    return _EXPERT.sub(lambda found: f"{int(found[1]) + shift}.", name) if shift else name


def prediction_of(name: str) -> tuple[str, str] | None:
    """What stands before the transformer layer's own names in a canonical name of one that predicts, and the rest; None for others."""
    found = _PREDICTION.fullmatch(name)
    return (name.removesuffix(found[2]), found[2]) if found and found[1] else None


def without_expert(name: str) -> str:
    """The name without the number of its expert."""
    return _EXPERT.sub("", name)


def expert_count(names: Iterable[str]) -> int:
    """How many experts a layer has, by the numbers in canonical names; 0 for a dense model."""
    return 1 + max((number for name in names if (number := expert_of(name)) is not None), default=-1)


def check_expert_parallel(experts: int, size: int, where: str) -> None:
    """Refuse an expert parallel size that does not divide the ``experts`` of a layer.  Raises :class:`TopologyError`."""
    if size > 1 and (not experts or experts % size):
        raise TopologyError(
            f"{experts or 'no'} experts are in a layer, and the expert parallel size is {size}",
            where=where,
            hint=f"choose one that divides them{aside('target.parallelism.expert')}",
            field="target.parallelism.expert",
        )


def has_experts(inner: str) -> bool:
    """Whether a layer with this parameter, named without its layer, has experts in place of one MLP."""
    return inner.startswith(("mlp.router.", "mlp.experts."))


def is_buffer(name: str) -> bool:
    """Whether it is no parameter, so that no optimizer knows it, though it is saved with the weights."""
    return name.endswith(".mlp.router.expert_bias")


def in_legacy_models(name: str) -> bool:
    """Whether a legacy GPT model can have a parameter of this canonical name; one that no table knows may be anything."""
    row = _parsed(name).row
    return row is None or bool(row.legacy and not prediction_of(name))


def split_layer(name: str) -> tuple[int | None, str]:
    """The number of the layer in a canonical name, and what follows it; outside the layers None, and the whole name."""
    return _parsed(name)[:2]


def layer_of(name: str) -> int | None:
    """The number of the layer in a canonical name; None outside the layers."""
    return _parsed(name)[0]


def model_order(name: str) -> tuple[int, int, int, str]:
    """A key that sorts canonical names as the model runs: embeddings, layers by number, head; then what no table knows."""
    found = _LAYER.fullmatch(name)
    places = _PLACES[not found]
    place = places.get(_EXPERT.sub("", found[2] if found else name).rpartition(".")[0], len(places))
    return (1, int(found[1]), place, name) if found else (0 if name.startswith("embedding.") else 2, 0, place, name)


def kind_of(name: str) -> tuple[Kind, str] | None:
    """The kind of a canonical name's module, and the parameter's own name in it; None outside the table."""
    _, _, row, leaf = _parsed(name)
    return (row.kind, leaf) if row else None


def is_padded(name: str) -> bool:
    """Whether the first axis of a canonical name's parameter is filled up to a size that depends on the layout."""
    known = kind_of(name)
    return known is not None and known[0].padded


class Axes(NamedTuple):
    """The natural axes of a global tensor; ``cut`` is the one that tensor parallelism cuts."""

    shape: Shape
    fused: Shape
    cut: int | None


def axes_of(name: str, local: Shape, tensor: int, *, gated: bool) -> Axes:
    """The global axes of a parameter of which each of ``tensor`` ranks holds ``local``.

    What the table does not know (a module of a rule file) may be cut along any axis or none: then the rank is an axis of its
    own, and such a tensor cannot change its layout.
    """
    known = kind_of(name)
    if known is None:
        return Axes((tensor, *local), (tensor, *local), 0) if tensor > 1 else Axes(local, local, None)
    kind, leaf = known
    axis = kind.cuts[leaf]
    if axis is None:
        return Axes(local, local, None)
    fused = tuple(length * tensor if number == axis else length for number, length in enumerate(local))
    if kind.gated and gated:
        return Axes((2, fused[0] // 2, *fused[1:]), fused, 1)
    return Axes(fused, fused, axis)


def is_gated(shapes: Mapping[str, Shape], where: str) -> bool:
    """Whether the MLP has a gate, by the local shapes of a rank: ``linear_fc1`` then has two rows for a column of ``linear_fc2``.

    Raises :class:`TopologyError` for any other relation.
    """
    for name, shape in shapes.items():
        if name.endswith(".linear_fc1.weight") and len(shape) == 2:
            other = shapes.get(name.replace("linear_fc1", "linear_fc2"), ())
            if len(other) == 2 and shape[0] in {other[1], 2 * other[1]}:
                return shape[0] == 2 * other[1]
            raise TopologyError(
                f"{name} has {shape[0]} rows and its linear_fc2 the shape {list(other)}: neither equal nor twice as many",
                where=where,
                hint="check that the checkpoint is complete, and that all ranks are of one save",
            )
    return False


def modules(rows: Iterable[Module]) -> dict[str, tuple[str, str]]:
    """Megatron 0.6's name of each module -> MindSpeed-Core-MS's, and whether it is a norm or linear."""
    return {row.legacy: (row.mindspore, "norm" if row.kind.norm else "linear") for row in rows if row.mindspore}
