"""Read a checkpoint of any known format as what it means: named global tensors.

with ckpt2pt.open("ms_ckpt", tp=2, pp=4) as checkpoint:
    checkpoint["decoder.layers.7.mlp.linear_fc1.weight"]          the whole weight as numpy, whatever it was cut into
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ckpt2pt.core.index import find
from ckpt2pt.core.tensor import Key, Role, Tensor, boxes
from ckpt2pt.errors import MissingInputError, UsageError
from ckpt2pt.formats.checkpoint import Checkpoint as Found
from ckpt2pt.formats.registry import read
from ckpt2pt.mapping.names import Rules, nearest
from ckpt2pt.plan.moves import cut
from ckpt2pt.tensors import DTYPE_BYTES, Box, Extent, Stored

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ROLES: tuple[Role, ...] = ("param", "main_param", "exp_avg", "exp_avg_sq")
"""A weight, its float32 main parameter, and the two moments of Adam."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a tensor: the box from ``origin`` on, of ``shape`` elements along its natural axes.

    ``extents`` are the stretches of files (path, first byte, bytes) from its first element to its last.
    """

    origin: tuple[int, ...]
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """What is known of a tensor without reading it: ``shape`` is global, ``axes`` the natural axes that ``parts`` count in.

    ``replicas`` counts pieces that have to hold the same bytes as others.
    """

    name: str
    role: Role
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    parts: tuple[Part, ...]
    replicas: int


class Checkpoint:
    """An open checkpoint: headers have been read, payload has not.  Use it as a context manager, or :meth:`close` it.

    ``format`` is ``mindspore`` or ``megatron``; ``iteration`` is None where the checkpoint does not state it.
    """

    def __init__(self, found: Found) -> None:
        from ckpt2pt.verify.leaves import Files  # noqa: PLC0415 - numpy, not needed to be told of wrong paths

        self._found = found
        self._files = Files()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; headers stay usable."""
        self._files.close()

    @property
    def path(self) -> Path:
        """The folder of the iteration that was opened."""
        return self._found.path

    @property
    def format(self) -> str:
        """``mindspore`` or ``megatron``."""
        return self._found.format

    @property
    def iteration(self) -> int | None:
        """The training step of the checkpoint."""
        return self._found.iteration

    @property
    def parallel(self) -> Mapping[str, int]:
        """``tensor`` and ``pipeline`` parallel sizes of the files."""
        return {"tensor": self._found.tensor, "pipeline": self._found.pipeline}

    def keys(self, role: Role = "param") -> tuple[str, ...]:
        """Names of the parameters that have this role, in Megatron core's spelling with global numbers of layers."""
        names = dict.fromkeys(key.name for key in self._found.index)
        return tuple(name for name in names if find(self._found.index, Key(role, name)) is not None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and find(self._found.index, Key("param", name)) is not None

    def info(self, name: str, role: Role = "param") -> TensorInfo:
        """Where a tensor lies, and of which type and shape it is.  Raises :class:`MissingInputError` for an unknown name."""
        tensor = self._tensor(name, role)
        return TensorInfo(
            name=name,
            role=role,
            dtype=tensor.dtype,
            shape=tensor.fused,
            axes=tensor.shape,
            parts=tuple(_part(tensor, view) for view in tensor.views),
            replicas=len(tensor.replicas),
        )

    def __getitem__(self, name: str) -> npt.NDArray[np.generic]:
        """The whole weight; :meth:`get` for moments and slices."""
        return self.get(name)

    def get(
        self,
        name: str,
        role: Role = "param",
        *,
        slice: slice | tuple[slice, ...] = (),  # noqa: A002 - as numpy says it
    ) -> npt.NDArray[np.generic]:
        """One global tensor, or a ``slice`` of it along its leading axes, with step 1; only what is asked for is read.

        numpy has no bfloat16: such elements come as float32, which holds each of them exactly.
        """
        import numpy as np  # noqa: PLC0415

        from ckpt2pt.verify.gather import gathered  # noqa: PLC0415
        from ckpt2pt.verify.leaves import width  # noqa: PLC0415

        tensor = self._tensor(name, role)
        wanted = _ranges(tensor, slice if isinstance(slice, tuple) else (slice,))
        elements = gathered(tensor)
        out = np.empty([len(one) for one in wanted], f"<u{width(tensor.dtype)}")
        row = 0
        for box in _natural(tensor, wanted):
            rows = out.size and math.prod(box[1]) * len(wanted[0]) // out.size
            elements.read(self._files, box, out[row : row + rows].reshape(box[1]))
            row += rows
        if tensor.dtype == "bfloat16":
            return (out.astype("<u4") << 16).view("<f4")
        return out.view({"bool": "?"}.get(tensor.dtype, tensor.dtype))

    def _tensor(self, name: str, role: Role) -> Tensor:
        found = find(self._found.index, Key(role, name))
        if found is None:
            names = self.keys(role)
            near = nearest(name, names)
            raise MissingInputError(
                f"there is no {Key(role, name)}" + (f"; the nearest is {near}" if near else ""),
                where=self.path,
                mend="checkpoint.keys(role) lists what is there" if names else f"the checkpoint holds no {role} at all",
            )
        return found


def _part(tensor: Tensor, view: Stored) -> Part:
    size = DTYPE_BYTES[tensor.dtype]
    reach = 1 + sum((length - 1) * stride for length, stride in zip(view.shape, view.strides, strict=True))
    extents = cut(view.storage, view.first * size, reach * size if view.numel else 0)
    return Part(origin=view.origin, shape=view.shape, extents=extents)


def _ranges(tensor: Tensor, slices: tuple[slice, ...]) -> list[range]:
    """What of each axis is asked for."""
    if len(slices) > len(tensor.fused):
        raise UsageError(
            f"{len(slices)} slices for {len(tensor.fused)} axes",
            where=tensor.key.name,
            mend="give one for each axis at most",
        )
    found = [range(length)[one] for length, one in zip(tensor.fused, slices, strict=False)]
    if any(one.step != 1 for one in found):
        raise UsageError(
            "a slice has a step", where=tensor.key.name, mend="leave the step out, and thin the array out instead"
        )
    return found + [range(length) for length in tensor.fused[len(slices) :]]


def _natural(tensor: Tensor, wanted: list[range]) -> Iterator[Box]:
    """The same in natural axes, of which the first few make up the first that users know."""
    if not wanted or not all(wanted):
        yield from [((), ())] if not wanted else []
        return
    leading = len(tensor.shape) - len(tensor.fused) + 1
    rest = tuple(one.start for one in wanted[1:]), tuple(len(one) for one in wanted[1:])
    for origin, shape in boxes(tensor.shape[:leading], wanted[0].start, wanted[0].stop):
        yield (*origin, *rest[0]), (*shape, *rest[1])


def open_checkpoint(
    path: str | Path,
    *,
    tp: int | None = None,
    pp: int | None = None,
    iteration: int | None = None,
    source_format: str = "auto",
    rules: Rules | None = None,
) -> Checkpoint:
    """Open a checkpoint by its headers.

    ``tp`` and ``pp`` are the parallel sizes of the files; a Megatron checkpoint states them, and so does a ``pt_meta`` beside
    the ranks.  ``iteration`` chooses one of several; by default the one that the tracker names, or the newest that all ranks
    have.  ``rules`` are names of parameters of your own.
    """
    return Checkpoint(
        read(
            Path(path),
            source_format=source_format,
            tensor=tp,
            pipeline=pp,
            iteration=iteration,
            rules=rules,
        )
    )
