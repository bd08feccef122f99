"""One model in any parallel layout: every rank's tensors are cut from the same whole arrays, by numpy alone."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ckpt2pt.discover.request import Request
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.formats.torchfile.trees import Value
from cutting import cut
from handmade import EMBEDDING, HEAD, Handmade, Parameter

VOCABULARY = (EMBEDDING, HEAD)


@dataclass
class Relaid(Handmade):
    """``heads``, ``groups``, ``columns`` (of the MLP) and ``rows`` (of the vocabulary) count all ranks together.

    Rows of the vocabulary from ``known`` on are zero, as where a source with fewer of them was padded.  ``more`` are arguments.
    """

    hidden: int = 6
    heads: int = 8
    groups: int | None = None
    channels: int = 2
    columns: int = 8
    rows: int = 16
    known: int = 1 << 20
    more: dict[str, Value] = field(default_factory=dict[str, Value])
    gated: bool = True
    kv: int = field(init=False, default=0)
    ffn: int = field(init=False, default=0)
    vocab: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        of = self.topology.tensor
        self.kv, self.ffn, self.vocab = (whole // of for whole in (self.heads * self.channels, self.columns, self.rows))
        super().__post_init__()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        groups = self.heads if self.groups is None else self.groups
        qkv = (self.heads + 2 * groups) * self.channels // self.topology.tensor
        return super().shapes() | {"qkv": (qkv, self.hidden), "up": ((1 + self.gated) * self.ffn, self.hidden)}

    def values(self, tp: int, each: Parameter, role: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.ascontiguousarray(
            cut(each.mindspore, self.whole(each, role), tp, self.topology.tensor, gated=self.gated)
        )

    def whole(self, each: Parameter, role: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """All ranks' parts of a parameter."""
        of = self.topology.tensor
        name = EMBEDDING if self.tied and each.mindspore in VOCABULARY else each.mindspore
        random = np.random.default_rng(zlib.crc32(f"{name} {role}".encode()))
        if name in VOCABULARY:
            values = random.normal(size=(64, self.hidden)).astype("<f4")[: self.rows]
            values[self.known :] = 0
            return values
        uncut = "norm." in name or name.endswith(("out_proj.bias", "projection.bias"))
        axis = 1 if name.endswith(("out_proj.weight", "projection.weight")) else 0
        shape = tuple(length * (of if number == axis and not uncut else 1) for number, length in enumerate(each.shape))
        return random.normal(size=shape).astype("<f4")

    def arguments(self) -> dict[str, Value]:
        return super().arguments() | {
            "ffn_hidden_size": self.columns, "num_attention_heads": self.heads, "kv_channels": self.channels,
            "group_query_attention": self.groups is not None, "num_query_groups": self.groups or 1,
            "swiglu": self.gated, "padded_vocab_size": self.rows, **self.more,
        }  # fmt: skip

    def becomes(self, other: Relaid, folder: Path, **more: Any) -> Request:
        """This one's files, the other's metadata, and the request to make the other of them."""
        self.write_source(folder / "ms")
        other.write_meta(folder / "pt_meta")
        return other.request(folder, **({"source_topology": self.topology} | more))


def check_mindspore(made: Relaid, folder: Path, *, prefix: str = "network", suffix: str = "ckpt") -> None:
    """Compare every tensor of an imported checkpoint with the truth, bit for bit."""
    for (tp, pp), entries in made.entries.items():
        path = folder / f"rank_{made.topology.source_rank(tp, pp)}" / f"{prefix}.{suffix}"
        found = index_file(path)
        data = path.read_bytes()
        tensors = {name: each for name, each in entries.items() if each.dtype == "float32"}
        assert {name for name, ref in found.items() if ref.shape} - {"state_step"} == set(tensors)
        for name, each in tensors.items():
            ref = found[name]
            stored = b"".join(data[at : at + nbytes] for _, at, nbytes in ref.extents)
            assert (ref.dtype, ref.shape, stored) == ("float32", each.shape, each.data), (tp, pp, name)
