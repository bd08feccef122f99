"""The tensors in one ``.distcp`` against those of the source: each item by the reader's headers and the reader's names.

item --torch_dist.items--> elements of a chunk -----------------------------------------+
its key --torch_dist.names--> (role, name, layer) --> the source's tensor, the same box -+-- bits, or rounded to nearest even
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from ckpt2pt.core.extents import Box, View
from ckpt2pt.core.index import Index, find
from ckpt2pt.core.params import split_layer
from ckpt2pt.core.state import Values
from ckpt2pt.core.tensor import Key, Tensor
from ckpt2pt.errors import InputError
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.megatron.scaler import SCALER, stored_scaler
from ckpt2pt.formats.torch_dist.common import COMMON
from ckpt2pt.formats.torch_dist.items import Located, locate
from ckpt2pt.formats.torch_dist.metadata import Chunk, Item
from ckpt2pt.formats.torch_dist.names import named
from ckpt2pt.formats.torch_dist.write import DistcpFile, Part
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.pickles import read_pickle, write_pickle
from ckpt2pt.formats.torchfile.trees import Value
from ckpt2pt.io.text import short
from ckpt2pt.verification.elements import Differing, rounded
from ckpt2pt.verification.gather import Files, Gathered, spans, strided
from ckpt2pt.verification.leaves import Leaves, flatten
from ckpt2pt.verification.prove import crcs_of
from ckpt2pt.verification.report import NOTHING_PUBLISHED, Difference, Findings


def prove_parts(
    index: Index, layers: Sequence[int], file: DistcpFile, path: Path, heed: Callable[[], None]
) -> Mapping[str, int]:
    """Compare a file that is to be published, before it is; returns its CRC-32.

    ``layers`` are the numbers in the source of the result's layers.  ``heed`` is called after every block, and may raise.
    Raises :class:`VerificationError` for a difference.
    """
    findings = Findings()
    crcs = compare_parts(index, layers, file, path, findings, lambda _: heed())
    findings.report(path.parent, 0).raise_differences(hint=NOTHING_PUBLISHED)
    return crcs


def compare_parts(
    index: Index,
    layers: Sequence[int],
    file: DistcpFile,
    path: Path,
    findings: Findings,
    advance: Callable[[int], None],
) -> Mapping[str, int]:
    """Compare every part of a file; the CRC-32 of it, by its name."""
    chunks = [(part, _in(chunk, path.name)) for part, chunk in file.chunks()]
    with Files([path], advance) as files:
        try:
            located = dict(locate(path.parent, ((part.dtype, chunk) for part, chunk in chunks)))
        except InputError as error:
            findings.differ(file.name, "file", error.what)
            return {}
        for part, chunk in chunks:
            _compare(index, layers, part, located[chunk], file.name, findings, files)
        return crcs_of({file.name: path}, {str(path): sorted(files.pieces[str(path)])})


def compare_common(expected: dict[Value, Value], scaler: Values | None, folder: Path) -> Iterator[Difference]:
    """What is no tensor, in ``common.pt``: each argument, each value of a group, of the scheduler and of the loss scale by its name."""
    path = folder / COMMON
    try:
        archive = Archive.open(path)
        tree = read_pickle(archive.pickle, where=str(path))
    except InputError as error:
        yield Difference(file=COMMON, tensor="file", problem=error.what)
        return
    wanted = _leaves(read_pickle(write_pickle(expected), where=COMMON), path)
    found = _leaves(tree, path)
    for name in dict.fromkeys((*wanted, *found)):
        if wanted.get(name) != found.get(name) or (name in wanted) != (name in found):
            texts = [short(held[name]) if name in held else "nothing" for held in (wanted, found)]
            yield Difference(
                file=COMMON, tensor=name, problem="is not as the source states it", expected=texts[0], found=texts[1]
            )
    if isinstance(tree, dict):
        own = Template(path=str(path), tree=cast("dict[str, Value]", tree), storages=dict(archive.storages))
        if (stored := stored_scaler(own)) != scaler:
            yield Difference(
                file=COMMON,
                tensor=f"/optimizer/{SCALER}",
                problem="is not as the source states it",
                expected=str(scaler),
                found=str(stored),
            )


def _leaves(tree: Value, path: Path) -> Leaves:
    """By name, but for the loss scale, whose tensor lies in a storage of its own."""
    leaves = flatten(tree, lambda value: value, where=str(path), nbytes=path.stat().st_size)
    return {name: leaf for name, leaf in leaves.items() if f"/{SCALER}" not in name}


def _in(chunk: Chunk, name: str) -> Chunk:
    """The same in a file that has not got its name yet."""
    return chunk._replace(item=Item(name, chunk.item.offset, chunk.item.nbytes))


def _compare(
    index: Index, layers: Sequence[int], part: Part, located: Located, file: str, findings: Findings, files: Files
) -> None:
    tensor, box = _source(index, layers, part)
    if tensor is None or box is None:
        findings.differ(file, part.key, "is not in the source")
        return
    source = Gathered(tensor.dtype, tensor.views, box)
    origin = (0,) * len(part.shape)
    result = strided(part.dtype, View(origin, part.shape, located.strides, located.first, located.storage))
    tally = Differing(part.dtype, part.dtype, strict=part.dtype == "float32")
    for start, stop in spans(math.prod(part.shape), 4):
        expected = rounded(source.block(files, start, stop), tensor.dtype, part.dtype)
        tally.see(start, expected, result.block(files, start, stop))
    findings.tensors += 1
    as_type = "" if part.dtype == "float32" else f" as {part.dtype}"
    findings.settle(file, part.key, tally, f"differ from the source {tensor.key}{as_type}")


def _source(index: Index, layers: Sequence[int], part: Part) -> tuple[Tensor | None, Box | None]:
    """The tensor of the source that a part is of, and the box of it in its natural axes."""
    name = named(part.key)
    if name is None:
        return None, None
    canonical = name.name(part.origin[: name.leading])
    layer, inner = split_layer(canonical)
    if layer is not None:
        canonical = f"decoder.layers.{layers[layer]}.{inner}"
    tensor = find(index, Key(name.role, canonical))
    origin, shape = part.origin[name.leading :], part.shape[name.leading :]
    if tensor is None or part.whole[name.leading :] != tensor.fused or any(n != 1 for n in part.shape[: name.leading]):
        return tensor, None
    if len(tensor.shape) == len(tensor.fused):
        return tensor, (origin, shape)
    rows = tensor.shape[1]  # of one of the halves that the source has as an axis
    if shape == tensor.fused:
        return tensor, ((0,) * len(tensor.shape), tensor.shape)
    half, row = divmod(origin[0], rows)
    return tensor, ((half, row, *origin[1:]), (1, *shape)) if row + shape[0] <= rows else None
