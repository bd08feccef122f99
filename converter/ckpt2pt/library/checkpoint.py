"""Read a checkpoint of any known format as what it means: named global tensors.

with ckpt2pt.open("ms_ckpt", tp=2, pp=4) as checkpoint:
    checkpoint["decoder.layers.7.mlp.linear_fc1.weight"]          the whole weight as numpy, whatever it was cut into
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ckpt2pt.core.extents import DTYPE_BYTES, Box, Extent, Stored
from ckpt2pt.core.index import find
from ckpt2pt.core.moves import cut
from ckpt2pt.core.names import Rules, nearest
from ckpt2pt.core.tensor import ROLES, Key, Role, Tensor, boxes
from ckpt2pt.errors import MissingInputError, UsageError
from ckpt2pt.formats.checkpoint import Checkpoint as Found
from ckpt2pt.formats.mindformers.flags import Flags
from ckpt2pt.formats.registry import read
from ckpt2pt.kube.conversion.spelling import in_python

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a tensor as a file holds it: the box from ``origin`` on, of ``shape`` elements along ``TensorInfo.axes``.

    ``extents`` are the stretches of files (path, first byte, bytes) from its first element to its last.
    """

    origin: tuple[int, ...]
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """What is known of a tensor without reading it.

    ``shape`` is that of the global tensor, as :meth:`Checkpoint.get` gives it.  ``axes`` is the same number of elements in
    the same order, with an axis for gate and up where a weight holds both, (2, ffn, hidden) for (2 * ffn, hidden): what a
    tensor-parallel rank holds is then one box.  ``parts`` hold each element once; ``replicas`` counts further copies.
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

    It behaves as a mapping from the names of weights to arrays, each of which is read when it is asked for.  One object is
    for one thread.
    """

    def __init__(self, found: Found) -> None:
        from ckpt2pt.verification.gather import Files  # noqa: PLC0415 - numpy, not needed to report wrong paths

        self._found = found
        self._files = Files()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files.  What headers tell stays usable; reading raises :class:`UsageError`."""
        self._files.close()
        self._closed = True

    @property
    def path(self) -> Path:
        """The folder of the iteration that was opened."""
        return self._found.path

    @property
    def format(self) -> str:
        """``mindspore``, ``megatron`` or ``torch_dist``."""
        return self._found.format

    @property
    def iteration(self) -> int | None:
        """The training step of the checkpoint, None where nothing in it states one."""
        return self._found.iteration

    @property
    def tp(self) -> int:
        """The tensor parallel size of the files."""
        return self._found.tensor

    @property
    def pp(self) -> int:
        """The pipeline parallel size of the files."""
        return self._found.pipeline

    @property
    def warnings(self) -> tuple[str, ...]:
        """What may be wrong with the checkpoint, in sentences: files of two ranks that hold the same weights."""
        return self._found.warnings

    def keys(self, role: Role = "param") -> tuple[str, ...]:
        """Names of the parameters that have this role, in Megatron core's spelling and in the order of the model.

        Layers have their global numbers.

        A float32 weight without a main parameter beside it is its own, and a weight that is there as a main parameter alone
        is given in float32.
        """
        _check_role(role)
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

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """The whole weight; :meth:`get` for moments and slices."""
        return self.get(name)

    @in_python("open")
    def get(
        self,
        name: str,
        role: Role = "param",
        *,
        slice: slice | tuple[slice, ...] = (),  # noqa: A002 - as numpy says it
    ) -> npt.NDArray[Any]:
        """One global tensor, or a ``slice`` of it: one for each of its leading axes, as ``numpy.s_[0:1024, :]`` makes them.

        Elements are as stored, but that numpy has no bfloat16: such come as float32, which holds each of them exactly.
        Beside the array at most 8 MiB are held in memory.  Raises :class:`MissingInputError` for a name or a role that is not there.
        """
        if self._closed:
            raise UsageError("the checkpoint is closed", where=self.path, hint="read inside the with statement")
        import numpy as np  # noqa: PLC0415

        from ckpt2pt.verification.gather import gathered, width  # noqa: PLC0415

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
        _check_role(role)
        found = find(self._found.index, Key(role, name))
        if found is None:
            names = self.keys(role)
            near = nearest(name, names)
            raise MissingInputError(
                f"there is no {Key(role, name)}" + (f"; the nearest is {near}" if near else ""),
                where=self.path,
                hint=f"keys({role!r}) lists what is there" if names else f"the checkpoint holds no {role} at all",
            )
        return found


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise UsageError(f"no role {role}", where="the role of a tensor", hint=f"give one of {', '.join(ROLES)}")


def _part(tensor: Tensor, view: Stored) -> Part:
    size = DTYPE_BYTES[tensor.dtype]
    reach = 1 + sum((length - 1) * stride for length, stride in zip(view.shape, view.strides, strict=True))
    extents = cut(view.storage, view.first * size, reach * size if view.numel else 0)
    return Part(origin=view.origin, shape=view.shape, extents=extents)


def _ranges(tensor: Tensor, slices: tuple[slice, ...]) -> list[range]:
    """What of each axis is asked for."""
    if len(slices) > len(tensor.fused) or {type(one) for one in slices} - {slice}:
        raise UsageError(
            f"{slices} is not a slice for each of {len(tensor.fused)} axes, or of the first of them",
            where=tensor.key.name,
            hint="give slices such as numpy.s_[0:1024, 0:8]; take a single row out of the array",
        )
    found = [range(length)[one] for length, one in zip(tensor.fused, slices, strict=False)]
    if any(one.step != 1 for one in found):
        raise UsageError(
            "a slice has another step than 1", where=tensor.key.name, hint="read all of it, and thin the array out"
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


@in_python("open")
def open_checkpoint(
    path: str | Path,
    *,
    tp: int | None = None,
    pp: int | None = None,
    iteration: int | None = None,
    source_format: str = "auto",
    rules: Rules | None = None,
    mindformers_config: str | Path | None = None,
    use_interleaved_weight_layout_mlp: bool | None = None,
    use_contiguous_weight_layout_attention: bool | None = None,
) -> Checkpoint:
    """Open a checkpoint by its headers: a MindSpore training output, a Megatron-LM 0.6 checkpoint, or a distributed one of any Megatron-LM.

    ``tp`` and ``pp`` are the parallel sizes of the training that wrote it; they may be left out where the checkpoint tells
    them, which is nearly always.  ``iteration`` chooses one of several; by default the one that the tracker names, or the
    newest that all ranks have.  ``source_format`` is ``auto``, ``mindspore``, ``megatron``, ``torch_dist``, ``mindformers``
    or ``huggingface``.
    ``rules`` are names of parameters of your own.  The last three say of a checkpoint of MindFormers what its files do not
    (docs/mindformers.md).

    Raises :class:`~ckpt2pt.errors.MissingInputError` for what is not there, :class:`~ckpt2pt.errors.InputError` for what is
    wrong, :class:`~ckpt2pt.errors.UsageError` for parallel sizes that have to be given.
    """
    return Checkpoint(
        read(
            Path(path),
            source_format=source_format,
            tensor=tp,
            pipeline=pp,
            iteration=iteration,
            rules=rules,
            mindformers=Flags.of(
                mindformers_config, use_interleaved_weight_layout_mlp, use_contiguous_weight_layout_attention
            ),
        )
    )
