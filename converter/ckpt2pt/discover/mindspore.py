"""A rank of a MindSpore result, whatever it is made from: the entries of its files, and the metadata beside them.

Megatron    tensors of the rank as float32, scalars of optimizer and scheduler, pt_meta     --ckpt.writer--> rank_R/network.ckpt
MindSpore   entries as they are, those of data-parallel shards joined                       --ckpt.writer--> the same
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckpt2pt.core.extents import DTYPE_BYTES, TensorRef
from ckpt2pt.core.foldernames import rank_name
from ckpt2pt.core.layout import weight_decay_groups
from ckpt2pt.core.moves import Move
from ckpt2pt.core.names import MOMENTS, prefix_remark
from ckpt2pt.core.reshard import RankTensors
from ckpt2pt.core.stated import decays
from ckpt2pt.core.topology import Rank
from ckpt2pt.discover.checkpoint import Discovered, kind_of
from ckpt2pt.discover.request import MindSporeFiles, Request
from ckpt2pt.errors import InputError, ref
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.megatron.resume import Unmet
from ckpt2pt.formats.mindspore import read_scalar, statement_of
from ckpt2pt.formats.mindspore.entries import Entry, text_entry
from ckpt2pt.formats.mindspore.imported import check_rank, scalar_entries
from ckpt2pt.formats.mindspore.shards import check_covered, read_info
from ckpt2pt.formats.mindspore.writer import MindSporeFile, mindspore_file
from ckpt2pt.formats.ptmeta.metadata import RankMeta, read_arguments

META, META_OF_SOURCE = "pt_meta", "source_pt_meta"
"""Where the metadata goes below the MindSpore folder; the second where the ranks beside it are of another layout."""

_OPTIMIZER = (*(f"{moment}." for moment in MOMENTS), "max_exp_avg_sq.", "moments.")
# What the reference leaves out with the moments, but by whole names: it looks for "step" and "epoch" anywhere in them.
_PROGRESS = re.compile(
    r"(?:learning_rate|weight_decay)(?:_group_\d+)?|epoch_num|step_num|num_steps|state_step|global_step|default_generator"
    r"|(?:lr_warmup|lr_decay|wd_incr)_steps|(?:current|last_overflow)_iterator_step"
)
_EMBEDDING, _HEAD = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"
_OF_GROUP = re.compile(r"(.+_group_)(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class MindSporeRank:
    """One rank, ready to run: its files, which hold the same ``entries``, and small files of metadata by their place.

    ``evidence`` is what proves the layout of Megatron's buffers, ``copies`` are pairs of source tensors that must be equal.
    """

    files: tuple[MindSporeFile, ...]
    entries: tuple[Entry, ...]
    metadata: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    evidence: str = ""
    remarks: tuple[str, ...] = ()
    copies: Sequence[tuple[TensorRef, TensorRef]] = ()

    @property
    def source_bytes(self) -> int:
        """Bytes to read."""
        return sum(entry.source.nbytes for entry in self.entries if isinstance(entry.source, TensorRef))

    def moves(self) -> tuple[Move, ...]:
        """Every element read once and written to each file."""
        first, *others = (file.moves() for file in self.files)
        return tuple(
            replace(move, sinks=tuple(sink for one in (move, *same) for sink in one.sinks))
            for move, *same in zip(first, *others, strict=True)
        )


def prepare_mindspore(request: Request, chosen: Discovered, rank: Rank) -> MindSporeRank:
    """Read a rank's headers, prove what they tell, and lay its files out."""
    readers = {"megatron": _of_megatron, "torch_dist": _of_distributed}
    read = readers.get(request.source_format or "", _of_training)
    made, wanted = read(request, chosen, rank), files_of(request)
    names = files_named(request, chosen, rank)
    return replace(
        made, files=tuple(mindspore_file(wanted.format, name, made.entries, crc=wanted.crc) for name in names)
    )


def files_of(request: Request) -> MindSporeFiles:
    """How the files are to be written."""
    return request.files or MindSporeFiles()


def files_named(request: Request, chosen: Discovered, rank: Rank) -> list[str]:
    """The files of a rank from the target's folder on: ranks are counted in the order tp-cp-dp-pp."""
    wanted, layout = files_of(request), request.topology
    if wanted.merged:
        from ckpt2pt.discover.merged import merged_names  # noqa: PLC0415 - for combine

        return merged_names(request.source, chosen.files[rank], wanted)
    group = layout.group(*rank) if wanted.copies else layout.group(*rank)[:1]
    return [f"{rank_name(number)}/{wanted.prefix}.{wanted.format}" for number in group]


