"""Golden sets as trainings: their arguments for Megatron-LM, and what model and optimizer held."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckpt2pt.cli.commands import main
from ckpt2pt.core.tensor import Key
from ckpt2pt.formats.registry import read
from ckpt2pt.verification.gather import Files, gathered
from goldens import golden_root
from mcore import Array, expected
from mcoresets import mcore_sets, odd_set, script_of

OF_LAYOUT = {
    "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--num-layers-per-virtual-pipeline-stage", "--save", "--ckpt-format",
    "--expert-model-parallel-size",
}  # fmt: skip
"""Arguments of a set that do not hold at another layout, with a value each."""
VALUED = (
    "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings", "seq_length", "normalization", "position_embedding_type",
    "vocab_size", "make_vocab_size_divisible_by", "lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_warmup_fraction", "lr_warmup_iters",
    "weight_decay", "adam_beta2", "train_iters", "global_batch_size", "micro_batch_size",
)  # fmt: skip
"""Arguments of Megatron 0.6 that today's releases know by the same name."""


@dataclass(frozen=True)
class Training:
    """A golden set: where it lies, and what its model and optimizer held."""

    folder: Path
    fp16: bool = False
    transformer_engine: bool = False

    @property
    def recent(self) -> bool:
        return (self.folder / "set.json").exists()

    @property
    def words(self) -> list[str]:
        """Arguments for Megatron-LM, without parallel sizes."""
        if self.fp16:
            return ["--fp16" if word == "--bf16" else word for word in words_of(self.folder)]
        if self.transformer_engine:
            return ["transformer_engine" if word == "local" else word for word in words_of(self.folder)]
        if self.recent:
            return words_of(self.folder)
        args, words = self.template.args, words_of(odd_set())
        flags = {
            "--swiglu": args["swiglu"],
            "--disable-bias-linear": not args["add_bias_linear"],
            "--untie-embeddings-and-output-weights": args["untie_embeddings_and_output_weights"],
            "--group-query-attention": args["group_query_attention"],
        }
        values = {name: args[name] for name in VALUED if args[name] is not None}
        values["num_layers"] = len({key.name.split(".")[2] for key in self.expected if ".layers." in key.name})
        if args["group_query_attention"]:
            values["num_query_groups"] = args["num_query_groups"]
        # The last one counts; what the two have in common is how they ran.
        words += [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        return [*words, *(flag for flag, given in flags.items() if given)]

    @property
    def template(self) -> Any:
        return read(self.folder / "A").template

    @property
    def expected(self) -> dict[Key, Array]:
        held = held_by(self.folder)
        if not self.fp16:
            return held
        # The weights of an fp16 training are its main parameters, rounded.
        halves = {
            Key("param", key.name): held[key].astype("<f2").astype("<f4") for key in held if key.role == "main_param"
        }
        return held | halves

    @property
    def run(self) -> dict[str, Any]:
        """Parameter groups, iteration, consumed samples and the numbers of the scheduler."""
        if self.recent:
            layout = json.loads(next((self.folder / "expected").glob("layout_*.json")).read_text())
            groups, samples, scheduler = (
                layout["param_groups"][0],
                layout["consumed_train_samples"],
                layout.get("scheduler"),
            )
        else:
            made = self.template
            groups, samples, scheduler = made.groups, made.args["consumed_train_samples"], made.scheduler
        found = {
            "groups": groups,
            "consumed_train_samples": samples,
            "iteration": 2,
            "scheduler": dict(scheduler or {}),
        }
        return found | ({"scaler": SCALER} if self.fp16 else {})


@cache
def held_by(folder: Path) -> dict[Key, Array]:
    """The state of a set: as the run dumped it, or, of Megatron 0.6, as its own files have it."""
    if (folder / "expected").exists():
        return expected(folder / "expected")
    found: dict[Key, Array] = {}
    with Files() as files:
        for key, tensor in read(folder / "A").index.items():
            data = np.array(gathered(tensor).block(files, 0, tensor.numel))
            found[key] = as_float(data.view("<u2" if tensor.dtype == "bfloat16" else "<f4"))
    return found


def as_float(data: Array) -> Array:
    """Bits of bfloat16, or halves, as float32."""
    return (data.astype("<u4") << 16).view("<f4") if data.dtype == np.uint16 else data.astype("<f4", copy=False)


def words_of(folder: Path) -> list[str]:
    words = json.loads((folder / "set.json").read_text())["args"]
    dropped = {place + more for place, word in enumerate(words) if word in OF_LAYOUT for more in (0, 1)}
    return [word for place, word in enumerate(words) if place not in dropped and word != "--overlap-grad-reduce"]


TIED, CUT, NOOP, BUCKETS, SHARDS = (
    "a2_tp1pp1_tied_bias", "b_st_tp2pp2_safetensors", "e_tp1pp2vpp2_noop_tail", "f_tp1pp1dp2_buckets", "j_tp1pp2dp2",
)  # fmt: skip
ODD = f"{odd_set().parent.name}-{odd_set().name}"
SETS = {name: Training(golden_root() / "megatron06" / name) for name in (TIED, CUT, NOOP, BUCKETS, SHARDS)} | {
    f"{folder.parent.name}-{folder.name}": Training(folder) for folder in mcore_sets()
}
FP16 = f"{ODD}-fp16"
SETS[FP16] = Training(odd_set(), fp16=True)
EXPERTS = {
    name: (stages, since)
    for name, stages, since in (
        ("0.8.0-moe_ep2", 2, "0.8.0"),
        ("0.19.0-moe_ep1", 2, "0.8.0"),
        ("0.19.0-moe_ep2__te_td_full", 2, "0.12.3"),
        ("0.19.0-moe_shared_mixed", 3, "0.12.3"),
    )
    if (golden_root() / "mcore" / Path(*name.split("-", 1))).exists()
}
"""Mixtures of experts: pipeline stages that divide their layers, and the first release that has their model."""
SETS |= {name: Training(golden_root() / "mcore" / Path(*name.split("-", 1))) for name in EXPERTS}
FUSED = f"{ODD}-transformer-engine"
SETS[FUSED] = Training(odd_set(), transformer_engine=True)
SCALER = {"scale": 2048.0, "growth_tracker": 7, "hysteresis_tracker": 1}
"""The loss scale that an fp16 training has come to."""


def fp16_training(folder: Path) -> Path:
    """The odd set as an fp16 training, some steps after its loss scale was changed."""
    target, place = folder / "fp16", folder / "fp16.run"
    if not target.exists():
        place.mkdir()
        script = script_of(odd_set(), place)
        script.write_text(script.read_text().replace("--bf16", "--fp16"))
        words = ["--source", odd_set() / "ms", "--tp-size", 1, "--pp-size", 1, "--param-map-path", script]
        words += ["--target", target, "--target-format", "megatron", "--progress", "none", "--multiprocess-off"]
        assert main(["convert", *map(str, words)]) == 0
        [path] = target.glob("iter_*/mp_rank_00/model_optim_rng.pt")
        tree: Any = torch.load(path, weights_only=False)
        tree["optimizer"]["grad_scaler"] = SCALER | {"scale": torch.tensor([SCALER["scale"]])}
        torch.save(tree, path)
    return target
