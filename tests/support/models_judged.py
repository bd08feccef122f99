"""Run with a release of transformers, or of megatron-core, on PYTHONPATH: make models of transformers, and compute what models say.

``transformers`` or ``megatron`` is the argument; one case is a line of JSON on stdin, and is answered by a line on stdout: what failed, or nothing.
A case with a ``name`` of :data:`MODELS` saves that model into ``folder``, with ``ids`` and ``logits`` in ``said``.  Any other loads ``folder``,
computes the logits of the ids in ``given`` and puts them in ``said``.  Everything is float32 and on the CPU.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

_DENSE = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_DEEPSEEK = {
    **_DENSE, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24,
    "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.5,
    "original_max_position_embeddings": 4096,
}  # fmt: skip

MODELS: dict[str, dict[str, Any]] = {
    "llama_scaled": {"model_type": "llama", **_DENSE, "head_dim": 16, "rms_norm_eps": 1e-5, "rope_scaling": _LLAMA3},
    "llama_linear_tied": {
        "model_type": "llama", **_DENSE, "tie_word_embeddings": True, "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "llama_biases": {"model_type": "llama", **_DENSE, "attention_bias": True, "mlp_bias": True},
    "qwen2_tied": {"model_type": "qwen2", **_DENSE, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_DENSE, "head_dim": 16},
    "qwen3_moe_dense_first": {
        "model_type": "qwen3_moe", **_DENSE, **_EXPERTS, "head_dim": 16, "mlp_only_layers": [0], "norm_topk_prob": True,
    },
    "qwen3_moe_before_topk": {"model_type": "qwen3_moe", **_DENSE, **_EXPERTS, "head_dim": 8, "norm_topk_prob": False},
    "qwen2_moe": {
        "model_type": "qwen2_moe", **_DENSE, **_EXPERTS, "shared_expert_intermediate_size": 40, "norm_topk_prob": False,
    },
    "mixtral": {"model_type": "mixtral", **_DENSE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "deepseek_v3": {"model_type": "deepseek_v3", **_DEEPSEEK},
    "deepseek_v3_groups": {"model_type": "deepseek_v3", **_DEEPSEEK, "n_group": 4, "topk_group": 2},
    "deepseek_v3_yarn": {"model_type": "deepseek_v3", **_DEEPSEEK, "rope_scaling": _YARN},
    "gpt2": {"model_type": "gpt2", "vocab_size": 101, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- transformers


def config_of(transformers: Any, fields: dict[str, Any]) -> Any:
    """As this release spells it: 5 has what concerns the rotary embedding in one field."""
    given = dict(fields)
    if int(transformers.__version__.partition(".")[0]) >= 5 and "rope_theta" in given:
        scaling = given.pop("rope_scaling", {"rope_type": "default"})
        given["rope_parameters"] = {"rope_theta": given.pop("rope_theta"), **scaling}
    return transformers.AutoConfig.for_model(**given)


def fill(torch: Any, model: Any, seed: int) -> None:
    """Weights of the size that a trained model has: with those of a fresh one most mistakes hide."""
    torch.manual_seed(seed)
    turned = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module).__name__ == "Conv1D"  # (columns, rows)
    }
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape)
        if tensor.dim() > 1:
            tensor.copy_(1.2 * noise / tensor.shape[0 if name in turned else -1] ** 0.5)
        else:
            tensor.copy_(0.3 * noise + float(name.endswith("weight")))
    for name, tensor in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            # 4.57 masks groups with 0, 5 and Megatron-LM with -inf: alike as long as no score is negative.
            tensor.copy_(0.2 * torch.rand(tensor.shape))


def make(case: dict[str, Any]) -> None:
    """Save a model, and what it says."""
    torch, transformers = import_module("torch"), import_module("transformers")
    fields = MODELS[case["name"]]
    model = transformers.AutoModelForCausalLM.from_config(
        config_of(transformers, fields), attn_implementation="eager", torch_dtype=torch.float32
    )
    with torch.no_grad():
        fill(torch, model, seed=len(case["name"]))
        ids = torch.randint(0, fields["vocab_size"], (2, 16))
        logits = model.eval()(ids).logits
    model.save_pretrained(case["folder"])
    np.savez(case["said"], ids=ids.numpy(), logits=logits.numpy())


def by_transformers(case: dict[str, Any]) -> None:
    """Load a model without a tensor too few or too many."""
    torch, transformers = import_module("torch"), import_module("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        case["folder"], output_loading_info=True, attn_implementation="eager", torch_dtype=torch.float32
    )
    left = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if left:
        raise ValueError(f"{case['folder']}: {left}")
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(np.load(case["given"])["ids"])).logits
    np.savez(case["said"], logits=logits.numpy())


# -------------------------------------------------------------------------------------------------------- megatron-core


def stand_in(torch: Any) -> type:
    """Causal attention for heads whose keys and values differ in size, which the local one of Megatron-LM does not take."""

    class Attention(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, config: Any, *_: Any, softmax_scale: float, **__: Any) -> None:
            super().__init__()
            self.scale = softmax_scale

        def forward(self, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
            """(tokens, batch, heads, channels) each."""
            scores = torch.einsum("sbhd,tbhd->bhst", query, key) * self.scale
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            weights = scores.masked_fill(later, float("-inf")).softmax(-1)
            return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)

    return Attention


def arguments_of(stored: SimpleNamespace) -> Any:
    """Megatron-LM's own defaults, and what the checkpoint says; and no kernel of a GPU."""
    sys.argv = ["pretrain"]
    args: Any = import_module("megatron.training.arguments").parse_args()
    for name, value in vars(stored).items():
        setattr(args, name, value)
    without = (
        "masked_softmax_fusion",
        "bias_swiglu_fusion",
        "bias_dropout_fusion",
        "apply_rope_fusion",
        "gradient_accumulation_fusion",
    )
    for name in ("no_persist_layer_norm", "use_cpu_initialization"):
        setattr(args, name, True)
    for name in without:
        setattr(args, name, False)
    args.params_dtype = import_module("torch").float32
    args.transformer_impl, args.moe_token_dispatcher_type, args.moe_grouped_gemm = "local", "alltoall", False
    return args


