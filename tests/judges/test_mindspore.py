"""Files that we write, loaded by real mindspore in an environment of its own (`make test-mindspore`)."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from ckpt2pt.engine.write import Stop, write_files
from ckpt2pt.formats.mindspore import index_file, read_scalar
from ckpt2pt.formats.mindspore.entries import Entry, number_entry, text_entry
from ckpt2pt.formats.mindspore.writer import CkptFile, mindspore_file
from ckptfiles import some_tensors
from goldens import REPOSITORY, golden_root
from imports import import_request, merge, run_all
from torchload import leaves

pytestmark = [pytest.mark.mindspore, pytest.mark.timeout(600)]  # importing mindspore alone takes a good while

PYTHON = REPOSITORY / ".venv-mindspore" / "bin" / "python"
SETS = {
    "dist_opt_dp2_tp2": golden_root() / "mindspore" / "dist_opt_dp2_tp2",
    "j_tp1pp2dp2": golden_root() / "megatron06" / "j_tp1pp2dp2" / "ms_zero_src",
}


def load(*paths: Path) -> list[dict[str, list[object]]]:
    """What mindspore read: {name: [type, shape, SHA-256]} of each file."""
    script = REPOSITORY / "tests" / "support" / "mindspore_load.py"
    quiet = os.environ | {"GLOG_v": "3"}
    done = subprocess.run(
        [str(PYTHON), str(script), *map(str, paths)], capture_output=True, text=True, check=False, env=quiet
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, list[object]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def indexed(path: Path) -> dict[str, list[object]]:
    """The same by our own index."""
    found: dict[str, list[object]] = {}
    for name, ref in index_file(path).items():
        data = b"".join(Path(e.path).read_bytes()[e.offset : e.offset + e.nbytes] for e in ref.extents)
        if ref.dtype == "str":
            data = str(read_scalar(ref)).encode()
        found[name] = [ref.dtype, list(ref.shape), hashlib.sha256(data).hexdigest()]
    return found


@pytest.mark.parametrize("name", SETS)
def test_merged_files_are_loaded_with_equal_values(name: str, tmp_path: Path) -> None:
    source = SETS[name]
    for suffix in ("ckpt", "safetensors"):
        merge(source, tmp_path / suffix, dst_format=suffix, crc=suffix == "ckpt")
    paths = sorted(tmp_path.glob("*/rank_*/*_dp_merged.*"))
    assert len(paths) == 4
    loaded = load(*paths)
    assert loaded == [indexed(path) for path in paths]
    if name == "dist_opt_dp2_tp2":
        for path, found in zip(paths, loaded, strict=True):
            expected = np.load(source / f"expected_merged_tp{path.parent.name[-1]}.npz")
            assert {key: found[key][2] for key in expected.files} == {
                key: hashlib.sha256(expected[key].tobytes()).hexdigest() for key in expected.files
            }


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_imported_files_are_loaded_with_equal_values(
    suffix: Literal["ckpt", "safetensors"], full: bool, tmp_path: Path
) -> None:
    source = golden_root() / "megatron06" / "b_st_tp2pp2_safetensors" / "A"
    run_all(import_request(source=source, target=tmp_path, format=suffix, full=full))
    paths = sorted(tmp_path.glob("rank_*/network.*"))
    assert len(paths) == 4
    loaded = load(*paths)
    assert loaded == [indexed(path) for path in paths]
    # And the values are Megatron's, as torch sees them.
    place, name = source / "iter_0000002" / "mp_rank_00_000", "language_model.embedding.word_embeddings.weight"
    if full:
        ((_, kinds),) = torch.load(place / "distrib_optim.pt")[0].items()
        for prefix, kind in {"": "param", "exp_avg.": "exp_avg", "exp_avg_sq.": "exp_avg_sq"}.items():
            # Registered first, so it lies last in the buffer; 128 words of 64 numbers on each of two ranks.
            values = kinds[kind][0][-128 * 64 :].numpy().tobytes()
            assert loaded[0][prefix + name][2] == hashlib.sha256(values).hexdigest()
    else:
        found = leaves(place / "model_optim_rng.pt")
        weight = found["/model/language_model/embedding/word_embeddings/weight"].float().numpy()
        assert loaded[0][name][2] == hashlib.sha256(weight.tobytes()).hexdigest()


def test_slices_checksums_scalars_and_texts_are_loaded(tmp_path: Path) -> None:
    tensors = [each for each in some_tensors() if each.data]  # an empty one mindspore takes for a scalar
    entries = [Entry(name=t.name, dtype=t.dtype, shape=t.shape, source=t.data) for t in tensors]
    scalars = [number_entry("step_num", 7, "int64"), number_entry("lr", 0.1, "float64")]
    files = [
        CkptFile(name="a.ckpt", entries=(*entries, *scalars, text_entry("text", "naïve 𝄞")), crc=True, slice_bytes=8),
        mindspore_file("safetensors", "b.safetensors", [*entries, *scalars]),
    ]
    written, _ = write_files(tmp_path, files, (), stop=Stop(), advance=lambda _: None, check=True)
    paths = [file.path for file in written]
    loaded = load(*paths)
    assert loaded == [indexed(path) for path in paths]
    assert len(loaded[0]) == len(tensors) + 3
