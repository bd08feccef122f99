"""Parallel sizes that are asked for agree with those that are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt2pt.errors import TopologyError
from ckpt2pt.formats.checkpoint import agreed


@pytest.mark.parametrize("asked", [(None, None), (2, None), (None, 4), (2, 4)])
def test_what_is_not_asked_for_is_what_is_there(asked: tuple[int | None, int | None]) -> None:
    assert agreed(asked, (2, 4), Path("here")) == (2, 4)


@pytest.mark.parametrize(("asked", "what"), [((1, 4), "tensor"), ((2, 2), "pipeline"), ((None, 0), "pipeline")])
def test_a_contradiction_says_what_is_there(asked: tuple[int | None, int | None], what: str) -> None:
    with pytest.raises(TopologyError, match=f"the {what} parallel size is [24], not") as caught:
        agreed(asked, (2, 4), Path("here"))
    assert caught.value.where == "here"
    assert caught.value.hint.startswith("give ")
