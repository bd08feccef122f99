"""Make a MindSpore checkpoint and its pt_meta of any size: real formats, cheap data.

The files are what MindSpeed-Core-MS feature-0.1 and a patched Megatron-LM 0.6 would write for a legacy GPT (RMSNorm,
swiglu, grouped-query attention); only the values are made up.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ckpt2pt.core.names import NameTable
from ckpt2pt.core.topology import Topology
from ckpt2pt.formats.torchfile.archive import finish, lay_out
from ckpt2pt.formats.torchfile.pickles import write_pickle
from ckpt2pt.formats.torchfile.trees import Global, Value, namespace, tensor
from ckpt2pt.io.checksums import crc32

SLICE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A legacy GPT; ``vocab`` is padded already."""

    topology: Topology
    hidden: int = 512
    heads: int = 8
    groups: int = 4
    ffn: int = 1536
    vocab: int = 8192
    iteration: int = 500
    batch: int = 16

    def arguments(self) -> dict[str, Value]:
        """Megatron's arguments, those that anybody looks at."""
        cut = self.topology
        return {
            "num_layers": cut.num_layers, "hidden_size": self.hidden, "ffn_hidden_size": self.ffn,
            "num_attention_heads": self.heads, "kv_channels": self.hidden // self.heads, "group_query_attention": True,
            "num_query_groups": self.groups, "max_position_embeddings": 4096, "swiglu": True, "normalization": "RMSNorm", "norm_epsilon": 1e-5,
            "untie_embeddings_and_output_weights": True, "add_position_embedding": True, "padded_vocab_size": self.vocab,
            "tensor_model_parallel_size": cut.tensor, "pipeline_model_parallel_size": cut.pipeline,
            "data_parallel_size": 1, "context_parallel_size": 1, "global_batch_size": self.batch, "seed": 1,
            "params_dtype": Global("torch", "bfloat16"), "consumed_train_samples": self.batch, "iteration": 1,
            "model_type": None, "bf16": True,
        }  # fmt: skip

    def parameters(self, pp: int, vpp: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(Megatron name, local shape) of one chunk in registration order."""
        tp, hidden, kv = self.topology.tensor, self.hidden, self.hidden // self.heads
        root = "language_model"
        if self.topology.holds_embedding(pp, vpp):
            yield f"{root}.embedding.word_embeddings.weight", (self.vocab // tp, hidden)
        for local in self.topology.real_slots(pp, vpp):
            layer = f"{root}.encoder.layers.{local}"
            yield f"{layer}.input_norm.weight", (hidden,)
            yield f"{layer}.self_attention.query_key_value.weight", (kv * (self.heads + 2 * self.groups) // tp, hidden)
            yield f"{layer}.self_attention.dense.weight", (hidden, hidden // tp)
            yield f"{layer}.post_attention_norm.weight", (hidden,)
            yield f"{layer}.mlp.dense_h_to_4h.weight", (2 * self.ffn // tp, hidden)
            yield f"{layer}.mlp.dense_4h_to_h.weight", (hidden, self.ffn // tp)
        if self.topology.holds_head(pp, vpp):
            yield f"{root}.encoder.final_norm.weight", (hidden,)
            yield f"{root}.output_layer.weight", (self.vocab // tp, hidden)


def build(folder: Path, model: Model, *, seed: int = 1, headers_only: bool = False) -> None:
    """Write ``folder/ms/rank_R/*.ckpt`` and ``folder/pt_meta``.

    ``headers_only`` leaves holes for the payloads: files of true size that take no room.
    """
    noise = np.random.default_rng(seed).normal(0, 0.02, 1 << 20).astype("<f4").tobytes()
    for tp, pp in model.topology.ranks():
        _write_rank(folder, model, tp, pp, noise, headers_only=headers_only)
        _write_meta(folder / "pt_meta", model, tp, pp)


def _write_rank(folder: Path, model: Model, tp: int, pp: int, noise: bytes, *, headers_only: bool) -> None:
    rank = model.topology.source_rank(tp, pp)
    path = folder / "ms" / f"rank_{rank}" / f"network_rank_{rank}-0_{model.iteration}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = NameTable()
    with path.open("wb") as file:
        for vpp in model.topology.filled_chunks(pp):
            slots = model.topology.real_slots(pp, vpp)
            for name, shape in reversed(list(model.parameters(pp, vpp))):
                mindspore = table.to_mindspore(name, slots.__getitem__)[0]
                for prefix in ("", "exp_avg.", "exp_avg_sq."):
                    _write_tensor(file.fileno(), prefix + mindspore, shape, noise, rank, headers_only=headers_only)
        for name, kind, data in _scalars(model):
            os.write(file.fileno(), _entry(name, kind, (), len(data)) + data)
    path.chmod(0o400)


def _write_tensor(fd: int, name: str, shape: tuple[int, ...], noise: bytes, rank: int, *, headers_only: bool) -> None:
    left = 4 * int(np.prod(shape))
    # Ranks hold equal copies of what tensor parallelism does not split, and nothing else alike: each begins an element later.
    shift = (crc32(name.encode(), 0) + (0 if "norm." in name else 4 * rank)) % (len(noise) // 2)
    # A hole from end to end would be read whole, to see that it is constant.
    first = noise[shift & ~3 :][:4] if headers_only else b""
    while left:
        size = min(left, SLICE_BYTES)
        os.write(fd, _entry(name, "Float32", shape, size))
        left -= size
        if headers_only:
            size -= os.write(fd, first[:size])
            os.ftruncate(fd, os.lseek(fd, size, os.SEEK_CUR))
            first = b""
            continue
        while size:
            shift &= ~3
            size -= os.write(fd, memoryview(noise)[shift : shift + size])
            shift = 0


def _scalars(model: Model) -> list[tuple[str, str, bytes]]:
    return [
        ("epoch_num", "Int64", struct.pack("<q", 0)),
        ("step_num", "Int64", struct.pack("<q", model.iteration)),
        ("num_steps", "Int64", struct.pack("<q", model.iteration * model.batch)),
        ("learning_rate_group_0", "Float32", struct.pack("<f", 1e-4)),
    ]


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _entry(name: str, kind: str, shape: tuple[int, ...], nbytes: int) -> bytes:
    """The bytes of a ``Checkpoint.value`` up to its payload (mindspore 2.10.0, checkpoint.proto)."""
    dims = b"".join(b"\x08" + _varint(dim) for dim in shape)
    tensor_head = dims + b"\x12" + _varint(len(kind)) + kind.encode() + b"\x1a" + _varint(nbytes)
    tag = b"\x0a" + _varint(len(name.encode())) + name.encode()
    tensor_field = b"\x12" + _varint(len(tensor_head) + nbytes)
    return (
        b"\x0a" + _varint(len(tag) + len(tensor_field) + len(tensor_head) + nbytes) + tag + tensor_field + tensor_head
    )


def _write_meta(folder: Path, model: Model, tp: int, pp: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, vpp in enumerate(model.topology.filled_chunks(pp)):
        document: dict[str, list[object]] = {}
        start = 0
        for name, shape in reversed(list(model.parameters(pp, vpp))):
            stop = start + int(np.prod(shape))
            document[f"module.{name}"] = ["torch.bfloat16", list(shape), start, stop, 0]
            start = stop
        (folder / f"param_map_buffer0_dp0tp{tp}pp{pp}vpp{number}.json").write_text(json.dumps(document))
    stem = f"args_tp{tp:02d}_pp{pp:03d}"
    storages = [os.urandom(5056), *(bytes(16) for _ in range(4))]
    pickle = write_pickle(_template(model, pp))
    layout = lay_out(stem, pickle, [len(data) for data in storages])
    with (folder / f"{stem}.pt").open("wb") as file:
        for number, data in enumerate(storages):
            os.pwrite(file.fileno(), data, layout.storage_offset(number))
        finish(file.fileno(), layout, [crc32(data, 0) for data in storages])


def _template(model: Model, pp: int) -> Value:
    group: dict[Value, Value] = {
        "wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, "max_lr": 1e-3,
        "min_lr": 1e-5, "lr": 4e-4, "bias_correction": True, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 1,
    }  # fmt: skip
    groups: list[Value] = [group, group | {"wd_mult": 0.0, "weight_decay": 0.0}]
    if pp:  # Megatron begins with the group of the first parameter: a norm where there is no embedding
        groups.reverse()
    trackers = ("data-parallel-rng", "model-parallel-rng", "expert-parallel-rng")
    rng: dict[Value, Value] = {
        "random_rng_state": (3, tuple(random.Random(1).getstate()[1]), None),
        "np_rng_state": ("MT19937", [*range(624)], 624, 0, 0.0),
        "torch_rng_state": tensor("uint8", "0", 5056, 0, (5056,)),
        "cuda_rng_state": tensor("uint8", "1", 16, 0, (16,)),
        "rng_tracker_states": {name: tensor("uint8", str(n), 16, 0, (16,)) for n, name in enumerate(trackers, 2)},
    }
    return {
        "args": namespace(model.arguments()),
        "checkpoint_version": 3.0,
        "iteration": 1,
        "optimizer": {"optimizer": {"param_groups": groups}},
        "opt_param_scheduler": {
            "max_lr": 1e-3,
            "min_lr": 1e-5,
            "num_steps": model.batch,
            "lr_warmup_steps": 0,
            "lr_decay_steps": 1 << 20,
            "lr_decay_style": "cosine",
            "start_wd": 0.1,
            "end_wd": 0.1,
            "wd_incr_steps": 1 << 20,
            "wd_incr_style": "constant",
        },
        "rng_state": [rng],
        "num_floating_point_operations_so_far": 0.0,
    }
