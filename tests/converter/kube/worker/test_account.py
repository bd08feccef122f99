"""The numbers that leave a worker are those that its reporter was reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt2pt.core.progress import Silence
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import InputError
from ckpt2pt.kube.worker.account import Account, Both
from ckpt2pt.run.conversion import run
from handmade import Handmade

TOTALS = {(0, 3): 60, (1, 3): 40}


def test_the_phases_of_a_run() -> None:
    account = Account()
    assert account.progress() == {"version": 1, "phase": "Planning", "bytes": 0}
    account.wait("rank_3 has nothing yet")
    waiting = account.progress()
    assert (waiting["phase"], waiting["reason"], waiting["message"]) == (
        "Waiting", "WaitingForCheckpoint", "rank_3 has nothing yet",
    )  # fmt: skip
    account.wait()
    assert "reason" not in account.progress()
    account.stages = (3,)
    account.begin(TOTALS, 500)
    account.advance((0, 3), 60)
    account.end((0, 3))
    assert account.progress()["phase"] == "Converting"
    account.advance((1, 3), 40)
    assert account.progress()["phase"] == "Verifying", "all is read, and a rank is not published yet"
    account.end((1, 3))
    seen = account.progress()
    assert seen.pop("throughput")
    assert seen == {
        "version": 1, "stages": [3], "phase": "Converting", "bytes": 100, "bytesTotal": 100, "iteration": 500,
    }  # fmt: skip


def test_a_worker_that_follows_tells_the_last_that_is_converted_and_what_could_not_be() -> None:
    account = Account()
    account.following = True
    assert account.progress()["phase"] == "Waiting"
    account.begin({(0, 0): 10}, 500)
    assert (account.progress()["phase"], account.progress().get("iteration")) == ("Converting", None)
    account.advance((0, 0), 10)
    account.end((0, 0))
    account.iteration = 500
    assert account.progress()["phase"] == "Waiting", "for the next"
    account.begin({(0, 0): 10}, 600)
    assert (account.progress()["bytes"], account.progress()["iteration"]) == (0, 500)
    account.on_failure(InputError("a shape is wrong", where="rank_0", hint="save it again"))
    assert account.progress()["reason"] == "InputWrong"
    assert account.progress()["message"] == "a shape is wrong; rank_0; save it again"


def test_nothing_to_read_is_no_throughput() -> None:
    account = Account()
    account.begin({}, 500)
    assert account.progress()["phase"] == "Converting"
    assert "throughput" not in account.progress()
    assert {"bytes": 0, "bytesTotal": 0}.items() <= account.facts().items()


def test_what_is_not_known_is_left_out() -> None:
    assert set(Account().facts()) == {"seconds"}


def test_both_hear_everything() -> None:
    one, other = Account(), Account()
    both = Both(one, Both(Silence(), other))
    both.begin(TOTALS, 7)
    both.advance((0, 3), 5)
    both.end((0, 3))
    both.close()
    for account in (one, other):
        assert (account.facts()["bytes"], account.iteration) == (5, 7)


def test_a_result_is_counted_with_what_was_there_already(tmp_path: Path) -> None:
    request = Handmade(topology=Topology(num_layers=2)).write(tmp_path)
    sizes: list[tuple[Any, Any, Any]] = []
    for _ in range(2):
        account = Account()
        outcome = replace(
            run(request, [0], account), conflicts=("the file is odd",), warnings=("two\x1b\nlines", *"abcd")
        )
        account.converted(outcome)
        assert account.facts()["warnings"] == ["iteration 12 was chosen, but the file is odd", "two lines", "a", "b"]
        facts = account.facts()
        assert (facts["iteration"], facts["outputPath"], facts["files"]) == (12, "iter_0000012", 2)
        sizes.append((facts["bytes"], facts["bytesTotal"], facts["bytesWritten"]))
    assert sizes[0][0] == sizes[0][1] > 0
    assert sizes[0][2] == sum(path.stat().st_size for path in request.target.rglob("*.pt"))
    assert sizes[1] == (0, 0, 0)