def role_of(entry: str) -> str:
    """What an entry of a MindSpore file is: ``param`` or a moment."""
    return next((moment for moment in MOMENTS if entry.startswith(f"{moment}.")), "param")


# --------------------------------------------------------------------------------------------------------- from Megatron


def unmet_by(request: Request, stages: Sequence[int]) -> dict[Rank, tuple[Unmet, ...]]:
    """What keeps Megatron-LM from resuming with the metadata of a Megatron source, by the ranks that are read for these stages."""
    if request.source_format != "megatron":
        return {}
    from ckpt2pt.discover.stored import own_of  # noqa: PLC0415
    from ckpt2pt.formats.ptmeta.capture import unmet_of_rank  # noqa: PLC0415 - for Megatron sources

    own = own_of(request)
    ranks = [rank for rank in own.folders if request.source_topology or rank[1] in stages]
    found: dict[Rank, tuple[Unmet, ...]] = {}
    for rank in ranks:
        stored, _ = own.headers(rank)
        found[rank] = unmet_of_rank(stored, own.folders, full=stored.buffers is not None)
    return found


def _of_megatron(request: Request, chosen: Discovered, rank: Rank) -> MindSporeRank:
    from ckpt2pt.discover.stored import own_of  # noqa: PLC0415 - for Megatron sources

    own, relaid = own_of(request), request.source_topology is not None
    stored, layout = own.headers((0, 0) if relaid else rank)
    meta = RankMeta(template=stored.template, chunks=())
    if not relaid:
        check_rank(stored.chunks, request.topology, pp=rank[1], sizes=meta.sizes, where=str(stored.folder))
    held = kind_of(request).read(request, chosen, rank, meta).held
    tensors = _asked_for(held, request)
    groups: list[dict[str, object]] = [{**group} for group in stored.template.groups]
    if relaid:
        groups = _groups_in_order(groups, tensors)
    metadata: dict[str, bytes] = {}
    for one in own.folders if relaid and rank == (0, 0) else () if relaid else (rank,):
        metadata |= own.described(one)
    return MindSporeRank(
        files=(),
        entries=(
            *(_entry(name, tensor, "float32") for name, tensor in tensors.items()),
            *scalar_entries(
                chosen.training_step.iteration, groups, stored.template.scheduler, where=stored.template.path
            ),
        ),
        metadata={f"{META_OF_SOURCE if relaid else META}/{name}": content for name, content in metadata.items()},
        evidence=layout.evidence,
        remarks=(*held.remarks, *([prefix_remark(stored.prefix)] if stored.prefix else [])),
        copies=held.copies,
    )


def _of_distributed(request: Request, chosen: Discovered, rank: Rank) -> MindSporeRank:
    """From whole tensors; the metadata beside the ranks is that of their own layout, which follows from the arguments."""
    from ckpt2pt.discover.distributed import described, own_meta  # noqa: PLC0415 - for such sources

    meta = own_meta(request, rank)
    held = kind_of(request).read(request, chosen, rank, meta).held
    tensors = _asked_for(held, request)
    groups = _groups_in_order([{**group} for group in meta.template.groups], tensors)
    iteration, scheduler = chosen.training_step.iteration, meta.template.scheduler
    return MindSporeRank(
        files=(),
        entries=(
            *(_entry(name, tensor, "float32") for name, tensor in tensors.items()),
            *scalar_entries(iteration, groups, scheduler, where=str(request.source)),
        ),
        metadata={f"{META}/{name}": content for name, content in described(request, rank).items()},
        remarks=held.remarks,
        copies=held.copies,
    )


def _asked_for(held: RankTensors, request: Request) -> dict[str, TensorRef]:
    contents = files_of(request).contents
    entries = held.entries(str(request.source)).items()
    return {name: one for name, one in entries if not request.full or role_of(name) in contents}


def _entry(name: str, tensor: TensorRef, dtype: str) -> Entry:
    return Entry(name=name, dtype=dtype, shape=tensor.shape, source=tensor, role=role_of(name))


def _groups_in_order(groups: list[dict[str, object]], tensors: Mapping[str, TensorRef]) -> list[dict[str, object]]:
    """The parameter groups in the order in which a rank's parameters need them; all of them where two are of one kind.

    With weight decay or without; embedding and output layer apart where these have a learning rate of their own
    (Megatron-LM 0.6, core/optimizer/__init__.py, ``_get_param_groups``).
    """
    by_kind = {(group.get("wd_mult") != 0, bool(group.get("is_decoupled_lr"))): group for group in groups}
    apart = any(decoupled for _, decoupled in by_kind)
    order = dict.fromkeys(
        (decayed, apart and name.endswith((_EMBEDDING, _HEAD)))
        for name, tensor in _parameters(tensors).items()
        for decayed in weight_decay_groups([tensor])
    )
    complete = len(by_kind) == len(groups) and order.keys() <= by_kind.keys()
    return [by_kind[kind] for kind in order] if complete else groups


