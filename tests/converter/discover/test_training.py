"""Which checkpoint of a training output is converted, and that its ranks belong together."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.topology import Topology
from ckpt2pt.discover import discover, prepare_all, training
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import InputError, MissingInputError, UsageError, ref
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.io.inputs import InputFile
from ckpt2pt.run.conversion import run
from ckpt2pt.show.preview import planned
from ckptfiles import Tensor, ckpt
from conversions import Quiet
from handmade import Handmade

TWO = Topology(num_layers=2, pipeline=2)


def saves(folder: Path, *steps: tuple[int, int], ranks: tuple[int, ...] = (0, 1)) -> Request:
    """A training of 100 steps an epoch that saved at these (epoch, step), with metadata for it."""
    made = Handmade(topology=TWO)
    made.write_meta(folder / "pt_meta")
    for epoch, step in steps:
        made.iteration = iteration = 100 * epoch + step
        scalars = {"epoch_num": epoch, "step_num": step, "num_steps": 4 * iteration}
        for (_, pp), entries in made.entries.items():
            if pp in ranks:
                entries |= {n: Tensor(n, "int64", (), struct.pack("<q", v)) for n, v in scalars.items()}
                path = folder / "ms" / f"rank_{pp}" / f"n_rank_{pp}-{epoch}_{step}.ckpt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(ckpt(entries.values()))
    return made.request(folder)


def report(folder: Path, *lasts: tuple[int, int], tail: str = "") -> None:
    for rank, (epoch, step) in enumerate(lasts):
        text = json.dumps({"last_epoch": epoch, "last_step": step}) + tail
        (folder / "ms" / f"rank_{rank}" / "meta.json").write_text(text)


def test_newest_is_chosen_without_a_report(tmp_path: Path) -> None:
    chosen = discover(saves(tmp_path, (0, 90), (0, 100), (1, 5)))
    assert (chosen.training_step.iteration, chosen.training_step.samples) == (105, 420)
    assert [file.path.name for file in chosen.files.values()] == ["n_rank_0-1_5.ckpt", "n_rank_1-1_5.ckpt"]


@pytest.mark.parametrize(
    ("target", "option"),
    [
        pytest.param("ms", "source.path", id="the-source"),
        pytest.param("pt_meta/../link", "source.path", id="the-source-by-a-link"),
        pytest.param("pt_meta", "metadata.path", id="the-metadata"),
        pytest.param("shards", "source.optShardInfoPath", id="the-descriptions-of-shards"),
        pytest.param("above", "source.path", id="the-source-is-the-iteration-of-the-result"),
    ],
)
def test_a_result_in_the_place_of_what_is_read_is_refused(target: str, option: str, tmp_path: Path) -> None:
    request = saves(tmp_path, (0, 100))
    for folder in ("above", "shards"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link").symlink_to("ms")
    (tmp_path / "above" / "iter_0000100").symlink_to("../ms")
    with pytest.raises(UsageError, match=f"would take the place of .*{option}") as refused:
        discover(replace(request, target=tmp_path / target, shard_info=tmp_path / "shards"))
    assert ref("target.path") in refused.value.hint


@pytest.mark.parametrize("target", [".", "ms/megatron", "pt_meta/megatron"])
def test_a_result_beside_or_below_what_is_read_harms_nothing(target: str, tmp_path: Path) -> None:
    request = replace(saves(tmp_path, (0, 100)), target=tmp_path / target)
    run(request, range(2), Quiet())
    assert discover(request).training_step.iteration == 100


def test_the_save_that_every_rank_reports_is_chosen(tmp_path: Path) -> None:
    request = saves(tmp_path, (0, 90), (0, 100), (1, 5))
    report(tmp_path, (1, 5), (0, 100), tail='_1000.ckpt"}')
    assert discover(request).training_step.iteration == 100


@pytest.mark.parametrize("iteration", [90, 100, 105])
def test_an_iteration_can_be_asked_for(iteration: int, tmp_path: Path) -> None:
    request = replace(saves(tmp_path, (0, 90), (0, 100), (1, 5)), iteration=iteration)
    report(tmp_path, (0, 90), (0, 90))
    assert discover(request).training_step.iteration == iteration


def test_an_iteration_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="no checkpoint is of iteration 91; by what the files hold they are of iterations 90, 105"
    ):
        discover(replace(saves(tmp_path, (0, 90), (1, 5)), iteration=91))


def test_a_best_a_partial_and_a_hidden_file_are_not_taken(tmp_path: Path) -> None:
    request = saves(tmp_path, (0, 90))
    for rank in (0, 1):
        for name in (f"n_best_rank_{rank}-0_95.ckpt", f"n_rank_{rank}-0_96.ckpt.tmp", f".n_rank_{rank}-0_97.ckpt"):
            (tmp_path / "ms" / f"rank_{rank}" / name).write_bytes(b"broken")
    assert discover(request).training_step.iteration == 90


def test_merged_shards_are_preferred(tmp_path: Path) -> None:
    request = saves(tmp_path, (0, 90))
    for rank in (0, 1):
        whole = tmp_path / "ms" / f"rank_{rank}" / f"n_rank_{rank}-0_90.ckpt"
        whole.rename(whole.with_name(f"n_rank_{rank}-0_90_dp_merged.ckpt"))
        whole.write_bytes(b"shards")
    assert {file.merged for file in discover(request).files.values()} == {True}


def test_a_step_that_one_rank_lacks_is_not_taken(tmp_path: Path) -> None:
    saves(tmp_path, (0, 95), ranks=(0,))
    assert discover(saves(tmp_path, (0, 90))).training_step.iteration == 90


def test_a_rank_that_is_missing_is_reported(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="rank_1"):
        discover(saves(tmp_path, (0, 90), ranks=(0,)))


def test_names_that_agree_over_contents_that_do_not_are_refused(tmp_path: Path) -> None:
    request = saves(tmp_path, (0, 90), (0, 95))
    folder = tmp_path / "ms" / "rank_1"
    (folder / "n_rank_1-0_90.ckpt").replace(folder / "n_rank_1-0_95.ckpt")
    with pytest.raises(InputError, match="step_num is 95 and 90") as caught:
        discover(request)
    assert "rank_0" in caught.value.where
    assert "rank_1" in caught.value.where


def timeless(folder: Path) -> Request:
    """A checkpoint that does not tell its time, by name or by content."""
    made = Handmade(topology=TWO)
    made.write_meta(folder / "pt_meta")
    for (_, pp), entries in made.entries.items():
        path = folder / "ms" / f"rank_{pp}" / "network.ckpt"
        path.parent.mkdir(parents=True)
        path.write_bytes(ckpt(t for t in entries.values() if t.shape))
    return made.request(folder)


def test_a_checkpoint_that_does_not_tell_its_time_needs_the_users_word(tmp_path: Path) -> None:
    request = timeless(tmp_path)
    with pytest.raises(InputError, match="tells its iteration"):
        discover(request)
    training_step = discover(replace(request, iteration=7)).training_step
    assert (training_step.iteration, training_step.samples, training_step.iteration_source) == (
        7,
        28,
        "the iteration asked for",
    )


def test_the_users_word_does_not_overrule_what_the_checkpoint_says(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="iterations 90"):
        discover(replace(saves(tmp_path, (0, 90)), iteration=7))


def test_identity_follows_options_source_and_metadata(tmp_path: Path) -> None:
    request = saves(tmp_path, (0, 90))
    first = discover(request).identity
    assert discover(request).identity == first
    assert discover(replace(request, workers=9, verify="none", timeout=3.0)).identity == first
    assert discover(replace(request, full=False)).identity != first
    source = tmp_path / "ms" / "rank_1" / "n_rank_1-0_90.ckpt"
    seen = source.stat()
    os.utime(source, ns=(seen.st_atime_ns, seen.st_mtime_ns + 1))
    second = discover(request).identity
    assert second != first
    path = next(tmp_path.glob("pt_meta/*.json"))
    path.write_text(path.read_text() + "\n")
    assert discover(request).identity != second


def test_only_the_stages_asked_for_are_prepared(tmp_path: Path) -> None:
    request = saves(tmp_path, (0, 90))
    assert [rank for rank, _ in prepare_all(request, discover(request), [1])] == [(0, 1)]


def test_headers_that_are_kept_are_those_of_the_files_and_ranks_of_one_form_share_theirs(tmp_path: Path) -> None:
    request = Handmade(topology=replace(TWO, tensor=2)).write(tmp_path)
    chosen = discover(request, keep=list(request.topology.ranks()))
    assert {path: header.index for path, header in chosen.headers.items()} == {
        file.path: index_file(file.path) for file in chosen.files.values()
    }
    assert len(chosen.headers) == 4
    assert len({id(header.rows) for header in chosen.headers.values()}) == 2


def test_each_header_is_read_once_however_many_ranks_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ranks of one form, those of a tensor parallel group, the tensors of one count as kept."""
    read: list[str] = []

    def counted(file: InputFile) -> dict[str, TensorRef]:
        read.append(file.path)
        return index_file(file)

    request = Handmade(topology=replace(TWO, tensor=2)).write(tmp_path)
    first = [file.path for (tp, _), file in discover(request).files.items() if not tp]
    monkeypatch.setattr(training, "_MAX_KEPT", sum(len(index_file(path)) for path in first))
    monkeypatch.setattr(training, "index_file", counted)
    ranks = planned(request, range(2)).document["ranks"]
    assert isinstance(ranks, list)
    assert len(ranks) == len(read) == len(set(read)) == 4


