"""A handmade checkpoint as a training with the distributed optimizer leaves it: flat shards, and what describes them.

Written from docs/format-ckpt.md alone; nothing of the converter's own joining is used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ckptfiles import Tensor, ckpt, safe
from handmade import PREFIX, Handmade

ALIGN = 8


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How the state is cut: buckets of ``per_bucket`` parameters, in ``buffers`` that take turns.

    ``aligned`` pads every bucket to a multiple of the group; ``zero3`` names lie apart, cut along their first axis.
    """

    per_bucket: int = 3
    buffers: int = 1
    aligned: bool = True
    zero3: tuple[str, ...] = ()
    v2: bool = False
    suffix: str = "ckpt"
    tail: str = ""

    def write(self, made: Handmade, folder: Path) -> None:
        """The files of every rank, and one description for each (tp, pp)."""
        for (tp, pp), entries in made.entries.items():
            group = made.topology.group(tp, pp)
            files, document = self.cut(entries, len(group))
            document["dp_rank_list"] = list(group)
            for number, (rank, tensors) in enumerate(zip(group, files, strict=True)):
                path = self.place(made, folder, tp, pp, rank, number)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes((ckpt if self.suffix == "ckpt" else safe)(tensors))
            info = self.info(made, folder, tp, pp)
            info.parent.mkdir(parents=True, exist_ok=True)
            info.write_text(json.dumps(document) + self.tail)

    def place(self, made: Handmade, folder: Path, tp: int, pp: int, rank: int, number: int) -> Path:
        if self.v2:
            inner = f"iter_{made.iteration:07d}/{made.topology.directory(tp, pp)}"
            return folder / inner / f"model_optim_rng_{number:03d}.ckpt"
        return folder / f"rank_{rank}" / f"network_rank_{rank}-0_{made.iteration}.{self.suffix}"

    def info(self, made: Handmade, folder: Path, tp: int, pp: int) -> Path:
        if self.v2:
            name = "dist_opt_shard_info_model_optim_rng.json"
            return folder / "opt_shard_info" / made.topology.directory(tp, pp) / name
        rank = made.topology.source_rank(tp, pp)
        return folder / "opt_shard_info" / f"rank_{rank}" / f"dist_opt_shard_info_rank_{rank}-0_0.json"

    def cut(self, entries: dict[str, Tensor], ranks: int) -> tuple[list[list[Tensor]], dict[str, Any]]:
        names = [name for name in reversed(entries) if f"exp_avg.{name}" in entries and name not in self.zero3]
        params: dict[str, Any] = {}
        infos: dict[str, Any] = {}
        files: list[list[Tensor]] = [[] for _ in range(ranks)]
        for buffer in range(self.buffers):
            mine = names[buffer :: self.buffers]
            buckets: dict[str, list[int]] = {}
            begin = 0
            for number, at in enumerate(range(0, len(mine), self.per_bucket)):
                chosen = mine[at : at + self.per_bucket]
                position, homes = 0, dict[str, int]()
                for name in chosen:
                    homes[name] = position
                    numel = len(entries[name].data) // 4
                    where = [buffer, number, begin + position, begin + position + numel]
                    params[name] = {"range_map": where, "shape": list(entries[name].shape), "dtype": "bfloat16"}
                    position = -(-(position + numel) // ALIGN) * ALIGN if self.aligned else position + numel
                size = -(-position // (ALIGN * ranks)) * ALIGN * ranks if self.aligned else position
                self._fill(entries, homes, size, f"buffer_{buffer}_bucket_{number}", files)
                buckets[str(number)] = [size, position]
                begin += size
            infos[str(buffer)] = {"buckets": buckets, "buffer_size": begin, "bucket_num": len(buckets)}
        listed = [prefix + name for name in self.zero3 if name in entries for prefix in PREFIX.values()]
        self._apart(entries, listed, files)
        document = {"dp_rank_list": [], "param_info": params, "buffer_info": infos}
        return files, document | ({"zero3_params": listed} if self.zero3 else {})

    @staticmethod
    def _fill(
        entries: dict[str, Tensor], homes: dict[str, int], size: int, shard: str, files: Sequence[list[Tensor]]
    ) -> None:
        share = size // len(files)
        for prefix in PREFIX.values():
            bucket = np.zeros(size, "<f4")
            for name, start in homes.items():
                values = np.frombuffer(entries[prefix + name].data, "<f4")
                bucket[start : start + values.size] = values
            for number, tensors in enumerate(files):
                data = bucket[number * share : (number + 1) * share].tobytes()
                tensors.append(Tensor(prefix + shard, "float32", (share,), data))

    @staticmethod
    def _apart(entries: dict[str, Tensor], zero3: Sequence[str], files: Sequence[list[Tensor]]) -> None:
        moments = tuple(prefix for prefix in PREFIX.values() if prefix)
        for name, whole in entries.items():
            if name in zero3:
                rows, size = whole.shape[0] // len(files), len(whole.data) // len(files)
                assert rows * len(files) == whole.shape[0]
                for number, tensors in enumerate(files):
                    data = whole.data[number * size : (number + 1) * size]
                    tensors.append(replace(whole, shape=(rows, *whole.shape[1:]), data=data))
            elif not name.startswith(moments) and f"exp_avg.{name}" not in entries:
                for tensors in files:
                    tensors.append(whole)