def _parameters(tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """Each parameter once, whichever of its tensors are there."""
    first = role_of(next(iter(tensors), ""))
    return {name: tensor for name, tensor in tensors.items() if role_of(name) == first}


# -------------------------------------------------------------------------------------------------------- from MindSpore


def _of_training(request: Request, chosen: Discovered, rank: Rank) -> MindSporeRank:
    for file in chosen.read_for(rank, request):
        if file.info:
            check_covered(read_info(file.info))
    meta = meta_of_training(request)
    held = kind_of(request).read(request, chosen, rank, meta).held
    tensors = held.entries(str(request.source))
    every = {**tensors, **held.others}
    entries = {name: one for name, one in every.items() if _is_kept(name, every, request)}
    remarks = held.remarks
    copies = held.copies
    if request.source_topology:
        entries, left_out = _of_other_layout(entries, tensors)
        remarks = (*remarks, *([_left_out(left_out)] if left_out else []))
        if meta.tied and request.topology.pipeline == 1:  # one stage needs no second copy of the embeddings
            heads = {name: entries.pop(name) for name in [*entries] if name.removeprefix(f"{role_of(name)}.") == _HEAD}
            copies = (*copies, *((entries[name.replace(_HEAD, _EMBEDDING)], head) for name, head in heads.items()))
    return MindSporeRank(files=(), entries=tuple(_as_stored(entries)), remarks=remarks, copies=copies)


def meta_of_training(request: Request) -> RankMeta:
    """What ``pt_meta`` says of the model; nothing where the layout does not change, as nothing of it is needed."""
    if request.source_topology is None or request.metadata is None:
        return RankMeta(template=Template(path=str(request.source), tree={}, storages={}), chunks=())
    return RankMeta(template=read_arguments(request.metadata, (0, 0), allow=request.rules.pickle_globals), chunks=())


def _is_kept(name: str, entries: Mapping[str, TensorRef], request: Request) -> bool:
    if not request.full:
        return not name.startswith(_OPTIMIZER) and not _PROGRESS.fullmatch(name)
    is_scalar = role_of(name) == "param" and f"exp_avg.{name}" not in entries
    return is_scalar or role_of(name) in files_of(request).contents


def _of_other_layout(entries: Mapping[str, TensorRef], held: Collection[str]) -> tuple[dict[str, TensorRef], list[str]]:
    """The entries with their groups in the order that the rank's parameters need; and what cannot be cut anew.

    What is no tensor of the model is that of the source's first rank: numbers are the same on all ranks, states are not.
    """
    tensors = {name: one for name, one in entries.items() if name in held}
    others = {name: one for name, one in entries.items() if name not in held}
    left_out = [name for name, one in others.items() if one.numel > 1 and one.dtype != "str"]
    kinds = {number: decays(group) for number, group in statement_of(others).groups.items()}
    order, numbers = weight_decay_groups(_parameters(tensors).values()), dict[str, int]()
    if None not in kinds.values() and len(set(kinds.values())) == len(kinds) and set(order) <= set(kinds.values()):
        numbers = {str(number): order.index(kind) for number, kind in kinds.items() if kind in order}
    found = dict(tensors)
    for name, one in others.items():
        group = _OF_GROUP.fullmatch(name)
        if name in left_out or (group and numbers and group[2] not in numbers):
            continue
        found[f"{group[1]}{numbers[group[2]]}" if group and numbers else name] = one
    return found, left_out


def _left_out(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"left out, as each rank has its own and the layout changes: {', '.join(names[:4])}{more}"


def _as_stored(index: Mapping[str, TensorRef]) -> Iterator[Entry]:
    for name, tensor in index.items():
        if tensor.dtype == "str":
            yield text_entry(name, str(read_scalar(tensor)))
        elif tensor.dtype in DTYPE_BYTES and tensor.dtype != "complex64":
            yield _entry(name, tensor, tensor.dtype)
        else:
            raise InputError(
                f"{tensor} is of a type that mindspore does not load",
                where=tensor.extents[0].path if tensor.extents else name,
                hint=f"choose another {ref('target.format')}: a conversion to Megatron leaves such entries out",
            )
