"""``pt_meta`` from any checkpoint that Megatron-LM 0.6 wrote of the same model; a run of one step is enough."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import cast

from ckpt2pt.core.buckets import Buffer
from ckpt2pt.core.layout import (
    BUCKET_NUMEL,
    BUCKET_NUMEL_A_RANK,
    BUSBW_BASE,
    COALESCED,
    MEGATRON_06,
    Parameter,
    Policy,
    bucket_numel,
    coalesce,
    find_bucket_numel,
    lay_out,
    weight_decay_groups,
)
from ckpt2pt.core.moves import MODEL_FILE, OPTIM_FILE, OPTIM_KINDS
from ckpt2pt.core.names import is_tied_head
from ckpt2pt.core.params import is_buffer
from ckpt2pt.core.progress import SILENCE, Advance, Portion, Reporter, no_progress
from ckpt2pt.errors import FormatError, InputError, TopologyError, ref
from ckpt2pt.formats.folders import iteration_folder
from ckpt2pt.formats.megatron.headers import MegatronRank, is_expert, rank_folders, read_rank
from ckpt2pt.formats.megatron.resume import TargetRun, Unmet, unmet
from ckpt2pt.formats.ptmeta.files import RankFiles
from ckpt2pt.formats.ptmeta.legacy import as_legacy, is_newer
from ckpt2pt.formats.ptmeta.metadata import data_parallel_size
from ckpt2pt.formats.ptmeta.missing import synthesize_entries
from ckpt2pt.formats.ptmeta.proof import check_copies, check_sizes, check_slices, check_views
from ckpt2pt.io.files import OpenFiles
from ckpt2pt.io.paths import status

_EMBEDDING = "language_model.embedding.word_embeddings.weight"
_HINT = "make pt_meta from a run of Megatron-LM 0.6 with --use-distributed-optimizer"
_TOGETHER = "make sure that both files are of one save, and complete"

SAMPLE_NUMEL = 1 << 10
"""Elements of each weight that are compared with their slice at least: files of two ranks or steps are distinguished by them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The buffers of a rank, chunk by chunk, and what proves them."""

    buffers: tuple[tuple[Buffer, ...], ...]
    bucket_numel: int | None
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """All ranks of a checkpoint.  ``with_maps`` is False for a run without the distributed optimizer.

    ``unmet`` is what keeps Megatron-LM from resuming with each rank's metadata; ``made`` are the parts of
    :data:`SYNTHESIZED` that the checkpoint did not hold.
    """

    ranks: tuple[RankFiles, ...]
    evidence: tuple[str, ...]
    with_maps: bool
    unmet: Mapping[tuple[int, int], tuple[Unmet, ...]]
    made: tuple[str, ...]


def capture(
    checkpoint: Path,
    *,
    target_data: int | None = None,
    bucket_size: int | None = None,
    compare: bool = True,
    synthesize: Collection[str] = (),
    allow: tuple[str, ...] = (),
    reporter: Reporter = SILENCE,
) -> Captured:
    """Compute every rank's metadata; ``checkpoint`` is a Megatron folder or one iteration of it.

    ``target_data`` is the data x context parallel size of the run to come (None: that of this one), ``bucket_size`` the
    elements of a bucket in a Megatron that was changed; ``compare`` reads every weight and compares it with its slice.
    ``synthesize`` are the parts of :data:`SYNTHESIZED` to be made where the checkpoint does not hold them.
    """
    ranks: list[RankFiles] = []
    evidence: list[str] = []
    broken: dict[tuple[int, int], tuple[Unmet, ...]] = {}
    made: dict[str, None] = {}
    with_maps = True
    folders = rank_folders(iteration_folder(checkpoint))
    totals = {rank: _read_nbytes(folder) for rank, folder in folders.items()}
    reporter.begin(totals, 0)
    for (tp, pp), folder in folders.items():
        portion = Portion(reporter, (tp, pp), totals[tp, pp])
        rank = read_rank(folder, allow=allow)
        with_maps = rank.template.args.get("use_distributed_optimizer") is True and with_maps
        at_most = None if compare else 0
        layout = (
            lay_out_rank(rank, pp, bucket_size=bucket_size, at_most=at_most, advance=portion.advance)
            if with_maps
            else None
        )
        buffers = layout.buffers if layout else ()
        if layout:
            evidence.append(f"tp {tp} pp {pp}: {layout.evidence}")
        rank = as_legacy(rank)
        files = rank_files(rank, tp, pp, buffers)
        if layout and target_data not in (None, data_parallel_size(rank.template)):
            again = lay_out_again(rank, pp, divisor=target_data, bucket_size=layout.bucket_numel)
            files = replace(files, buffers=again)
        found = unmet_of_rank(rank, folders, full=with_maps)
        parts = {one.synthesize for one in found}.intersection(synthesize)
        if parts:
            flat = [parameter for chunk in range(len(rank.chunks)) for parameter in _parameters(rank, chunk)]
            tree, storages = synthesize_entries(rank.template, parts, flat, tp=tp, pp=pp)
            template = replace(rank.template, tree=rank.template.tree | tree)
            files = replace(files, tree=template.tree, storages={**files.storages, **storages})
            found = unmet_of_rank(replace(rank, template=template), folders, full=with_maps)
            made |= dict.fromkeys(sorted(parts))
        broken[tp, pp] = found
        ranks.append(files)
        portion.end()
    return Captured(ranks=tuple(ranks), evidence=tuple(evidence), with_maps=with_maps, unmet=broken, made=tuple(made))


def _read_nbytes(folder: Path) -> int:
    """About what comparing reads: all weights, and of the optimizer's three kinds of buckets the float32 weights."""
    model, optim = (status(folder / name) for name in (MODEL_FILE, OPTIM_FILE))
    return (model.st_size if model else 0) + (optim.st_size // len(OPTIM_KINDS) if optim else 0)


def unmet_of_rank(
    rank: MegatronRank, ranks: Collection[tuple[int, int]], *, full: bool, checkpoint: bool = False
) -> tuple[Unmet, ...]:
    """What keeps Megatron-LM 0.6 from resuming with this rank's metadata; ``ranks`` are those of the whole checkpoint.

    With ``checkpoint``: from resuming from the rank as it is.
    """
    rank = as_legacy(rank)
    flat = [parameter for chunk in range(len(rank.chunks)) for parameter in _parameters(rank, chunk)]
    run = TargetRun(
        num_layers=None,
        tensor=1 + max(tp for tp, _ in ranks),
        pipeline=1 + max(pp for _, pp in ranks),
        virtual=len(rank.chunks),
        groups=weight_decay_groups(flat),
    )
    return unmet(rank.template, run, full=full, checkpoint=checkpoint)


def rank_files(rank: MegatronRank, tp: int, pp: int, buffers: tuple[tuple[Buffer, ...], ...]) -> RankFiles:
    """What ``pt_meta`` holds of a rank: that of Megatron-LM 0.6, also where a newer one wrote it."""
    if is_newer(rank):
        rank = as_legacy(rank)
        divisor = data_parallel_size(rank.template)
        buffers = lay_out_again(rank, pp, divisor=divisor, bucket_size=None) if buffers else ()
    virtual = len(rank.chunks) > 1
    return RankFiles(
        tp=tp,
        pp=pp,
        tree=rank.template.tree,
        path=rank.template.path,
        storages=rank.template.storages,
        buffers=buffers,
        names=tuple(
            tuple(f"{f'model{vpp}' if virtual else 'model'}.{name}" for name, _ in reversed(chunk))
            for vpp, chunk in enumerate(rank.chunks)
        ),
    )


def lay_out_rank(
    rank: MegatronRank,
    pp: int,
    *,
    bucket_size: int | None = None,
    at_most: int | None = None,
    advance: Advance = no_progress,
    files: OpenFiles | None = None,
) -> Layout:
    """Compute a rank's buffers by Megatron's rules and prove them with all that the checkpoint holds.

    ``at_most`` elements at the beginning, in the middle and at the end of each parameter are compared (-1: none).  Buffers that the file
    holds coalesced have one bucket each, without the padding of those that the run had.
    """
    prove = partial(_prove, rank, at_most=at_most, advance=advance, files=files)
    if rank.coalesced:
        return _lay_out_coalesced(rank, pp, prove, bucket_size=bucket_size)
    divisor = _divisor(rank)
    notes: list[str] = []
    if bucket_size is None and rank.buffers is not None and not _fits(rank, pp, divisor):
        bucket_size = _infer(rank, pp, divisor)
        if bucket_size:
            notes.append(f"buckets of {bucket_size} elements, by the header of distrib_optim.pt")
    buffers = lay_out_again(rank, pp, divisor=divisor, bucket_size=bucket_size)
    notes += prove(buffers)
    return Layout(buffers=buffers, bucket_numel=bucket_size, evidence="; ".join(notes))


def prove_given(
    rank: MegatronRank, maps: Sequence[Buffer], *, at_most: int | None, where: Path, files: OpenFiles | None = None
) -> Layout:
    """Buffers by param maps that somebody wrote, proved like computed ones; chunks without parameters have no map."""
    filled = [vpp for vpp, chunk in enumerate(rank.chunks) if chunk]
    if len(maps) != len(filled):
        raise FormatError(
            f"{len(maps)} param maps for {len(filled)} chunks of {rank.folder.name}",
            where=where,
            hint=f"copy all maps of the run, or leave {ref('metadata.path')} out to have them computed",
        )
    placed = dict(zip(filled, maps, strict=True))
    buffers = tuple((placed[vpp],) if vpp in placed else () for vpp in range(len(rank.chunks)))
    for vpp, buffer in placed.items():
        names = {name for name, _ in rank.chunks[vpp]}
        strange = sorted(names ^ {placement.name for placement in buffer.placements})
        if strange:
            raise FormatError(
                f"{strange[0]} is not in both the map and the model file of chunk {vpp}",
                where=where,
                hint=f"point {ref('metadata.path')} at the maps of this run, or leave it out to have them computed",
            )
        shapes = {name: weight.shape for name, weight in rank.chunks[vpp]}
        for placement in buffer.placements:
            if placement.shape != (there := shapes[placement.name]):
                what = f"{placement.name} has shape {[*placement.shape]} in the param map, {[*there]} in the model file"
                hint = f"point {ref('metadata.path')} at the maps of this run"
                raise TopologyError(what, where=where, hint=hint, field="metadata.path")
    notes = _prove(rank, buffers, at_most=at_most, files=files)
    return Layout(buffers=buffers, bucket_numel=None, evidence="; ".join(notes))


def _lay_out_coalesced(
    rank: MegatronRank, pp: int, prove: Callable[..., list[str]], *, bucket_size: int | None
) -> Layout:
    """The first layout of any release that has the sizes of the file and that the weights prove.

    Where all sizes are multiples of 64 there is one; else releases, buckets and data-parallel sizes differ in their gaps.
    """
    held = [bucket.numel for buffer in rank.buffers or () for bucket in buffer]
    divisor = _group_of_buffers(rank)
    tried: dict[tuple[tuple[Buffer, ...], ...], tuple[tuple[tuple[Buffer, ...], ...], Policy]] = {}
    totals: dict[str, None] = {}
    for policy in COALESCED:
        if rank.template.args.get("ddp_pad_buckets_for_high_nccl_busbw") is True:
            policy = replace(policy, base=BUSBW_BASE)
        for size in dict.fromkeys((bucket_size or _bucket_size(rank, divisor), None)):
            with suppress(InputError):  # Megatron stops at such a layout
                run = _buffers(rank, pp, divisor=divisor, size=size, policy=policy)
                joined = tuple(tuple(map(coalesce, chunk)) for chunk in run)
                sizes = [buffer.numel for chunk in joined for buffer in chunk]
                totals[" + ".join(map(str, sizes))] = None
                if sizes == held:
                    tried.setdefault(joined, (run, policy))
    if not tried:
        raise FormatError(
            f"{OPTIM_FILE} holds {' + '.join(map(str, held)) or 'no'} elements, and the parameters of the model file make "
            f"{' or '.join(totals) or 'a layout at which Megatron-LM stops'}",
            where=rank.folder,
            hint=_TOGETHER,
        )
    refused: FormatError | None = None
    for joined, (run, policy) in tried.items():
        views = _offsets_equal(rank, run)
        try:
            notes = prove(joined, views=views)
        except FormatError as error:
            refused = refused or error
        else:
            if len(tried) > 1:
                notes.append(f"laid out as by Megatron-LM {policy.releases}")
            return Layout(buffers=joined, bucket_numel=None, evidence="; ".join(notes))
    raise cast("FormatError", refused)


def _offsets_equal(rank: MegatronRank, run: Sequence[Sequence[Buffer]]) -> bool:
    """Whether the weights lie in the model file as in these buffers; the elements decide where they do not."""
    try:
        return all(
            check_views(buffer, weights, where=str(rank.folder))
            for chunk, weights in zip(run, rank.chunks, strict=True)
            for buffer in chunk
        )
    except FormatError:
        return False


def _prove(
    rank: MegatronRank,
    buffers: tuple[tuple[Buffer, ...], ...],
    *,
    views: bool | None = None,
    at_most: int | None,
    advance: Advance = no_progress,
    files: OpenFiles | None = None,
) -> list[str]:
    """What proves these buffers; ``views`` tells whether the weights lie as they should, None if that is to be found out."""
    stored = list(rank.buffers or ())
    flat = [(buffer, weights) for chunk, weights in zip(buffers, rank.chunks, strict=True) for buffer in chunk]
    notes: list[str] = []
    if rank.buffers is not None and len(stored) != len(flat):
        raise FormatError(
            f"distrib_optim.pt holds {len(stored)} buffers, the model makes {len(flat)}", where=rank.folder, hint=_HINT
        )
    if views is None:
        equal = [check_views(buffer, weights, where=str(rank.folder)) for buffer, weights in flat]
        views = all(equal)
    if views:
        notes.append("offsets equal those of the weights in the model file")
    if rank.buffers is None:
        return notes or ["computed from order, shapes and arguments; there is no distrib_optim.pt to compare with"]
    if not views and at_most == 0:
        at_most = SAMPLE_NUMEL  # without offsets to go by, only the values tell the order
    count = 0
    for (buffer, weights), buckets in zip(flat, stored, strict=True):
        check_sizes(buffer, buckets, where=str(rank.folder))
        if at_most is None or at_most > 0:
            where = str(rank.folder)
            count += check_slices(buffer, buckets, weights, where=where, at_most=at_most, advance=advance, files=files)
    compared = f"{count} elements of distrib_optim.pt equal their weights"
    return [*notes, compared if count else "sizes equal those of distrib_optim.pt"]


def prove_copies(rank: MegatronRank, *, at_most: int | None) -> str:
    """Compare the float32 copies of a run without the distributed optimizer, rounded, with the weights."""
    count = sum(
        check_copies(copies, weights, where=str(rank.folder), at_most=at_most)
        for copies, weights in zip(rank.copies or (), rank.chunks, strict=True)
    )
    return f"{count} elements of the optimizer's float32 copies equal their weights"


def _fits(rank: MegatronRank, pp: int, divisor: int) -> bool:
    """Whether Megatron's own number of elements for a bucket gives the sizes of the header."""
    try:
        buffers = lay_out_again(rank, pp, divisor=divisor, bucket_size=None)
    except InputError:  # Megatron stops at such a layout, so this one had another number
        return False
    computed = [[bucket.numel_unpadded for bucket in buffer.buckets] for chunk in buffers for buffer in chunk]
    return computed == [[bucket.numel_unpadded for bucket in buffer] for buffer in rank.buffers or ()]


def _infer(rank: MegatronRank, pp: int, divisor: int) -> int | None:
    """The bucket size of a changed Megatron; only the first chunk of the first stage has buckets that end by size."""
    if bucket_numel(overlap=_overlaps(rank), pp=pp, chunk=0) is None or not rank.buffers:
        return None
    parameters = _parameters(rank, 0)
    first = len({parameter.dtype for parameter in parameters})
    sizes = [[bucket.numel_unpadded for bucket in buffer] for buffer in rank.buffers[:first]]
    return find_bucket_numel(parameters, divisor=divisor, unpadded=sizes)


def lay_out_again(
    rank: MegatronRank, pp: int, *, divisor: int | None, bucket_size: int | None
) -> tuple[tuple[Buffer, ...], ...]:
    """The buffers of each chunk by the rules of Megatron-LM 0.6, for ``divisor`` data x context parallel ranks."""
    return _buffers(rank, pp, divisor=divisor or 1, size=bucket_size, policy=MEGATRON_06)


def _buffers(
    rank: MegatronRank, pp: int, *, divisor: int, size: int | None, policy: Policy
) -> tuple[tuple[Buffer, ...], ...]:
    """Those of each chunk; experts that have buffers of their own come last, with a data-parallel group of their own."""
    found: list[tuple[Buffer, ...]] = []
    for chunk in range(len(rank.chunks)):
        numel = bucket_numel(overlap=_overlaps(rank), pp=pp, chunk=chunk, size=size)
        parameters = _parameters(rank, chunk)
        kinds = [(parameters, divisor)]
        if rank.apart:
            experts = [one for one in parameters if is_expert(one.name)]
            dense = [one for one in parameters if not is_expert(one.name)] if not rank.lacks_dense else []
            kinds = [(dense, divisor), (experts, _group_of_experts(rank, divisor))]
        laid = (lay_out(listed, divisor=group, bucket_numel=numel, policy=policy) for listed, group in kinds)
        found.append(tuple(chain.from_iterable(laid)))
    return tuple(found)


def _group_of_experts(rank: MegatronRank, divisor: int) -> int:
    """The ranks that hold the same experts (megatron/core/parallel_state.py, expert data parallel group)."""
    args = rank.template.args
    tensor, expert = (
        size if type(size := args.get(name)) is int and size > 0 else 1
        for name in ("tensor_model_parallel_size", "expert_model_parallel_size")
    )
    own = args.get("expert_tensor_parallel_size")
    return max(1, divisor * tensor // (expert * (own if type(own) is int and own > 0 else tensor)))


def _group_of_buffers(rank: MegatronRank) -> int:
    """The data-parallel ranks that share a buffer, by the arguments of a run of 0.7 or newer; 1 where they do not say it.

    Megatron-LM core_v0.10.0, megatron/core/parallel_state.py: ``num_distributed_optimizer_instances`` groups hold it each.
    """
    instances = rank.template.args.get("num_distributed_optimizer_instances")
    group = data_parallel_size(rank.template) or 1
    return max(1, group // instances) if isinstance(instances, int) and instances > 0 else group


def _bucket_size(rank: MegatronRank, divisor: int) -> int:
    """Elements of a bucket by the arguments of a run of 0.7 or newer.

    Megatron-LM core_v0.12.0, megatron/training/training.py (``get_model``): ``--ddp-num-buckets``, ``--ddp-bucket-size``,
    else as many as pay for the latency of the group.
    """
    args = rank.template.args
    count, size = args.get("ddp_num_buckets"), args.get("ddp_bucket_size")
    if isinstance(count, int) and count > 0:
        return sum(ref.numel for chunk in rank.chunks for _, ref in chunk) // count
    return size if isinstance(size, int) and size > 0 else max(BUCKET_NUMEL, BUCKET_NUMEL_A_RANK * divisor)


def _parameters(rank: MegatronRank, chunk: int) -> list[Parameter]:
    """Parameters of a chunk; embeddings are shared when they are tied over a pipeline.

    Megatron-LM cac60ce4, megatron/model/module.py, ``initialize_word_embeddings``.
    """
    args = rank.template.args
    pipeline = args.get("pipeline_model_parallel_size")
    tied = args.get("untie_embeddings_and_output_weights") is False and isinstance(pipeline, int) and pipeline > 1
    return [
        Parameter(
            name=name,
            shape=ref.shape,
            dtype=ref.dtype,
            shared=tied and (is_tied_head(name) or name == _EMBEDDING),
        )
        for name, ref in rank.chunks[chunk]
        if not is_buffer(name)
    ]


def _overlaps(rank: MegatronRank) -> bool:
    return rank.template.args.get("overlap_grad_reduce") is True


def _divisor(rank: MegatronRank) -> int:
    found = data_parallel_size(rank.template)
    if found is None:
        value = rank.template.args.get("data_parallel_size")
        raise FormatError(f"the arguments say data_parallel_size {value!r}", where=rank.folder, hint=_HINT)
    return found
