"""What ``pt_meta`` states of the layout: degrees that are left out are taken from it, and a wrong one is answered with it.

args_tp01_pp003.pt               tensor and pipeline, by the names of the files
args.num_layers, args.virtual_*  layers and model chunks, by the arguments of the first of them
names in maps and name lists     no-op layers: slots without parameters
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt2pt.ckpt.ranks import rank_folder
from ckpt2pt.errors import TopologyError, UsageError
from ckpt2pt.inputs import refused
from ckpt2pt.mapping.names import local_layer
from ckpt2pt.mapping.topology import MAX_RANKS, Topology
from ckpt2pt.meta import METADATA, chunk_names, data_parallel_size, read_arguments

_ARGUMENTS = re.compile(r"args_tp(\d{2,6})_pp(\d{3,6})\.pt")
_MEND = (
    "set spec.parallelism and spec.model (--tp-size --pp-size --vpp-size --num-layers --noop --stage-list) to those of the "
    "Megatron run that wrote pt_meta; on a command line they may be left out, but for --stage-list"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stated:
    """The layout of the Megatron run that wrote a ``pt_meta``; None is what it does not say.

    ``group`` is its data x context parallel size.
    """

    folder: Path
    tensor: int
    pipeline: int
    virtual: int | None
    num_layers: int | None
    group: int | None

    def __str__(self) -> str:
        return f"pt_meta was written with {_layout(self.tensor, self.pipeline, self.virtual, self.num_layers)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The layout as far as it was given; None is to be learnt."""

    num_layers: int | None = None
    tensor: int | None = None
    pipeline: int | None = None
    virtual: int | None = None
    data: int | None = None
    context: int | None = None
    noop: frozenset[int] | None = None
    layers_per_stage: tuple[int, ...] | None = None

    @property
    def complete(self) -> bool:
        """Whether nothing is left to learn."""
        group = self.data is not None or self.context is not None
        return group and None not in (self.num_layers, self.tensor, self.pipeline, self.virtual, self.noop)


def read_stated(folder: Path, *, allow: tuple[str, ...] = ()) -> Stated | None:
    """What the files of a ``pt_meta`` say; None where there is no folder or no ``args_tp*_pp*.pt`` in it."""
    try:
        names = [found for path in folder.iterdir() if (found := _ARGUMENTS.fullmatch(path.name))]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise refused(error, folder, METADATA) from error
    if not names:
        return None
    first = min((int(name[1]), int(name[2])) for name in names)
    template = read_arguments(folder, first, allow=allow)
    layers = template.args.get("num_layers")
    key = "virtual_pipeline_model_parallel_size"
    virtual: object = (
        template.args.get(key) or 1 if key in template.args else len(chunk_names(folder, first, allow=allow))
    )
    return Stated(
        folder=folder,
        tensor=1 + max(int(name[1]) for name in names),
        pipeline=1 + max(int(name[2]) for name in names),
        virtual=virtual if type(virtual) is int and virtual > 0 else None,
        num_layers=layers if type(layers) is int and layers > 0 else None,
        group=data_parallel_size(template),
    )


def learn(given: Given, *, source: Path, metadata: Path, allow: tuple[str, ...] = ()) -> Topology:
    """The layout that was given, completed by what ``metadata`` states.

    Where it states nothing, degrees are 1 and no layer is a no-op; only the layers have to be known.
    """
    stated = None if given.complete else read_stated(metadata, allow=allow)
    layers = given.num_layers if given.num_layers is not None or stated is None else stated.num_layers
    if layers is None:
        raise UsageError(
            "--num-layers is missing" + (", and pt_meta does not say it" if stated else ""),
            where=f"the command line and {metadata}",
            mend="give --num-layers, no-op layers included, or check --param-map-path",
        )
    with answering(metadata, allow):
        topology = Topology(
            num_layers=layers,
            tensor=_first(given.tensor, stated.tensor if stated else None),
            pipeline=_first(given.pipeline, stated.pipeline if stated else None),
            virtual=_first(given.virtual, stated.virtual if stated else None),
            data=_first(given.data),
            context=_first(given.context),
            noop=given.noop or frozenset(),
            layers_per_stage=given.layers_per_stage,
        )
    if stated is None:
        return topology
    check(topology, stated)
    if given.noop is None and stated.num_layers == topology.num_layers:
        topology = replace(topology, noop=_empty_layers(topology, metadata, allow))
    if given.data is None and given.context is None:
        topology = _with_group(topology, stated.group or 1, source)
    return topology


def _first(*degrees: int | None) -> int:
    return next((degree for degree in degrees if degree is not None), 1)


def check(topology: Topology, stated: Stated) -> None:
    """Refuse a layout whose ranks are not those that ``pt_meta`` has files for."""
    if (topology.tensor, topology.pipeline) != (stated.tensor, stated.pipeline):
        asked = _layout(topology.tensor, topology.pipeline, topology.virtual, topology.num_layers)
        raise TopologyError(f"{stated}, the options ask for {asked}", where=stated.folder, mend=_MEND)


@contextmanager
def answering(metadata: Path, allow: tuple[str, ...] = ()) -> Generator[None]:
    """Errors about the layout say what ``pt_meta`` states of it."""
    try:
        yield
    except (TopologyError, UsageError) as error:
        stated = read_stated(metadata, allow=allow)
        if stated is None:
            raise
        raise type(error)(f"{error.what}; {stated}", where=error.where, mend=error.mend) from error


def _layout(tensor: int, pipeline: int, virtual: int | None, layers: int | None) -> str:
    chunks = f", vpp {virtual}" if virtual and virtual > 1 else ""
    return f"tp {tensor}, pp {pipeline}{chunks}" + (f", {layers} layer{'s' if layers > 1 else ''}" if layers else "")


def _empty_layers(topology: Topology, metadata: Path, allow: tuple[str, ...]) -> frozenset[int]:
    """Layers without parameters; none where a chunk has no map at all, so that nobody can tell which one it is."""
    empty: set[int] = set()
    for pp in range(topology.pipeline):
        chunks = chunk_names(metadata, (0, pp), allow=allow)
        if len(chunks) != topology.virtual:
            return frozenset()
        for vpp, names in enumerate(chunks):
            found = {local_layer(name) for name in names}
            empty.update(layer for local, layer in enumerate(topology.slots(pp, vpp)) if local not in found)
    return frozenset(empty) if len(empty) < topology.num_layers else frozenset()


def _with_group(topology: Topology, group: int, source: Path) -> Topology:
    """The data-parallel size of the Megatron run, where the source has the folders of such a training."""
    if topology.tensor * topology.pipeline * group > MAX_RANKS:
        return topology
    wide = replace(topology, data=group, noop=topology.noop | topology.ignored_noop)
    first = {wide.source_rank(*rank) for rank in wide.ranks()}
    if first == {topology.source_rank(*rank) for rank in topology.ranks()}:
        first = {rank for key in wide.ranks() for rank in wide.group(*key)}
    return wide if all(rank_folder(source, rank).is_dir() for rank in first) else topology
