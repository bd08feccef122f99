"""Which file of a training output is converted: one for each rank, all of one step, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import FileAccessError, InputError, MissingInputError, ref
from ckpt2pt.formats.mindspore.filenames import UNNAMED
from ckpt2pt.formats.mindspore.ranks import choose, find_groups, find_sources, last_saved, rank_folder

TWO = Topology(num_layers=2, tensor=2)


def place(root: Path, rank: int, *names: str) -> None:
    folder = root / f"rank_{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def both(root: Path, *names: str) -> None:
    for rank in (0, 1):
        place(root, rank, *(name.replace("@", str(rank)) for name in names))


def found(root: Path, wanted: str | None = None) -> dict[tuple[int, int], list[str]]:
    sources = find_sources(root, TWO, wanted_format=wanted)
    return {when: [file.path.name for file in files.values()] for when, files in sources.items()}


NAMED: dict[str, tuple[list[str], dict[tuple[int, int], str]]] = {
    "epoch-and-step": (["network_rank_@-0_500.ckpt"], {(0, 500): "network_rank_@-0_500.ckpt"}),
    "safetensors": (["network_rank_@-0_500.safetensors"], {(0, 500): "network_rank_@-0_500.safetensors"}),
    "no-step": (["network.ckpt"], {UNNAMED: "network.ckpt"}),
    "global-step": (["model_rank_@_70.ckpt"], {(0, 70): "model_rank_@_70.ckpt"}),
    "numbers-not-letters-order-steps": (
        ["n_rank_@-0_1000.ckpt", "n_rank_@-0_999.ckpt", "n_rank_@-1_2.ckpt"],
        {(0, 999): "n_rank_@-0_999.ckpt", (0, 1000): "n_rank_@-0_1000.ckpt", (1, 2): "n_rank_@-1_2.ckpt"},
    ),
    "merged-before-shards": (
        ["n_rank_@-0_5.ckpt", "n_rank_@-0_5_dp_merged.ckpt"],
        {(0, 5): "n_rank_@-0_5_dp_merged.ckpt"},
    ),
    "merged-before-shards-across-formats": (
        ["n_rank_@-0_5.safetensors", "n_rank_@-0_5_dp_merged.ckpt"],
        {(0, 5): "n_rank_@-0_5_dp_merged.ckpt"},
    ),
    "merged-without-step": (["network.ckpt", "network_dp_merged.ckpt"], {UNNAMED: "network_dp_merged.ckpt"}),
    "merged-of-another-step-is-another-checkpoint": (
        ["n_rank_@-0_5_dp_merged.ckpt", "n_rank_@-0_6.ckpt"],
        {(0, 5): "n_rank_@-0_5_dp_merged.ckpt", (0, 6): "n_rank_@-0_6.ckpt"},
    ),
    "others-are-no-candidates": (
        [
            "n_rank_@-0_5.ckpt", "n_best_rank_@-0_4.ckpt", "n_rank_@-0_6.ckpt.tmp", "n_rank_@-0_7_breakpoint.ckpt",
            "strategy0.ckpt", "stratey0.ckpt", ".n_rank_@-0_8.ckpt", "meta.json", "events.pt", "n_rank_@-0_9.ckpt.tmp",
        ],
        {(0, 5): "n_rank_@-0_5.ckpt"},
    ),
    "a-prefix-with-digits-and-dashes": (["llama-2-7_b_rank_@-3_40.ckpt"], {(3, 40): "llama-2-7_b_rank_@-3_40.ckpt"}),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMED)
def test_names_tell_the_step(case: str, tmp_path: Path) -> None:
    names, expected = NAMED[case]
    both(tmp_path, *names)
    assert found(tmp_path) == {
        when: [name.replace("@", "0"), name.replace("@", "1")] for when, name in expected.items()
    }


def test_only_steps_that_every_rank_has_are_candidates(tmp_path: Path) -> None:
    both(tmp_path, "n_rank_@-0_5.ckpt")
    place(tmp_path, 0, "n_rank_0-0_6.ckpt")
    assert list(found(tmp_path)) == [(0, 5)]


def test_newest_comes_last(tmp_path: Path) -> None:
    both(tmp_path, "n_rank_@-1_1.ckpt", "n_rank_@-0_90.ckpt", "n_rank_@-0_100.ckpt")
    assert list(found(tmp_path)) == [(0, 90), (0, 100), (1, 1)]


def test_results_of_megatron_beside_the_ranks_are_no_iterations(tmp_path: Path) -> None:
    both(tmp_path, "n_rank_@-0_5.ckpt")
    theirs = tmp_path / "iter_0000005" / "mp_rank_00"
    theirs.mkdir(parents=True)
    (theirs / "model_optim_rng.pt").touch()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    assert list(found(tmp_path)) == [(0, 5)]


def test_a_folder_of_descriptions_that_is_named_has_to_be_there_though_nothing_is_sharded(tmp_path: Path) -> None:
    both(tmp_path, "n_rank_@-0_5.ckpt")
    files = find_sources(tmp_path, TWO)
    assert find_groups(tmp_path, TWO, files, sharded=lambda _: False, info=tmp_path) == files
    with pytest.raises(MissingInputError, match="shard descriptions is not there"):
        find_groups(tmp_path, TWO, files, sharded=lambda _: False, info=tmp_path / "nowhere")


def test_one_of_two_formats_can_be_asked_for(tmp_path: Path) -> None:
    both(tmp_path, "n_rank_@-0_5.ckpt", "n_rank_@-0_5.safetensors")
    with pytest.raises(InputError, match="two files of one step") as caught:
        found(tmp_path)
    assert ref("source.format") in caught.value.hint
    assert found(tmp_path, "safetensors") == {(0, 5): ["n_rank_0-0_5.safetensors", "n_rank_1-0_5.safetensors"]}
    assert found(tmp_path, "ckpt") == {(0, 5): ["n_rank_0-0_5.ckpt", "n_rank_1-0_5.ckpt"]}


def test_two_files_without_a_step_are_refused(tmp_path: Path) -> None:
    both(tmp_path, "network.ckpt", "other.ckpt")
    with pytest.raises(InputError, match=r"network.ckpt and other.ckpt"):
        found(tmp_path)


def test_files_with_and_without_a_step_are_refused(tmp_path: Path) -> None:
    both(tmp_path, "network.ckpt", "n_rank_@-0_5.ckpt")
    with pytest.raises(InputError, match=r"with and without a step in their name: network.ckpt, n_rank_0-0_5.ckpt"):
        found(tmp_path)


def test_ranks_without_a_common_step_are_refused_and_listed(tmp_path: Path) -> None:
    place(tmp_path, 0, "n_rank_0-0_5.ckpt")
    place(tmp_path, 1, "n_rank_1-0_6.ckpt")
    with pytest.raises(InputError, match="rank_0 has 0_5; rank_1 has 0_6"):
        found(tmp_path)


def test_a_missing_rank_folder_is_named_with_those_there_are(tmp_path: Path) -> None:
    place(tmp_path, 0, "network.ckpt")
    place(tmp_path, 3, "network.ckpt")
    with pytest.raises(
        MissingInputError, match=r"1 of 2 rank folders are missing: rank_1 \(there are rank_0, rank_3\)"
    ):
        found(tmp_path)


def test_a_long_list_of_missing_ranks_is_cut(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"rank_7 and 8 more \(there are none\)"):
        find_sources(tmp_path, Topology(num_layers=2, tensor=16))


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="source folder") as caught:
        found(tmp_path / "nowhere")
    assert caught.value.where == str(tmp_path / "nowhere")


def test_a_rank_folder_without_a_file_is_named(tmp_path: Path) -> None:
    place(tmp_path, 0, "network.ckpt")
    place(tmp_path, 1, "meta.json")
    with pytest.raises(MissingInputError, match="no ckpt or safetensors file") as caught:
        found(tmp_path)
    assert caught.value.where.endswith("rank_1")


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path: Path) -> None:
    both(tmp_path, "network.ckpt")
    loop = tmp_path / "rank_1"
    (loop / "network.ckpt").unlink()
    loop.rmdir()
    loop.write_bytes(b"")  # a file where a folder should be
    with pytest.raises((MissingInputError, FileAccessError)):
        found(tmp_path)


def test_ranks_of_data_and_context_parallel_copies_are_not_looked_at(tmp_path: Path) -> None:
    topology = Topology(num_layers=4, tensor=2, pipeline=2, data=2, context=2)
    for rank in (0, 1, 8, 9):
        place(tmp_path, rank, "network.ckpt")
    sources = find_sources(tmp_path, topology)[UNNAMED]
    assert {key: file.path.parent.name for key, file in sources.items()} == {
        (0, 0): "rank_0", (1, 0): "rank_1", (0, 1): "rank_8", (1, 1): "rank_9",
    }  # fmt: skip
    assert all(file.named is None for file in sources.values())


# --------------------------------------------------------------------------------------------------------------- meta.json


def metas(root: Path, *texts: str | None) -> None:
    for rank, text in enumerate(texts):
        folder = rank_folder(root, rank)
        folder.mkdir(parents=True, exist_ok=True)
        if text is not None:
            (folder / "meta.json").write_text(text)


def meta(epoch: object, step: object) -> str:
    return json.dumps({"last_epoch": epoch, "last_step": step, "last_ckpt_file": "n.ckpt"})


REPORTED: dict[str, tuple[list[str | None], tuple[int, int] | None]] = {
    "agree": ([meta(0, 5), meta(0, 5)], (0, 5)),
    "slowest-rank-counts": ([meta(0, 6), meta(0, 5)], (0, 5)),
    "epoch-before-step": ([meta(1, 2), meta(0, 900)], (0, 900)),
    "tail-of-an-older-longer-one": ([meta(0, 5) + '0000.ckpt"}', meta(0, 5)], (0, 5)),
    "white-space-first": (["\n  " + meta(0, 5), meta(0, 5)], (0, 5)),
    "one-is-missing": ([meta(0, 5), None], None),
    "not-json": (["{", meta(0, 5)], None),
    "not-an-object": (["[1, 2]", meta(0, 5)], None),
    "text-for-a-number": ([meta("0", 5), meta(0, 5)], None),
    "true-for-a-number": ([meta(0, True), meta(0, 5)], None),
    "nested-beyond-reason": (["[" * 60000, meta(0, 5)], None),
    "not-utf8": (["\udcff", meta(0, 5)], None),
}


@pytest.mark.parametrize("case", REPORTED)
def test_the_last_save_is_what_every_rank_reports(case: str, tmp_path: Path) -> None:
    texts, expected = REPORTED[case]
    for rank, text in enumerate(texts):
        metas(tmp_path, *([None] * rank))
        rank_folder(tmp_path, rank).mkdir(exist_ok=True)
        if text is not None:
            (rank_folder(tmp_path, rank) / "meta.json").write_text(text, errors="surrogateescape")
    assert last_saved(tmp_path, TWO) == expected


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        pytest.param(None, (1, 2), id="newest-without-a-report"),
        pytest.param((0, 5), (0, 5), id="the-reported-one-although-a-newer-is-there"),
        pytest.param((0, 7), (1, 2), id="newest-when-the-reported-one-is-gone"),
    ],
)
def test_the_reported_save_is_chosen_when_it_is_there(
    reported: tuple[int, int] | None, expected: tuple[int, int]
) -> None:
    assert choose([(1, 2), (0, 5), (0, 10)], reported) == expected
