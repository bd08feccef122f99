"""Names of folders and the text of trackers: what they say, and what they do not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ckpt2pt.core import foldernames as names
from ckpt2pt.errors import FormatError, InputError
from goldens import REPOSITORY


@pytest.mark.parametrize("iteration", [0, 500, 9_999_999, 10_000_000, 123_456_789_012])
def test_an_iteration_has_seven_digits_or_more(iteration: int) -> None:
    name = names.iteration_name(iteration)
    assert len(name) >= len("iter_0000000")
    assert (names.iteration_of(name), names.is_iteration(name)) == (iteration, True)
    assert (names.tracked_name(str(iteration)), names.tracked_name(f" {iteration}\n")) == (name, name)


@pytest.mark.parametrize("name", ["iter_", "iter_1a", "iter_-1", "iter_\u0663", ".iter_0000001", "iter_" + "9" * 19])
def test_other_names_are_no_iterations(name: str) -> None:
    assert (names.iteration_of(name), names.is_iteration(name)) == (None, False)


def test_release_is_an_iteration_without_a_number() -> None:
    assert (names.iteration_of("release"), names.is_iteration("release")) == (None, True)
    assert names.tracked_name("release") == "release"


def test_iterations_are_in_the_order_of_their_numbers() -> None:
    paths = [Path("/x") / name for name in ("iter_10000000", "iter_9999999", "logs", "release", "iter_0000500")]
    assert [path.name for path in names.iterations(paths)] == [
        "release", "iter_0000500", "iter_9999999", "iter_10000000",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "2garbage", "iter_0000001", "-1", "1.0", "\u0663", "9" * 5000, "released"])
def test_any_other_text_of_a_tracker_names_nothing(text: str) -> None:
    assert names.tracked_name(text) == ""


@pytest.mark.parametrize(
    ("text", "name"),
    [("500ease", "iter_0000500"), ("release12", "release"), ("12", "iter_0000012"), ("x12", ""), ("", "")],
)
def test_what_is_left_of_a_longer_text_is_ignored_where_mindspore_wrote_it(text: str, name: str) -> None:
    assert names.tracked_name(text, overwritten=True) == name


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("mp_rank_00", (0, 0)), ("mp_rank_01_003", (1, 3)), ("mp_rank_100_000", (100, 0)), ("mp_rank_07_1000", (7, 1000)),
        ("mp_rank_0", None), ("mp_rank_00_00", None), ("rank_0", None), ("mp_rank_00_000_001", None), ("xmp_rank_00", None),
    ],
)  # fmt: skip
def test_a_model_rank_is_read_back_from_its_name(name: str, rank: tuple[int, int] | None) -> None:
    assert names.model_rank_of(name) == rank
    if rank is not None:
        assert names.model_rank_name(rank[0], rank[1] if name.count("_") == 3 else None) == name


def test_global_ranks_are_in_the_order_of_their_numbers() -> None:
    assert names.ranks_of(["rank_10", "rank_9", "rank_x", "mp_rank_00", names.rank_name(0)]) == [0, 9, 10]


def test_every_folder_of_a_rank_is_seen_as_one() -> None:
    assert all(map(names.is_rank, ("rank_0", "mp_rank_00", "mp_rank_00_001", "mp_rank_00_001_002")))
    assert not any(map(names.is_rank, ("rank", "rank_a", "iter_0000001", "pt_meta")))


def test_the_parallel_sizes_are_those_of_the_largest_ranks() -> None:
    assert names.parallel_sizes([(0, 0), (100, 0), (3, 7)]) == (101, 8)
    assert names.parallel_sizes([]) == (1, 1)


def test_an_expert_parallel_rank_is_refused_by_its_name() -> None:
    with pytest.raises(FormatError, match="mp_rank_00_001_002 is of an expert parallel rank"):
        names.model_ranks([Path("/x/mp_rank_00_001"), Path("/x/mp_rank_00_001_002")])


def test_two_folders_of_one_rank_are_refused() -> None:
    with pytest.raises(InputError, match="two folders of one rank: mp_rank_00 and mp_rank_00_000"):
        names.model_ranks([Path("/x/mp_rank_00"), Path("/x/mp_rank_00_000")])


def test_no_other_module_has_a_pattern_of_these_names() -> None:
    """The hook lives in a training, where nothing else of ours is; names of files carry those of folders."""
    pattern = re.compile(r"""(?:iter_|rank_)(?:\(?\\d|\[0-9)|startswith\("(?:mp_)?rank_|removeprefix\("(?:mp_)?rank_""")
    allowed = {"core/foldernames.py", "formats/mindspore/filenames.py", "hooks/__init__.py"}
    package = REPOSITORY / "converter" / "ckpt2pt"
    found = {
        module.relative_to(package).as_posix() for module in package.rglob("*.py") if pattern.search(module.read_text())
    }
    assert found == allowed
