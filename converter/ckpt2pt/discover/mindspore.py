"""A rank of a MindSpore result, whatever it is made from: the entries of its files, and the metadata beside them.

Megatron    tensors of the rank as float32, scalars of optimizer and scheduler, pt_meta     --ckpt.writer--> rank_R/network.ckpt
MindSpore   entries as they are, those of data-parallel shards joined                       --ckpt.writer--> the same
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckpt2pt.core.extents import DTYPE_BYTES, TensorRef
from ckpt2pt.core.fill import box_ref
from ckpt2pt.core.foldernames import rank_name
from ckpt2pt.core.layout import weight_decay_groups
from ckpt2pt.core.names import MOMENTS, prefix_remark
from ckpt2pt.core.params import EMBEDDING, HEAD
from ckpt2pt.core.reshard import RankTensors
from ckpt2pt.core.stated import decays
from ckpt2pt.core.tensor import Key, Role, Tensor, box_of, local_tensor
from ckpt2pt.core.topology import Rank
from ckpt2pt.discover.checkpoint import Discovered, Filled, kind_of, only_growing
from ckpt2pt.discover.request import MindSporeFiles, Request
from ckpt2pt.errors import InputError, ref
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.megatron.resume import Unmet
from ckpt2pt.formats.mindspore import read_scalar, statement_of
from ckpt2pt.formats.mindspore.entries import Entry, TensorBox, text_entry
from ckpt2pt.formats.mindspore.imported import check_rank, scalar_entries
from ckpt2pt.formats.mindspore.shards import check_covered, read_info
from ckpt2pt.formats.mindspore.writer import mindspore_file
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
class MindSporeRank(Filled):
    """One rank, ready to run: its files, which hold the same ``entries``, and small files of metadata by their place.

    ``evidence`` is what proves the layout of Megatron's buffers, ``copies`` are pairs of source tensors that must be equal.
    """

    entries: tuple[Entry, ...]
    metadata: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    evidence: str = ""
    remarks: tuple[str, ...] = ()
    copies: Sequence[tuple[TensorRef, TensorRef]] = ()

    def weights(self) -> Iterator[tuple[str, TensorRef]]:
        """What each parameter is made from, by its name."""
        for entry in self.entries:
            if entry.role == "param" and not isinstance(entry.source, bytes):
                yield entry.name, box_ref(self.index[entry.source.key], entry.source.box)


@only_growing()
def prepare_mindspore(request: Request, chosen: Discovered, rank: Rank) -> MindSporeRank:
    """Read a rank's headers, prove what they tell, and lay its files out."""
    made = (_of_megatron if request.from_megatron else _of_training)(request, chosen, rank)
    wanted, names = files_of(request), files_named(request, chosen, rank)
    files = [mindspore_file(wanted.format, name, made.entries, crc=wanted.crc) for name in names]
    return replace(made, files=files, slots=[file.slots() for file in files])


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


def role_of(entry: str) -> Role:
    """What an entry of a MindSpore file is: ``param`` or a moment."""
    return MOMENTS.get(entry.partition(".")[0], "param")


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
    """Everything as float32.  The metadata beside the ranks is that of Megatron's own, or of a source without a layout that which
    follows from its arguments.
    """
    evidence, metadata, remarks = "", dict[str, bytes](), tuple[str, ...]()
    place, relaid = META, request.source_topology is not None
    if request.source_format == "torch_dist":
        from ckpt2pt.discover.distributed import described, own_meta  # noqa: PLC0415 - for such sources

        meta, metadata = own_meta(request, rank), described(request, rank)
    else:
        from ckpt2pt.discover.stored import own_of  # noqa: PLC0415 - for the others

        own, place = own_of(request), META_OF_SOURCE if relaid else META
        stored, layout = own.headers((0, 0) if relaid else rank)
        meta, evidence = RankMeta(template=stored.template, chunks=()), layout.evidence
        remarks = (prefix_remark(stored.prefix),) if stored.prefix else ()
        if not relaid:
            check_rank(stored.chunks, request.topology, pp=rank[1], sizes=meta.sizes, where=str(stored.folder))
        for one in own.folders if relaid and rank == (0, 0) else () if relaid else (rank,):
            metadata |= own.described(one)
    held = kind_of(request).read(request, chosen, rank, meta).held
    entries = _asked_for(held, request)
    groups: list[dict[str, object]] = [{**group} for group in meta.template.groups]
    if relaid or request.source_format == "torch_dist":
        groups = _groups_in_order(groups, entries)
    template, iteration = meta.template, chosen.training_step.iteration
    numbers = scalar_entries(iteration, groups, template.scheduler, where=template.where)
    return MindSporeRank(
        source=str(request.source),
        index=held.index,
        files=(),
        slots=(),
        entries=(*entries, *numbers),
        copies=held.copies,
        remarks=(*held.remarks, *remarks),
        metadata={f"{place}/{name}": content for name, content in metadata.items()},
        evidence=evidence,
    )


def _asked_for(held: RankTensors, request: Request) -> tuple[Entry, ...]:
    contents = files_of(request).contents if request.full else ("param",)
    named = held.named(str(request.source)).items()
    return tuple(_entry(held, key, name, "float32") for name, key in named if key.role in contents)


def _entry(held: RankTensors, key: Key, name: str, dtype: str | None = None) -> Entry:
    """All that the rank holds of a tensor, in its own type unless ``dtype`` is given."""
    tensor = held.index[key]
    part = held.part(tensor)
    return Entry(name=name, dtype=dtype or tensor.dtype, shape=part.shape, source=TensorBox(key, part.box))


