"""Which file of one folder is which of another's, and which iteration counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt2pt.errors import InputError, MissingInputError, UsageError
from ckpt2pt.formats.folders import iteration_folder, layout_of, pairs


def files(root: Path, *names: str) -> Path:
    root.mkdir(exist_ok=True)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    return root


@pytest.mark.parametrize(
    ("left", "right", "paired"),
    [
        pytest.param(["a/x.pt"], ["a/x.pt"], [("a/x.pt", "a/x.pt")], id="the-same-place"),
        pytest.param(["a/x.pt"], [], [("a/x.pt", None)], id="left-only"),
        pytest.param([], ["b.ckpt"], [(None, "b.ckpt")], id="right-only"),
        pytest.param(
            ["mp_rank_00/x.pt"],
            ["mp_rank_00_000/x.pt"],
            [("mp_rank_00/x.pt", "mp_rank_00_000/x.pt")],
            id="suffix-right",
        ),
        pytest.param(
            ["mp_rank_00_000/x.pt"], ["mp_rank_00/x.pt"], [("mp_rank_00_000/x.pt", "mp_rank_00/x.pt")], id="suffix-left"
        ),
        pytest.param(
            ["mp_rank_00_000/x.pt", "mp_rank_00/x.pt"],
            ["mp_rank_00/x.pt"],
            [("mp_rank_00/x.pt", "mp_rank_00/x.pt"), ("mp_rank_00_000/x.pt", None)],
            id="both-forms-on-one-side",
        ),
        pytest.param(
            ["rank_0/network.ckpt"],
            ["rank_0/n_rank_0-0_2.safetensors"],
            [("rank_0/network.ckpt", "rank_0/n_rank_0-0_2.safetensors")],
            id="the-only-file-of-a-rank",
        ),
        pytest.param(
            ["rank_0/a.ckpt", "rank_0/b.ckpt"],
            ["rank_0/c.ckpt"],
            [("rank_0/a.ckpt", None), ("rank_0/b.ckpt", None), (None, "rank_0/c.ckpt")],
            id="no-guess-among-several",
        ),
        pytest.param(
            ["x.pt", ".ckpt2pt/y.pt", ".x.pt.1.partial", "z.json"], ["x.pt"], [("x.pt", "x.pt")], id="not-ours"
        ),
    ],
)
def test_files_are_paired_by_place(
    tmp_path: Path, left: list[str], right: list[str], paired: list[tuple[str | None, str | None]]
) -> None:
    one, other = files(tmp_path / "l", *left), files(tmp_path / "r", *right)
    found = [
        (a and a.relative_to(one).as_posix(), b and b.relative_to(other).as_posix()) for _, a, b in pairs(one, other)
    ]
    assert found == paired


def test_a_megatron_root_is_the_iteration_of_its_tracker(tmp_path: Path) -> None:
    root = files(tmp_path, "iter_0000001/x.pt", "iter_0000020/x.pt")
    with pytest.raises(InputError, match="2 iterations and no latest"):
        iteration_folder(root)
    (root / "latest_checkpointed_iteration.txt").write_text("1\n")
    assert iteration_folder(root).name == "iter_0000001"
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    assert iteration_folder(root).name == "release"


@pytest.mark.parametrize("text", ["2garbage", "iter_0000001", "-1", "1.0", "\u0663", "9" * 5000])
def test_a_tracker_that_names_no_iteration_is_reported_as_such(text: str, tmp_path: Path) -> None:
    root = files(tmp_path, "iter_0000001/x.pt", "release/x.pt")
    (root / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(InputError, match=r"the tracker says .* neither an iteration nor release") as caught:
        iteration_folder(root)
    assert (caught.value.exit_code, caught.value.where) == (65, str(root / "latest_checkpointed_iteration.txt"))
    assert iteration_folder(root / "release").name == "release"


def test_a_root_with_one_iteration_needs_no_tracker(tmp_path: Path) -> None:
    assert iteration_folder(files(tmp_path, "iter_0000007/x.pt")).name == "iter_0000007"
    assert iteration_folder(tmp_path / "iter_0000007").name == "iter_0000007"


def test_what_cannot_be_paired_is_refused(tmp_path: Path) -> None:
    one = files(tmp_path / "l", "x.pt")
    with pytest.raises(MissingInputError):
        list(pairs(one, tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="one is a folder"):
        list(pairs(one, one / "x.pt"))
    with pytest.raises(MissingInputError, match="neither folder"):
        list(pairs(files(tmp_path / "a"), files(tmp_path / "b")))


@pytest.mark.parametrize(
    ("ranks", "degrees"),
    [
        ([0], (1, 1, 1)),
        ([0, 1, 2, 3], (4, 1, 1)),
        ([0, 2], (1, 2, 2)),
        ([0, 1, 4, 5], (2, 2, 2)),
        ([0, 1, 8, 9, 16, 17], (2, 3, 4)),
        ([1, 2], None),
        ([0, 1, 3], None),
        ([0, 3, 4], None),
        ([0, 1, 5, 6], None),
    ],
)
def test_the_layout_follows_from_the_ranks(ranks: list[int], degrees: tuple[int, int, int] | None) -> None:
    found = layout_of(ranks)
    assert (found and (found.tensor, found.pipeline, found.data)) == degrees
