"""Trainings in fp16 into the forms of today's Megatron-LM: halves, the type of gradients, and the loss scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.core.tensor import Key
from ckpt2pt.formats.megatron.scaler import stored_scaler
from ckpt2pt.formats.registry import read
from ckpt2pt.verification.gather import Files, gathered
from ckpt2pt.verification.leaves import open_pt
from mcore import expected
from mcoresets import odd_set, script_of

ODD = odd_set()
STATE = {"scale": 1024.0, "growth_tracker": 0, "hysteresis_tracker": 3}


def script(tmp_path: Path, *more: str) -> Path:
    path = script_of(ODD, tmp_path, *more)
    path.write_text(path.read_text().replace("--bf16", "--fp16"))
    return path


def convert(source: Path, target: Path, form: str, *more: str | Path) -> Path:
    words = ["--source", source, "--target", target, "--target-format", form, "--progress", "none"]
    assert main(["convert", "--multiprocess-off", *map(str, [*words, *more])]) == 0
    return target


def of_mindspore(tmp_path: Path, form: str, *flags: str, name: str = "first") -> Path:
    return convert(ODD / "ms", tmp_path / name, form, "--param-map-path", script(tmp_path, *flags))


def state_of(result: Path) -> Any:
    template = read(result).template
    assert template
    return stored_scaler(template)


def types_of(result: Path) -> set[str]:
    """What keys the buffers of the optimizer: the types of parameters and gradients."""
    [path] = result.glob("iter_*/mp_rank_00/distrib_optim.pt")
    return {part for name in open_pt(path) for part in name.split("/") if "torch." in part or "float" in part}


def assert_equal(result: Path) -> None:
    wanted = expected(ODD / "expected")
    found = read(result).index
    assert found.keys() == wanted.keys()
    with Files() as files:
        for key, tensor in found.items():
            data = np.array(gathered(tensor).block(files, 0, tensor.numel))
            assert tensor.dtype == ("float16" if key.role == "param" else "float32")
            values = wanted[Key("main_param", key.name)].astype("<f2") if key.role == "param" else wanted[key]
            assert data.tobytes() == values.tobytes(), key


@pytest.mark.parametrize("form", ["megatron", "torch_dist"])
def test_a_mindspore_training_begins_with_the_loss_scale_of_the_arguments(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = of_mindspore(tmp_path, form, "--initial-loss-scale", "1024", "--hysteresis", "3")
    assert_equal(result)
    assert state_of(result) == STATE
    said = "loss scale: 1024, as at the start of a run, as nothing in the source states it"
    assert capsys.readouterr().out.count(said) == 1


@pytest.mark.parametrize("last", ["megatron", "torch_dist"])
@pytest.mark.parametrize("first", ["megatron", "torch_dist"])
def test_a_megatron_training_keeps_its_own(
    first: str, last: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = of_mindspore(tmp_path, first, "--initial-loss-scale", "1024", "--hysteresis", "3")
    capsys.readouterr()
    result = convert(source, tmp_path / "last", last)
    assert_equal(result)
    assert state_of(result) == STATE
    assert "loss scale" not in capsys.readouterr().out


@pytest.mark.parametrize("form", ["megatron", "torch_dist"])
def test_a_constant_loss_scale_has_no_state(form: str, tmp_path: Path) -> None:
    result = of_mindspore(tmp_path, form, "--loss-scale", "128")
    assert state_of(result) == {}
    assert state_of(convert(result, tmp_path / "last", "megatron")) == {}


@pytest.mark.parametrize("through", ["megatron", "torch_dist"])
@pytest.mark.parametrize(("flags", "other"), [((), "float16"), (("--accumulate-allreduce-grads-in-fp32",), "float32")])
def test_the_type_of_gradients_is_that_of_the_run(
    through: str, flags: tuple[str, ...], other: str, tmp_path: Path
) -> None:
    first = of_mindspore(tmp_path, through, *flags)
    result = convert(first, tmp_path / "last", "megatron")
    assert any(part.count("float16") == (2 if other == "float16" else 1) for part in types_of(result)), types_of(result)


def test_weights_alone_have_no_loss_scale(tmp_path: Path) -> None:
    result = convert(
        ODD / "ms", tmp_path / "out", "torch_dist", "--param-map-path", script(tmp_path), "--convert-param-only"
    )
    assert state_of(result) is None


def test_another_loss_scale_is_another_result(tmp_path: Path) -> None:
    """A result that was made with one is not kept as that of the other."""
    of_mindspore(tmp_path, "megatron", "--initial-loss-scale", "1024")
    words = [
        "--source",
        ODD / "ms",
        "--target",
        tmp_path / "first",
        "--target-format",
        "megatron",
        "--multiprocess-off",
    ]
    words += ["--param-map-path", script(tmp_path, "--initial-loss-scale", "2048")]
    assert main(["convert", *map(str, words)]) == 64


def test_a_run_of_both_precisions_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--source", ODD / "ms", "--target", tmp_path / "out", "--target-format", "megatron"]
    words += ["--param-map-path", script_of(ODD, tmp_path, "--fp16")]
    assert main(["convert", *map(str, words)]) == 64
    assert "both bf16 and fp16" in capsys.readouterr().err
