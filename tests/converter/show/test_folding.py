"""Ranks that are alike share a line, every rank is in exactly one, and documents keep them all."""

from __future__ import annotations

import re

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.core.topology import Topology
from ckpt2pt.show.folding import fold, folded, spanned
from handmade import Handmade


def test_a_line_has_all_its_stages_for_all_its_tensor_parallel_ranks() -> None:
    cells = [((tp, pp), (pp in {0, 3}, tp == 1 and pp == 2)) for pp in range(4) for tp in range(2)]
    lines = fold(cells)
    assert {(*spanned(ranks), cell) for cell, ranks in lines} == {
        ("0,3", "0-1", (True, False)),
        ("1", "0-1", (False, False)),
        ("2", "0", (False, False)),
        ("2", "1", (False, True)),
    }
    assert sorted(rank for _, ranks in lines for rank in ranks) == sorted(rank for rank, _ in cells)


def test_with_details_each_rank_has_its_own() -> None:
    cells = [((tp, 0), ("x",)) for tp in range(3)]
    assert fold(cells, details=True) == [(("x",), [rank]) for rank, _ in cells]


def test_only_tables_of_ranks_are_folded() -> None:
    rows = [{"tp": tp, "pp": 0, "file": f"args_tp{tp:02d}_pp000.pt"} for tp in range(2)]
    document = {"kind": "x", "ranks": rows, "iterations": [{"tp": 2, "pp": 2}]}
    assert folded(document) == document | {"ranks": [{"pp": "0", "tp": "0-1", "file": "args_tp*_pp*.pt"}]}
    assert folded({"ranks": "0-63"}) == {"ranks": "0-63"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a plan of tp 8, pp 8, vpp 2 with a no-op layer."""
    topology = Topology(num_layers=32, tensor=8, pipeline=8, virtual=2, noop=frozenset({31}))
    request = Handmade(topology=topology).write(tmp_path_factory.mktemp("wide"))
    paths = {"--ms-path": request.source, "--param-map-path": request.metadata, "--megatron-path": request.target}
    sizes = "--num-layers 32 --tp-size 8 --pp-size 8 --vpp-size 2 --noop 31"
    return [*(str(word) for pair in paths.items() for word in pair), *sizes.split()]


def test_a_plan_of_many_ranks_fits_on_a_screen(wide: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *wide]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 34  # of these 13 say where each fact is from, and who loads the result
    rows = [re.split(r"  +", line.strip()) for line in lines if re.match(r"\d", line)]
    assert [row[:5] for row in rows[:4]] == [
        ["0", "0-7", "0", "0-1", "embedding"],
        ["1-7", "0-7", "0", "2-15 (2 each)", "-"],
        ["0-6", "0-7", "1", "16-29 (2 each)", "-"],
        ["7", "0-7", "1", "30 (no-op 31)", "head"],
    ]
    files = sum(1 + int(found[1]) for line in lines if (found := re.search(r"ckpt and (\d+) more$", line)))
    assert files == 2 * 64


def test_details_list_every_rank_and_file(wide: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *wide, "--details"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("/model_optim_rng.pt ") == shown.count("/distrib_optim.pt ") == 64
    assert len(shown.splitlines()) > 256


def test_the_document_is_the_same_with_and_without(wide: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for more in ([], ["--details"]):
        assert main(["plan", *wide, *more, "--output", "json"]) == 0
        found.append(re.sub(r'"bytesFree": \d+', "", capsys.readouterr().out))
    assert found[0] == found[1]
    assert found[0].count('"directory"') == 64


def test_metadata_of_many_ranks_as_well(wide: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    metadata = wide[wide.index("--param-map-path") + 1]
    assert main(["inspect", metadata]) == 0
    assert len(capsys.readouterr().out.splitlines()) < 50
    assert main(["inspect", metadata, "--details"]) == 0
    assert capsys.readouterr().out.count("args_tp") == 64
