"""A golden checkpoint as the same Megatron run saves it without ``--use-distributed-optimizer``.

The tree is Megatron-LM cac60ce4's (core/optimizer/optimizer.py, ``Float16OptimizerWithFloat16Params.state_dict``), written by
torch.save; values are those of ``distrib_optim.pt``, cut by the run's own param maps.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from torchload import megatron_names

KINDS = ("param", "exp_avg", "exp_avg_sq")


def without_distributed_optimizer(golden: Path, target: Path, *, fp32: bool = False) -> Path:
    """Write it into ``target``; ``fp32`` as a run in float32, whose optimizer has no copies of the weights."""
    iteration = next(golden.glob("A/iter_*"))
    for place in sorted(iteration.glob("mp_rank_*")):
        found = re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", place.name)
        assert found
        with megatron_names():
            tree: dict[str, Any] = torch.load(place / "model_optim_rng.pt", weights_only=False)
            parameters = _parameters(golden, place, int(found[1]), int(found[2] or 0))
            groups = tree["optimizer"]["optimizer"]["param_groups"]
            tree["optimizer"] = _optimizer(groups, parameters, fp32=fp32)
            tree["args"].use_distributed_optimizer = False
            if fp32:
                for key in [key for key in tree if re.fullmatch(r"model\d*", key)]:
                    _fill(
                        tree[key],
                        {name: kinds for chunk, name, kinds in parameters if key in ("model", f"model{chunk}")},
                    )
            (target / iteration.name / place.name).mkdir(parents=True)
            torch.save(tree, target / iteration.name / place.name / "model_optim_rng.pt")
    (target / "latest_checkpointed_iteration.txt").write_text(str(int(iteration.name[5:])))
    return target


def _parameters(golden: Path, place: Path, tp: int, pp: int) -> list[tuple[int, str, dict[str, torch.Tensor]]]:
    """Chunk, name without ``module.``, tensors by kind; in order of registration."""
    optim = torch.load(place / "distrib_optim.pt")
    parameters: list[tuple[int, str, dict[str, torch.Tensor]]] = []
    maps = sorted((golden / "A" / "param_map").glob(f"param_map_buffer0_dp0tp{tp}pp{pp}vpp*.json"))
    for number, path in enumerate(maps):
        (kinds,) = optim[number].values()
        flat = {kind: torch.cat(kinds[kind]) for kind in KINDS}
        for name, (_, shape, start, stop, _) in reversed(json.loads(path.read_text()).items()):
            cut = {kind: flat[kind][start:stop].reshape(shape).clone() for kind in KINDS}
            parameters.append((number, name.removeprefix("module."), cut))
    return parameters


def _optimizer(groups: list[dict[str, Any]], parameters: list[Any], *, fp32: bool) -> dict[str, Any]:
    state: dict[int, dict[str, torch.Tensor]] = {}
    copies: list[list[torch.Tensor]] = []
    for group in groups:
        mine = [
            (name, kinds)
            for _, name, kinds in parameters
            if (name.endswith(".bias") or kinds["param"].dim() == 1) == (group["wd_mult"] == 0)
        ]
        group["params"] = list(range(len(state), len(state) + len(mine)))
        copies.append([_marked(kinds["param"], name) for name, kinds in mine])
        for number, (_, kinds) in zip(group["params"], mine, strict=True):
            state[number] = {kind: kinds[kind] for kind in KINDS[1:]}
    inner = {"state": state, "param_groups": groups}
    return inner if fp32 else {"optimizer": inner, "fp32_from_fp16_params": copies}


def _marked(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Attributes as tensor parallelism gives them: torch writes such a tensor by ``_rebuild_from_type_v2``."""
    marks: Any = tensor
    marks.tensor_model_parallel = tensor.dim() > 1
    marks.partition_dim, marks.partition_stride = int(".dense" in name), 1
    return tensor


def _fill(model: Any, values: dict[str, dict[str, torch.Tensor]], prefix: str = "") -> None:
    for key, item in model.items():
        path = f"{prefix}.{key}".lstrip(".")
        if isinstance(item, torch.Tensor):
            model[key] = values[path.replace("word_embeddings_for_head", "word_embeddings")]["param"]
        elif item is not None:
            _fill(item, values, path)
