"""A result that differs from its source gets no final name, and proving one reads each file once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.core.moves import Move
from ckpt2pt.core.topology import Topology
from ckpt2pt.discover import Prepared
from ckpt2pt.discover.mindspore import MindSporeRank
from ckpt2pt.discover.request import Request
from ckpt2pt.engine import write
from ckpt2pt.errors import VerificationError
from ckpt2pt.run.conversion import run
from conversions import Quiet, request_for
from handmade import Handmade
from imports import import_request, run_all


@pytest.fixture
def golden_j(golden: Path) -> Path:
    return golden / "megatron06" / "j_tp1pp2dp2"


def conversion(folder: Path, target: Path, verify: str) -> Request:
    return request_for(folder, target, verify=verify)


def swapped(found: Sequence[Move]) -> list[Move]:
    """A plan in which two tensors of one size change places: every digest of it is right."""
    changed = list(found)
    for role in ("exp_avg", "param"):
        sized = [(sum(extent.nbytes for extent in move.extents), move) for move in found]
        same = [number for number, (nbytes, move) in enumerate(sized) if move.role == role and nbytes == 4 * 64]
        one, other = same[:2]
        changed[one] = replace(found[one], sinks=found[other].sinks)
        changed[other] = replace(found[other], sinks=found[one].sinks)
    return changed


def flip_after_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system loses a bit of each file between the write and the proof."""
    finish: Callable[[Any], None] = write._finish  # pyright: ignore[reportPrivateUsage]

    def finish_and_flip(output: write.Output) -> None:
        finish(output)
        at = output.layout.storage_offset(0) + 5
        byte = os.pread(output.file.fd, 1, at)[0]
        os.pwrite(output.file.fd, bytes([byte ^ 1]), at)

    monkeypatch.setattr(write, "_finish", finish_and_flip)


def left(folder: Path) -> list[str]:
    """Everything in a target but the records."""
    return sorted(str(path) for path in folder.rglob("*") if path.is_file() and ".ckpt2pt" not in path.parts)


def test_a_wrong_plan_of_a_conversion_publishes_nothing(
    golden_j: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Prepared.moves
    monkeypatch.setattr(Prepared, "moves", lambda self: swapped(plan(self)))
    with pytest.raises(VerificationError, match="differ from the source") as caught:
        run(conversion(golden_j, tmp_path / "out", "full"), range(2), Quiet())
    assert caught.value.exit_code == 76
    assert left(tmp_path / "out") == []
    run(conversion(golden_j, tmp_path / "digest", "digest"), range(2), Quiet())
    assert left(tmp_path / "digest"), "the digests of a wrong plan are right"


@pytest.mark.parametrize("verify", ["digest", "full"])
def test_a_bit_that_a_conversion_lost_on_the_disk_publishes_nothing(
    golden_j: Path, tmp_path: Path, verify: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        flip_after_the_sums(patch)
        with pytest.raises(VerificationError) as caught:
            run(conversion(golden_j, tmp_path / "out", verify), range(2), Quiet())
    assert caught.value.exit_code == 76
    assert left(tmp_path / "out") == []
    assert run(conversion(golden_j, tmp_path / "out", verify), range(2), Quiet()).published


def counted_reads(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> Counter[str]:
    """Bytes read of each file, by the name of its path."""
    found = Counter[str]()
    names: dict[int, str] = {}

    def name(fd: int) -> str:
        return names.setdefault(os.fstat(fd).st_ino, os.readlink(f"/proc/self/fd/{fd}"))

    preadv, pread = os.preadv, os.pread

    def counting_preadv(fd: int, into: Any, offset: int, *more: Any) -> int:
        count = preadv(fd, into, offset, *more)
        found[name(fd)] += count
        return count

    def counting_pread(fd: int, nbytes: int, offset: int) -> bytes:
        data = pread(fd, nbytes, offset)
        found[name(fd)] += len(data)
        return data

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", counting_preadv)
        patch.setattr(os, "pread", counting_pread)
        act()
    return found


def read_of(found: Counter[str], folder: Path) -> int:
    return sum(count for name, count in found.items() if name.startswith(f"{folder}/"))


def test_a_full_proof_reads_the_source_twice_and_the_result_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Handmade(Topology(num_layers=2, pipeline=2), hidden=256, vocab=4096)
    made.write(tmp_path)
    request = made.request(tmp_path, verify="full")
    found = counted_reads(monkeypatch, lambda: run(request, range(2), Quiet()))
    for folder, passes in ((request.source, 2), (request.target, 1)):
        nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in {".pt", ".ckpt"})
        assert passes <= read_of(found, folder) / nbytes < passes + 0.05, folder


# -------------------------------------------------------------------------------------------------------------- import


def importing(source: Path, target: Path, verify: Any, **more: Any) -> Request:
    return import_request(source=source, target=target, verify=verify, **more)


def test_a_wrong_plan_of_an_import_publishes_nothing(
    golden_j: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = MindSporeRank.moves
    monkeypatch.setattr(MindSporeRank, "moves", lambda self: swapped(plan(self)))
    with pytest.raises(VerificationError, match="differ from the source") as caught:
        run_all(importing(golden_j / "A", tmp_path / "out", "full"))
    assert caught.value.exit_code == 76
    assert left(tmp_path / "out") == []
    run_all(importing(golden_j / "A", tmp_path / "digest", "digest"))
    assert left(tmp_path / "digest"), "the digests of a wrong plan are right"


@pytest.mark.parametrize("verify", ["digest", "full"])
def test_a_bit_that_an_import_lost_on_the_disk_publishes_nothing(
    golden_j: Path, tmp_path: Path, verify: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        flip_after_the_sums(patch)
        with pytest.raises(VerificationError) as caught:
            run_all(importing(golden_j / "A", tmp_path / "out", verify))
    assert caught.value.exit_code == 76
    assert left(tmp_path / "out") == []
    assert run_all(importing(golden_j / "A", tmp_path / "out", verify)).published


def test_a_full_proof_of_an_import_reads_the_result_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Handmade(Topology(num_layers=2, pipeline=2), hidden=256, vocab=4096)
    source = made.convert(tmp_path).target.root
    request = importing(source, tmp_path / "back", "full")
    found = counted_reads(monkeypatch, lambda: run_all(request))
    nbytes = sum(path.stat().st_size for path in (tmp_path / "back").glob("rank_*/*.ckpt"))
    assert 1 <= read_of(found, tmp_path / "back") / nbytes < 1.05
    # The optimizer is copied and compared: twice.  Planning and the proof compare the weights with their slices.
    optim = sum(count for name, count in found.items() if name.endswith("distrib_optim.pt"))
    assert optim / sum(path.stat().st_size for path in source.rglob("distrib_optim.pt")) < 3.1
