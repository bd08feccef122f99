"""Small checkpoints of mixtures of experts, laid out as Megatron-LM 0.8 to 0.19 lay them out; torch writes them.

Every size is a multiple of 64, so that a buffer is its parameters in reverse order of registration, end to end.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

HIDDEN, FFN, EXPERTS, LAYERS = 64, 32, 4, 2
HEAD = "output_layer.weight"
KINDS = ("param", "exp_avg", "exp_avg_sq")
ROLES = {"param": "main_param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
SCHEDULER = {
    "max_lr": 1e-3, "lr_warmup_steps": 12, "num_steps": 12, "lr_decay_style": "cosine", "lr_decay_steps": 600,
    "min_lr": 1e-4, "start_wd": 0.1, "end_wd": 0.1, "wd_incr_style": "constant", "wd_incr_steps": 18,
}  # fmt: skip
Tensors = dict[tuple[str, str], torch.Tensor]


def global_tensors(*, shared: bool = True, seed: int = 3) -> Tensors:
    """(role, canonical name) -> values; weights are rounded main parameters."""
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (128, HIDDEN)}
    for layer in range(LAYERS):
        inner: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (HIDDEN,),
            "self_attention.linear_proj.weight": (HIDDEN, HIDDEN),
            "self_attention.linear_qkv.weight": (3 * HIDDEN, HIDDEN),
            "pre_mlp_layernorm.weight": (HIDDEN,),
            "mlp.router.weight": (EXPERTS, HIDDEN),
        }
        for expert in range(EXPERTS):
            inner[f"mlp.experts.local_experts.{expert}.linear_fc1.weight"] = (2 * FFN, HIDDEN)
            inner[f"mlp.experts.local_experts.{expert}.linear_fc2.weight"] = (HIDDEN, FFN)
        if shared:
            inner["mlp.shared_experts.linear_fc1.weight"] = (2 * FFN, HIDDEN)
            inner["mlp.shared_experts.linear_fc2.weight"] = (HIDDEN, FFN)
        shapes |= {f"decoder.layers.{layer}.{name}": shape for name, shape in inner.items()}
    shapes |= {"decoder.final_layernorm.weight": (HIDDEN,), "output_layer.weight": (128, HIDDEN)}
    draw = torch.Generator().manual_seed(seed)
    found = {
        (role, name): torch.randn(shape, generator=draw) for name, shape in shapes.items() for role in ROLES.values()
    }
    return found | {("param", name): found["main_param", name].bfloat16() for name in shapes}


def groups_of(experts: bool) -> dict[str, Any]:
    """The state of an optimizer without its tensors: matrices decay, and experts have nothing but matrices."""
    groups = [
        {
            "wd_mult": wd_mult, "lr_mult": 1.0, "is_expert_parallel": experts, "is_decoupled_lr": False, "max_lr": 1e-3,
            "min_lr": 1e-4, "lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.95), "eps": 1e-8,
            "weight_decay": 0.1 * wd_mult, "step": 2,
        }
        for wd_mult in ((1.0,) if experts else (1.0, 0.0))
    ]  # fmt: skip
    return {"optimizer": {"param_groups": groups}}


def tied(tensors: Tensors) -> Tensors:
    """The same with a head that is the embedding."""
    return {
        (role, name): tensors[role, "embedding.word_embeddings.weight" if name == HEAD else name]
        for role, name in tensors
    }


def save_experts(
    folder: Path,
    tensors: Tensors,
    *,
    experts: int,
    stages: int = 1,
    chunks: int = 1,
    grouped: bool = False,
    untied: bool = True,
) -> Path:
    """Write it for ``experts`` expert parallel ranks, each with a part of the experts in buffers of their own."""
    args = Namespace(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=4, num_experts=EXPERTS, padded_vocab_size=128,
        tensor_model_parallel_size=1, pipeline_model_parallel_size=stages, expert_model_parallel_size=experts,
        untie_embeddings_and_output_weights=untied, use_distributed_optimizer=True, data_parallel_size=experts,
        consumed_train_samples=12,
    )  # fmt: skip
    for pp in range(stages):
        for ep in range(experts):
            name = "mp_rank_00" + (f"_{pp:03d}" if stages > 1 else "") + (f"_{ep:03d}" if experts > 1 else "")
            place = folder / "iter_0000002" / name
            place.mkdir(parents=True)
            held = [
                list(
                    local_names(
                        tensors, pp, chunk, stages=stages, chunks=chunks, experts=experts, ep=ep, grouped=grouped
                    )
                )
                for chunk in range(chunks)
            ]
            models = {
                "model" if chunks == 1 else f"model{number}": {
                    local: tensors["param", full].clone() for local, full in names
                }
                for number, names in enumerate(held)
            }
            groups = {"optimizer": [groups_of(False), groups_of(True)] if experts > 1 else groups_of(False)}
            tree = {"args": args, "checkpoint_version": 3.0, "iteration": 2, **models, **groups}
            torch.save(tree | {"opt_param_scheduler": SCHEDULER}, place / "model_optim_rng.pt")
            dense = [[full for _, full in names if experts == 1 or ".mlp.experts." not in full] for names in held]
            own = [[full for _, full in names if ".mlp.experts." in full] for names in held]
            state: Any = buffers(tensors, dense)
            if experts > 1:
                state = [None if ep else state, buffers(tensors, own)]
            torch.save(state, place / "distrib_optim.pt")
    return folder


def local_names(
    tensors: Tensors, pp: int, chunk: int, *, stages: int, chunks: int, experts: int, ep: int, grouped: bool
) -> list[tuple[str, str]]:
    """(name in the file, canonical name) of what a chunk of a rank holds, in order of registration."""
    turns = stages * chunks
    each, turn = LAYERS // turns, chunk * stages + pp
    found: list[tuple[str, str]] = []
    for full in (name for role, name in tensors if role == "param"):
        local = full
        if full.startswith("decoder.layers."):
            layer, inner = full.removeprefix("decoder.layers.").split(".", 1)
            if int(layer) // each != turn:
                continue
            local = f"decoder.layers.{int(layer) % each}.{inner}"
        elif turn != (0 if full.startswith("embedding.") else turns - 1):
            continue
        if ".mlp.experts." in full:
            before, after = local.split("local_experts.")
            number, module = after.split(".", 1)
            expert, rank = int(number) % (EXPERTS // experts), int(number) // (EXPERTS // experts)
            if rank != ep:
                continue
            local = f"{before}{module}{expert}" if grouped else f"{before}local_experts.{expert}.{module}"
        found.append((local, full))
    return found


def buffers(tensors: Tensors, chunks: list[list[str]]) -> dict[Any, Any]:
    """``distrib_optim.pt`` of one optimizer."""
    found: dict[Any, Any] = {"buckets_coalesced": True}
    for number, names in enumerate(filter(None, chunks)):
        kinds: dict[str, Any] = {
            kind: torch.cat([tensors[ROLES[kind], name].flatten() for name in reversed(names)]) for kind in KINDS
        }
        found[number] = {(torch.bfloat16, torch.float32): kinds | {"numel_unpadded": kinds["param"].numel()}}
    return found
