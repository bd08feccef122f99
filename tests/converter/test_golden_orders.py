"""Names, order and places of legacy models and of Transformer Engine's layers, by what real runs registered.

No release that is on PyPI has the classes of legacy models, and Transformer Engine cannot be imported without a GPU.  So the judges are the
files and param maps that Megatron-LM 0.6 wrote, whose legacy models are those of up to 0.17, and the buffers that a run with Transformer Engine's layer
spec had (its own modules imitated, the order by Megatron-LM itself).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.verification.leaves import TensorLeaf, open_pt
from goldens import golden_root, golden_sets
from mcore import canonical
from mcoresets import array, names_of, script_of, sizes_of

FUSED = sorted((golden_root() / "mcore").glob("*/llama*__te_td_full"))
LEGACY = [folder for folder in golden_sets() if "noop" not in folder.name]
"""Megatron-LM after 0.6 has no no-op layers: its chunks hold other layers."""
KINDS = ("param", "exp_avg", "exp_avg_sq")


def convert(target: Path, *words: object) -> Path:
    program = ["convert", "--target", target, "--target-format", "megatron", "--progress", "none", "--multiprocess-off"]
    assert main([*map(str, [*program, *words])]) == 0
    return next(target.glob("iter_*"))


def buffers_of(folder: Path) -> list[dict[str, Any]]:
    """Kind -> flat tensor, of each buffer of a rank."""
    leaves = open_pt(folder / "distrib_optim.pt")
    numbers = sorted({int(path.split("/")[1]) for path in leaves if path.split("/")[1].isdigit()})
    return [
        {
            kind: array(leaf)
            for kind in KINDS
            for path, leaf in leaves.items()
            if path.startswith(f"/{number}/") and path.endswith(f"/{kind}")
        }
        for number in numbers
    ]


def models_of(folder: Path) -> list[dict[str, Any]]:
    """The weights of each model chunk in the order of the file."""
    leaves = dict(open_pt(folder / "model_optim_rng.pt"))
    keys = dict.fromkeys(found[1] for path in leaves if (found := re.match(r"/(model\d*)/", path)))
    return [names_of(leaves, key) for key in keys]


def kept(folder: Path, number: int) -> dict[str, list[Any]]:
    """The buckets of a buffer as 0.6 keeps them."""
    found: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for path, leaf in open_pt(folder / "distrib_optim.pt").items():
        matched = re.fullmatch(rf"/{number}/.*/(param|exp_avg|exp_avg_sq)/\d+", path)
        if matched and isinstance(leaf, TensorLeaf):
            found[matched[1]].append(array(leaf))
    return found


@pytest.mark.parametrize("folder", LEGACY, ids=lambda path: path.name)
def test_a_legacy_model_is_registered_as_megatron_0_6_registered_it(folder: Path, tmp_path: Path) -> None:
    result = convert(tmp_path / "out", "--source", folder / "A", "--names", "legacy")
    source = next((folder / "A").glob("iter_*"))
    ranks = sorted(source.glob("mp_rank_*"))
    assert [rank.name for rank in ranks] == sorted(rank.name for rank in result.glob("mp_rank_*"))
    for rank in ranks:
        own = models_of(result / rank.name)
        for one, other in zip(own, models_of(rank), strict=True):
            assert list(one) == list(other)
            assert all(np.array_equal(one[name], other[name]) for name in one)
        tp, pp = (int(number) for number in (f"{rank.name}_000").split("_")[2:4])
        maps = sorted((folder / "A" / "param_map").glob(f"param_map_buffer0_dp0tp{tp}pp{pp}vpp*.json"))
        for number, (buffer, path) in enumerate(zip(buffers_of(result / rank.name), maps, strict=True)):
            _compare(buffer, json.loads(path.read_text()), kept(rank, number))


def _compare(buffer: dict[str, Any], places: dict[str, Any], buckets: dict[str, list[Any]]) -> None:
    """Each parameter follows the one before it at a multiple of 64, in the order of the real map."""
    at, firsts = 0, {place[4]: place[2] for place in reversed(places.values())}
    for _, shape, start, stop, bucket in places.values():
        at = -(-at // 64) * 64
        for kind in KINDS:
            wanted = buckets[kind][bucket][start - firsts[bucket] : stop - firsts[bucket]]
            assert wanted.size == np.prod(shape)
            assert np.array_equal(buffer[kind][at : at + wanted.size], wanted)
        at += stop - start
    assert all(len(buffer[kind]) == at for kind in KINDS)


@pytest.mark.parametrize("folder", FUSED, ids=lambda path: path.name)
def test_layers_of_transformer_engine_lie_where_a_real_run_had_them(folder: Path, tmp_path: Path) -> None:
    """Names, order and places are those of the run; the state is that of the same set without Transformer Engine, which comes as MindSpore files."""
    plain = folder.with_name(folder.name.removesuffix("__te_td_full"))
    sizes = sizes_of(plain)
    result = convert(
        tmp_path / "out", "--source", plain / "ms", "--param-map-path", script_of(folder, tmp_path),
        "--tp-size", sizes["tp"], "--pp-size", sizes["pp"],
    )  # fmt: skip
    for path in sorted((folder / "expected").glob("layout_*.json")):
        layout, numbers = json.loads(path.read_text()), path.stem.removeprefix("layout_")
        held = np.load(plain / "expected" / f"expected_{numbers}.npz")
        tp, pp, _ = layout["tp_pp_ep"]
        rank = result / f"mp_rank_{tp:02d}_{pp:03d}"
        [weights], [buffer], [real] = models_of(rank), buffers_of(rank), layout["buffers"]
        assert [(name, list(array.shape)) for name, array in weights.items()] == [
            (row[1], row[3]) for row in layout["params"]
        ]
        for name, weight in weights.items():
            assert np.array_equal(weight, held[f"0/{canonical(name)}/bf16"])
        for name, start, stop, _ in real["params"]:
            for kind in KINDS:
                assert np.array_equal(buffer[kind][start:stop], held[f"0/{canonical(name)}/{kind}"].reshape(-1))
        assert all(len(buffer[kind]) == real["numel_unpadded"] for kind in KINDS)
