"""Small sources of any layout with known values, and the files that Megatron would load for them.

Written from the formats alone: the names, the order of buffers and the padding of buckets are spelled out here a second
time, so that a wrong table or a wrong sum in the converter has something to differ from.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from archives import write_archive
from ckpt2pt.core.topology import Topology
from ckpt2pt.discover.request import Request
from ckpt2pt.formats.torchfile.pickles import write_pickle
from ckpt2pt.formats.torchfile.trees import Global, Value, namespace, tensor
from ckpt2pt.run.conversion import Outcome, run
from ckptfiles import Tensor, ckpt, safe
from conversions import Quiet

ROLES = ("param", "exp_avg", "exp_avg_sq")
PREFIX = {"param": "", "exp_avg": "exp_avg.", "exp_avg_sq": "exp_avg_sq."}
EMBEDDING, HEAD = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"
LAYER = [
    ("input_norm", "input_norm", "norm"),
    ("self_attention.query_key_value", "attention.qkv_proj", "qkv"),
    ("self_attention.dense", "attention.out_proj", "dense"),
    ("post_attention_norm", "post_attention_norm", "norm"),
    ("mlp.dense_h_to_4h", "mlp.mapping", "up"),
    ("mlp.dense_4h_to_h", "mlp.projection", "down"),
]

Rank = tuple[int, int]


@dataclass(frozen=True)
class Parameter:
    """One parameter: Megatron's local name, MindSpore's global one."""

    megatron: str
    mindspore: str
    shape: tuple[int, ...]


@dataclass
class Handmade:
    """A model of odd sizes, each of one tensor-parallel rank.  ``entries`` may be changed before :meth:`write`.

    ``edit`` changes the template of each rank before it is written.
    """

    topology: Topology
    data: int = 1
    bucket_numel: int | None = None
    tied: bool = False
    bias: bool = False
    gamma: bool = False
    hidden: int = 5
    kv: int = 3
    ffn: int = 7
    vocab: int = 11
    batch: int = 4
    iteration: int = 12
    params_dtype: str = "bfloat16"
    grads_dtype: str = "float32"
    edit: Callable[[dict[Any, Any]], object] = len
    entries: dict[Rank, dict[str, Tensor]] = field(default_factory=dict[Rank, dict[str, Tensor]])
    truth: dict[tuple[int, int, str, str], np.ndarray[Any, np.dtype[np.float32]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for tp, pp in self.topology.ranks():
            found = self.entries.setdefault((tp, pp), {})
            for vpp in range(self.topology.virtual):
                for each in self.parameters(pp, vpp):
                    for role in ROLES:
                        values = self.values(tp, each, role)
                        self.truth[tp, pp, role, f"{vpp}:{each.megatron}"] = values
                        name = PREFIX[role] + each.mindspore
                        found[name] = Tensor(name, "float32", each.shape, values.tobytes())
            found |= {t.name: t for t in self.scalars()}

    def values(self, tp: int, each: Parameter, role: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """What a rank holds of a parameter."""
        seed = zlib.crc32(f"{tp} {each.mindspore} {role}".encode())
        return np.random.default_rng(seed).normal(size=each.shape).astype("<f4")

    def scalars(self) -> list[Tensor]:
        numbers = {"epoch_num": 0, "step_num": self.iteration, "num_steps": self.iteration * self.batch}
        return [Tensor(name, "int64", (), struct.pack("<q", number)) for name, number in numbers.items()]

    # ------------------------------------------------------------------------------------------------ the model

    def parameters(self, pp: int, vpp: int) -> list[Parameter]:
        """In registration order."""
        return list(self._parameters(pp, vpp))

    def _parameters(self, pp: int, vpp: int) -> Iterator[Parameter]:
        cut, hidden = self.topology, self.hidden
        first, last = pp == 0 and vpp == 0, pp == cut.pipeline - 1 and vpp == cut.virtual - 1
        if first:
            yield Parameter(EMBEDDING, EMBEDDING, (self.vocab, hidden))
        counts = cut.layers_per_stage or (cut.num_layers // (cut.pipeline * cut.virtual),) * (
            cut.pipeline * cut.virtual
        )
        turn = vpp * cut.pipeline + pp
        shapes = self.shapes()
        for local in range(counts[turn]):
            layer = sum(counts[:turn]) + local
            if layer in cut.noop:
                continue
            for theirs, ours, kind in LAYER:
                yield from self._module(
                    f"language_model.encoder.layers.{local}.{theirs}",
                    f"language_model.encoder.layers.{layer}.{ours}",
                    shapes[kind],
                    norm=kind == "norm",
                )
        if last:
            name = "language_model.encoder.final_norm"
            yield from self._module(name, name, (hidden,), norm=True)
            if not self.tied:
                yield Parameter(HEAD, HEAD, (self.vocab, hidden))
            elif cut.pipeline > 1:
                yield Parameter("word_embeddings.weight", HEAD, (self.vocab, hidden))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Local shapes of a layer's weights."""
        return {
            "norm": (self.hidden,), "qkv": (3 * self.kv, self.hidden), "dense": (self.hidden, self.kv),
            "up": (2 * self.ffn, self.hidden), "down": (self.hidden, self.ffn),
        }  # fmt: skip

    def _module(self, theirs: str, ours: str, shape: tuple[int, ...], *, norm: bool) -> Iterator[Parameter]:
        weight, bias = ("gamma", "beta") if norm and self.gamma else ("weight", "bias")
        yield Parameter(f"{theirs}.weight", f"{ours}.{weight}", shape)
        if self.bias:
            yield Parameter(f"{theirs}.bias", f"{ours}.{bias}", shape[:1])

    def buckets(self, pp: int, vpp: int) -> list[list[tuple[Parameter, int, int]]]:
        """Buckets of (parameter, start, stop) as Megatron-LM cac60ce4 fills them.

        param_and_grad_buffer.py goes backwards through the parameters and closes a bucket when it is full; the next
        one begins at a multiple of the group's size.  Only chunk 0 of stage 0 has more than one (distributed_data_parallel.py).
        """
        limit = self.bucket_numel if (pp, vpp) == (0, 0) else None
        found: list[list[tuple[Parameter, int, int]]] = [[]]
        position = 0
        for each in reversed(self.parameters(pp, vpp)):
            if limit and found[-1] and position - found[-1][0][1] >= limit:
                position = -(-position // self.data) * self.data
                found.append([])
            stop = position + int(np.prod(each.shape))
            found[-1].append((each, position, stop))
            position = stop
        return [bucket for bucket in found if bucket]

    # ------------------------------------------------------------------------------------------------- the files

    def arguments(self) -> dict[str, Value]:
        tp = self.topology.tensor
        return {
            "num_layers": self.topology.num_layers, "hidden_size": self.hidden, "ffn_hidden_size": self.ffn * tp,
            "num_attention_heads": tp, "kv_channels": self.kv, "group_query_attention": False, "num_query_groups": 1,
            "max_position_embeddings": 16, "swiglu": True, "padded_vocab_size": self.vocab * tp,
            "untie_embeddings_and_output_weights": not self.tied, "data_parallel_size": self.data,
            "context_parallel_size": 1, "global_batch_size": self.batch, "consumed_train_samples": 4, "iteration": 1,
            "params_dtype": Global("torch", self.params_dtype), "use_distributed_optimizer": True,
            "lr": 1e-3, "min_lr": 1e-5, "lr_warmup_iters": 2, "lr_decay_iters": 100, "train_iters": 100, "lr_decay_style": "cosine",
            "lr_warmup_fraction": None, "start_weight_decay": 0.1, "end_weight_decay": 0.1, "weight_decay_incr_style": "constant",
            "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8, "seed": 1234,
            "accumulate_allreduce_grads_in_fp32": self.grads_dtype != self.params_dtype,
            "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": self.topology.pipeline, "overlap_grad_reduce": bool(self.bucket_numel),
        }  # fmt: skip

    def template(self, pp: int = 0) -> dict[Value, Value]:
        """What a run of one step saved on a stage; groups are ordered by their first parameters."""
        decays = dict.fromkeys(
            len(each.shape) > 1 for vpp in range(self.topology.virtual) for each in self.parameters(pp, vpp)
        )
        group: dict[Value, Value] = {
            "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, "max_lr": 1e-3, "min_lr": 1e-5,
            "lr": 5e-4, "bias_correction": True, "betas": (0.9, 0.95), "eps": 1e-8, "step": 1,
        }  # fmt: skip
        groups: Value = [group | {"wd_mult": float(one), "weight_decay": 0.1 * one} for one in decays]
        return {
            "args": namespace(self.arguments()),
            "checkpoint_version": 3.0,
            "iteration": 1,
            "optimizer": {"optimizer": {"param_groups": groups}},
            "opt_param_scheduler": {
                "max_lr": 1e-3, "min_lr": 1e-5, "lr_warmup_steps": 8, "lr_decay_steps": 400, "lr_decay_style": "cosine",
                "num_steps": 4, "start_wd": 0.1, "end_wd": 0.1, "wd_incr_steps": 400, "wd_incr_style": "constant",
            },
            "rng_state": [
                {
                    "random_rng_state": (3, (*range(624), 624), None),
                    "np_rng_state": ("MT19937", [*range(624)], 624, 0, 0.0),
                    "torch_rng_state": tensor("uint8", "0", 5056, 0, (5056,)),
                    "cuda_rng_state": tensor("uint8", "1", 16, 0, (16,)),
                    "rng_tracker_states": {"model-parallel-rng": tensor("uint8", "2", 16, 0, (16,))},
                }
            ],
        }  # fmt: skip

    def write_source(self, folder: Path, *, suffix: str = "ckpt", crc: bool = False) -> None:
        for (tp, pp), entries in self.entries.items():
            rank = self.topology.source_rank(tp, pp)
            path = folder / f"rank_{rank}" / f"network_rank_{rank}-0_{self.iteration}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((ckpt if suffix == "ckpt" else safe)(entries.values(), crc=crc))

    def write_meta(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for tp, pp in self.topology.ranks():
            number = 0
            for vpp in range(self.topology.virtual):
                document = {
                    f"module.{each.megatron}": [f"torch.{self.params_dtype}", list(each.shape), start, stop, index]
                    for index, bucket in enumerate(self.buckets(pp, vpp))
                    for each, start, stop in bucket
                }
                if document:  # a chunk without parameters has no buffer, and does not count
                    path = folder / f"param_map_buffer0_dp0tp{tp}pp{pp}vpp{number}.json"
                    path.write_text(json.dumps(document))
                    number += 1
            stem, storages = f"args_tp{tp:02d}_pp{pp:03d}", [os.urandom(size) for size in (5056, 16, 16)]
            template = self.template(pp)
            self.edit(template)
            write_archive(folder / f"{stem}.pt", stem, write_pickle(template), storages)

    def request(self, folder: Path, **more: Any) -> Request:
        options: dict[str, Any] = {
            "topology": self.topology, "source": folder / "ms", "metadata": folder / "pt_meta", "target": folder / "out",
            "in_process": True, "verify": "full",
        }  # fmt: skip
        return Request(**(options | more))

    def write(self, folder: Path, **more: Any) -> Request:
        self.write_source(folder / "ms")
        self.write_meta(folder / "pt_meta")
        return self.request(folder, **more)

    def convert(self, folder: Path, **more: Any) -> Outcome:
        return run(self.write(folder, **more), range(self.topology.pipeline), Quiet())

    # ---------------------------------------------------------------------------------------------- the judgement

    def check(self, outcome: Outcome) -> None:
        """Load every file with torch and compare with the truth."""
        for tp, pp in self.topology.ranks():
            single = self.topology.pipeline == 1
            folder = outcome.target.folder / (f"mp_rank_{tp:02d}" if single else f"mp_rank_{tp:02d}_{pp:03d}")
            self._check_model(tp, pp, torch.load(folder / "model_optim_rng.pt", weights_only=False))
            self._check_optimizer(tp, pp, torch.load(folder / "distrib_optim.pt", weights_only=False))

    def check_weights(self, outcome: Outcome) -> None:
        """The same for parameters alone."""
        for tp, pp in self.topology.ranks():
            path = outcome.target.folder / self.topology.directory(tp, pp) / "model_optim_rng.pt"
            self._check_model(tp, pp, torch.load(path, weights_only=False))

    def _check_model(self, tp: int, pp: int, tree: dict[str, Any]) -> None:
        assert (tree["iteration"], tree["args"].consumed_train_samples) == (self.iteration, self.iteration * self.batch)
        keys = ["model"] if self.topology.virtual == 1 else [f"model{vpp}" for vpp in range(self.topology.virtual)]
        assert [key for key in tree if key.startswith("model")] == keys
        for vpp, key in enumerate(keys):
            found = dict(_flat(tree[key]))
            expected = {each.megatron: each for each in self.parameters(pp, vpp)}
            renamed = {
                "word_embeddings.weight" if name == "word_embeddings_for_head.weight" else name: value
                for name, value in found.items()
            }
            assert set(renamed) == set(expected)
            assert "encoder" in tree[key]["language_model"]
            for name, value in renamed.items():
                truth = torch.from_numpy(self.truth[tp, pp, "param", f"{vpp}:{name}"])
                dtype = getattr(torch, self.params_dtype)
                assert value.dtype == dtype
                assert torch.equal(value, truth.to(dtype)), (tp, pp, vpp, name)

    def _check_optimizer(self, tp: int, pp: int, tree: dict[Any, Any]) -> None:
        filled = [vpp for vpp in range(self.topology.virtual) if self.parameters(pp, vpp)]
        key = (getattr(torch, self.params_dtype), getattr(torch, self.grads_dtype))
        assert [number for number in tree if isinstance(number, int)] == list(range(len(filled)))
        assert len(tree["per_bucket_numel"]) == len(tree["per_bucket_numel_unpadded"]) == len(filled)
        for number, vpp in enumerate(filled):
            buckets = self.buckets(pp, vpp)
            unpadded = [bucket[-1][2] - bucket[0][1] for bucket in buckets]
            padded = [-(-numel // self.data) * self.data for numel in unpadded]
            assert tree["per_bucket_numel"][number] == {key: padded}
            assert tree["per_bucket_numel_unpadded"][number] == {key: unpadded}
            assert list(tree[number]) == [key]
            assert list(tree[number][key]) == list(ROLES)
            for role in ROLES:
                for bucket, numel, values in zip(buckets, padded, tree[number][key][role], strict=True):
                    truth = [self.truth[tp, pp, role, f"{vpp}:{each.megatron}"].ravel() for each, _, _ in bucket]
                    expected = np.zeros(numel, "<f4")
                    joined = np.concatenate(truth)
                    expected[: joined.size] = joined
                    assert values.dtype == torch.float32
                    assert np.array_equal(values.numpy().view("<u4"), expected.view("<u4")), (tp, pp, vpp, role)


def _flat(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from _flat(value, name)
        elif value is not None:
            yield name, value
