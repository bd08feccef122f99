"""Sets of ``hf/``: a model as Megatron-LM holds it, the same as transformers reads it, and the logits that Megatron computed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from goldens import golden_root

SETS = ("llama", "llama_tied_padded", "moe", "qwen3_moe")
NAMES = {"llama": "LlamaForCausalLM", "llama_tied_padded": "LlamaForCausalLM", "moe": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}  # fmt: skip
TOKENS = {"llama_tied_padded": 101}
"""What nothing but the tokenizer says."""


def folder_of(name: str) -> Path:
    """A set."""
    return golden_root() / "hf" / name


def arguments(name: str) -> dict[str, Any]:
    """The arguments of Megatron-LM that matter."""
    args = json.loads((folder_of(name) / "args.json").read_text())
    args.pop("checkpoint", None)
    return {
        **args,
        "iteration": 2,
        "consumed_train_samples": 12,
        "pipeline_model_parallel_size": 1,
        "global_batch_size": 6,
        "params_dtype": torch.bfloat16,
        "bf16": True,
    }


def save_megatron(name: str, target: Path, **changed: object) -> Path:
    """A checkpoint of one rank, weights alone, as Megatron-LM saves it with torch; ``changed`` arguments."""
    tensors = {
        key: torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
        if value.dtype == np.uint16
        else torch.from_numpy(value)
        for key, value in np.load(folder_of(name) / "mcore.npz").items()
    }
    place = target / "iter_0000002" / "mp_rank_00"
    place.mkdir(parents=True)
    args = argparse.Namespace(**{**arguments(name), **changed})
    torch.save(
        {"args": args, "checkpoint_version": 3.0, "iteration": 2, "model": tensors}, place / "model_optim_rng.pt"
    )
    (target / "latest_checkpointed_iteration.txt").write_text("2")
    return target
