"""A distributed checkpoint converted to Megatron-LM 0.6, in any layout, is the same checkpoint; a wrong one is none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckpt2pt
from ckpt2pt.cli.commands import main
from ckpt2pt.core.tensor import Role
from ckpt2pt.errors import Ckpt2ptError, FormatError, MissingInputError, TopologyError
from goldens import golden_root
from torchdist import HEADS, gpt, write_gpt

MCORE = golden_root() / "mcore"
WRONG = MCORE / "0.19.0" / "odd_dp2__td_full"
SETS = [path for path in sorted(MCORE.glob("*/*__*td_*")) if path != WRONG and "moe" not in path.name]
LAYOUTS = {
    "as it was": {},
    "tp 4": {"target_tp": 4, "target_pp": 1},
    "pp 2, interleaved": {"target_tp": 1, "target_pp": 2, "target_vpp": 2},
}


def converted(source: Path, target: Path, **asked: Any) -> Path:
    """Convert, with the proof that compares every element."""
    return ckpt2pt.convert(source=source, target=target, verify="full", **asked).target.folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("asked", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_result_holds_what_the_source_holds(tmp_path: Path, asked: dict[str, int], tied: bool) -> None:
    source = write_gpt(tmp_path / "source", gpt(tied=tied, layers=4))
    folder = converted(source, tmp_path / "target", **asked)
    found = ckpt2pt.verify(source, tmp_path / "target")
    assert found.same
    with ckpt2pt.open(folder) as checkpoint:
        assert (checkpoint.tp, checkpoint.pp) == (asked.get("target_tp", 2), asked.get("target_pp", 1))
        assert checkpoint.iteration == 3


@pytest.mark.parametrize("source", SETS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_every_golden_checkpoint_is_carried_over(tmp_path: Path, source: Path) -> None:
    converted(source, tmp_path / "x", target_tp=1, target_pp=2, target_vpp=1)
    assert ckpt2pt.verify(source, tmp_path / "x").same


def test_the_weights_of_a_wrong_save_can_be_had(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="do not round to the weights"):
        converted(WRONG, tmp_path / "full")
    assert not list(tmp_path.glob("full/iter_*"))
    folder = converted(WRONG, tmp_path / "weights", params_only=True)
    assert [path.name for path in folder.glob("mp_rank_*/*.pt")] == ["model_optim_rng.pt"]


def test_a_save_that_did_not_end_is_reported(tmp_path: Path) -> None:
    source = write_gpt(tmp_path / "source", gpt(tied=False, layers=4))
    next(source.rglob(".metadata")).unlink()
    with pytest.raises(MissingInputError, match=r"there is no .metadata, which is written last"):
        converted(source, tmp_path / "target")


def test_a_main_parameter_between_the_samples_is_found_by_the_full_proof(tmp_path: Path) -> None:
    arrays = gpt(hidden=32)
    main_parameter = arrays["main_param"]["decoder.layers.mlp.linear_fc1.weight"]
    main_parameter[1].reshape(-1)[main_parameter[1].size // 4] += 1
    source = write_gpt(tmp_path / "source", arrays)
    assert ckpt2pt.inspect(source)["mainParameters"] == "samples round to the weights"
    with pytest.raises(FormatError, match="of 1 of 15 tensors do not round"):
        converted(source, tmp_path / "x")
    assert not (tmp_path / "x" / "latest_checkpointed_iteration.txt").exists()


def test_a_flipped_bit_is_found_by_the_checksum_of_its_item(tmp_path: Path) -> None:
    source = write_gpt(tmp_path / "source", gpt())
    with ckpt2pt.open(source) as checkpoint:
        [part] = checkpoint.info("decoder.layers.1.mlp.linear_fc2.weight", "exp_avg").parts
    path, offset, _ = part.extents[0]
    data = bytearray(Path(path).read_bytes())
    data[offset] ^= 1
    Path(path).write_bytes(data)
    with pytest.raises(Ckpt2ptError, match=r"the CRC-32 of data/0 is") as caught:
        ckpt2pt.convert(source=source, target=tmp_path / "x")
    assert caught.value.exit_code == 65
    assert "from byte" in caught.value.where or "__0_0.distcp" in caught.value.where


def test_arguments_that_it_leaves_out_are_reported_by_the_tensors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The small Namespace of a checkpoint that no Megatron-LM wrote."""
    source = write_gpt(tmp_path / "source", gpt(), args={"num_layers": 2, "num_attention_heads": HEADS})
    converted(source, tmp_path / "x")
    assert ckpt2pt.verify(source, tmp_path / "x").same
    assert main(["plan", "--source", str(source), "--target", str(tmp_path / "y")]) == 0
    assert "defaults of Megatron-LM 0.6" in capsys.readouterr().out


