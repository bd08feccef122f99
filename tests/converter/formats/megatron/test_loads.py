"""Which releases load a checkpoint, and the reason why others do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.formats.megatron.headers import read_rank
from ckpt2pt.formats.megatron.loads import SHARDINGS, classes_in, loads_of, torch_loads
from ckpt2pt.formats.megatron.order import Style
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.torchfile.trees import Call, Global, namespace
from goldens import golden_root
from mcoresets import odd_set


def first(folder: Path) -> Any:
    return read_rank(min(folder.glob("iter_*/mp_rank_*")))


def test_what_0_6_wrote_is_read_by_no_later_release() -> None:
    found = loads_of(first(golden_root() / "megatron06" / "b_tp2pp2" / "A"))
    assert found["0.6"] == "yes"
    assert found["0.7 to 0.19"].startswith("no: they read coalesced optimizer files")


def test_odd_sizes_exclude_the_release_that_leaves_no_gaps() -> None:
    found = loads_of(first(odd_set()))
    assert found["0.8 to 0.19"] == "yes, with the local layer spec"
    assert found["0.7"].startswith("no: ")
    assert found["older than its own"].startswith("often no: its arguments name classes")


def test_without_gaps_it_is_the_other_way_round() -> None:
    found = torch_loads(Style(release=(0, 7)), full=True, aligned=False)
    assert [found["0.7"][:3], found["0.8 to 0.19"][:3]] == ["yes", "no:"]


@pytest.mark.parametrize(
    ("style", "full", "expected"),
    [
        (Style(), True, {"0.6": "no", "0.7 to 0.19": "yes, with the local layer spec"}),
        (Style(transformer_engine=True), True, {"0.6": "no", "0.7 to 0.19": "yes, with the layer spec of Transformer Engine"}),
        (Style(names="legacy"), True, {"0.6": "no", "0.7 to 0.17": "yes, with legacy models", "0.18 and 0.19": "no"}),
        (Style(), False, {"0.7 to 0.19": "yes, with the local layer spec and --no-load-optim --no-load-rng"}),
        (Style(names="legacy"), False, {"0.7 to 0.17": "yes", "0.18 and 0.19": "no: they have no legacy models"}),
    ],
)  # fmt: skip
def test_a_result_is_loaded_by_the_releases_that_have_its_model(
    style: Style, full: bool, expected: dict[str, str]
) -> None:
    found = torch_loads(style, full=full, aligned=True)
    assert found.keys() == expected.keys()
    assert all(found[releases].startswith(said) for releases, said in expected.items())


def test_arrays_of_numpy_1_are_refused_where_numpy_2_is() -> None:
    array = Call(Global("numpy.core.multiarray", "_reconstruct"), ())
    state: Any = [{"np_rng_state": ("MT19937", array, 624, 0, 0.0)}]
    found = classes_in(Template(path="x", tree={"args": namespace({}), "rng_state": state}, storages={}))
    assert list(found) == ["0.14 to 0.19, numpy 2"]


def test_of_the_forms_of_torch_dist_each_release_reads_some() -> None:
    assert SHARDINGS["fully_reshardable"]["0.15 to 0.19"].startswith("yes")
    assert SHARDINGS["fully_sharded_model_space"]["0.16 to 0.19"].startswith("no")
