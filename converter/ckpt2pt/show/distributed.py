"""What a distributed checkpoint of Megatron-LM (torch_dist) holds: the tensors that it means, and how it holds them."""

from __future__ import annotations

import re
from pathlib import Path

from ckpt2pt.core.extents import DTYPE_BYTES
from ckpt2pt.core.index import Index
from ckpt2pt.core.tensor import ROLES, Tensor
from ckpt2pt.formats.megatron.loads import SHARDINGS, WEIGHTS, classes_in
from ckpt2pt.formats.registry import read
from ckpt2pt.formats.torch_dist.common import COMMON, read_common, sharding_of
from ckpt2pt.formats.torch_dist.metadata import read_metadata
from ckpt2pt.io.paths import is_file
from ckpt2pt.io.records import Json
from ckpt2pt.io.text import spans
from ckpt2pt.verification.leaves import Leaves, flatten

_NUMBER = re.compile(r"(?<=\.layers\.)\d+|(?<=\.local_experts\.)\d+")
_ARGS_NBYTES = 1 << 20
_ROLES = {
    "param": "parameters",
    "main_param": "main parameters",
    "exp_avg": "first moments",
    "exp_avg_sq": "second moments",
}


def inspect_distributed(path: Path, *, details: bool) -> tuple[Json, Leaves]:
    """The document of one iteration, and the training arguments.  What is wrong with the checkpoint is raised.

    The chunks of each tensor are proved to cover it, and samples of main parameters to round to the weights.
    """
    metadata = read_metadata(path)
    common, found = read_common(metadata), read(path, source_format="torch_dist")
    files = {extent.path for tensor in found.index.values() for view in tensor.views for extent in view.storage}
    sharding = sharding_of(common, metadata)
    stateful = "main_param" in {key.role for key in found.index}
    releases = SHARDINGS.get(sharding or "", {}) if stateful or metadata.whole_states else WEIGHTS
    if not is_file(path / COMMON, "the path"):
        releases = {"0.8 to 0.18": f"no: they look for {COMMON}", "0.19": releases.get("0.15 to 0.19", "yes")}
    document: Json = {
        "kind": "Megatron distributed checkpoint (torch_dist)",
        "path": str(path),
        "iteration": found.iteration,
        "optimizer": (sharding or "not said how it is stored") if stateful else "none",
        "mainParameters": _rounding(found.index),
        **({"releases": {**releases, **classes_in(common)}} if releases else {}),
        "files": len(files),
        "chunks": sum(len(entry.chunks) for entry in metadata.tensors.values()),
        "objects": len(metadata.objects),
        "totals": _totals(found.index),
        "tensors": [_row([tensor]) for tensor in found.index.values()] if details else _collapsed(found.index),
        **({"warnings": list(found.warnings)} if found.warnings else {}),
    }
    return document, flatten(
        {"args": common.tree.get("args")}, lambda value: value, where=common.path, nbytes=_ARGS_NBYTES
    )


def _rounding(index: Index) -> str:
    if not any(key.role == "main_param" for key in index):
        return "none"
    rounds = any(key.role == "param" and tensor.dtype != "float32" for key, tensor in index.items())
    return "samples round to the weights" if rounds else "the weights are float32 themselves"


def _totals(index: Index) -> list[Json]:
    found: list[Json] = []
    for role in ROLES:
        held = [tensor for key, tensor in index.items() if key.role == role]
        if held:
            numel = sum(tensor.numel for tensor in held)
            nbytes = sum(tensor.numel * DTYPE_BYTES[tensor.dtype] for tensor in held)
            found.append({"role": _ROLES[role], "count": len(held), "elements": numel, "bytes": nbytes})
    return found


def _collapsed(index: Index) -> list[Json]:
    """One row for the same weight of many layers and experts; the optimizer's state has the same names."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[Tensor]] = {}
    for key, tensor in index.items():
        if key.role == "param":
            groups.setdefault((_NUMBER.sub("{}", key.name), tensor.dtype, tensor.fused), []).append(tensor)
    return [_row(held) for held in groups.values()]


def _row(held: list[Tensor]) -> Json:
    first, count = held[0], len(held)
    numbers = [
        {int(one) for one in column} for column in zip(*(_NUMBER.findall(one.key.name) for one in held), strict=True)
    ]
    given = iter(numbers)
    name = _NUMBER.sub(lambda found: f"{{{spans(next(given))}}}" if count > 1 else found[0], first.key.name)
    return {
        "name": name if first.key.role == "param" else f"{first.key.role}/{name}",
        "count": count,
        "dtype": first.dtype,
        "shape": list(first.fused),
        "bytes": count * first.numel * DTYPE_BYTES[first.dtype],
    }
