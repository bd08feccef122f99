"""A checkpoint of MSAdapter is one of Megatron-LM in another container: the same tensors, at every place."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.core.names import Rules
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.msadapter import WITHOUT_RNG, check_msadapter
from ckpt2pt.formats.registry import detect, read
from ckpt2pt.verification.across import compare_any
from msadapter import FAMILIES, rewrite


def test_a_real_one_is_detected_and_holds_what_torch_would_have_saved(golden: Path) -> None:
    source, reference = golden / "msadapter/moe_ep2", golden / "reference_torch/moe_ep2"
    assert (detect(source), detect(reference)) == ("msadapter", "megatron")
    found = read(source)
    assert (found.format, found.iteration, found.expert, found.warnings) == ("msadapter", 2, 2, (WITHOUT_RNG,))
    assert found.template
    assert "rng_state" not in found.template.tree
    comparison = compare_any([source, reference], (None, None), Rules(), ignore=[], ignore_padding=False)
    assert comparison.same
    assert comparison.equal == 142


def test_what_torch_wrote_is_refused_where_msadapter_is_said(golden: Path) -> None:
    folder = golden / "reference_torch/moe_ep2"
    with pytest.raises(FormatError, match="torch wrote this checkpoint") as caught:
        read(folder, source_format="msadapter")
    assert caught.value.field == "source.format"
    check_msadapter(golden / "msadapter/moe_ep2/iter_0000002")


@pytest.mark.parametrize("form", ["megatron", "torch_dist", "mindspore"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_becomes_every_other_format(family: str, form: str, golden: Path, tmp_path: Path) -> None:
    source = rewrite(golden / "mcore/0.19.0/odd_dp2", tmp_path / "in", family)
    words = ["--source", str(source), "--source-format", "msadapter", "--target", str(tmp_path / "out")]
    assert main(["convert", *words, "--target-format", form, "--verify", "full", "--progress", "none"]) == 0
    assert main(["verify", str(source), str(tmp_path / "out"), "--progress", "none"]) == 0


def test_a_checkpoint_is_never_called_loadable(golden: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for path in ("msadapter/moe_ep2", "msadapter/moe_ep2/iter_0000002"):
        assert main(["inspect", str(golden / path)]) == 0
        said = capfd.readouterr().out
        assert said.startswith("MSAdapter ")
        assert "no: no release of torch reads files of MSAdapter" in said
        assert "ckpt2pt convert --target-format torch" in said
        assert "releases" not in said
    assert main(["inspect", str(golden / "msadapter/corners.pt")]) == 0
    assert capfd.readouterr().out.startswith("MSAdapter archive (.pt), which torch does not read")


def test_megatron_06_asks_for_the_random_generators_that_it_needs(
    golden: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = rewrite(golden / "megatron06/f_tp1pp1dp2_buckets/A", tmp_path / "in")
    words = ["--source", str(source), "--target", str(tmp_path / "out"), "--progress", "none"]
    assert main(["convert", *words]) == 65
    assert "rng_state is missing" in capfd.readouterr().err
    meta = ["--megatron-path", str(source), "--param-map-path", str(tmp_path / "meta")]
    assert main(["pt-meta", *meta, "--synthesize", "rng"]) == 0
    assert main(["convert", *words, "--param-map-path", str(tmp_path / "meta"), "--verify", "full"]) == 0
