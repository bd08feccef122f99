"""The model that arguments describe has to be the one that the tensors are of, or no run could load the result.  Pure.

Sizes: Megatron-LM 0.6 to 0.19, megatron/training/arguments.py; megatron/core/transformer/attention.py (rows of linear_qkv), mlp.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ckpt2pt.core.index import Index
from ckpt2pt.core.params import EMBEDDING, layer_of
from ckpt2pt.core.tensor import Key, Tensor
from ckpt2pt.errors import FormatError, ref

_POSITIONS = "embedding.position_embeddings.weight"


class _Contradiction(NamedTuple):
    argument: str
    stated: str
    found: str


def check_architecture(args: Mapping[str, object], index: Index, *, where: str, source: str) -> None:
    """Refuse arguments of another model than that of the tensors; what they do not state is not compared.

    ``where`` names what states them, ``source`` the checkpoint.  Raises :class:`FormatError`.
    """
    for wrong in (*_layers(args, index), *_modules(args, index)):
        raise FormatError(
            f"{wrong.argument} is {wrong.stated}, and the checkpoint has {wrong.found} ({source})",
            where=where,
            hint=f"check that {ref('metadata.path')} belongs to this model",
            field="metadata.path",
        )


def _layers(args: Mapping[str, object], index: Index) -> Iterator[_Contradiction]:
    """No-op layers have no parameters, so that there may be fewer."""
    count = len({layer_of(key.name) for key in index} - {None})
    stated = _number(args, "num_layers")
    if stated and count > stated:
        yield _Contradiction("num_layers", str(stated), f"{count} layers")


def _modules(args: Mapping[str, object], index: Index) -> Iterator[_Contradiction]:
    weights = {_of_any_layer(key.name): tensor for key, tensor in index.items() if key.role == "param"}
    hidden = _number(args, "hidden_size")
    if (embedding := index.get(Key("param", EMBEDDING))) and hidden not in (None, embedding.fused[1]):
        yield _Contradiction("hidden_size", str(hidden), f"{embedding.fused[1]} columns of {EMBEDDING}")
    yield from _attention(args, weights.get("self_attention.linear_qkv.weight"))
    if (fc1 := weights.get("mlp.linear_fc1.weight")) and (ffn := _number(args, "ffn_hidden_size")):
        gated, rows = args.get("swiglu"), fc1.fused[0]
        if (gated is True and rows != 2 * ffn) or (gated is False and rows not in (ffn, 2 * ffn)):
            yield _Contradiction("ffn_hidden_size", f"{ffn} and swiglu {gated}", f"{rows} rows of {fc1.key.name}")
    kind = args.get("position_embedding_type")
    if isinstance(kind, str) and (kind == "learned_absolute") != (_POSITIONS in weights):
        yield _Contradiction("position_embedding_type", kind, f"{'a' if _POSITIONS in weights else 'no'} {_POSITIONS}")
    biased, has_bias = args.get("add_bias_linear"), "self_attention.linear_proj.bias" in weights
    if "self_attention.linear_proj.weight" in weights and isinstance(biased, bool) and biased != has_bias:
        yield _Contradiction(
            "add_bias_linear", str(biased), f"{'a' if has_bias else 'no'} self_attention.linear_proj.bias"
        )


def _attention(args: Mapping[str, object], qkv: Tensor | None) -> Iterator[_Contradiction]:
    """Rows are those of all queries, of all keys and of all values."""
    heads, hidden, grouped = (
        _number(args, "num_attention_heads"),
        _number(args, "hidden_size"),
        args.get("group_query_attention"),
    )
    other = args.get("multi_latent_attention") or args.get("attention_output_gate")
    if qkv is None or not heads or not hidden or not isinstance(grouped, bool) or other:
        return
    groups = _number(args, "num_query_groups") if grouped else heads
    channels = _number(args, "kv_channels") or hidden // heads
    if groups and (heads + 2 * groups) * channels != qkv.fused[0]:
        stated = f"{heads}, with {groups} query groups of {channels} channels"
        yield _Contradiction("num_attention_heads", stated, f"{qkv.fused[0]} rows of {qkv.key.name}")


def _number(args: Mapping[str, object], name: str) -> int | None:
    value = args.get(name)
    return value if type(value) is int and value > 0 else None


def _of_any_layer(name: str) -> str:
    layer = layer_of(name)
    return name if layer is None else name.partition(f".{layer}.")[2]
