"""The tensors of a ``.safetensors`` for transformers or MindFormers against those of the source: by the header, and the way back of each.

file --mindspore.safetensors--> elements --huggingface.places---> parts of Megatron core's tensors -+- bits, or rounded to nearest even
                                         --mindformers.layouts--> regions of them ------------------+
source ------------------------------------------------------------ the same boxes -----------------+
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ckpt2pt.core.extents import Shape, TensorRef, View
from ckpt2pt.core.index import Index, find
from ckpt2pt.core.params import is_buffer, is_padded
from ckpt2pt.core.tensor import Key, Tensor, box_of, dense_strides
from ckpt2pt.errors import InputError
from ckpt2pt.formats.huggingface.names import Family, Row, rows_of
from ckpt2pt.formats.huggingface.places import natural_shape, placed
from ckpt2pt.formats.huggingface.views import Heads
from ckpt2pt.formats.mindformers.layouts import Layouts
from ckpt2pt.formats.mindformers.regions import Parts
from ckpt2pt.formats.mindspore.safetensors import index_safetensors
from ckpt2pt.verification.elements import Differing, rounded
from ckpt2pt.verification.gather import Files, Gathered, spans, stored, strided
from ckpt2pt.verification.prove import crcs_of
from ckpt2pt.verification.report import Findings


@dataclass(frozen=True, kw_only=True)
class ExpectedShards:
    """What a result holds: the tensors of ``index`` by the names of ``family``, of type ``dtype``, without padding.

    ``zeros`` are tensors of the class that the model does not have.
    """

    index: Index
    family: Family
    heads: Heads
    vocabulary: int
    dtype: str
    zeros: frozenset[str]

    @cached_property
    def rows(self) -> Mapping[str, tuple[Tensor, Row]]:
        """By the names of the result, whatever file they are in: the tensor of the source, and which part of it that is."""
        names = dict.fromkeys(key.name for key in self.index)
        found = ((find(self.index, Key("param", name)), name) for name in names)
        return {row.own: (tensor, row) for tensor, name in found if tensor for row in rows_of(self.family, name)}


def compare_shard(
    expected: ExpectedShards,
    names: frozenset[str],
    path: Path,
    name: str,
    findings: Findings,
    advance: Callable[[int], None],
) -> Mapping[str, int]:
    """Compare every tensor of a file, which are to be ``names``; the CRC-32 of it, by its name."""

    def compare(result: TensorRef, files: Files) -> None:
        if result.name in expected.zeros:
            _compare_zeros(result, name, findings, files)
        else:
            _compare(expected, *expected.rows[result.name], result, name, findings, files)

    return _compare_file(names, path, name, findings, advance, compare)


def _compare_file(
    names: frozenset[str],
    path: Path,
    name: str,
    findings: Findings,
    advance: Callable[[int], None],
    compare: Callable[[TensorRef, Files], None],
) -> Mapping[str, int]:
    """Which tensors there are, and each of them as ``compare`` does it."""
    with Files([path], advance) as files:
        try:
            held = index_safetensors(path)
        except InputError as error:
            findings.differ(name, "file", error.what)
            return {}
        for own in sorted(names ^ held.keys()):
            findings.differ(name, own, "is not in the file" if own in names else "is unexpected")
        for own in sorted(names & held.keys()):
            compare(held[own], files)
        return crcs_of({name: path}, {str(path): sorted(files.pieces[str(path)])})


def _compare(
    expected: ExpectedShards, source: Tensor, row: Row, result: TensorRef, file: str, findings: Findings, files: Files
) -> None:
    dtype = source.dtype if is_buffer(source.key.name) else expected.dtype
    shape = natural_shape(row.form, result.shape, expected.heads)
    wanted = (expected.vocabulary, *source.shape[1:]) if is_padded(source.key.name) else source.shape
    if shape != wanted or result.dtype != dtype:
        findings.differ(file, row.own, "has another type or shape", f"{dtype}{list(wanted)}", str(result))
        return
    tally = Differing(dtype, dtype, strict=dtype == "float32")
    for view in placed(row.form, result.shape, expected.heads, result.extents):
        own, other = Gathered(source.dtype, source.views, box_of(view)), strided(dtype, view)
        for start, stop in spans(view.numel, 4):
            tally.see(
                start, rounded(own.block(files, start, stop), source.dtype, dtype), other.block(files, start, stop)
            )
    findings.tensors += 1
    if tally.seen != math.prod(result.shape):
        findings.differ(file, row.own, "was not compared in full", math.prod(result.shape), tally.seen)
    as_type = "" if dtype == "float32" else f" as {dtype}"
    findings.settle(file, row.own, tally, f"differ from the source {source.key}{as_type}")


def _compare_zeros(result: TensorRef, file: str, findings: Findings, files: Files) -> None:
    elements = stored(result.dtype, result.shape, result.extents)
    findings.tensors += 1
    if any(elements.block(files, start, stop).any() for start, stop in spans(result.numel, 4)):
        findings.differ(file, result.name, "is not zero")


@dataclass(frozen=True, kw_only=True)
class ExpectedFiles:
    """What a result holds: the tensors of ``index`` as ``layouts`` fuse them; ``dtypes`` by the names of the result."""

    index: Index
    layouts: Layouts
    dtypes: Mapping[str, str]


def compare_stored(
    expected: ExpectedFiles,
    names: frozenset[str],
    path: Path,
    name: str,
    findings: Findings,
    advance: Callable[[int], None],
) -> Mapping[str, int]:
    """The same for weights of MindFormers."""
    return _compare_file(
        names,
        path,
        name,
        findings,
        advance,
        lambda result, files: _compare_regions(expected, result, name, findings, files),
    )


def _compare_regions(expected: ExpectedFiles, result: TensorRef, file: str, findings: Findings, files: Files) -> None:
    own, dtype, shape = result.name, expected.dtypes[result.name], expected.layouts.shapes[result.name]
    if (result.dtype, result.shape) != (dtype, shape):
        findings.differ(file, own, "has another type or shape", f"{dtype}{list(shape)}", str(result))
        return
    whole = View(_zeros(shape), shape, dense_strides(shape), 0, result.extents)
    seen = 0
    for fused in expected.layouts.of(own):
        source = find(expected.index, Key("param", fused.name))
        if source is None or source.shape != fused.shape:
            what = "is not in the source" if source is None else "has another shape than in the source"
            findings.differ(file, own, f"{fused.name} {what}")
            continue
        tally = Differing(dtype, dtype, strict=dtype == "float32")
        for view in Parts([whole]).views(fused.regions):
            mine, other = Gathered(source.dtype, source.views, box_of(view)), strided(dtype, view)
            for start, stop in spans(view.numel, 4):
                wanted = rounded(mine.block(files, start, stop), source.dtype, dtype)
                tally.see(start, wanted, other.block(files, start, stop))
        as_type = "" if dtype == source.dtype else f" as {dtype}"
        findings.settle(file, own, tally, f"differ from the source {source.key}{as_type}")
        seen += tally.seen
    findings.tensors += 1
    if seen != math.prod(shape):
        findings.differ(file, own, "was not compared in full", math.prod(shape), seen)


def _zeros(shape: Shape) -> Shape:
    return (0,) * len(shape)
