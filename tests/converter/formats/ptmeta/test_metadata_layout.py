"""What pt_meta says of the layout may be left out, and answers a layout that is wrong."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import MissingInputError, TopologyError
from ckpt2pt.formats.ptmeta.metadata import Given, learn, read_stated
from conversions import topology_of
from goldens import golden_sets
from handmade import Handmade

DEGREES = [
    "--num-layers",
    "8",
    "--tp-size",
    "2",
    "--pp-size",
    "2",
    "--vpp-size",
    "2",
    "--dp-size",
    "1",
    "--cp-size",
    "1",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ms`` and ``pt_meta`` of tp 2, pp 2, vpp 2 and 8 layers."""
    folder = tmp_path_factory.mktemp("made")
    Handmade(Topology(num_layers=8, tensor=2, pipeline=2, virtual=2)).write(folder)
    return folder


def places(folder: Path, target: Path) -> list[str]:
    words = ["--ms-path", folder / "ms", "--param-map-path", folder / "pt_meta", "--megatron-path", target]
    return [*map(str, words)]


@pytest.mark.parametrize("golden", golden_sets(), ids=lambda path: path.name)
@pytest.mark.parametrize("suffix", ["", "_params"])
def test_the_layout_of_every_golden_set_is_learnt(golden: Path, suffix: str) -> None:
    found = learn(Given(), source=golden / f"ms{suffix}", metadata=golden / f"pt_meta{suffix}", target=Path("none"))
    wanted = topology_of(golden)
    assert (found.num_layers, found.tensor, found.pipeline, found.virtual, found.noop) == (
        wanted.num_layers, wanted.tensor, wanted.pipeline, wanted.virtual, wanted.noop,
    )  # fmt: skip
    assert [found.source_rank(*rank) for rank in found.ranks()] == [
        wanted.source_rank(*rank) for rank in wanted.ranks()
    ]


