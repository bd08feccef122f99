"""All training arguments of a run from those that a description gives, by the rules of Megatron-LM 0.6.

What is worked out and what is taken as the default is kept apart from what was said: both are assumptions.
Rules: Megatron-LM cac60ce4, megatron/arguments.py (``validate_args``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import UsageError
from ckpt2pt.formats.ptmeta.describe import Description, known
from ckpt2pt.formats.ptmeta.gpt import Argument

_HINT = "add it to the description (docs/pt-meta.md)"
_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "micro_batch_size", "lr")
#   argument                 what alone can be synthesised
_SUPPORTED: Mapping[str, tuple[Argument, ...]] = {
    "use_distributed_optimizer": (True,),
    "use_mcore_models":          (False,),
    "transformer_impl":          ("local",),
    "optimizer":                 ("adam",),
    "fp16":                      (False,),
    "num_experts":               (None,),
    "standalone_embedding_stage": (False,),
    "decoupled_lr":              (None,),
    "retro_add_retriever":       (False,),
    "rampup_batch_size":         (None,),
    "data_parallel_random_init": (False,),
}  # fmt: skip


_Derive = Callable[[str, Argument], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """``values`` in Megatron's order; ``derived`` and ``defaults`` name those that nobody said, with their values."""

    values: Mapping[str, Argument]
    derived: Mapping[str, Argument]
    defaults: Mapping[str, Argument]

    def number(self, name: str) -> int:
        """An argument that is an integer."""
        return integer(self.values, name)


_WHATEVER = ("use_distributed_optimizer", "use_mcore_models", "transformer_impl", "fp16", "num_experts")
"""What decides nothing where the result is not of Megatron-LM 0.6, or is decided there."""


def complete(said: Description, *, data: int | None, vocabulary: int | None, today: bool = False) -> Arguments:
    """Fill in what the description leaves out; ``today`` describes a run of a release after 0.6.

    ``data`` is the data x context parallel size if it is known by another way than the description; ``vocabulary`` the
    padded size that the MindSpore files show.
    """
    defaults = known().arguments
    values: dict[str, Argument] = dict(defaults) | dict(said.given)
    derived: dict[str, Argument] = {}

    def derive(name: str, value: Argument) -> None:
        if values.get(name) != value or name not in said.given:
            derived[name] = values[name] = value

    for name in _REQUIRED:
        if values[name] is None:
            raise UsageError(f"the description does not give {name}", where=said.path, hint=_HINT)
    _check_supported({**values, **{name: _SUPPORTED[name][0] for name in _WHATEVER}} if today else values, said)
    if values["fp16"] and values["bf16"]:
        raise UsageError(
            "the description gives both bf16 and fp16", where=said.path, hint="leave out the one that the run has not"
        )
    if not values["bf16"]:
        derive("params_dtype", "float16" if values["fp16"] else "float32")
    else:
        derive("params_dtype", "bfloat16")
        derive("accumulate_allreduce_grads_in_fp32", True)
    _derive_sizes(values, derive)
    _derive_degrees(values, said, data, derive)
    _derive_rest(values, derive)
    if values["padded_vocab_size"] is None and vocabulary:
        derive("padded_vocab_size", vocabulary)
    return Arguments(
        values=values | dict(said.unknown),
        derived=derived,
        defaults={name: values[name] for name in defaults if name not in said.given and name not in derived},
    )


def _check_supported(values: Mapping[str, Argument], said: Description) -> None:
    for name, allowed in _SUPPORTED.items():
        if values[name] not in allowed:
            raise UsageError(
                f"{name} is {values[name]}; metadata of such a run cannot be made from a description",
                where=said.path,
                hint="make it from a checkpoint: run Megatron for one step, then ckpt2pt pt-meta --megatron-path",
            )