def built(args: Any, tokens: int) -> Any:
    """The model that pretrain_gpt.py builds of these arguments."""
    core = import_module("megatron.core.models.gpt")
    layers = import_module("megatron.core.models.gpt.gpt_layer_specs")
    config = import_module("megatron.training.arguments").core_transformer_config_from_args(args)
    if args.num_experts:
        spec = layers.get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    else:
        spec = layers.get_gpt_layer_local_spec(
            qk_layernorm=args.qk_layernorm, normalization=args.normalization,
            multi_latent_attention=args.multi_latent_attention,
        )  # fmt: skip
    if args.multi_latent_attention:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = stand_in(import_module("torch"))
    return core.GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=tokens,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
    )


def by_megatron(case: dict[str, Any]) -> None:
    """Load a checkpoint strictly."""
    torch = import_module("torch")
    (file,) = Path(case["folder"]).glob("iter_*/mp_rank_00/model_optim_rng.pt")
    found = torch.load(file, weights_only=False)
    model = built(arguments_of(found["args"]), tokens=len(found["model"]["embedding.word_embeddings.weight"]))
    model.load_state_dict(found["model"], strict=True)
    ids = torch.from_numpy(np.load(case["given"])["ids"])
    places = torch.arange(ids.shape[1]).expand_as(ids)
    later = torch.ones((1, 1, ids.shape[1], ids.shape[1]), dtype=torch.bool).triu(1)
    with torch.no_grad():
        logits = model.eval()(ids, places, later)
    np.savez(case["said"], logits=logits.numpy())


def start_megatron() -> None:
    """One rank, and no GPU."""
    support = import_module("megatron_cpu")
    support.without_gpu()
    torch = import_module("torch")
    torch.cuda.random.get_rng_state, torch.cuda.random.set_rng_state = (
        torch.cuda.get_rng_state,
        torch.cuda.set_rng_state,
    )
    support.OnCpu().__enter__()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    import_module("megatron.core.parallel_state").initialize_model_parallel()
    import_module("megatron.core.tensor_parallel.random").model_parallel_cuda_manual_seed(1)


def answer(kind: str, case: dict[str, Any]) -> None:
    """Do what a case asks for."""
    if "name" in case:
        make(case)
    elif kind == "megatron":
        by_megatron(case)
    else:
        by_transformers(case)


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # both print
    kind = sys.argv[1]
    if kind == "megatron":
        start_megatron()
    for line in sys.stdin:
        failed = ""
        try:
            answer(kind, json.loads(line))
        except Exception:  # noqa: BLE001  # the test says it
            failed = traceback.format_exc()
        print(json.dumps(failed), file=answers, flush=True)