def _groups_in_order(groups: list[dict[str, object]], entries: Sequence[Entry]) -> list[dict[str, object]]:
    """The parameter groups in the order in which a rank's parameters need them; all of them where two are of one kind.

    With weight decay or without; embedding and output layer apart where these have a learning rate of their own
    (Megatron-LM 0.6, core/optimizer/__init__.py, ``_get_param_groups``).
    """
    by_kind = {(group.get("wd_mult") != 0, bool(group.get("is_decoupled_lr"))): group for group in groups}
    apart = any(decoupled for _, decoupled in by_kind)
    order = dict.fromkeys(
        (decayed, apart and entry.name.endswith((_EMBEDDING, _HEAD)))
        for entry in _parameters(entries)
        for decayed in weight_decay_groups([entry])
    )
    complete = len(by_kind) == len(groups) and order.keys() <= by_kind.keys()
    return [by_kind[kind] for kind in order] if complete else groups


def _parameters(entries: Sequence[Entry]) -> list[Entry]:
    """Each parameter once, whichever of its tensors are there."""
    return [entry for entry in entries if entry.role == entries[0].role]


# -------------------------------------------------------------------------------------------------------- from MindSpore


def _of_training(request: Request, chosen: Discovered, rank: Rank) -> MindSporeRank:
    for file in chosen.read_for(rank, request):
        if file.info:
            check_covered(read_info(file.info))
    meta = meta_of_training(request)
    held = kind_of(request).read(request, chosen, rank, meta).held
    named, remarks, copies = held.named(str(request.source)), held.remarks, held.copies
    every = {*named, *held.others}
    entries = [_entry(held, key, name) for name, key in named.items() if _is_kept(name, every, request)]
    others = {name: one for name, one in held.others.items() if _is_kept(name, every, request)}
    if request.source_topology:
        others, left_out = _of_other_layout(others, entries)
        remarks = (*remarks, *([_left_out(left_out)] if left_out else []))
        if meta.tied and request.topology.pipeline == 1:  # one stage needs no second copy of the embeddings
            heads = {one.name: named[one.name] for one in entries if named[one.name].name == HEAD}
            entries = [one for one in entries if one.name not in heads]
            copies = (*copies, *((held.ref(key._replace(name=EMBEDDING)), held.ref(key)) for key in heads.values()))
    index = dict(held.index)
    entries += _as_stored(others, index)
    return MindSporeRank(
        source=str(request.source),
        index=index,
        files=(),
        slots=(),
        entries=tuple(entries),
        remarks=remarks,
        copies=copies,
    )


def meta_of_training(request: Request) -> RankMeta:
    """What ``pt_meta`` says of the model; nothing where the layout does not change, as nothing of it is needed."""
    if request.source_topology is None or request.metadata is None:
        return RankMeta(template=Template(path=str(request.source), tree={}, storages={}), chunks=())
    return RankMeta(template=read_arguments(request.metadata, (0, 0), allow=request.rules.pickle_globals), chunks=())


def _is_kept(name: str, entries: Collection[str], request: Request) -> bool:
    if not request.full:
        return not name.startswith(_OPTIMIZER) and not _PROGRESS.fullmatch(name)
    is_scalar = role_of(name) == "param" and f"exp_avg.{name}" not in entries
    return is_scalar or role_of(name) in files_of(request).contents


def _of_other_layout(
    others: Mapping[str, TensorRef], entries: Sequence[Entry]
) -> tuple[dict[str, TensorRef], list[str]]:
    """What is no tensor of the model, with groups in the order that the rank's parameters need; and what cannot be cut anew.

    It is that of the source's first rank: numbers are the same on all ranks, states are not.
    """
    left_out = [name for name, one in others.items() if one.numel > 1 and one.dtype != "str"]
    kinds = {number: decays(group) for number, group in statement_of(others).groups.items()}
    order, numbers = weight_decay_groups(_parameters(entries)), dict[str, int]()
    if None not in kinds.values() and len(set(kinds.values())) == len(kinds) and set(order) <= set(kinds.values()):
        numbers = {str(number): order.index(kind) for number, kind in kinds.items() if kind in order}
    found: dict[str, TensorRef] = {}
    for name, one in others.items():
        group = _OF_GROUP.fullmatch(name)
        if name in left_out or (group and numbers and group[2] not in numbers):
            continue
        found[f"{group[1]}{numbers[group[2]]}" if group and numbers else name] = one
    return found, left_out


def _left_out(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"left out, as each rank has its own and the layout changes: {', '.join(names[:4])}{more}"


def _as_stored(others: Mapping[str, TensorRef], index: dict[Key, Tensor]) -> Iterator[Entry]:
    """Entries as they are; those that are no texts join the ``index``."""
    for name, one in others.items():
        if one.dtype == "str":
            yield text_entry(name, str(read_scalar(one)))
        elif one.dtype in DTYPE_BYTES and one.dtype != "complex64":
            head, _, rest = name.partition(".")
            key = Key(MOMENTS[head], rest) if head in MOMENTS else Key("param", name)
            index[key] = tensor = local_tensor(key, one.dtype, one.shape, one.extents)
            yield Entry(name, one.dtype, one.shape, TensorBox(key, box_of(tensor.views[0])))
        else:
            raise InputError(
                f"{one} is of a type that mindspore does not load",
                where=one.extents[0].path if one.extents else name,
                hint=f"choose another {ref('target.format')}: a conversion to Megatron leaves such entries out",
            )
