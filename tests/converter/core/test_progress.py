"""Whoever reads a checkpoint again tells how far it is: every rank begins, reaches its total and ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from ckpt2pt.core.progress import Portion
from ckpt2pt.core.topology import Rank
from ckpt2pt.formats.ptmeta.capture import capture
from ckpt2pt.verification.compare import compare
from ckpt2pt.verification.prove import verify_records, verify_target
from goldens import golden_sets
from results import Result, convert


class Recorder:
    """Keeps what it is reported."""

    def __init__(self) -> None:
        self.totals: dict[Rank, int] = {}
        self.done: dict[Rank, int] = {}
        self.steps = 0
        self.ended: list[Rank] = []

    def begin(self, totals: Mapping[Rank, int], iteration: int) -> None:
        assert not self.totals, "it begins once"
        self.totals = dict(totals)

    def advance(self, rank: Rank, nbytes: int) -> None:
        assert nbytes >= 0
        self.steps += nbytes > 0
        self.done[rank] = self.done.get(rank, 0) + nbytes

    def end(self, rank: Rank) -> None:
        assert self.done[rank] == self.totals[rank]
        self.ended.append(rank)

    def close(self) -> None:
        raise AssertionError("whoever made a reporter closes it")


@pytest.fixture(scope="module")
def result(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return convert(golden / "megatron06" / "b_tp2pp2", tmp_path_factory.mktemp("out") / "out")


RANKS = [(0, 0), (1, 0), (0, 1), (1, 1)]


@pytest.mark.parametrize("level", ["digest", "full"])
def test_a_result_against_its_source(level: str, result: Result) -> None:
    received = Recorder()
    verify_target(result.request, range(2), level=level, reporter=received)  # type: ignore[arg-type]
    assert received.ended == RANKS
    assert received.steps > len(RANKS), "not a whole rank at a time"


def test_most_of_what_a_full_verification_reads_is_counted_while_it_reads(result: Result) -> None:
    class Counting(Recorder):
        last = 0

        def advance(self, rank: Rank, nbytes: int) -> None:
            super().advance(rank, nbytes)
            self.last = nbytes

        def end(self, rank: Rank) -> None:
            super().end(rank)
            assert self.last < self.totals[rank] / 4, "the estimate is close to what is read"

    verify_target(result.request, range(2), level="full", reporter=Counting())


def test_a_result_by_its_own_manifests(result: Result) -> None:
    received = Recorder()
    report = verify_records(result.request.target, reporter=received)
    assert sorted(received.ended) == sorted(RANKS)
    assert sum(received.totals.values()) == report.checked_bytes


def test_two_checkpoints(result: Result) -> None:
    received = Recorder()
    compare(result.request.target, result.request.target, reporter=received)
    files = sum(path.stat().st_size for path in result.request.target.rglob("*.pt"))
    assert received.done == received.totals == {(0, 0): 2 * files}
    assert received.steps > 10


def test_pt_meta_from_a_checkpoint() -> None:
    folder = next(path for path in golden_sets() if path.name.startswith("b_tp2pp2"))
    received = Recorder()
    capture(folder / "A", reporter=received)
    assert sorted(received.ended) == sorted(RANKS)
    assert received.steps > len(RANKS)


def test_a_portion_never_passes_its_total() -> None:
    received = Recorder()
    received.begin({(0, 0): 100}, 0)
    portion = Portion(received, (0, 0), 100)
    portion.advance(60)
    portion.advance(60)
    assert received.done == {(0, 0): 100}
    portion.end()
    assert received.ended == [(0, 0)]
