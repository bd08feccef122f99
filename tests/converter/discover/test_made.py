"""Metadata in memory: it is there for as long as its template, and chunks of several types are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt2pt.core.buckets import Bucket, Buffer, Placement
from ckpt2pt.discover.made import chunks_of, template_of_files
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.ptmeta.files import RankFiles


def buffer(dtype: str) -> Buffer:
    placement = Placement(name="a.weight", shape=(2,), start=0, stop=2)
    return Buffer(dtype=dtype, buckets=(Bucket(index=0, start=0, placements=(placement,), numel=2),))


def test_a_template_lies_in_memory_for_as_long_as_it_is_held() -> None:
    made = RankFiles(tp=1, pp=2, tree={"iteration": 7}, storages={}, buffers=(), names=((),))
    template = template_of_files(made, Path("checkpoint"))
    assert template.where == "checkpoint"
    path = Path(template.path)
    assert template.tree["iteration"] == 7
    assert path.read_bytes()
    del template
    assert not path.exists()


def test_a_chunk_without_parameters_is_left_out() -> None:
    chunks = chunks_of([("a.weight",), ()], [[buffer("bfloat16")], []], Path("/x"))
    assert [(chunk.vpp, chunk.names) for chunk in chunks] == [(0, ("a.weight",))]


def test_parameters_of_several_types_in_one_chunk_are_refused() -> None:
    with pytest.raises(FormatError, match="several types in one chunk"):
        chunks_of([("a.weight",)], [[buffer("bfloat16"), buffer("float32")]], Path("/x"))