def test_sizes_that_contradict_its_arguments_are_refused(tmp_path: Path) -> None:
    source = write_gpt(tmp_path / "source", gpt())
    with pytest.raises(TopologyError, match="is 4, the checkpoint has 2"):
        ckpt2pt.convert(source=source, target=tmp_path / "x", tp=4)


def test_a_source_without_an_optimizer_gives_weights(tmp_path: Path) -> None:
    arrays = {"param": gpt()["param"]}
    source = write_gpt(tmp_path / "source", arrays)
    with pytest.raises(MissingInputError, match="holds no state of the optimizer"):
        converted(source, tmp_path / "x")
    converted(source, tmp_path / "x", params_only=True)
    assert ckpt2pt.verify(source, tmp_path / "x").same


def test_what_a_legacy_model_cannot_have_is_refused(tmp_path: Path) -> None:
    arrays = gpt()
    for held in arrays.values():
        held["decoder.layers.self_attention.q_layernorm.weight"] = np.ones((2, 4), "<f4")
    with pytest.raises(FormatError, match=r"has no decoder\.layers\.0\.self_attention\.q_layernorm\.weight"):
        converted(write_gpt(tmp_path / "source", arrays), tmp_path / "x")


def test_a_file_that_goes_is_missed(tmp_path: Path) -> None:
    source = write_gpt(tmp_path / "source", gpt())
    shutil.move(source / "__0_0.distcp", tmp_path / "elsewhere")
    with pytest.raises(MissingInputError, match=r"__0_0\.distcp is not there"):
        converted(source, tmp_path / "x")


@pytest.mark.parametrize("asked", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_mindspore_result_holds_the_same_with_its_metadata(tmp_path: Path, asked: dict[str, int]) -> None:
    source = write_gpt(tmp_path / "source", gpt(layers=4))
    converted(source, tmp_path / "ms", target_format="mindspore", **asked)
    assert ckpt2pt.verify(source, tmp_path / "ms").same
    back = ckpt2pt.convert(source=tmp_path / "ms", metadata=tmp_path / "ms" / "pt_meta", target=tmp_path / "pt")
    assert ckpt2pt.verify(source, back.target.folder).same


MINDSPORE_ROLES: tuple[Role, ...] = ("main_param", "exp_avg", "exp_avg_sq")
HELD_BY_MINDSPORE = [
    (path, ms)
    for path in SETS
    if "__te" not in path.name and (ms := path.parent / path.name.partition("__")[0] / "ms").is_dir()
]


@pytest.mark.parametrize(("source", "ms"), HELD_BY_MINDSPORE, ids=[path.name for path, _ in HELD_BY_MINDSPORE])
def test_a_mindspore_result_is_what_mindspore_would_hold(tmp_path: Path, source: Path, ms: Path) -> None:
    """Sets of one name hold the same state; an independent writer made what MindSpeed-Core-MS would hold of it."""
    converted(source, tmp_path / "ms", target_format="mindspore", target_tp=1, target_pp=1)
    with ckpt2pt.open(ms) as one, ckpt2pt.open(tmp_path / "ms") as other:
        assert set(one) == set(other)
        for name in one:
            for role in MINDSPORE_ROLES:
                np.testing.assert_array_equal(one.get(name, role), other.get(name, role), f"{role} {name}")
