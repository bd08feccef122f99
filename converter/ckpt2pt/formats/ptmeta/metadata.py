"""The ``pt_meta`` folder: what a Megatron run of the same model says of itself.

args_tp00_pp003.pt                          -> Template   (arguments, scheduler, RNG; never executed)
param_map_buffer0_dp0tp0pp3vpp1.json        -> Buffer     (order, buckets, padding)
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import cast

from ckpt2pt.core.buckets import Buffer, ChunkMap, parse_param_map
from ckpt2pt.core.layout import weight_decay_groups
from ckpt2pt.core.names import bare, local_layer
from ckpt2pt.core.topology import MAX_RANKS, Topology
from ckpt2pt.errors import FormatError, MissingInputError, TopologyError, TryAgainError, UsageError, aside, ref, refs
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.megatron.resume import TargetRun, Unmet, unmet
from ckpt2pt.formats.mindspore.ranks import rank_folder
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.pickles import read_pickle
from ckpt2pt.formats.torchfile.trees import Global
from ckpt2pt.io.inputs import read_whole
from ckpt2pt.io.jsontext import parse_json
from ckpt2pt.io.paths import is_file, is_folder, is_there, listing, status

_Described = tuple[tuple[str, ...], Buffer | None]
"""A chunk's names in registration order, and its buffer when there is a map."""
_Maps = Mapping[tuple[int, int], Sequence[tuple[int, int, Path]]]
"""(tp, pp) -> (buffer, chunk, path) of each param map."""
_MAX_NAMES = 200_000
METADATA = ref("metadata.path")
WRITING = ".ckpt2pt/pt_meta.writing.json"
"""There while the folder is being written: its files may be of two runs."""
_HINT = f"point {METADATA} at the pt_meta written for this model and these degrees"

ARGUMENTS = re.compile(r"args_tp(\d{2,6})_pp(\d{3,6})\.pt", re.ASCII)
"""(tp, pp)"""
PARAM_MAP = re.compile(r"param_map_buffer(\d+)_dp0tp(0|[1-9]\d*)pp(0|[1-9]\d*)vpp(\d+)\.json", re.ASCII)
"""(buffer, tp, pp, model chunk)"""
_LAYOUT_HINT = f"set {refs('parallelism', 'model')} to those of the Megatron run that wrote pt_meta"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMeta:
    """The metadata of one (tp, pp)."""

    template: Template
    chunks: tuple[ChunkMap, ...]

    @property
    def sizes(self) -> dict[str, int | bool]:
        """The integer arguments: hidden_size, num_attention_heads, padded_vocab_size, ..."""
        return {name: value for name, value in self.template.args.items() if isinstance(value, int)}

    @property
    def params_dtype(self) -> str:
        """The model's parameter type: args.params_dtype, bfloat16 if it does not say."""
        value = self.template.args.get("params_dtype")
        return value.name if isinstance(value, Global) else "bfloat16"

    @property
    def tied(self) -> bool:
        """True when embedding and output layer share their weights."""
        return self.template.args.get("untie_embeddings_and_output_weights") is False

    def unmet(self, topology: Topology, *, full: bool, checkpoint: bool = False) -> tuple[Unmet, ...]:
        """What keeps Megatron-LM 0.6 from loading a checkpoint made with this metadata, or whose template this is."""
        buffers = [chunk.buffer for chunk in self.chunks]
        placed = [p for buffer in buffers if buffer for p in reversed(buffer.placements)]
        run = TargetRun(
            num_layers=topology.num_layers,
            tensor=topology.tensor,
            pipeline=topology.pipeline,
            virtual=topology.virtual,
            groups=weight_decay_groups(placed) if all(buffers) else None,
        )
        return unmet(self.template, run, full=full, checkpoint=checkpoint)


def read_rank_meta(
    folder: Path, topology: Topology, *, tp: int, pp: int, target_data: int | None = None, allow: tuple[str, ...] = ()
) -> RankMeta:
    """Read and prove the metadata of one rank.

    ``target_data`` is the data x context size of the Megatron run to come; None takes it from the arguments.
    """
    template = read_arguments(folder, (tp, pp), allow=allow)
    maps = param_map_files(folder, tp, pp)
    divisor = target_data or data_parallel_size(template)
    if maps:
        buffers = [_param_map(path, divisor) for path in maps]
        order: list[_Described] = [(tuple(p.name for p in reversed(buffer.placements)), buffer) for buffer in buffers]
    else:
        order = [(names, None) for names in _name_lists(template)]
    return RankMeta(
        template=template,
        chunks=_assign(order, topology, pp, where=str(folder)),
    )


def read_arguments(folder: Path, rank: tuple[int, int], *, allow: tuple[str, ...] = ()) -> Template:
    """The template of one (tp, pp) alone."""
    if not is_folder(folder, METADATA):
        raise MissingInputError("the metadata folder is not there", where=folder, hint=_HINT)
    return read_template(_arguments_file(folder, *rank), allow=allow)


