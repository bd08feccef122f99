"""Checkpoints of the real Megatron-LM in other layouts: every tensor as torch cuts it from Megatron's own files."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt2pt.cli.commands import main
from ckpt2pt.formats.folders import iteration_folder
from conversions import topology_of
from goldens import golden_sets
from torchload import leaves, megatron_names, same

SETS = {folder.name: folder for folder in golden_sets()}
KINDS = ("param", "exp_avg", "exp_avg_sq")
Whole = dict[tuple[str, str], torch.Tensor]
"""(kind, name with the global number of the layer) -> the tensor of all ranks; kind ``model`` is the bf16 weight."""


class Layout:
    """Degrees, and which layers a chunk has."""

    def __init__(self, tp: int, pp: int, vpp: int, layers: int) -> None:
        self.tp, self.pp, self.vpp, self.each = tp, pp, vpp, layers // (pp * vpp)

    def first_layer(self, pp: int, vpp: int) -> int:
        return (vpp * self.pp + pp) * self.each

    def folder(self, root: Path, tp: int, pp: int) -> Path:
        return iteration_folder(root) / (f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if self.pp > 1 else ""))


def gated(name: str) -> bool:
    return ".dense_h_to_4h." in name


def cut_axis(name: str) -> int | None:
    if "norm." in name or "position" in name or name.endswith(("dense.bias", "dense_4h_to_h.bias")):
        return None
    return 1 if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")) else 0


def join(name: str, parts: list[torch.Tensor], swiglu: bool) -> torch.Tensor:
    axis = cut_axis(name)
    if axis is None:
        assert all(torch.equal(part, parts[0]) for part in parts)
        return parts[0]
    if gated(name) and swiglu:
        halves = [part.chunk(2) for part in parts]
        return torch.cat([torch.cat([half[number] for half in halves]) for number in (0, 1)])
    return torch.cat(parts, axis)


def part(name: str, whole: torch.Tensor, tp: int, of: int, swiglu: bool) -> torch.Tensor:
    axis = cut_axis(name)
    if axis is None:
        return whole
    if gated(name) and swiglu:
        return torch.cat([half.chunk(of)[tp] for half in whole.chunk(2)])
    return whole.chunk(of, axis)[tp]


def stored(root: Path, maps: Path, cut: Layout, tp: int, pp: int) -> dict[tuple[str, str], torch.Tensor]:
    """What one rank's files hold, by torch and the run's own param maps."""
    folder = cut.folder(root, tp, pp)
    with megatron_names():
        model: dict[str, Any] = torch.load(folder / "model_optim_rng.pt", weights_only=False)
    optim: dict[Any, Any] = torch.load(folder / "distrib_optim.pt", weights_only=False)
    found: dict[tuple[str, str], torch.Tensor] = {}
    for vpp in range(cut.vpp):
        path = maps / f"param_map_buffer0_dp0tp{tp}pp{pp}vpp{vpp}.json"
        if not path.is_file():
            continue
        weights = dict(flat(model["model" if cut.vpp == 1 else f"model{vpp}"]))
        (kinds,) = optim[vpp].values()
        places = json.loads(path.read_text())
        begins: dict[int, int] = {}
        for _, _, start, _, bucket in places.values():
            begins[bucket] = min(start, begins.get(bucket, start))
        for raw, (_, shape, start, stop, bucket) in places.items():
            name = re.sub(r"^(module\.)+", "", raw)
            saved = "word_embeddings_for_head.weight" if name == "word_embeddings.weight" else name
            named = with_layer(name, cut.first_layer(pp, vpp))
            found["model", named] = weights.pop(saved)
            for kind in KINDS:
                values = kinds[kind][bucket][start - begins[bucket] : stop - begins[bucket]]
                found[kind, named] = values.reshape(shape)
        assert not weights
    return found


def with_layer(name: str, first: int) -> str:
    return re.sub(r"layers\.(\d+)\.", lambda found: f"layers.{int(found[1]) + first}.", name)


def flat(tree: dict[str, Any], path: str = "") -> list[tuple[str, torch.Tensor]]:
    found: list[tuple[str, torch.Tensor]] = []
    for key, value in tree.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            found += flat(value, name)
        elif value is not None:
            found.append((name, value))
    return found


def whole_of(root: Path, maps: Path, cut: Layout, swiglu: bool) -> Whole:
    parts: dict[tuple[str, str], list[torch.Tensor]] = defaultdict(list)
    for pp in range(cut.pp):
        for tp in range(cut.tp):
            for key, value in stored(root, maps, cut, tp, pp).items():
                parts[key].append(value)
    return {key: join(key[1], values, swiglu) for key, values in parts.items()}


CASES = [
    ("a_tp1pp1", "ms", (2, 1, 1)),
    ("a_tp1pp1", "ms", (4, 2, 2)),
    ("a2_tp1pp1_tied_bias", "ms", (2, 2, 1)),
    ("b_tp2pp2", "ms", (1, 1, 1)),
    ("b_tp2pp2", "ms", (4, 1, 2)),
    ("b_st_tp2pp2_safetensors", "ms", (1, 4, 1)),
    ("c_tp2pp2vpp2", "ms", (1, 1, 1)),
    ("e_tp1pp2vpp2_noop_tail", "ms", (2, 4, 1)),
    ("f_tp1pp1dp2_buckets", "ms", (2, 2, 1)),
    ("j_tp1pp2dp2", "ms", (2, 1, 1)),
    ("j_tp1pp2dp2", "ms_zero_src", (4, 1, 2)),
]


@pytest.mark.parametrize(("name", "source", "target"), [case for case in CASES if case[0] in SETS])
def test_every_tensor_is_what_torch_cuts_from_megatrons_own(
    name: str, source: str, target: tuple[int, int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line alone: pt-meta, convert with full proof, verify, import, and back to the first files."""
    folder = SETS[name]
    if not (folder / source).is_dir():
        pytest.skip("the committed subset has no such source")
    cut = topology_of(folder)
    sizes = dict(zip(("tp", "pp", "vpp"), target, strict=True))
    asked = [text for flag, size in sizes.items() for text in (f"--target-{flag}-size", str(size))]
    of_source = ["--tp-size", str(cut.tensor), "--pp-size", str(cut.pipeline)]
    meta, out, back = (str(tmp_path / part) for part in ("meta", "out", "back"))
    quiet = ["--progress", "none", "--multiprocess-off"]
    buckets = ["--bucket-size", "22592"] if "buckets" in name else []
    assert main(["pt-meta", "--from-pt-meta", str(folder / "pt_meta"), "--param-map-path", meta, *asked, *buckets]) == 0
    places = ["--ms-path", str(folder / source), "--param-map-path", meta, "--megatron-path", out]
    assert main(["convert", *places, *of_source, *asked, "--verify", "full", *quiet]) == 0
    with megatron_names():
        args = torch.load(Path(meta) / "args_tp00_pp000.pt", weights_only=False)["args"]
    before = Layout(cut.tensor, cut.pipeline, cut.virtual, cut.num_layers)
    whole = whole_of(folder / "A", folder / "A" / "param_map", before, args.swiglu)
    check(whole, Path(out), Path(meta), Layout(*target, cut.num_layers), args)

    first = [f"--target-{flag}-size" for flag in sizes], (cut.tensor, cut.pipeline, cut.virtual)
    home = [text for flag, size in zip(*first, strict=True) for text in (flag, str(size))]
    assert main(["import", "--megatron-path", out, "--ms-path", back, *home, *quiet]) == 0
    capsys.readouterr()
    assert main(["verify", str(folder / "ms"), back, *of_source]) == 0
    assert "no difference" in capsys.readouterr().out


