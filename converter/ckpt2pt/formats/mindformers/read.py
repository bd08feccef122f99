"""A checkpoint of MindFormers as global tensors.

metadata.json, safetensors headers --metadata--> parts of each stored tensor --layouts--> views of core's tensors
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ckpt2pt.core.extents import Shape, Stored, TensorRef, View
from ckpt2pt.core.foldernames import mindformers_iteration_of
from ckpt2pt.core.index import Index, ordered
from ckpt2pt.core.params import is_buffer
from ckpt2pt.core.tensor import Key, Role, Tensor, check_coverage, dense_strides
from ckpt2pt.errors import CoverageError, FormatError, MissingInputError, aside
from ckpt2pt.formats.checkpoint import Checkpoint, Selection, agreed
from ckpt2pt.formats.mindformers.flags import CONTIGUOUS, INTERLEAVED, Said, check_sizes, read_flags
from ckpt2pt.formats.mindformers.folder import ADAPTER, METADATA, Common, files_of, iteration_folder, read_common
from ckpt2pt.formats.mindformers.layouts import IGNORED, Layouts, gated, groups_of, interleavable, same_in_both
from ckpt2pt.formats.mindformers.legacy import find_file, is_legacy
from ckpt2pt.formats.mindformers.metadata import Entry, read_metadata
from ckpt2pt.formats.mindformers.regions import Parts
from ckpt2pt.formats.mindspore.safetensors import index_safetensors
from ckpt2pt.formats.rounding import check_rounding
from ckpt2pt.io.inputs import InputFile
from ckpt2pt.io.paths import is_file

_PREFIXES: Mapping[str, Role] = {"main_param.": "main_param", "adam_m.": "exp_avg", "adam_v.": "exp_avg_sq"}
_HINT = "copy the whole iteration again from where it was written"
_EMBEDDING = "embedding."


class Whole(NamedTuple):
    """A stored tensor: its parts, and copies of parts that other ranks hold."""

    dtype: str
    shape: Shape
    parts: tuple[Stored, ...]
    replicas: tuple[Stored, ...] = ()


@dataclass(frozen=True, slots=True)
class Saved:
    """What the files of an iteration hold, by name; ``sizes`` are tensor, pipeline and expert parallel size of the training."""

    folder: Path
    tensors: Mapping[str, Whole]
    common: Common
    sizes: tuple[int, int, int] = (1, 1, 1)
    unexpected: tuple[str, ...] = ()


def open_mindformers(path: Path, wanted: Selection) -> Checkpoint:
    """Read the headers of one iteration: that of the tracker unless ``wanted`` names another.

    Raises :class:`UsageError` where the order of rows of a fused weight matters and nothing says it, :class:`CoverageError` for
    parts that leave gaps or overlap, :class:`MissingInputError` for files that are not there.
    """
    saved = read_saved(path, wanted.iteration, weights_alone=wanted.weights_alone)
    folder, common, rounds = saved.folder, saved.common, True
    agreed((wanted.tensor, wanted.pipeline), saved.sizes[:2], folder)
    index, remarks = index_of(saved, read_flags(wanted.mindformers), weights_alone=wanted.weights_alone)
    try:
        check_rounding(index, str(folder))
    except FormatError as error:
        rounds = False
        remarks = (*remarks, f"{error.what}: Megatron-LM makes the weights anew from them in its first step")
    if common.unhealthy:
        remarks = (*remarks, "the training marked this checkpoint as unhealthy (ckpt_status 1)")
    if saved.unexpected:
        remarks = (*remarks, f"{', '.join(saved.unexpected[:6])} hold no part of the checkpoint")
    tensor, pipeline, expert = saved.sizes
    return Checkpoint(
        path=folder,
        format="mindformers",
        iteration=mindformers_iteration_of(folder.name) if common.iteration is None else common.iteration,
        tensor=tensor,
        pipeline=pipeline,
        expert=expert,
        index=index,
        warnings=remarks,
        samples=common.samples,
        rounds=rounds,
    )


def read_saved(path: Path, iteration: int | None = None, *, weights_alone: bool = False) -> Saved:
    """Read the headers of all files of an iteration, but for those of the optimizer where ``weights_alone`` are wanted.

    By default it is that of the tracker, or in the older form the newest.
    """
    if is_legacy(path):
        _, header, common = find_file(path, iteration)
        held = {name: ref for name, ref in header.items() if not (weights_alone and name.startswith(tuple(_PREFIXES)))}
        return Saved(path, {name: _whole(ref) for name, ref in held.items()}, common)
    folder = iteration_folder(path, iteration)
    if is_file(folder / ADAPTER, InputFile.option):
        raise FormatError(
            f"it holds the weights of an adapter (LoRA) alone ({ADAPTER})",
            where=folder,
            hint="merge the adapter into its base model with MindFormers, and convert that",
        )
    there = files_of(folder)
    names = [name for name, (kind, _) in there.items() if kind == "model" or not weights_alone]
    entries = read_metadata(folder)
    if entries is None:
        return _of_one_rank(folder, names, there)
    if weights_alone:
        optimizer = {name for name, (kind, _) in there.items() if kind == "opt"}
        entries = {
            name: entry
            for name, entry in entries.items()
            if not name.startswith(tuple(_PREFIXES)) and not optimizer.intersection(entry.chunks[0].files)
        }
    listed = {file for entry in entries.values() for chunk in entry.chunks for file in chunk.files}
    lost = sorted(listed - there.keys())
    if lost:
        raise MissingInputError(f"{lost[0]} is not there, which {METADATA} names", where=folder, hint=_HINT)
    headers = {name: index_safetensors(folder / name) for name in names if name in listed}
    tensors = {name: _joined(name, entry, headers, folder) for name, entry in entries.items()}
    for file, refs in headers.items():
        other = next((ref for name, ref in refs.items() if name not in entries and ref.numel > 1), None)
        if other:
            raise CoverageError(f"{file} holds {other}, which {METADATA} does not name", where=folder, hint=_HINT)
    unexpected = tuple(name for name in names if name not in listed)
    return Saved(folder, tensors, read_common(folder), _sizes(entries), unexpected)


def _of_one_rank(folder: Path, names: Sequence[str], there: Mapping[str, tuple[str, int]]) -> Saved:
    """Files of a training on one rank, which has no ``metadata.json``; those of more ranks cannot be distinguished."""
    several = next((name for name in names if there[name][1] > 1), None)
    kinds = [kind for kind, _ in (there[name] for name in names)]
    if several or len(set(kinds)) != len(kinds):
        raise MissingInputError(
            f"{METADATA} is not there, which says what the files of several ranks hold ({several or names[-1]})",
            where=folder,
            hint=_HINT,
        )
    tensors: dict[str, Whole] = {}
    for name in names:
        for key, ref in index_safetensors(folder / name).items():
            if key in tensors:
                raise CoverageError(f"{key} is in two files", where=folder / name, hint=_HINT)
            tensors[key] = _whole(ref)
    return Saved(folder, tensors, read_common(folder))


def _whole(ref: TensorRef) -> Whole:
    return Whole(ref.dtype, ref.shape, (_view((0,) * len(ref.shape), ref),))


def _view(origin: Shape, ref: TensorRef) -> Stored:
    return View(origin, ref.shape, dense_strides(ref.shape), 0, ref.extents)


def _joined(name: str, entry: Entry, headers: Mapping[str, Mapping[str, TensorRef]], folder: Path) -> Whole:
    parts: list[Stored] = []
    replicas: list[Stored] = []
    for chunk in entry.chunks:
        for number, file in enumerate(chunk.files):
            ref = headers.get(file, {}).get(name)
            if ref is None or (ref.dtype, ref.shape) != (entry.dtype, chunk.shape):
                found = "is not there" if ref is None else f"is {ref.dtype}{list(ref.shape)}"
                raise CoverageError(
                    f"{name} {found}, and {METADATA} says {entry.dtype}{list(chunk.shape)}",
                    where=folder / file,
                    hint=_HINT,
                )
            (replicas if number else parts).append(_view(chunk.origin, ref))
    return Whole(entry.dtype, entry.shape, tuple(parts), tuple(replicas))


def _sizes(entries: Mapping[str, Entry]) -> tuple[int, int, int]:
    """Parallel sizes of the training, as far as they are seen: what cuts the columns of a row-parallel layer, stages, experts."""
    tensor = max(
        (
            entry.fragments[1]
            for name, entry in entries.items()
            if name.endswith(".linear_proj.weight") and len(entry.fragments) == 2
        ),
        default=1,
    )
    stages: list[set[int]] = []
    for ranks in {entry.ranks for entry in entries.values() if entry.ranks}:
        shared = [
            stage for stage in stages if not stage.isdisjoint(ranks)
        ]  # a mesh of experts may have fewer of a stage
        stages = [stage for stage in stages if stage not in shared] + [set(ranks).union(*shared)]
    experts = max((entry.mesh.get("ep", 1) for entry in entries.values()), default=1)
    return tensor, max(1, len(stages)), experts


def _role(name: str) -> tuple[Role, str]:
    for prefix, role in _PREFIXES.items():
        if name.startswith(prefix):
            return role, name.removeprefix(prefix)
    return "param", name


def index_of(saved: Saved, said: Said, *, weights_alone: bool = False) -> tuple[Index, tuple[str, ...]]:
    """The global tensors, and remarks on what was said of them."""
    where = str(saved.folder)
    roles = {name: _role(name) for name in saved.tensors}
    shapes = {
        name: whole.shape
        for name, whole in saved.tensors.items()
        if roles[name][0] == "param" and not name.endswith(IGNORED) and not _is_number(name, whole)
    }
    layouts, remarks = _layouts(saved, said, shapes)
    found: dict[Key, Tensor] = {}
    for stored, whole in saved.tensors.items():
        role, name = roles[stored]
        if name not in shapes:
            if not _is_number(stored, whole) and not name.endswith(IGNORED):
                raise CoverageError(f"{stored} is there, and no weight {name}", where=where, hint=_HINT)
            continue
        if role == "param" and "." in name and not name.startswith((_EMBEDDING, "decoder.", "output_layer.", "mtp.")):
            raise FormatError(
                f"{name} is neither a parameter of a GPT model nor state of AdamW",
                where=where,
                hint=f"convert weights alone{aside('mode')}, if it is state of another optimizer",
            )
        if whole.shape != shapes[name]:
            raise CoverageError(
                f"{stored} has the shape {list(whole.shape)}, its weight {list(shapes[name])}", where=where, hint=_HINT
            )
        parts, replicas = Parts(whole.parts), Parts(whole.replicas)
        for fused in layouts.of(name):
            key = Key(role, fused.name)
            if key in found:
                raise CoverageError(f"{key} is there by two names, of which one is {stored}", where=where, hint=_HINT)
            views, copies = (tuple(one.views(fused.regions)) for one in (parts, replicas))
            found[key] = Tensor(key, whole.dtype, fused.shape, fused.fused, views, copies)
            check_coverage(found[key], where)
    if not weights_alone:
        _check_roles(found, where)
    return ordered(found, where, partial=True), remarks


def _is_number(name: str, whole: Whole) -> bool:
    """Whether it is a counter of the training or of its optimizer (``global_step``, ``learning_rate``)."""
    return "." not in name and math.prod(whole.shape) == 1


def _layouts(saved: Saved, said: Said, shapes: Mapping[str, Shape]) -> tuple[Layouts, tuple[str, ...]]:
    where, remarks = str(saved.folder), list[str]()
    pynative = any(
        name.startswith("main_param.") or (whole.dtype in {"bfloat16", "float16"} and not name.startswith(_EMBEDDING))
        for name, whole in saved.tensors.items()
    )
    has_gate = gated(shapes, where)
    interleaved, contiguous = False, None
    fc1, qkv = interleavable(shapes), groups_of(shapes, said.sizes)
    if fc1 and has_gate:
        interleaved, why = said.flag(INTERLEAVED, pynative=pynative, matter=fc1, where=saved.folder)
        remarks.append(f"{INTERLEAVED} is {interleaved}: {why}")
    if qkv and not same_in_both(shapes[qkv[0]], qkv[1]):
        value, why = said.flag(CONTIGUOUS, pynative=pynative, matter=qkv[0], where=saved.folder)
        remarks.append(f"{CONTIGUOUS} is {value}: {why}")
        if value:
            contiguous = qkv[1] or said.missing_heads(qkv[0], saved.folder)
    check_sizes(said, _found_sizes(shapes, qkv))
    heads = said.sizes.get("num_attention_heads")
    return (
        Layouts(
            shapes=shapes, interleaved=interleaved, contiguous=contiguous, heads=heads, gated=has_gate, where=where
        ),
        tuple(remarks),
    )


def _found_sizes(shapes: Mapping[str, Shape], qkv: tuple[str, tuple[int, int] | None] | None) -> dict[str, int]:
    """Numbers of the model by its tensors."""
    found: dict[str, int] = {}
    layers = {name.split(".")[2] for name in shapes if name.startswith("decoder.layers.")}
    if layers:
        found["num_layers"] = len(layers)
    if len(embedding := shapes.get("embedding.word_embeddings.weight", ())) == 2:
        found["hidden_size"] = embedding[1]
    if qkv and qkv[1]:
        queries, channels = qkv[1]
        groups = shapes[qkv[0]][0] // ((queries + 2) * channels)
        found |= {"num_attention_heads": groups * queries, "num_query_groups": groups, "kv_channels": channels}
    for name, shape in shapes.items():
        if name.endswith(".layers.0.mlp.linear_fc2.weight") and len(shape) == 2:
            found["ffn_hidden_size"] = shape[1]
    return found


def _check_roles(index: Index, where: str) -> None:
    """Refuse a checkpoint of which some parameters have moments and others have not, or a main parameter is lost."""
    names = [key.name for key in index if key.role == "param" and not is_buffer(key.name)]
    low = [name for name in names if index[Key("param", name)].dtype != "float32"]
    wanted: Mapping[Role, Sequence[str]] = {"exp_avg": names, "exp_avg_sq": names, "main_param": low}
    optimizer = any(key.role != "param" for key in index)
    for role, owners in wanted.items():
        lacking = [name for name in owners if Key(role, name) not in index]
        if lacking and optimizer:
            raise CoverageError(
                f"{len(lacking)} of {len(owners)} parameters have no {role}, such as {lacking[0]}",
                where=where,
                hint=f"{_HINT}, or convert weights alone{aside('mode')}",
            )
