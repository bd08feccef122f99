"""Main parameters have to round to the weights: what an optimizer holds that does not is another tensor's, or another step's.

A training overwrites its weights with the main parameters in the first step that it makes, so that nothing is wrong before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ckpt2pt.core.extents import DTYPE_BYTES, Box, Gather
from ckpt2pt.core.index import Index
from ckpt2pt.core.moves import cut
from ckpt2pt.core.plan import copies
from ckpt2pt.core.tensor import Key, Tensor, boxes
from ckpt2pt.errors import FormatError, aside
from ckpt2pt.formats.ptmeta.proof import rounds_to
from ckpt2pt.io.files import OpenFiles, read_at

SAMPLE_NUMEL = 256
"""Elements of a stretch of a tensor that are compared: at its beginning, in its middle and at its end."""

_BLOCK_NUMEL = 1 << 17


def check_rounding(index: Index, where: str, *, every: bool = False) -> int:
    """Compare main parameters, rounded, with the weights of less precision: samples of each, or ``every`` element.

    Gives the elements that were compared.  Raises :class:`FormatError` where some differ, with how many tensors do.
    """
    pairs = [
        (weight, main)
        for key, weight in index.items()
        if key.role == "param"
        and (main := index.get(Key("main_param", key.name)))
        and main.dtype == "float32"
        and weight.dtype in {"bfloat16", "float16"}
    ]
    count, wrong = 0, list[str]()
    with OpenFiles() as files:
        for weight, main in pairs:
            for box in _boxes(main, every=every):
                count += math.prod(box[1])
                if not rounds_to(_elements(main, box, files), _elements(weight, box, files), weight.dtype):
                    wrong.append(weight.key.name)
                    break
    if wrong:
        raise FormatError(
            f"the optimizer's main parameters of {len(wrong)} of {len(pairs)} tensors do not round to the weights, such as "
            f"those of {wrong[0]}",
            where=where,
            hint="the optimizer state was saved wrong, as Megatron-LM 0.15 to 0.19 save it (fully_reshardable) with several "
            f"buckets of which one is padded; the weights are right: convert weights alone{aside('mode')}, or save again "
            "without --overlap-grad-reduce",
        )
    return count


def _boxes(tensor: Tensor, *, every: bool) -> Iterator[Box]:
    """All of it, view by view as it is stored; or a stretch at its beginning, in its middle and at its end."""
    if every:
        for view in tensor.views:
            for start in range(0, view.numel, _BLOCK_NUMEL):
                for origin, shape in boxes(view.shape, start, min(view.numel, start + _BLOCK_NUMEL)):
                    yield tuple(map(sum, zip(view.origin, origin, strict=True))), shape
        return
    last = max(0, tensor.numel - SAMPLE_NUMEL)
    for start in sorted({0, last // 2, last}):
        yield from boxes(tensor.shape, start, min(tensor.numel, start + SAMPLE_NUMEL))


def _elements(tensor: Tensor, box: Box, files: OpenFiles) -> npt.NDArray[np.uint8]:
    """A box in C order, run by run."""
    width = DTYPE_BYTES[tensor.dtype]
    out = np.empty(math.prod(box[1]) * width, np.uint8)
    for copy in copies(Gather(tensor.views, box)):
        for number in range(copy.runs):
            start = (copy.source_start + number * copy.source_stride) * width
            into = out.data[(copy.target_start + number * copy.target_stride) * width :]
            for extent in cut(copy.storage, start, copy.run * width):
                read_at(files.get(extent.path)[0], into[: extent.nbytes], extent.offset, extent.path)
                into = into[extent.nbytes :]
    return out
