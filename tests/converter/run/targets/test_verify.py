"""A torch_dist result against its source."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.core.tensor import Key
from ckpt2pt.formats.registry import read
from dist import CUT, of_mindspore


def verify(folder: Path, target: Path, *more: str) -> int:
    words = ["--source", folder / "ms", "--param-map-path", folder / "pt_meta", "--target", target, *more]
    return main(["verify", "--target-format", "torch_dist", "--progress", "none", *map(str, words)])


def test_a_flipped_bit_is_found_in_the_tensor_that_has_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert of_mindspore(CUT, tmp_path / "out") == 0
    assert verify(CUT, tmp_path / "out") == 0
    tensor = read(tmp_path / "out").index[Key("exp_avg", "decoder.layers.0.mlp.linear_fc2.weight")]
    [extent] = tensor.views[0].storage
    path, place = Path(extent.path), extent.offset + 4 * tensor.views[0].first
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    capfd.readouterr()
    assert verify(CUT, tmp_path / "out") == 76
    said = capfd.readouterr()
    assert "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight" in said.out + said.err
    assert verify(CUT, tmp_path / "out", "--level", "digest") == 76


def test_a_file_that_is_gone_or_was_cut_is_a_difference(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert of_mindspore(CUT, tmp_path / "out") == 0
    [lost] = (tmp_path / "out").glob("iter_*/__3_0.distcp")
    for data in (lost.read_bytes()[:-9], None):
        lost.unlink()
        if data:
            lost.write_bytes(data)
        capfd.readouterr()
        assert verify(CUT, tmp_path / "out") == 76
        assert "__3_0.distcp" in capfd.readouterr().out


def test_torch_reads_no_row_of_archives(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for target in ("torch_dist", "megatron"):
        assert verify(CUT, tmp_path / "out", "--target-format", target, "--reader", "torch") == 64
        said = capfd.readouterr().err
        assert "--reader is torch" in said
        assert "leave --reader out" in said
        assert "load the result with Megatron-LM" in said


def test_a_result_that_is_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert verify(CUT, tmp_path / "out") == 66
    assert "there is no result of iteration" in capfd.readouterr().err
