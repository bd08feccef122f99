"""Files of MSAdapter become files of torch: what real torch loads is what Megatron-LM itself would have saved, key by key."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckpt2pt
from ckpt2pt.cli.commands import main
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.pickles import write_pickle
from ckpt2pt.formats.torchfile.trees import Call, Global, Persistent, Value
from msadapter import FAMILIES, rewrite, write_archive

QUIET = ("--progress", "none", "--multiprocess-off")
MEGATRON = {
    "megatron.core.enums": ("ModelType",),
    "megatron.core.rerun_state_machine": ("RerunDiagnostic", "RerunMode", "RerunState"),
    "megatron.core.transformer.enums": ("AttnBackend",),
    "megatron.training.arguments": (),
}
GENERATORS = ("torch_rng_state", "cuda_rng_state", "rng_tracker_states")


class Named:
    """A member of an enumeration of Megatron-LM."""

    def __init__(self, *args: object) -> None:
        self.args = args

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Named) and (type(self).__name__, self.args) == (type(other).__name__, other.args)

    __hash__ = None  # type: ignore[assignment]


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins for the classes that Megatron-LM adds to those that torch trusts."""
    known: list[Any] = [argparse.Namespace, np.ndarray, np.dtype, np.dtypes.UInt32DType]
    for module, names in MEGATRON.items():
        parts = module.split(".")
        for number in range(1, len(parts) + 1):
            name = ".".join(parts[:number])
            monkeypatch.setitem(sys.modules, name, sys.modules.get(name) or types.ModuleType(name))
        for name in names:
            kind = type(name, (Named,), {"__module__": module})
            monkeypatch.setattr(sys.modules[module], name, kind, raising=False)
            known.append(kind)
    rebuild = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    known += [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    with torch.serialization.safe_globals(known):
        yield


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two trees differ in type, order of keys or any bit."""
    if isinstance(one, Named):
        return [] if one == other else [path]
    if type(one) is not type(other):
        return [f"{path}: {type(one)} {type(other)}"]
    if isinstance(one, torch.Tensor):
        alike = (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        same = alike and one.contiguous().view(-1).view(torch.uint8).equal(
            other.contiguous().view(-1).view(torch.uint8)
        )
        return [] if same else [path]
    if isinstance(one, np.ndarray):
        return [] if np.array_equal(one, other) else [path]
    if isinstance(one, argparse.Namespace):
        return differences(vars(one), vars(other), path)
    if isinstance(one, dict):
        found = [] if list(one) == list(other) else [f"{path}: keys"]
        return found + [
            line for key in one if key in other for line in differences(one[key], other[key], f"{path}/{key}")
        ]
    if isinstance(one, list | tuple):
        found = [] if len(one) == len(other) else [f"{path}: length"]
        return found + [
            line
            for number, both in enumerate(zip(one, other, strict=False))
            for line in differences(*both, f"{path}/{number}")
        ]
    return [] if one == other else [path]


def repair(source: Path, target: Path, *words: object) -> int:
    flags = ["--source", source, "--target", target, "--target-format", "torch", *words, *QUIET]
    return main(["convert", *map(str, flags)])


def without_generators(paths: list[str]) -> list[str]:
    return [path for path in paths if not any(name in path for name in GENERATORS)]


@pytest.mark.usefixtures("megatron")
def test_real_torch_loads_what_megatron_itself_saved(golden: Path, tmp_path: Path) -> None:
    assert repair(golden / "msadapter/moe_ep2", tmp_path, "--verify", "full") == 0
    reference = golden / "reference_torch/moe_ep2"
    files = sorted(path.relative_to(reference) for path in reference.rglob("*.pt"))
    assert len(files) == 4
    for name in files:
        wanted = torch.load(reference / name, weights_only=False)
        made = torch.load(tmp_path / name, weights_only=True)
        assert without_generators(differences(wanted, made)) == [], name
        if name.name.startswith("model"):
            [state] = made["rng_state"]
            torch.set_rng_state(state["torch_rng_state"])  # which refuses any other size
            assert state["cuda_rng_state"].shape == (16,)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["megatron06/b_tp2pp2/A", "mcore/0.19.0/moe_ep2"])
@pytest.mark.usefixtures("megatron")
def test_every_layout_and_release_comes_back_from_msadapter(
    name: str, family: str, golden: Path, tmp_path: Path
) -> None:
    original = golden / name
    assert repair(rewrite(original, tmp_path / "in", family), tmp_path / "out") == 0
    for path in sorted(original.glob("iter_*/mp_rank_*/*.pt")):
        made = tmp_path / "out" / path.relative_to(original)
        wanted, found = (torch.load(one, weights_only=False, pickle_module=Lenient) for one in (path, made))
        assert without_generators(differences(wanted, found)) == [], path
        assert arrays_of(path) == arrays_of(made)  # Megatron-LM 0.19 refuses the names of numpy 1


def arrays_of(path: Path) -> list[bytes]:
    """What of numpy a file names."""
    return sorted(set(re.findall(rb"cnumpy[\w.]*\n\w+", Archive.open(path).pickle)))


class Lenient:
    """pickle, with stand-ins for classes that are not installed."""

    import pickle as _pickle

    load = staticmethod(_pickle.load)

    class Unpickler(_pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            try:
                return super().find_class(module, name)
            except (ImportError, AttributeError):
                return type(name, (Named,), {"__module__": module})


def test_every_model_passes_and_torch_loads_it_without_trust(tmp_path: Path) -> None:
    """Names that nobody knows, views whose stride lies, shared tensors, every type that MSAdapter writes."""

    def tensor(key: str, kind: str, shape: tuple[int, ...], stride: list[Value], numel: int) -> Value:
        storage = Persistent(("storage", kind, key, "cpu", numel))
        rebuild, outer = (
            Global("msadapter._utils", "_rebuild_tensor_v2"),
            Global("msadapter._tensor", "_rebuild_from_type_v2"),
        )
        return Call(
            outer,
            (
                rebuild,
                Global("mindspore.common.tensor", "Tensor"),
                (storage, 0, shape, stride, False, None, None),
                None,
            ),
        )

    data = np.arange(6, dtype="<f4")
    shared = tensor("0", "FloatStorage", (3, 2), [1, 3], 6)
    tree: dict[Value, Value] = {
        "iteration": 7,
        "model": {"vision.tower.0.weights": shared, "tied": shared, "quite/another name": tensor("1", "BFloat16Storage", (2,), [1], 2)},
        "of a fork": [tensor("2", "LongStorage", (), [], 1), tensor("3", "BoolStorage", (2,), [1], 2), tensor("4", "IntStorage", (0, 3), [3, 1], 0)],
    }  # fmt: skip
    payloads = {"0": data.tobytes(), "1": b"\x80\x3f\0\x40", "2": (41).to_bytes(8, "little"), "3": b"\1\0", "4": b""}
    write_archive(tmp_path / "in/iter_0000007/mp_rank_00/model_optim_rng.pt", write_pickle(tree, check=False), payloads)
    assert repair(tmp_path / "in", tmp_path / "out", "--verify", "full") == 0
    made = torch.load(tmp_path / "out/iter_0000007/mp_rank_00/model_optim_rng.pt", weights_only=True)
    model = made["model"]
    assert model["vision.tower.0.weights"].tolist() == data.reshape(3, 2).tolist()
    assert model["tied"] is model["vision.tower.0.weights"]
    assert model["quite/another name"].tolist() == [1.0, 2.0]
    assert [one.tolist() for one in made["of a fork"]] == [41, [True, False], []]
    assert made["of a fork"][2].shape == (0, 3)
    assert "rng_state" not in made


def test_stages_one_at_a_time_publish_last(golden: Path, tmp_path: Path) -> None:
    source = rewrite(golden / "megatron06/b_tp2pp2/A", tmp_path / "in")
    tracker = tmp_path / "out/latest_checkpointed_iteration.txt"
    assert repair(source, tmp_path / "out", "--stage", 1) == 0
    assert not tracker.exists()
    assert repair(source, tmp_path / "out", "--stage", 0) == 0
    assert tracker.exists()
    for level in ("digest", "full"):
        words = ["--source", str(source), "--target", str(tmp_path / "out"), "--target-format", "torch"]
        assert main(["verify", *words, "--level", level, "--progress", "none"]) == 0
    assert main(["verify", str(tmp_path / "out"), "--progress", "none"]) == 0


def test_a_killed_repair_is_resumed(golden: Path, tmp_path: Path) -> None:
    source = rewrite(golden / "megatron06/b_tp2pp2/A", tmp_path / "in")
    script = (
        "import os, sys\n"
        "from ckpt2pt.cli.commands import main\n"
        "from ckpt2pt.run.rank import RankTask\n"
        "real, done = RankTask.run, []\n"
        "def killed(*args):\n"
        "    real(*args)\n"
        "    done.append(args)\n"
        "    if len(done) == 2:\n"
        "        os.kill(os.getpid(), 9)\n"
        "RankTask.run = killed\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["--source", source, "--target", tmp_path / "out", "--target-format", "torch", *QUIET]
    done = subprocess.run([sys.executable, "-c", script, "convert", *map(str, words)], check=False, capture_output=True)
    assert done.returncode == -9
    assert not (tmp_path / "out/latest_checkpointed_iteration.txt").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("iter_*/mp_rank_*/*.pt")}
    assert len(kept) == 4
    assert repair(source, tmp_path / "out", "--verify", "digest") == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len([*(tmp_path / "out").glob("iter_*/mp_rank_*/*.pt")]) == 8


def test_a_difference_is_found_and_nothing_of_others_is_replaced(
    golden: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(golden / "msadapter/moe_ep2", tmp_path / "in")
    assert repair(source, tmp_path / "out") == 0
    made = tmp_path / "out/iter_0000002/mp_rank_00_001/distrib_optim.pt"
    data = bytearray(made.read_bytes())
    data[len(data) // 2] ^= 1
    made.write_bytes(data)
    words = [
        "--source",
        str(source),
        "--target",
        str(tmp_path / "out"),
        "--target-format",
        "torch",
        "--progress",
        "none",
    ]
    assert main(["verify", *words]) == 76
    assert "mp_rank_00_001/distrib_optim.pt" in capfd.readouterr().err
    os.utime(made)
    assert main(["convert", *words]) in {64, 76}
    assert made.read_bytes() == data


def test_plan_writes_nothing_and_says_what_would_be_written(
    golden: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--source",
        str(golden / "msadapter/moe_ep2"),
        "--target",
        str(tmp_path / "out"),
        "--target-format",
        "torch",
    ]
    assert main(["plan", *words, "--output", "json"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert [file["name"] for rank in plan["ranks"] for file in rank["files"]] == [
        "model_optim_rng.pt",
        "distrib_optim.pt",
    ] * 2
    assert not (tmp_path / "out").exists()
    assert main(["convert", *words, *QUIET]) == 0
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.pt"))
    assert plan["bytesToWrite"] == written


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--param-map-path", "meta"],
            "--param-map-path is given, and decides nothing of files that keep what they hold",
        ),
        (["--num-layers", "3"], "--num-layers is 3, and the arguments of the source say 2"),
        (["--target-tp-size", "2"], "--target-tp-size is given, and decides nothing"),
        (["--convert-param-only"], "--convert-param-only is given, and decides nothing"),
        (["--tp-size", "2"], "the tensor parallel size is 1, not 2"),
    ],
)
def test_what_is_said_of_it_has_to_be_true(
    words: list[str], said: str, golden: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert repair(golden / "msadapter/moe_ep2", tmp_path / "out", *words) in {64, 65}
    assert said in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_library_and_a_document_do_it_too(golden: Path, tmp_path: Path) -> None:
    source = golden / "msadapter/moe_ep2"
    outcome = ckpt2pt.convert(source=source, target=tmp_path / "one", source_format="msadapter", target_format="torch")
    assert outcome.published
    (tmp_path / "conversion.yaml").write_text(
        "apiVersion: ckpt2pt.dev/v1alpha1\nkind: CheckpointConversion\nmetadata: {name: leave}\nspec:\n"
        "  model: {numLayers: 2}\n"
        f"  source: {{volume: {{hostPath: {{path: {source.parent}}}}}, path: moe_ep2, format: MSAdapter}}\n"
        f"  target: {{volume: {{hostPath: {{path: {tmp_path}}}}}, path: two, format: Torch}}\n"
    )
    assert main(["run", "-f", str(tmp_path / "conversion.yaml"), "--progress", "none"]) == 0
    assert main(["verify", str(tmp_path / "one"), str(tmp_path / "two"), "--progress", "none"]) == 0
