"""A checkpoint that has been found and read as far as its headers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ckpt2pt.core.index import Index, layer_numbers
from ckpt2pt.core.names import Rules
from ckpt2pt.core.stated import Statement
from ckpt2pt.errors import TopologyError, UsageError, ref
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.mindformers.flags import Flags
from ckpt2pt.formats.torch_dist.metadata import Item

OPTION = "the checkpoint's path"
"""What names the folder, in the user's words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is to be read of a checkpoint: one iteration, and the parallel sizes that it is said to have; None is as found.

    ``weights_alone`` leaves the optimizer of a Megatron checkpoint alone.  ``described`` asks for tensors without views where a
    format can tell types and shapes from a few files; :attr:`Checkpoint.locate` then finds those that are needed.
    """

    tensor: int | None = None
    pipeline: int | None = None
    iteration: int | None = None
    rules: Rules = Rules()  # noqa: RUF009 - frozen
    weights_alone: bool = False
    mindformers: Flags = Flags()  # noqa: RUF009 - frozen
    """What is said of the fused weights of a MindFormers checkpoint."""
    described: bool = False


class Locate(Protocol):
    """Reads the headers of the files that hold the parameters ``names``, None for all of ``index``."""

    def __call__(self, index: Index, names: Collection[str] | None, /) -> Index:
        """The same index, with the views of these.  Raises :class:`TopologyError` for other types or shapes than those described."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """``path`` is the folder of the chosen iteration, or of the ranks where one folder holds several iterations.

    ``iteration`` is None where nothing in the checkpoint states it; ``tensor`` and ``pipeline`` are the parallel sizes of
    the files.
    """

    path: Path
    format: str
    iteration: int | None
    tensor: int
    pipeline: int
    index: Index
    expert: int = 1
    """Expert parallel size of the run that wrote it."""
    warnings: tuple[str, ...] = ()
    """What may be wrong with it, in sentences."""
    template: Template | None = None
    """What a Megatron checkpoint holds that is no tensor of the model, by its first rank."""
    statement: Statement = Statement()  # noqa: RUF009 - frozen
    """What a MindSpore file states of optimizer and scheduler."""
    samples: int | None = None
    """Training samples consumed, None where nothing states them."""
    rounds: bool = True
    """Whether main parameters round to the weights: else Megatron-LM changes these in the first step that it makes."""
    files: Sequence[str] = ()
    """All files that hold tensors, where the views of some are not known."""
    locate: Locate | None = None
    """Gives the views of parameters by name, or of all; None where the index has them."""
    items: Mapping[str, Sequence[Item]] = field(default_factory=dict[str, Sequence["Item"]])
    """The archives inside each file of a distributed checkpoint, by its name."""


def agreed(asked: tuple[int | None, int | None], there: tuple[int, int], where: Path) -> tuple[int, int]:
    """Tensor and pipeline parallel size as they are there; :class:`TopologyError` where another one is asked for."""
    for what, one, other in zip(("tensor", "pipeline"), asked, there, strict=True):
        if one not in {None, other}:
            raise TopologyError(
                f"the {what} parallel size is {other}, not {one}",
                where=where,
                hint=f"give {other}: in a document a size that is left out is 1",
            )
    return there


def check_layers(
    checkpoint: Checkpoint, num_layers: int | None, noop: frozenset[int] | None, stated: object = None
) -> tuple[int, int]:
    """How many layers have parameters, and how many there are up to the last of these.

    Raises :class:`UsageError` for a number of layers that is neither, nor what is ``stated``, and for other no-op layers.
    """
    there = layer_numbers(checkpoint.index).keys()
    count, whole = len(there), 1 + max(there, default=-1)
    if num_layers not in {None, count, whole, stated}:
        raise UsageError(
            f"{ref('model.numLayers')} is {num_layers}, and the source has {count} layers"
            + (f", {whole} with its no-op layers" if whole > count else ""),
            where=checkpoint.path,
            hint=f"leave {ref('model.numLayers')} out, or give {count}",
            field="model.numLayers",
        )
    empty = frozenset(range(whole)) - there
    if noop is not None and (noop & there or empty - noop):
        raise UsageError(
            f"{ref('model.noopLayers')} is {_listed(noop)}, and the layers without parameters are {_listed(empty)}",
            where=checkpoint.path,
            hint=f"leave {ref('model.noopLayers')} out, or give {_listed(empty)}",
            field="model.noopLayers",
        )
    return count, whole


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(layers))) or "none"
