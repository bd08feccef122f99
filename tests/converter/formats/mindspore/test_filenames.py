"""What a name says of its rank and step, and that no file is taken from the folder of another rank."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import InputError
from ckpt2pt.formats.mindspore.filenames import UNNAMED, check_rank, rank_of_name, shown, when_of_name
from ckpt2pt.formats.mindspore.ready import Watcher
from handmade import Handmade


@pytest.mark.parametrize(
    ("name", "rank", "when"),
    [
        ("network_rank_3-0_500.ckpt", "rank_3", (0, 500)),
        ("network_rank_3_2-1_500.ckpt", "rank_3", (1, 500)),
        ("qwen_rank_3-network-1_5.safetensors", "rank_3", (1, 5)),
        ("network_rank_3_500.ckpt", "rank_3", (0, 500)),
        ("network_rank_3-0_500_dp_merged.ckpt", "rank_3", (0, 500)),
        ("rank_3.ckpt", "rank_3", UNNAMED),
        ("rank_8_run_rank_3-0_5.ckpt", "rank_3", (0, 5)),
        ("dist_opt_shard_info_rank_3-0_0.json", "rank_3", UNNAMED),
        ("mp_rank_01_003_model_optim_rng.ckpt", "mp_rank_01_003", UNNAMED),
        ("network.ckpt", "", UNNAMED),
        ("frank_3-0_5.ckpt", "", (0, 5)),
        ("top_rank_8_experts-0_5.ckpt", "", (0, 5)),
        ("model_optim_rng_001.ckpt", "", UNNAMED),
    ],
)
def test_a_name_says_its_rank_and_its_step(name: str, rank: str, when: tuple[int, int]) -> None:
    assert (rank_of_name(name), when_of_name(name)) == (rank, when)


@pytest.mark.parametrize(
    ("folder", "name", "refused"),
    [
        ("rank_0", "network_rank_1-0_2.ckpt", True),
        ("rank_10", "network_rank_1-0_2.ckpt", True),
        ("rank_1", "network_rank_01-0_2.ckpt", False),
        ("rank_0", "network_rank_1-0_2_dp_merged.safetensors", True),
        ("rank_0", "network_rank_99999999999999999999-0_2.ckpt", True),
        ("rank_0", "network_rank_00-0_2.ckpt", False),
        ("mp_rank_00_001", "mp_rank_00_000_model_optim_rng.ckpt", True),
        ("mp_rank_00", "mp_rank_00_000_model_optim_rng.ckpt", False),
        ("mp_rank_01_000", "mp_rank_01_model_optim_rng_001.ckpt", False),
        ("mp_rank_00_001", "dist_opt_shard_info_rank_4-0_0.json", False),
        ("rank_4", "dist_opt_shard_info_rank_0-0_0.json", True),
        ("anything", "network_rank_1-0_2.ckpt", False),
    ],
)
def test_a_rank_in_the_name_is_that_of_the_folder(folder: str, name: str, refused: bool) -> None:
    path = Path("/x") / folder / name
    if not refused:
        check_rank(path)
        return
    with pytest.raises(InputError, match=rf"{name} is named after \w+, but lies in {folder}"):
        check_rank(path)


def test_a_step_is_shown_as_the_name_spells_it() -> None:
    assert (shown((0, 12)), shown(UNNAMED)) == ("0_12", "a file without a step in its name")


def swapped(root: Path) -> None:
    one, other = root / "rank_0", root / "rank_1"
    one.rename(root / "aside")
    other.rename(one)
    (root / "aside").rename(other)


def one_strange_file(root: Path) -> None:
    shutil.copy(root / "rank_0" / "network_rank_0-0_12.ckpt", root / "rank_1" / "network_rank_0-0_12.ckpt")


WAYS: dict[str, Callable[[list[str], Path], list[str]]] = {
    "convert": lambda flags, _: ["convert", *flags],
    "plan": lambda flags, _: ["plan", *flags],
    "verify": lambda flags, _: ["verify", *flags],
    "watch": lambda flags, _: ["watch", "--once", "--settle", "0", *flags],
    "wait": lambda flags, _: ["convert", "--readiness-timeout", "5", "--readiness-settle", "0", *flags],
}


@pytest.mark.parametrize("damage", [swapped, one_strange_file])
@pytest.mark.parametrize("way", WAYS)
def test_the_file_of_another_rank_is_never_converted(
    way: str, damage: Callable[[Path], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Handmade(Topology(num_layers=4, tensor=2)).write(tmp_path)
    damage(tmp_path / "ms")
    flags = ["--num-layers", "4", "--tp-size", "2", "--ms-path", str(tmp_path / "ms")]
    flags += ["--param-map-path", str(tmp_path / "pt_meta"), "--megatron-path", str(tmp_path / "out")]
    assert main(WAYS[way](flags, tmp_path)) == 65
    reported = capfd.readouterr().err
    assert "network_rank_" in reported
    assert "is named after rank_" in reported
    assert "but lies in rank_" in reported
    assert not (tmp_path / "out").exists()


def test_a_watcher_refuses_it_too(tmp_path: Path) -> None:
    made = Handmade(Topology(num_layers=4, tensor=2))
    made.write(tmp_path)
    swapped(tmp_path / "ms")
    with pytest.raises(InputError, match="named after"):
        Watcher(tmp_path / "ms", made.topology).look()