def chunk_names(folder: Path, rank: tuple[int, int], *, allow: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The parameters of each chunk that the metadata of one rank describes, in no order; nothing is proved."""
    found: list[tuple[str, ...]] = []
    for path in param_map_files(folder, *rank):
        document = _load_json(path)
        found.append(tuple(map(bare, cast("dict[str, object]", document) if isinstance(document, dict) else ())))
    return found or _name_lists(read_arguments(folder, rank, allow=allow))


def require(folder: Path, *, source: Path, target: Path) -> None:
    """Refuse a folder without metadata, with the command that would make it."""
    if is_there(folder / WRITING, METADATA):
        raise TryAgainError(
            "the metadata is being written, or a run that wrote it was killed",
            where=folder,
            hint="run the same ckpt2pt pt-meta again: it completes the folder",
        )
    if listing(folder, "args_tp*_pp*.pt", METADATA):
        return
    checkpoint = next((path.parents[2] for path in listing(target, "*/mp_rank_*/model_optim_rng.pt")), None)
    captured = f"ckpt2pt pt-meta --megatron-path {checkpoint or 'MEGATRON'} --param-map-path {folder}"
    described = f"ckpt2pt pt-meta --description FILE --ms-path {source} --param-map-path {folder}"
    if checkpoint:
        hint = f"there is a Megatron checkpoint; if it is of the same model and cut, run: {captured}"
    else:
        hint = (
            f"with any checkpoint of the same model and cut that Megatron wrote (one step is enough), run: {captured}; "
            f"without one, describe Megatron's arguments (YAML or the training script), and run: {described}"
        )
    what = (
        "there is no args_tp*_pp*.pt in the metadata folder"
        if is_folder(folder)
        else "the metadata folder is not there"
    )
    raise MissingInputError(what, where=folder, hint=hint)


def assumed(folder: Path) -> dict[str, object]:
    """What the metadata rests on besides what was read: ``assumed`` of ``origin.json`` (ckpt2pt.formats.ptmeta.files)."""
    if not is_file(folder / "origin.json", METADATA):
        return {}
    document = _load_json(folder / "origin.json")
    found = cast("dict[str, object]", document).get("assumed") if isinstance(document, dict) else None
    return cast("dict[str, object]", found) if isinstance(found, dict) else {}


def metadata_files(folder: Path, *, tp: int, pp: int) -> tuple[Path, ...]:
    """The files that describe one rank: its arguments, then its param maps chunk by chunk."""
    return (_arguments_file(folder, tp, pp), *param_map_files(folder, tp, pp))


def _arguments_file(folder: Path, tp: int, pp: int) -> Path:
    return folder / f"args_tp{tp:02d}_pp{pp:03d}.pt"


def read_param_maps(folder: Path, *, tp: int, pp: int, divisor: int | None) -> tuple[Buffer, ...]:
    """The buffers of one rank, chunk by chunk, as the maps in ``folder`` describe them."""
    return tuple(_param_map(path, divisor) for path in param_map_files(folder, tp, pp))


def _param_map(path: Path, divisor: int | None) -> Buffer:
    return parse_param_map(_load_json(path), where=str(path), divisor=divisor)


def data_parallel_size(template: Template) -> int | None:
    """Ranks that share the optimizer's buffers in the run that wrote the template: data x context."""
    data, context = template.args.get("data_parallel_size"), template.args.get("context_parallel_size", 1)
    return data * context if isinstance(data, int) and isinstance(context, int) and data * context > 0 else None


def read_template(path: Path, *, allow: tuple[str, ...] = ()) -> Template:
    """Read an ``args_*.pt`` without executing it; whatever torch or numpy wrote it."""
    seen = status(path, METADATA)
    return _template(path, allow, seen and (seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns))


@lru_cache(1)  # parts of a run ask for one rank in turn; those of many ranks would not fit into memory
def _template(path: Path, allow: tuple[str, ...], _: tuple[int, ...] | None) -> Template:
    archive = Archive.open(path, METADATA)
    tree = read_pickle(archive.pickle, where=str(path), allow=allow)
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise FormatError("the file does not hold a dictionary with text keys", where=path, hint=_HINT)
    return Template(path=str(path), tree=cast("dict[str, object]", tree), storages=dict(archive.storages))  # type: ignore[arg-type]


def _param_maps(folder: Path) -> _Maps:
    """The param maps in a folder.  Only data-parallel rank 0's are read: all ranks write the same."""
    seen = status(folder, METADATA)
    if seen is None:
        raise MissingInputError("the folder of param maps is not there", where=folder, hint=_HINT)
    return _listed_maps(folder, (seen.st_dev, seen.st_ino, seen.st_mtime_ns, seen.st_ctime_ns))


@lru_cache(1)
def _listed_maps(folder: Path, _: tuple[int, ...]) -> _Maps:
    """Each rank in turn asks for its own; listing the folder for each would take the square of their number."""
    found: dict[tuple[int, int], list[tuple[int, int, Path]]] = {}
    for path in listing(folder, option=METADATA):
        if match := PARAM_MAP.fullmatch(path.name):
            buffer, tp, pp, chunk = map(int, match.groups())
            found.setdefault((tp, pp), []).append((buffer, chunk, path))
    return found


def param_map_files(folder: Path, tp: int, pp: int) -> list[Path]:
    """Maps of one rank in the order of its chunks."""
    found = sorted(_param_maps(folder).get((tp, pp), ()))
    more = sorted(path.name for buffer, _, path in found if buffer)
    if more:
        raise FormatError(
            f"a second buffer: {more[0]} (parameters of several types in one chunk)",
            where=folder,
            hint=f"convert weights alone{aside('mode')}; the optimizer of such a model is not supported",
        )
    if [chunk for _, chunk, _ in found] != list(range(len(found))):
        raise FormatError(
            f"param maps of tp {tp} pp {pp} are numbered vpp {[chunk for _, chunk, _ in found]}, not 0, 1, 2, ...",
            where=folder,
            hint="copy all of them; a run that was restarted in one folder numbers on, so start with an empty one",
        )
    return [path for _, _, path in found]


def _name_lists(template: Template) -> list[tuple[str, ...]]:
    """``param_name_list`` of a params-only pt_meta: for each chunk the names in buffer order."""
    lists = template.tree.get("param_name_list")
    if lists is None:
        raise MissingInputError(
            "there is neither a param map (param_map_buffer0_*.json) nor a param_name_list in the args file",
            where=template.where,
            hint=_HINT,
        )
    if not isinstance(lists, list) or not all(isinstance(names, list) for names in lists):
        raise FormatError("param_name_list is not a list of lists", where=template.where, hint=_HINT)
    if sum(len(names) for names in cast("list[list[object]]", lists)) > _MAX_NAMES:  # lists may be shared
        raise FormatError(f"param_name_list holds more than {_MAX_NAMES} names", where=template.where, hint=_HINT)
    found: list[tuple[str, ...]] = []
    for names in cast("list[list[object]]", lists):
        if not all(isinstance(name, str) for name in names) or len(set(map(str, names))) != len(names):
            raise FormatError(
                "param_name_list holds something else than distinct names", where=template.where, hint=_HINT
            )
        found.append(tuple(bare(str(name)) for name in reversed(names)))
    return found


def _assign(order: list[_Described], topology: Topology, pp: int, *, where: str) -> tuple[ChunkMap, ...]:
    """Give each map its chunk.  A chunk of no-op layers alone has no buffer, and the maps are numbered without it."""
    filled = topology.filled_chunks(pp)
    if len(order) == topology.virtual:
        chunks = [(vpp, item) for vpp, item in enumerate(order) if item[0]]
    elif len(order) == len(filled):
        chunks = list(zip(filled, order, strict=True))
    else:
        raise TopologyError(
            f"{len(order)} model chunks are described for stage {pp}, the options ask for {len(filled)}",
            where=where,
            hint=f"set {ref('parallelism.virtualPipeline')} to that of the run that wrote pt_meta",
            field="parallelism.virtualPipeline",
        )
    return tuple(ChunkMap(vpp=vpp, names=names, buffer=buffer) for vpp, (names, buffer) in chunks)


def _load_json(path: Path) -> object:
    try:
        return parse_json(read_whole(path, METADATA))
    except ValueError as error:
        raise FormatError(f"not a JSON document: {error}", where=path, hint=_HINT) from error


# ------------------------------------------------------------------------------------------------------------ the layout


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
    names = [found for path in listing(folder, option=METADATA) if (found := ARGUMENTS.fullmatch(path.name))]
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


def learn(given: Given, *, source: Path, metadata: Path, target: Path, allow: tuple[str, ...] = ()) -> Topology:
    """The layout that was given, completed by what ``metadata`` states.

    Where it states nothing, degrees are 1 and no layer is a no-op; only the layers have to be known.
    """
    stated = None if given.complete else read_stated(metadata, allow=allow)
    layers = given.num_layers if given.num_layers is not None or stated is None else stated.num_layers
    if layers is None:
        require(metadata, source=source, target=target)
        raise UsageError(
            f"{ref('model.numLayers')} is missing, and pt_meta does not say it",
            where=f"{ref('spec')} and {metadata}",
            hint=f"give {ref('model.numLayers')}, no-op layers included, or check {METADATA}",
            field="model.numLayers",
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
        made = (
            f"ckpt2pt pt-meta --from-pt-meta {stated.folder} --param-map-path NEW "
            f"--target-tp-size {topology.tensor} --target-pp-size {topology.pipeline}"
        )
        hint = f"{_LAYOUT_HINT}; for another layout than that of pt_meta make metadata of it: {made}"
        raise TopologyError(f"{stated}, the options ask for {asked}", where=stated.folder, hint=hint)


@contextmanager
def answering(metadata: Path, allow: tuple[str, ...] = ()) -> Generator[None]:
    """Errors about the layout say what ``pt_meta`` states of it."""
    try:
        yield
    except (TopologyError, UsageError) as error:
        stated = read_stated(metadata, allow=allow)
        if stated is None:
            raise
        raise type(error)(f"{error.what}; {stated}", where=error.where, hint=error.hint, field=error.field) from error


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
    return wide if all(is_folder(rank_folder(source, rank), ref("source.path")) for rank in first) else topology
