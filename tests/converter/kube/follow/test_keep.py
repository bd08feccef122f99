"""Only older results of the same conversion are removed."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from ckpt2pt.core.topology import Topology
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import Ckpt2ptError
from ckpt2pt.kube.follow.keep import prune, verified_as
from ckpt2pt.publish import TRACKER, locked, tracked
from ckpt2pt.run.conversion import run
from conversions import Quiet
from handmade import Handmade


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    """Results of the iterations 10, 20 and 30; the tracker names 30."""
    for iteration in (10, 20, 30):
        request = Handmade(topology=Topology(num_layers=2), iteration=iteration).write(tmp_path)
        for path in request.source.rglob(f"*-0_{iteration}.*"):
            assert path.is_file()
        run(request, [0], Quiet())
    return request


def there(request: Request) -> list[str]:
    return sorted(path.name for path in request.target.iterdir())


def test_the_last_ones_stay(request_: Request) -> None:
    assert tracked(request_.target) == 30
    assert prune(request_, 0) == prune(request_, 3) == []
    assert prune(request_, 2) == [10]
    assert there(request_) == ["iter_0000020", "iter_0000030", TRACKER]
    assert prune(request_, 1) == [20]


def test_the_one_that_the_tracker_names_is_never_removed(request_: Request) -> None:
    (request_.target / TRACKER).write_text("10")
    assert prune(request_, 1) == [20]
    assert there(request_) == ["iter_0000010", "iter_0000030", TRACKER]


@pytest.mark.parametrize("text", [None, "release"])
def test_without_a_number_in_the_tracker_nothing_is_removed(request_: Request, text: str | None) -> None:
    (request_.target / TRACKER).unlink()
    if text:
        (request_.target / TRACKER).write_text(text)
    assert tracked(request_.target) is None
    assert prune(request_, 1) == []


def test_how_a_result_was_verified_is_what_each_of_its_ranks_says(request_: Request) -> None:
    assert verified_as(request_, 30) == request_.verify == "full"
    assert verified_as(replace(request_, full=False), 30) is None, "of another conversion"
    assert verified_as(request_, 99) is None
    [manifest] = (request_.target / "iter_0000030" / ".ckpt2pt").glob("rank-*.json")
    manifest.write_text(manifest.read_text().replace('"verified": "full"', '"verified": "none"'))
    assert verified_as(request_, 30) is None, "its seal is broken"


def test_what_others_wrote_stays(request_: Request, caplog: pytest.LogCaptureFixture) -> None:
    (request_.target / "iter_0000005").mkdir()
    (request_.target / "iter_0000005" / "model.pt").touch()
    (request_.target / "iter_0000010" / "mp_rank_00" / "notes.txt").touch()
    assert prune(replace(request_, full=False), 1) == [], "another conversion's"
    assert prune(request_, 1) == [20]
    assert there(request_) == ["iter_0000005", "iter_0000010", "iter_0000030", TRACKER]
    assert "mp_rank_00/notes.txt, which ckpt2pt did not write" in caplog.text


def test_unfinished_older_ones_go_and_do_not_count(request_: Request) -> None:
    (request_.target / "iter_0000020" / ".ckpt2pt" / "report.json").unlink()
    assert prune(request_, 2) == []
    assert prune(request_, 1) == [10, 20]


def test_a_link_is_not_followed(request_: Request, tmp_path: Path) -> None:
    moved = (request_.target / "iter_0000010").rename(tmp_path / "elsewhere")
    (request_.target / "iter_0000010").symlink_to(moved)
    assert prune(request_, 1) == [20]
    assert (moved / "mp_rank_00").is_dir()


def test_what_a_killed_run_was_removing_is_swept(request_: Request) -> None:
    (request_.target / "iter_0000010").rename(request_.target / ".iter_0000010.removed")
    prune(request_, 0)
    assert there(request_) == ["iter_0000020", "iter_0000030", TRACKER]


def test_a_folder_that_cannot_be_renamed_is_reported(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> Path:
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(Ckpt2ptError, match="removing an older result"):
        prune(request_, 1)


def test_a_listed_file_that_was_changed_is_not_ours_any_more(
    request_: Request, caplog: pytest.LogCaptureFixture
) -> None:
    path = next((request_.target / "iter_0000010").rglob("*.pt"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert prune(request_, 1) == [20]
    assert path.is_file()
    assert f"{path.name}, which ckpt2pt did not write" in caplog.text


def test_what_somebody_is_at_work_in_stays(request_: Request, caplog: pytest.LogCaptureFixture) -> None:
    with locked(request_.target / "iter_0000010" / ".ckpt2pt" / "stage-000.lock", "converting this stage"):
        assert prune(request_, 1) == [20]
    assert "another run is converting" in caplog.text
    assert prune(request_, 1) == [10]
