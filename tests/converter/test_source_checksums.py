"""Sources that state a CRC-32 of themselves: proved while they are read, by everything that reads all of them."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.core.topology import Topology
from ckpt2pt.discover import prepare
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import FormatError, TryAgainError
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.run import conversion as run_module
from ckpt2pt.run.conversion import run
from ckpt2pt.verification.prove import verify_target
from ckptfiles import trailer
from conversions import Quiet, request_for
from goldens import golden_root
from handmade import Handmade
from imports import merge


def flip_a_bit(path: Path, name: str) -> None:
    """In the middle of a tensor, where nothing but a checksum can tell."""
    extent = index_file(path)[name].extents[0]
    data = bytearray(path.read_bytes())
    data[extent.offset + extent.nbytes // 2] ^= 1
    path.write_bytes(data)


def checked_source(folder: Path, suffix: str, **more: Any) -> tuple[Handmade, Request, Path]:
    model = Handmade(topology=Topology(num_layers=2, pipeline=2))
    request = model.write(folder, **more)
    shutil.rmtree(request.source)
    model.write_source(request.source, suffix=suffix, crc=True)
    return model, request, request.source / "rank_1" / f"network_rank_1-0_12.{suffix}"


def read_so_far() -> int:
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize("verify", ["none", "full"])
def test_a_source_that_differs_from_its_own_checksum_is_not_published(suffix: str, verify: str, tmp_path: Path) -> None:
    model, request, path = checked_source(tmp_path, suffix, verify=verify)
    flip_a_bit(path, f"exp_avg.{model.parameters(1, 0)[0].mindspore}")
    with pytest.raises(FormatError, match=r"crc_num.*\n.*rank_1") as caught:
        run(request, range(2), Quiet())
    assert caught.value.where == str(path)
    assert not list((tmp_path / "out").rglob("mp_rank_00_001/*"))
    assert not list((tmp_path / "out").glob("latest*"))


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_checksum_is_proved_without_a_second_reading(suffix: str, tmp_path: Path) -> None:
    read: dict[bool, int] = {}
    for crc in (True, False):
        model = Handmade(topology=Topology(num_layers=2), hidden=256, kv=256, ffn=512, vocab=1024)
        request = model.write(tmp_path / str(crc), verify="none")
        shutil.rmtree(request.source)
        model.write_source(request.source, suffix=suffix, crc=crc)
        before = read_so_far()
        outcome = run(request, [0], Quiet())
        read[crc] = read_so_far() - before
        assert outcome.source_checksums == {"verified": int(crc), "notChecked": 0, "none": int(not crc)}
        assert ("source checksums: 1 verified" in outcome.sentence()) == crc
    size = sum(path.stat().st_size for path in (tmp_path / "True" / "ms").rglob("*"))
    assert size > 10 << 20
    assert read[True] - read[False] < 0.02 * size


def test_parameters_alone_leave_the_checksum_unchecked_and_say_so(tmp_path: Path) -> None:
    model, request, path = checked_source(tmp_path, "ckpt", full=False, verify="digest")
    outcome = run(request, range(2), Quiet())
    assert "source checksums: 2 not checked (only a part of the file is read)" in outcome.sentence()
    flip_a_bit(path, f"exp_avg.{model.parameters(1, 0)[0].mindspore}")
    with pytest.raises(FormatError, match="crc_num"):
        run(replace(request, verify="full", target=tmp_path / "other"), range(2), Quiet())


def test_verify_finds_a_source_that_changed_against_its_own_checksum(tmp_path: Path) -> None:
    _, request, path = checked_source(tmp_path, "ckpt")
    run(request, range(2), Quiet())
    report = verify_target(request, range(2), level="full")
    assert report.source_checksums["verified"] == 2
    assert "the checksums of 2 source files" in report.render()
    stamp = path.stat()
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(FormatError, match="crc_num"):
        verify_target(request, range(2), level="full")


def test_a_source_written_meanwhile_is_tried_again_and_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, request, path = checked_source(tmp_path, "ckpt", verify="none")
    prepared = prepare

    def prepare_and_change(*words: Any) -> Any:
        found = prepared(*words)
        flip_a_bit(path, model.parameters(1, 0)[0].mindspore)
        return found

    monkeypatch.setattr(run_module, "prepare", prepare_and_change)
    with pytest.raises(TryAgainError, match="was written while it was read"):
        run(request, [1], Quiet())


def shards_with_checksums(folder: Path) -> Path:
    source = folder / "ms"
    shutil.copytree(golden_root() / "megatron06" / "j_tp1pp2dp2" / "ms_zero_src", source)
    for path in source.glob("rank_*/*.ckpt"):
        path.chmod(0o644)
        path.write_bytes(path.read_bytes() + trailer(path.read_bytes()))
    return source


def test_shards_are_proved_when_they_are_merged(tmp_path: Path) -> None:
    source = shards_with_checksums(tmp_path)

    good = merge(source, tmp_path / "good")
    assert good.outcome.source_checksums == {"verified": 4, "notChecked": 0, "none": 0}
    assert "source checksums: 4 verified" in good.sentence()
    assert merge(source, tmp_path / "half", optimizer=False).outcome.source_checksums["notChecked"] == 4
    path = next((source / "rank_3").glob("*.ckpt"))
    flip_a_bit(path, next(name for name in index_file(path) if name.startswith("exp_avg_sq.buffer")))
    with pytest.raises(FormatError, match="crc_num") as caught:
        merge(source, tmp_path / "bad")
    assert caught.value.where == str(path)
    assert not list((tmp_path / "bad" / "rank_2").glob("*"))


def test_shards_are_proved_when_they_are_converted_in_place(tmp_path: Path) -> None:
    golden = golden_root() / "megatron06" / "j_tp1pp2dp2"
    request = request_for(golden, tmp_path / "out", source=shards_with_checksums(tmp_path), verify="none")
    assert run(request, range(2), Quiet()).source_checksums["verified"] == 4
