"""A ``.distcp`` against the source: what differs is known by its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt2pt.core.tensor import Key
from ckpt2pt.errors import VerificationError
from ckpt2pt.formats.registry import read
from ckpt2pt.formats.torch_dist.keys import layers_of
from ckpt2pt.formats.torch_dist.slots import Division
from ckpt2pt.verification.report import Findings
from ckpt2pt.verification.torch_dist import compare_parts, prove_parts
from dist import CUT, convert


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    assert convert(CUT / "A", out, "--target-tp-size", "2", "--target-pp-size", "1") == 0
    [folder] = out.glob("iter_*")
    return folder


def division() -> Division:
    found = read(CUT / "A")
    return Division(
        index=found.index,
        layers=layers_of(found.index, ""),
        tensor=2,
        pipeline=1,
        dtype="bfloat16",
        full=True,
        where="",
    )


def test_every_part_is_compared(result: Path) -> None:
    cut = division()
    file, _ = cut.file((1, 0))
    findings = Findings()
    read_bytes: list[int] = []
    compare_parts(cut.index, list(cut.layers.numbers), file, result / file.name, findings, read_bytes.append)
    assert findings.differences == []
    assert findings.tensors == len(file.parts)
    assert sum(read_bytes) > sum(part.nbytes for part in file.parts)


@pytest.mark.parametrize(
    "key", [Key("param", "output_layer.weight"), Key("main_param", "decoder.layers.1.mlp.linear_fc1.weight")]
)
def test_a_tensor_of_another_source_is_named(key: Key, result: Path) -> None:
    cut = division()
    file, _ = cut.file((0, 0))
    views = tuple(view._replace(first=view.first + 1) for view in cut.index[key].views)
    index = {**cut.index, key: cut.index[key]._replace(views=views)}
    with pytest.raises(VerificationError, match="differ from the source") as refused:
        prove_parts(index, list(cut.layers.numbers), file, result / file.name, lambda: None)
    assert str(key) in refused.value.what


def test_layers_in_another_order_are_found(result: Path) -> None:
    cut = division()
    file, _ = cut.file((0, 0))
    with pytest.raises(VerificationError):
        prove_parts(cut.index, list(reversed(cut.layers.numbers)), file, result / file.name, lambda: None)


def test_an_item_that_is_no_archive_is_a_difference(result: Path, tmp_path: Path) -> None:
    cut = division()
    file, _ = cut.file((0, 0))
    (tmp_path / file.name).write_bytes(bytes((result / file.name).stat().st_size))
    findings = Findings()
    compare_parts(cut.index, list(cut.layers.numbers), file, tmp_path / file.name, findings, lambda _: None)
    assert [one.file for one in findings.differences] == [file.name]
