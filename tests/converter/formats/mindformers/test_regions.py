"""Regions of a stored tensor, as views of its parts: interleaved, transposed, and cut wherever it is cut."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from ckpt2pt.core.extents import Stored, View
from ckpt2pt.core.tensor import dense_strides
from ckpt2pt.formats.mindformers.regions import Parts, Region, rows, view_of

HALVES = tuple(Region((half, 0, 0), (1, 6, 4), (half, 0), (None, 0, 1), (1, 2, 1)) for half in range(2))
"""(2, 6, 4): gate and up, which alternate in the rows of (12, 4)."""
TRANSPOSED = (Region((0, 0), (4, 12), (0, 0), (1, 0), (1, 1)),)
LOWER = (rows((5, 4), 7),)


def parts_of(stored: np.ndarray, cuts: tuple[int, int]) -> list[tuple[Stored, np.ndarray]]:
    local = tuple(n // c for n, c in zip(stored.shape, cuts, strict=True))
    found: list[tuple[Stored, np.ndarray]] = []
    for place in product(*map(range, cuts)):
        origin = tuple(at * n for at, n in zip(place, local, strict=True))
        part = np.ascontiguousarray(stored[tuple(slice(o, o + n) for o, n in zip(origin, local, strict=True))])
        found.append((View(origin, local, dense_strides(local), 0, (str(place),)), part))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("cuts", [(1, 1), (2, 1), (4, 1), (12, 1), (3, 2), (1, 4)])
@pytest.mark.parametrize(
    ("regions", "shape"),
    [(HALVES, (2, 6, 4)), (TRANSPOSED, (4, 12)), (LOWER, (5, 4))],
    ids=["halves", "transposed", "rows"],
)
def test_the_views_of_regions_hold_each_element_once_however_the_stored_tensor_is_cut(
    regions: tuple[Region, ...], shape: tuple[int, ...], cuts: tuple[int, int]
) -> None:
    stored = np.arange(48).reshape(12, 4)
    wanted = {HALVES: np.stack([stored[0::2], stored[1::2]]), TRANSPOSED: stored.T, LOWER: stored[7:]}[regions]
    parts = parts_of(stored, cuts)
    data = {view.storage: part.ravel() for view, part in parts}
    found, seen = np.full(shape, -1), np.zeros(shape, int)
    for view in Parts(view for view, _ in parts).views(regions):
        for step in product(*map(range, view.shape)):
            at = tuple(o + s for o, s in zip(view.origin, step, strict=True))
            found[at] = data[view.storage][view.first + sum(s * n for s, n in zip(step, view.strides, strict=True))]
            seen[at] += 1
    assert (seen == 1).all()
    assert np.array_equal(found, wanted)


def test_a_part_that_holds_nothing_of_a_region_is_no_view() -> None:
    part: Stored = View((0, 0), (7, 4), (4, 1), 0, ())
    assert view_of(LOWER[0], part) is None
    assert view_of(LOWER[0], part._replace(origin=(7, 0))) is not None


def test_a_scalar_has_one_view() -> None:
    part: Stored = View((), (), (), 3, ())
    assert list(Parts([part]).views([Region((), (), (), (), ())])) == [part]
