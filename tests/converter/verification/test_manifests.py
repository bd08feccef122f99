"""A result that has only itself to tell what it is: copied to where its source is not."""

from __future__ import annotations

import json
import os
import shutil
import time
import tracemalloc
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.errors import InputError, MissingInputError
from ckpt2pt.io.records import seal, unseal
from ckpt2pt.run.conversion import run
from ckpt2pt.verification.prove import verify_records
from conversions import Quiet, request_for
from imports import import_request, run_all
from results import convert

SET = "b_tp2pp2"


@pytest.fixture(scope="module")
def finished(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "out"
    convert(golden / "megatron06" / SET, folder)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "elsewhere" / "out")


@pytest.fixture
def imported(golden: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "ms"
    assert run_all(import_request(source=golden / "megatron06" / SET / "A", target=folder)).published
    return folder


def problems(folder: Path) -> list[tuple[str, str]]:
    return [(difference.file, difference.problem) for difference in verify_records(folder).differences]


def test_a_copy_proves_itself_by_its_root_or_its_iteration(copied: Path) -> None:
    [iteration] = copied.glob("iter_*")
    for folder in (copied, iteration):
        report = verify_records(folder)
        assert (report.differences, report.ranks, report.level) == ((), 4, "digest")
        assert report.checked_bytes == sum(path.stat().st_size for path in copied.rglob("*.pt"))


def test_an_import_proves_itself(imported: Path) -> None:
    report = verify_records(imported)
    assert (report.differences, report.ranks) == ((), 4)
    path = next(imported.glob("rank_1/*.ckpt"))
    os.truncate(path, path.stat().st_size - 1)
    name = path.relative_to(imported).as_posix()
    assert problems(imported) == [(name, "has another size")]


NAMES = [
    "mp_rank_01_001/model_optim_rng.pt", "mp_rank_00_000/distrib_optim.pt", ".ckpt2pt/rank-00-000.json",
    ".ckpt2pt/rank-01-001.json", ".ckpt2pt/stage-000.json", ".ckpt2pt/stage-001.json", ".ckpt2pt/report.json",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lost", [True, False], ids=["lost", "flipped"])
def test_what_is_lost_or_flipped_is_named(copied: Path, name: str, lost: bool) -> None:
    [iteration] = copied.glob("iter_*")
    path = iteration / name
    if lost:
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert name in {file for file, _ in problems(copied)}


def test_a_whole_stage_that_is_lost_is_missed(copied: Path) -> None:
    for pattern in ("mp_rank_*_001", ".ckpt2pt/*-001.json"):
        for path in [*copied.glob(f"iter_*/{pattern}")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert (".ckpt2pt/stage-001.json", "is not there") in problems(copied)
    [report] = copied.glob("iter_*/.ckpt2pt/report.json")
    report.unlink()
    assert problems(copied) == [(".ckpt2pt/report.json", "is not there")], "and without it nobody knows of the stage"


def test_a_file_too_many_is_named(copied: Path) -> None:
    [iteration] = copied.glob("iter_*")
    (iteration / "mp_rank_02_000").mkdir()
    shutil.copyfile(iteration / NAMES[0], iteration / "mp_rank_02_000" / "model_optim_rng.pt")
    assert problems(copied) == [("mp_rank_02_000/model_optim_rng.pt", "is unexpected")]


def test_what_is_half_done_is_not_proved(golden: Path, tmp_path: Path) -> None:
    run(request_for(golden / "megatron06" / SET, tmp_path), [1], Quiet())
    assert problems(tmp_path)[0] == (".ckpt2pt/stage-000.json", "is not there")


def test_a_folder_that_tells_nothing_is_no_result(tmp_path: Path, copied: Path) -> None:
    with pytest.raises(MissingInputError, match="no records"):
        verify_records(tmp_path)
    [claim] = copied.glob("iter_*/.ckpt2pt/claim.json")
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"identity": "me"}))
    with pytest.raises(InputError, match="the claim there was changed"):
        verify_records(copied)


def test_a_second_result_in_the_same_folder_is_named(imported: Path, copied: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(imported, both)
    [iteration] = copied.glob("iter_*")
    shutil.copytree(iteration, both / iteration.name)
    report = verify_records(both)
    assert report.differences == ()
    assert [text for text in report.warnings if iteration.name in text]
    assert not [text for text in verify_records(imported).warnings if "iter_" in text]


def test_one_path_on_the_command_line_is_a_result(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copied)]) == 0
    assert "4 ranks, sizes and CRC-32 of all files" in capsys.readouterr().out
    next(copied.rglob("distrib_optim.pt")).unlink()
    assert main(["verify", str(copied), "--output", "json"]) == 76
    assert json.loads(capsys.readouterr().out)["differences"][0]["problem"] == "is not there"


def test_a_rank_number_without_end_is_refused_at_once(copied: Path) -> None:
    [iteration] = copied.glob("iter_*")
    path = iteration / ".ckpt2pt" / "rank-00-000.json"
    record = unseal(path.read_bytes())
    assert record is not None
    for tp, pp, error in ((0, 1 << 40, None), (0, 60_000, InputError), (60_000, 60_000, InputError)):
        path.write_bytes(seal(record | {"tp": tp, "pp": pp}))
        start = time.process_time()
        if error:
            with pytest.raises(error, match="the records name tp"):
                verify_records(copied)
        else:
            assert (".ckpt2pt/rank-00-000.json", "was changed") in problems(copied)
        assert time.process_time() - start < 5


@pytest.mark.parametrize("name", ["claim.json", "report.json", "stage-000.json", "rank-00-000.json"])
def test_a_record_of_two_gigabytes_is_not_read(name: str, copied: Path) -> None:
    [iteration] = copied.glob("iter_*")
    os.truncate(iteration / ".ckpt2pt" / name, 2 << 30)
    tracemalloc.start()
    try:
        if name == "claim.json":
            with pytest.raises(InputError, match="claim"):
                verify_records(copied)
        else:
            assert (f".ckpt2pt/{name}", "was changed") in problems(copied)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
