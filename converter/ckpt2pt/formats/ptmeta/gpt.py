"""The parameters of a legacy GPT model of Megatron-LM 0.6 in order of registration, from its training arguments.  Pure.

Megatron-LM cac60ce4: megatron/model/language_model.py (embedding, encoder, output layer), transformer.py
(ParallelTransformerLayer) and module.py (``initialize_word_embeddings``, which adds the last stage's tied copy last).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckpt2pt.core.buckets import expected_shape
from ckpt2pt.core.layout import Parameter
from ckpt2pt.core.names import TIED_HEAD
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import UsageError

Argument = bool | int | float | str | list[object] | None

EMBEDDING = "language_model.embedding.word_embeddings.weight"


def chunk_parameters(
    args: Mapping[str, Argument], topology: Topology, *, pp: int, vpp: int, dtype: str
) -> tuple[Parameter, ...]:
    """Parameters of one model chunk with their local shapes."""
    sizes = {name: value for name, value in args.items() if isinstance(value, int)}
    tied = args.get("untie_embeddings_and_output_weights") is False and topology.pipeline > 1
    found: list[Parameter] = []
    for name in _names(args, topology, pp, vpp):
        shape = expected_shape(name, sizes, topology.tensor)
        if shape is None:
            raise UsageError(
                f"the shape of {name} cannot be determined",
                where="the model description",
                hint="give hidden_size, num_attention_heads, kv_channels, ffn_hidden_size, padded_vocab_size and "
                "max_position_embeddings",
            )
        shared = tied and name in {EMBEDDING, TIED_HEAD}
        found.append(Parameter(name=name, shape=shape, dtype=dtype, shared=shared))
    return tuple(found)


def _names(args: Mapping[str, Argument], topology: Topology, pp: int, vpp: int) -> Iterator[str]:
    norm = ("weight",) if args.get("normalization") == "RMSNorm" else ("weight", "bias")
    linear = ("weight", "bias") if args.get("add_bias_linear") else ("weight",)
    qkv = ("weight", "bias") if args.get("add_bias_linear") or args.get("add_qkv_bias") else ("weight",)
    modules = {
        "input_norm": norm,
        "self_attention.query_key_value": qkv,
        "self_attention.dense": linear,
        "post_attention_norm": norm,
        "mlp.dense_h_to_4h": linear,
        "mlp.dense_4h_to_h": linear,
    }
    if topology.holds_embedding(pp, vpp):
        yield EMBEDDING
        if args.get("position_embedding_type") == "learned_absolute":
            yield "language_model.embedding.position_embeddings.weight"
    for local in topology.real_slots(pp, vpp):
        for module, leaves in modules.items():
            for leaf in leaves:
                yield f"language_model.encoder.layers.{local}.{module}.{leaf}"
    if topology.holds_head(pp, vpp):
        for leaf in norm:
            yield f"language_model.encoder.final_norm.{leaf}"
        if args.get("untie_embeddings_and_output_weights"):
            yield "language_model.output_layer.weight"
        elif topology.pipeline > 1:
            yield TIED_HEAD
