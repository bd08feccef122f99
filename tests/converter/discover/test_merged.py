"""Degrees from the descriptions of shards, which have to lie where their names say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.core.topology import Topology
from ckpt2pt.discover.merged import described_topology
from ckpt2pt.errors import InputError
from goldens import golden_root
from handmade import Handmade
from sharding import Sharding

J = golden_root() / "megatron06" / "j_tp1pp2dp2"


@pytest.mark.parametrize(
    "topology",
    [
        Topology(num_layers=2),
        Topology(num_layers=2, tensor=2, data=4),
        Topology(num_layers=2, pipeline=2, data=2, context=2),
    ],
    ids=str,
)
def test_degrees_are_read_from_the_descriptions(topology: Topology, tmp_path: Path) -> None:
    Sharding().write(Handmade(topology, hidden=8, vocab=12, data=2), tmp_path)
    found = described_topology(tmp_path / "opt_shard_info")
    assert (found.tensor, found.pipeline) == (topology.tensor, topology.pipeline)
    assert found.data == topology.data * topology.context


def test_a_description_of_another_rank_is_refused(tmp_path: Path) -> None:
    shutil.copytree(J / "ms_zero_src" / "opt_shard_info", tmp_path / "info")
    [path] = (tmp_path / "info" / "rank_0").iterdir()
    path.rename(path.with_name("dist_opt_shard_info_rank_2-0_0.json"))
    with pytest.raises(InputError, match="named after rank_2, but lies in rank_0"):
        described_topology(tmp_path / "info")


@pytest.mark.parametrize("command", ["combine", "convert"])
def test_shards_and_descriptions_of_another_rank_are_refused_by(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def call(folder: Path) -> int:
        if command == "combine":
            places = ["--strategy-dir", folder / "opt_shard_info", "--checkpoint-dir", folder]
            return main(["combine", *map(str, [*places, "--output-dir", tmp_path / "out"])])
        words = ["--num-layers", 4, "--pp-size", 2, "--dp-size", 2, "--ms-path", folder]
        words += ["--param-map-path", J / "pt_meta", "--megatron-path", tmp_path / "out"]
        return main(["convert", *map(str, words)])

    for number, place in enumerate(
        ("rank_0/network_rank_@-0_2.ckpt", "opt_shard_info/rank_0/dist_opt_shard_info_rank_@-0_0.json")
    ):
        folder = tmp_path / str(number)
        shutil.copytree(J / "ms_zero_src", folder)
        path = folder / place.replace("@", "0")
        path.rename(folder / place.replace("@", "1"))
        assert call(folder) == 65
        assert "is named after rank_1, but lies in rank_0" in capfd.readouterr().err
        assert not (tmp_path / "out").exists()


def test_merged_groups_that_hold_the_same_bits_are_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = Handmade(Topology(num_layers=2, tensor=2, data=2), hidden=8, vocab=12, data=2)
    words = ["--strategy-dir", tmp_path / "ms/opt_shard_info", "--checkpoint-dir", tmp_path / "ms"]
    Sharding().write(made, tmp_path / "ms")
    assert main(["combine", *map(str, [*words, "--output-dir", tmp_path / "apart"])]) == 0
    assert "the same bits" not in capfd.readouterr().err
    for source, target in ((0, 1), (2, 3)):
        [path] = (tmp_path / "ms" / f"rank_{target}").glob("*.ckpt")
        path.chmod(0o600)
        path.write_bytes(
            (tmp_path / "ms" / f"rank_{source}" / path.name.replace(f"rank_{target}", f"rank_{source}")).read_bytes()
        )
    assert main(["combine", *map(str, [*words, "--output-dir", tmp_path / "alike"])]) == 0
    assert "hold the same bits" in capfd.readouterr().err