def check(whole: Whole, out: Path, maps: Path, cut: Layout, args: Any) -> None:
    left = set(whole)
    for pp in range(cut.pp):
        for tp in range(cut.tp):
            for (kind, name), value in stored(out, maps, cut, tp, pp).items():
                tied = name == "word_embeddings.weight"
                key = (kind, "language_model.embedding.word_embeddings.weight" if tied else name)
                expected = part(key[1], whole[key], tp, cut.tp, args.swiglu)
                assert value.dtype == expected.dtype == (torch.bfloat16 if kind == "model" else torch.float32)
                assert torch.equal(value, expected), (tp, pp, kind, name)
                left.discard(key)
    assert {name for _, name in left} <= {"word_embeddings.weight"}


@pytest.mark.parametrize(
    ("one", "other", "target"),
    [("a_tp1pp1", "b_tp2pp2", (2, 2)), ("b_tp2pp2", "a_tp1pp1", (1, 1)), ("b_tp2pp2", "b_tp2pp2", (2, 2))],
)
def test_metadata_of_another_layout_is_what_megatron_writes_in_it(
    one: str, other: str, target: tuple[int, int], tmp_path: Path
) -> None:
    """Two runs of one model in two layouts: all but where they were saved, and their random numbers."""
    if not {one, other} <= set(SETS):
        pytest.skip("the committed subset has no such pair")
    sizes = ["--target-tp-size", str(target[0]), "--target-pp-size", str(target[1])]
    assert (
        main(["pt-meta", "--from-pt-meta", str(SETS[one] / "pt_meta"), "--param-map-path", str(tmp_path), *sizes]) == 0
    )
    theirs = SETS[other] / "pt_meta"
    names = {path.name for path in theirs.glob("*_dp0*.json")} | {path.name for path in theirs.glob("args_*.pt")}
    assert names == {path.name for path in tmp_path.iterdir()} - {"origin.json", ".ckpt2pt"}
    for name in sorted(names):
        if name.endswith(".json"):
            assert (tmp_path / name).read_bytes() == (theirs / name).read_bytes()
            continue
        left, right = leaves(tmp_path / name), leaves(theirs / name)
        left, right = ({k: v for k, v in found.items() if not k.startswith("/rng_state/")} for found in (left, right))
        assert list(left) == list(right)
        assert {key for key in left if not same(left[key], right[key])} <= {"/args/save"}