def _derive_sizes(values: dict[str, Argument], derive: _Derive) -> None:
    hidden, heads = integer(values, "hidden_size"), integer(values, "num_attention_heads")
    if values["encoder_num_layers"] is None:
        derive("encoder_num_layers", values["num_layers"])
    if values["ffn_hidden_size"] is None:
        derive("ffn_hidden_size", int((4 * hidden * 2 / 3) / 64) * 64 if values["swiglu"] else 4 * hidden)
    if values["kv_channels"] is None:
        derive("kv_channels", hidden // heads)
    if values["encoder_seq_length"] is None:
        derive("encoder_seq_length", values["seq_length"])
    if values["max_position_embeddings"] is None and values["seq_length"] is not None:
        derive("max_position_embeddings", values["seq_length"])
    if values["use_rotary_position_embeddings"]:
        derive("position_embedding_type", "rope")


def _derive_degrees(values: dict[str, Argument], said: Description, data: int | None, derive: _Derive) -> None:
    tensor, context = integer(values, "tensor_model_parallel_size"), integer(values, "context_parallel_size")
    pipeline = integer(values, "pipeline_model_parallel_size")
    model = tensor * pipeline * context
    stated = None if values["data_parallel_size"] is None else integer(values, "data_parallel_size")
    world = said.world_size
    if "world_size" in said.given:
        world = integer(values, "world_size")
    if world is None:
        world = stated * model if stated else (data or context) * tensor * pipeline
    if world % model:
        raise UsageError(
            f"{world} ranks do not divide into tensor {tensor} x pipeline {pipeline} x context {context}",
            where=said.path,
            hint="check the degrees and world_size of the description",
        )
    if stated not in {None, world // model}:
        raise UsageError(
            f"data_parallel_size is {stated}, but {world} ranks by tensor {tensor} x pipeline {pipeline} x context "
            f"{context} are {world // model}",
            where=said.path,
            hint="correct world_size or data_parallel_size of the description, or leave one of them out",
        )
    derive("world_size", world)
    derive("data_parallel_size", world // model)
    derive("transformer_pipeline_model_parallel_size", pipeline)
    each = values["num_layers_per_virtual_pipeline_stage"]
    if isinstance(each, int) and each > 0:
        derive("virtual_pipeline_model_parallel_size", integer(values, "num_layers") // pipeline // each)
    if values["global_batch_size"] is None:
        derive("global_batch_size", integer(values, "micro_batch_size") * (world // model))


def _derive_rest(values: dict[str, Argument], derive: _Derive) -> None:
    if values["dataloader_type"] is None:
        derive("dataloader_type", "single")
    if values["weight_decay_incr_style"] == "constant":
        derive("start_weight_decay", values["weight_decay"])
        derive("end_weight_decay", values["weight_decay"])
    if integer(values, "tensor_model_parallel_size") == 1 and values["sequence_parallel"]:
        derive("sequence_parallel", False)
    if values["sequence_parallel"]:
        derive("async_tensor_model_parallel_allreduce", False)
    if not values["add_bias_linear"] and values["bias_gelu_fusion"]:
        derive("bias_gelu_fusion", False)
    if values["lr_decay_iters"] is None and values["train_iters"] is not None:
        derive("lr_decay_iters", values["train_iters"])
    if values["lr_decay_samples"] is None and values["train_samples"] is not None:
        derive("lr_decay_samples", values["train_samples"])
    if values["local_rank"] is None:
        derive("local_rank", 0)


def topology_of(
    arguments: Mapping[str, Argument],
    *,
    data: int,
    context: int,
    noop: frozenset[int],
    layers_per_stage: tuple[int, ...] | None,
) -> Topology:
    """The cut of the Megatron run; ``data`` and ``context`` are those of the MindSpore training, which number its ranks."""
    virtual = arguments.get("virtual_pipeline_model_parallel_size")
    return Topology(
        num_layers=integer(arguments, "num_layers"),
        tensor=integer(arguments, "tensor_model_parallel_size"),
        pipeline=integer(arguments, "pipeline_model_parallel_size"),
        virtual=virtual if isinstance(virtual, int) else 1,
        data=data,
        context=context,
        noop=noop,
        layers_per_stage=layers_per_stage,
    )


def integer(values: Mapping[str, Argument], name: str) -> int:
    """An argument that must be a positive integer."""
    value = values.get(name)
    if type(value) is not int or value < 1:
        raise UsageError(f"{name} is {value}, not a number above 0", where="the model description", hint=_HINT)
    return value


def floating(values: Mapping[str, Argument], name: str, default: float | None = None) -> float:
    """An argument that must be a number."""
    value = values.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{name} is {value}, not a number", where="the model description", hint=_HINT)
    return value