def test_what_is_given_and_what_is_learnt_are_one_conversion(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = places(made, tmp_path)
    assert main(["convert", *words, "--multiprocess-off"]) == 0
    assert main(["convert", *words, *DEGREES, "--multiprocess-off"]) == 0
    assert "everything was there already" in capfd.readouterr().out
    assert main(["verify", *words]) == 0


WRONG = {
    "tp-too-few": (["--tp-size", "1"], 65, "the options ask for tp 1, pp 2, vpp 2, 8 layers"),
    "tp-too-many": (["--tp-size", "4"], 65, "the options ask for tp 4, pp 2, vpp 2, 8 layers"),
    "pp-too-few": (["--pp-size", "1"], 65, "ask for tp 2, pp 1"),
    "pp-too-many": (["--pp-size", "4"], 65, "ask for tp 2, pp 4"),
    "tp-and-pp": (["--tp-size", "1", "--pp-size", "4"], 65, "ask for tp 1, pp 4"),
    "vpp-too-few": (["--vpp-size", "1"], 65, "2 model chunks are described for stage 0, the options ask for 1"),
    "vpp-too-many": (["--vpp-size", "4"], 65, "2 model chunks are described"),
    "layers-too-few": (["--num-layers", "4"], 65, "has layer slots 0-1 in the metadata, but 0 by the options"),
    "layers-too-many": (["--num-layers", "16"], 65, "has layer slots 0-1 in the metadata, but 0-3 by the options"),
    "layers-that-do-not-divide": (["--num-layers", "7"], 64, "7 layers do not divide"),
    "all": (["--tp-size", "4", "--pp-size", "1", "--vpp-size", "1", "--num-layers", "3"], 65, "tp 4, pp 1, 3 layers"),
    "noop": (["--noop", "3"], 65, "has layer slots 0-1 in the metadata, but 0 by the options"),
    "stage-list": (["--stage-list", "1,3,2,2"], 65, "has layer slots 0-1 in the metadata, but 0 by the options"),
}


@pytest.mark.parametrize("command", ["convert", "plan"])
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_layout_is_answered_with_what_pt_meta_states(
    case: str, command: str, made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags, code, reported = WRONG[case]
    for more in ([], DEGREES):  # the last of a flag counts
        assert main([command, *more, *places(made, tmp_path), *flags]) == code
        err = capfd.readouterr().err
        assert reported in err
        assert "pt_meta was written with tp 2, pp 2, vpp 2, 8 layers" in err
        assert "rank_0/network" not in err
    assert not list(tmp_path.iterdir())


def test_a_pt_meta_of_more_or_fewer_ranks_is_reported(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "pt_meta", tmp_path / "pt_meta")
    wanted = Given(num_layers=8, tensor=2, pipeline=2, virtual=2)
    for path in (tmp_path / "pt_meta").glob("*tp01_*"):
        path.unlink()
    with pytest.raises(
        TopologyError, match="pt_meta was written with tp 1, pp 2, vpp 2, 8 layers, the options ask for tp 2"
    ):
        learn(wanted, source=made / "ms", metadata=tmp_path / "pt_meta", target=Path("none"))
    shutil.copy(tmp_path / "pt_meta" / "args_tp00_pp000.pt", tmp_path / "pt_meta" / "args_tp03_pp007.pt")
    with pytest.raises(TopologyError, match="pt_meta was written with tp 4, pp 8, vpp 2"):
        learn(wanted, source=made / "ms", metadata=tmp_path / "pt_meta", target=Path("none"))


@pytest.mark.parametrize(
    ("ranks", "asked", "data"),
    [
        pytest.param([0, 2], {}, 2, id="the-first-of-each-group"),
        pytest.param([0, 1], {}, 1, id="a-training-of-dp-1"),
        pytest.param([0, 1, 2, 3], {}, 2, id="all-ranks"),
        pytest.param([0, 1, 2, 3], {"data": 1}, 1, id="given"),
        pytest.param([0, 1, 2, 3], {"context": 2}, 1, id="context-given"),
    ],
)
def test_the_data_parallel_size_is_pt_metas_where_the_source_has_it(
    ranks: list[int], asked: dict[str, Any], data: int, tmp_path: Path
) -> None:
    Handmade(Topology(num_layers=4, pipeline=2), data=2).write_meta(tmp_path / "pt_meta")
    for rank in ranks:
        (tmp_path / "ms" / f"rank_{rank}").mkdir(parents=True)
    assert (
        learn(
            replace(Given(), **asked), source=tmp_path / "ms", metadata=tmp_path / "pt_meta", target=Path("none")
        ).data
        == data
    )


def test_where_nothing_is_stated_layers_have_to_be_given(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="the metadata folder is not there"):
        learn(Given(), source=tmp_path, metadata=tmp_path / "none", target=Path("none"))
    assert learn(
        Given(num_layers=4, tensor=2), source=tmp_path, metadata=tmp_path / "none", target=Path("none")
    ) == Topology(num_layers=4, tensor=2)
    assert read_stated(tmp_path) is None


def test_noop_layers_of_one_chunk_alone_have_to_be_given(tmp_path: Path) -> None:
    """Its maps are numbered as if it was not there, so nobody can tell which chunk it is."""
    layout = Topology(num_layers=12, pipeline=2, virtual=3, noop=frozenset({4, 5}))
    Handmade(layout).write_meta(tmp_path)
    given = Given(num_layers=12, tensor=1, pipeline=2, virtual=3)
    assert learn(given, source=tmp_path, metadata=tmp_path, target=Path("none")).noop == frozenset()


def test_noop_layers_beyond_the_model_are_a_warning(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for command in ("plan", "convert"):
        assert main([command, *places(made, tmp_path), "--noop", "62", "63"]) == 0
        assert "no-op layers 62, 63 are ignored: there are only layers 0 to 7" in capfd.readouterr().err
    assert main(["convert", *places(made, tmp_path)]) == 0  # the same conversion
    assert "everything was there already" in capfd.readouterr().out
