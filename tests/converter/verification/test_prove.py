"""Results against their manifests and against their source, and what is said about it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.errors import MissingInputError
from ckpt2pt.io.records import seal
from ckpt2pt.publish import read_record
from ckpt2pt.verification.prove import verify_target
from ckpt2pt.verification.report import Report
from results import Result, convert, flip

LEVELS = pytest.mark.parametrize("level", ["digest", "full"])
MODEL = "mp_rank_00_001/model_optim_rng.pt"
LEAF = "/model/language_model/encoder/final_norm.weight"


@pytest.fixture(scope="module")
def finished(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return convert(golden / "megatron06" / "j_tp1pp2dp2", tmp_path_factory.mktemp("finished"))


@pytest.fixture
def result(finished: Result, tmp_path: Path) -> Result:
    return finished.copied(tmp_path / "out")


def verify(result: Result, level: Any, stages: tuple[int, ...] = (0, 1), reader: Any = "own") -> Report:
    return verify_target(result.request, stages, level=level, reader=reader)


@LEVELS
@pytest.mark.parametrize("reader", ["own", pytest.param("torch", marks=pytest.mark.torch)])
def test_a_finished_conversion_has_no_difference(result: Result, level: str, reader: str) -> None:
    report = verify(result, level, reader=reader)
    assert report.differences == ()
    report.raise_differences()
    assert (report.ranks, report.checked_tensors > 0) == (2, level == "full")
    nbytes = sum(path.stat().st_size for path in result.folder.glob("mp_rank_*/*.pt"))
    assert report.checked_bytes == nbytes if level == "digest" else report.checked_bytes > nbytes


@pytest.mark.parametrize(
    ("level", "problems"),
    [
        pytest.param("digest", ["has another CRC-32"], id="digest"),
        pytest.param(
            "full",
            [
                "1 of 64 elements differ from the source decoder.final_layernorm.weight as bfloat16",
                "1 of 64 elements differ from param of language_model.encoder.final_norm.weight in distrib_optim.pt as bfloat16",
            ],
            id="full",
        ),
    ],
)
def test_one_bit_is_found_by_either_level(result: Result, level: str, problems: list[str]) -> None:
    flip(result.folder / MODEL, LEAF, 3)
    found = verify(result, level).differences
    assert [d.problem for d in found] == problems
    assert {d.file for d in found} == {MODEL}
    assert verify(result, level, stages=(0,)).differences == (), "the other stage is right"


def _cut(folder: Path) -> None:
    os.truncate(folder / MODEL, 5000)


def _lose(folder: Path) -> None:
    (folder / MODEL).unlink()


def _forget(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / ".ckpt2pt" / name).unlink()


def _strange(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / ".ckpt2pt" / name
        path.write_bytes(seal((read_record(path) or {}) | {"identity": "another"}))

    return edit


def _change(name: str, **facts: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / ".ckpt2pt" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))

    return edit


def _track(text: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder.parent / "latest_checkpointed_iteration.txt").write_text(text, encoding="utf-8")

    return edit


TRACKER = "latest_checkpointed_iteration.txt"
ASTRAY = [(TRACKER, "does not lead to an iteration")]
STRANGE = "is of another conversion or another source"
UNLIKE = "tells something else than the manifests that it joins"


def of(name: str, problem: str) -> tuple[str, str]:
    return f".ckpt2pt/{name}", problem


DIGEST = [
    pytest.param(_cut, [(MODEL, "has another size")], id="a-file-cut"),
    pytest.param(_lose, [(MODEL, "is not there")], id="a-file-lost"),
    pytest.param(_track("77"), ASTRAY, id="tracker-astray"),
    pytest.param(_track("²"), ASTRAY, id="tracker-no-number"),
    pytest.param(lambda folder: (folder.parent / TRACKER).unlink(), ASTRAY, id="no-tracker"),
]
RANK, STAGE, REPORT, CLAIM = "rank-00-001.json", "stage-001.json", "report.json", "claim.json"
RECORDS = [
    pytest.param(_forget(RANK), [of(STAGE, UNLIKE), of(RANK, "is not there")], id="no-rank"),
    pytest.param(_change(RANK, files=[]), [of(STAGE, UNLIKE), of(RANK, "was changed")], id="rank-changed"),
    pytest.param(_strange(RANK), [of(STAGE, UNLIKE), of(RANK, STRANGE)], id="rank-strange"),
    pytest.param(_forget(STAGE), [of(STAGE, "is not there")], id="no-stage"),
    pytest.param(_change(STAGE, ranks=[]), [of(STAGE, "was changed")], id="stage-changed"),
    pytest.param(_strange(STAGE), [of(STAGE, STRANGE), of(REPORT, UNLIKE)], id="stage-strange"),
    pytest.param(_forget(REPORT), [of(REPORT, "is not there")], id="no-report"),
    pytest.param(_change(REPORT, iteration=3), [of(REPORT, "was changed")], id="report-changed"),
    pytest.param(_strange(REPORT), [of(REPORT, STRANGE)], id="report-strange"),
    pytest.param(_forget(CLAIM), [of(CLAIM, "is not there")], id="no-claim"),
    pytest.param(_change(CLAIM, identity="me"), [of(CLAIM, "was changed")], id="claim-changed"),
    pytest.param(_strange(CLAIM), [of(CLAIM, STRANGE)], id="claim-strange"),
]


@LEVELS
@pytest.mark.parametrize(("damage", "expected"), RECORDS)
def test_a_record_that_is_missing_changed_or_strange_is_named(
    result: Result, damage: Callable[[Path], None], expected: list[tuple[str, str]], level: str
) -> None:
    damage(result.folder)
    assert [(d.file, d.problem) for d in verify(result, level).differences] == expected


@pytest.mark.parametrize(("damage", "expected"), DIGEST)
def test_the_digest_level_names_what_is_missing_or_strange(
    result: Result, damage: Callable[[Path], None], expected: list[tuple[str, str]]
) -> None:
    damage(result.folder)
    assert [(d.file, d.problem) for d in verify(result, "digest").differences] == expected


@LEVELS
@pytest.mark.parametrize(
    "name", ["mp_rank_01_000/model_optim_rng.pt", "mp_rank_00/distrib_optim.pt", "mp_rank_00_000/model_rng.pt"]
)
def test_a_file_that_is_of_no_rank_is_named(result: Result, level: str, name: str) -> None:
    path = result.folder / name
    path.parent.mkdir(exist_ok=True)
    shutil.copyfile(result.folder / MODEL, path)
    assert [(d.file, d.problem) for d in verify(result, level).differences] == [(name, "is unexpected")]


@LEVELS
def test_optimizer_state_does_not_belong_to_weights_alone(golden: Path, tmp_path: Path, level: str) -> None:
    result = convert(golden / "megatron06" / "j_tp1pp2dp2", tmp_path, full=False)
    name = "mp_rank_00_001/distrib_optim.pt"
    shutil.copyfile(result.folder / MODEL, result.folder / name)
    assert [(d.file, d.problem) for d in verify(result, level).differences] == [(name, "is unexpected")]


def test_a_tracker_that_has_gone_on_to_a_later_iteration_is_right(result: Result) -> None:
    (result.folder.parent / "iter_0000009").mkdir()
    _track("9")(result.folder)
    assert verify(result, "full").differences == ()


def test_a_stage_can_be_verified_before_the_others_are_converted(golden: Path, tmp_path: Path) -> None:
    from ckpt2pt.run.conversion import run
    from conversions import Quiet, request_for

    request = request_for(golden / "megatron06" / "j_tp1pp2dp2", tmp_path)
    run(request, [1], Quiet())
    assert verify_target(request, [1], level="full").differences == ()
    assert [d.file for d in verify_target(request, [0], level="digest").differences] == [
        ".ckpt2pt/stage-000.json",
        ".ckpt2pt/rank-00-000.json",
    ]


def test_a_source_that_was_written_again_is_another_source(result: Result, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(result.request.source, source)
    for path in source.rglob("*.ckpt"):
        os.utime(path, ns=(1, 1))
    again = result._replace(request=replace(result.request, source=source))
    problems = {d.problem for d in verify(again, "full").differences}
    assert problems == {"is of another conversion or another source"}, "the elements are the same"


@LEVELS
def test_a_result_that_was_never_made_is_a_missing_input(result: Result, tmp_path: Path, level: str) -> None:
    nowhere = result._replace(request=replace(result.request, target=tmp_path / "nowhere"))
    with pytest.raises(MissingInputError, match="no result of iteration 2"):
        verify(nowhere, level)


def test_the_conversion_itself_can_ask_for_the_full_level(golden: Path, tmp_path: Path) -> None:
    result = convert(golden / "megatron06" / "j_tp1pp2dp2", tmp_path, verify="full")
    manifest = json.loads((result.folder / ".ckpt2pt" / "rank-00-001.json").read_text())
    assert manifest["verified"] == "full"