def renamed(folder: Path, old: str, new: str) -> None:
    for path in list((folder / "ms").glob(f"rank_*/*-{old}.ckpt")):
        path.rename(path.with_name(path.name.replace(old, new)))


def test_a_name_that_says_another_step_is_reported_with_those_that_hold_the_same(tmp_path: Path) -> None:
    request = saves(tmp_path, (0, 90))
    for name in ("0_300", "0_400"):
        for path in list((tmp_path / "ms").glob("rank_*/*-0_90.ckpt")):
            path.with_name(path.name.replace("0_90", name)).write_bytes(path.read_bytes())
    chosen = discover(request)
    assert chosen.training_step.iteration == 90
    assert chosen.training_step.conflicts == (
        "the file is named 0_400, and holds step_num 90",
        "n_rank_0-0_90.ckpt, n_rank_0-0_300.ckpt hold the same iteration: n_rank_0-0_400.ckpt was taken for its name",
    )


def test_an_iteration_that_only_a_name_says_is_not_there(tmp_path: Path) -> None:
    request = saves(tmp_path, (0, 90), (0, 100))
    renamed(tmp_path, "0_100", "0_400")
    with pytest.raises(InputError, match=r"no checkpoint is of iteration 400; .* of iterations 90, 100 \(0_400\)"):
        discover(replace(request, iteration=400))


def test_an_iteration_that_two_checkpoints_hold_is_not_guessed(tmp_path: Path) -> None:
    request = saves(tmp_path, (0, 90))
    for path in list((tmp_path / "ms").glob("rank_*/*-0_90.ckpt")):
        path.with_name(path.name.replace("0_90", "0_400")).write_bytes(path.read_bytes())
    with pytest.raises(
        InputError, match=r"2 checkpoints are of iteration 90; .* of iterations 90, 90 \(0_400\)"
    ) as reported:
        discover(replace(request, iteration=90))
    assert "move the files of all but one" in reported.value.hint
