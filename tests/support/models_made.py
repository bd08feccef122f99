"""Models of the eight classes of transformers that are read and written, with random weights: config.json, names and shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mindformers_made import write_safetensors

Arrays = dict[str, npt.NDArray[Any]]
_DECODER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "vocab_size": 40, "hidden_act": "silu",
    "tie_word_embeddings": False, "initializer_range": 0.02, "attention_dropout": 0.0,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "router_aux_loss_coef": 0.001,
}  # fmt: skip
CONFIGS: Mapping[str, dict[str, Any]] = {
    "llama": _DECODER | {"attention_bias": False, "mlp_bias": False},
    "llama_biased": _DECODER | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama_scaled": _DECODER
    | {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    },
    "llama_linear": _DECODER | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "qwen2": _DECODER | {"use_sliding_window": False},
    "qwen3": _DECODER | {"attention_bias": False, "use_sliding_window": False},
    "qwen3_moe": _DECODER | _EXPERTS | {"mlp_only_layers": [0], "norm_topk_prob": False},
    "qwen2_moe": _DECODER | _EXPERTS | {"shared_expert_intermediate_size": 12},
    "mixtral": _DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None, "router_aux_loss_coef": 0.02},
    "deepseek_v3": {name: value for name, value in _DECODER.items() if name != "head_dim"}
    | {
        "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "q_lora_rank": 6, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2,
        "v_head_dim": 4, "n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
        "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True,
        "rope_scaling": {
            "rope_type": "yarn", "type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
        },
    },
    "deepseek_direct": {},
    "gpt2": {
        "n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 40, "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_pytorch_tanh", "tie_word_embeddings": True, "attn_pdrop": 0.1, "resid_pdrop": 0.1,
        "embd_pdrop": 0.1, "initializer_range": 0.02,
    },
}  # fmt: skip
CONFIGS["deepseek_direct"].update({**CONFIGS["deepseek_v3"], "q_lora_rank": None, "n_group": 1})
del CONFIGS["deepseek_direct"]["rope_scaling"]
CLASSES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM", "mixtral": "MixtralForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM", "gpt2": "GPT2LMHeadModel",
}  # fmt: skip


def config_of(name: str) -> dict[str, Any]:
    """config.json of a model."""
    kind = next(
        kind
        for kind in sorted(CLASSES, key=len, reverse=True)
        if name.startswith(kind.partition("_v3")[0]) and (kind != "qwen3" or "moe" not in name)
    )
    return {"model_type": kind, "architectures": [CLASSES[kind]], "torch_dtype": "bfloat16", **deepcopy(CONFIGS[name])}


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the class."""
    kind, tokens = config["model_type"], config["vocab_size"]
    if kind == "gpt2":
        return _gpt2(config)
    hidden, layers, ffn = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (tokens, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (tokens, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        found |= {f"{at}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        found |= {f"{at}self_attn.{name}": shape for name, shape in _attention(config).items()}
        sparse = (
            layer >= config["first_k_dense_replace"]
            if kind == "deepseek_v3"
            else "num_experts_per_tok" in config and layer not in config.get("mlp_only_layers", [])
        )
        if not sparse:
            found |= {
                f"{at}mlp.{name}": shape for name, shape in _mlp(hidden, ffn, bias=bool(config.get("mlp_bias"))).items()
            }
            continue
        experts = config.get("num_experts") or config.get("num_local_experts") or config["n_routed_experts"]
        own = f"{at}block_sparse_moe." if kind == "mixtral" else f"{at}mlp."
        width = ffn if kind == "mixtral" else config["moe_intermediate_size"]
        names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if kind == "mixtral" else {}
        found[f"{own}gate.weight"] = (experts, hidden)
        for expert in range(experts):
            for name, shape in _mlp(hidden, width).items():
                module = name.partition(".")[0]
                found[f"{own}experts.{expert}.{names.get(module, module)}.weight"] = shape
        if kind == "qwen2_moe":
            shared = _mlp(hidden, config["shared_expert_intermediate_size"])
            found |= {f"{own}shared_expert.{name}": shape for name, shape in shared.items()}
            found[f"{own}shared_expert_gate.weight"] = (1, hidden)
        if kind == "deepseek_v3":
            shared = _mlp(hidden, config["n_shared_experts"] * width)
            found |= {f"{own}shared_experts.{name}": shape for name, shape in shared.items()}
            found[f"{own}gate.e_score_correction_bias"] = (experts,)
    return found


def _mlp(hidden: int, ffn: int, *, bias: bool = False) -> dict[str, tuple[int, ...]]:
    shapes = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    return _leaves(shapes, set(shapes) if bias else set())


def _attention(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if config["model_type"] == "deepseek_v3":
        nope, rope, value = (config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        latent, query = config["kv_lora_rank"], config["q_lora_rank"]
        rows = heads * (nope + rope)
        shapes: dict[str, tuple[int, ...]] = {
            "kv_a_proj_with_mqa": (latent + rope, hidden), "kv_a_layernorm": (latent,), "kv_b_proj": (heads * (nope + value), latent),
            "o_proj": (hidden, heads * value),
        }  # fmt: skip
        direct = {"q_proj": (rows, hidden)}
        through = {"q_a_proj": (query, hidden), "q_a_layernorm": (query,), "q_b_proj": (rows, query)}
        return _leaves({**shapes, **(through if query else direct)}, set())
    width, groups = config["head_dim"], config["num_key_value_heads"]
    shapes = {
        "q_proj": (heads * width, hidden), "k_proj": (groups * width, hidden), "v_proj": (groups * width, hidden),
        "o_proj": (hidden, heads * width),
    }  # fmt: skip
    biased = set(shapes) if config.get("attention_bias") else set()
    if config["model_type"] in {"qwen2", "qwen2_moe"}:
        biased = {"q_proj", "k_proj", "v_proj"}
    if config["model_type"].startswith("qwen3"):
        shapes |= {"q_norm": (width,), "k_norm": (width,)}
    return _leaves(shapes, biased)


def _leaves(shapes: Mapping[str, tuple[int, ...]], biased: set[str]) -> dict[str, tuple[int, ...]]:
    weights = {f"{name}.weight": shape for name, shape in shapes.items()}
    return weights | {f"{name}.bias": shapes[name][:1] for name in sorted(biased)}


def _gpt2(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn = config["n_embd"], config["n_inner"]
    found: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (config["vocab_size"], hidden),
        "transformer.wpe.weight": (config["n_positions"], hidden),
    }
    inner = {"ln_1": (hidden,), "attn.c_attn": (hidden, 3 * hidden), "attn.c_proj": (hidden, hidden)}
    inner |= {"ln_2": (hidden,), "mlp.c_fc": (hidden, ffn), "mlp.c_proj": (ffn, hidden)}
    for name, shape in {
        f"h.{layer}.{name}": shape for layer in range(config["n_layer"]) for name, shape in inner.items()
    }.items():
        found |= {f"transformer.{name}.weight": shape, f"transformer.{name}.bias": shape[-1:]}
    return found | {"transformer.ln_f.weight": (hidden,), "transformer.ln_f.bias": (hidden,)}


def arrays_of(config: Mapping[str, Any], seed: int = 0) -> Arrays:
    """Random bits of bfloat16, none of them a NaN; the correction bias of a router is float32."""
    random = np.random.default_rng(seed)

    def of(name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        if name.endswith("e_score_correction_bias"):
            return random.standard_normal(shape, dtype=np.float32)
        return random.integers(0, 0x7F00, shape, dtype=np.uint16)

    return {name: of(name, shape) for name, shape in shapes_of(config).items()}


def save(folder: Path, config: Mapping[str, Any], arrays: Arrays, *, shards: int = 1) -> Path:
    """The folder of a model, of one file or of several with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", arrays)
        return folder
    names = list(arrays)
    files = {name: f"model-{1 + place % shards:05d}-of-{shards:05d}.safetensors" for place, name in enumerate(names)}
    for file in sorted(set(files.values())):
        write_safetensors(folder / file, {name: arrays[name] for name in names if files[name] == file})
    index = {"metadata": {"total_size": sum(array.nbytes for array in arrays.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
