"""A model of Hugging Face transformers as global tensors of Megatron core: weights alone.

config.json --arguments--> the class, and the arguments of Megatron-LM
safetensors headers --names, places--> parts of core's tensors
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple, cast

from ckpt2pt.core.extents import Shape, Stored, TensorRef, View
from ckpt2pt.core.index import Index, ordered
from ckpt2pt.core.params import EMBEDDING, HEAD, has_experts, layer_of, split_layer
from ckpt2pt.core.tensor import Key, Tensor, check_coverage, dense_strides
from ckpt2pt.errors import CoverageError, FormatError, MissingInputError
from ckpt2pt.formats.checkpoint import Checkpoint, Selection, agreed
from ckpt2pt.formats.huggingface.arguments import (
    Fields,
    arguments_of,
    experts_of,
    family_of,
    heads_of,
    is_tied,
    layers_of,
)
from ckpt2pt.formats.huggingface.names import DEEPSEEK_V3, GPT2, Family, Form, Row
from ckpt2pt.formats.huggingface.places import natural_shape, placed
from ckpt2pt.formats.huggingface.write import CONFIG, INDEX, SINGLE
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.mindspore.safetensors import index_safetensors
from ckpt2pt.formats.torchfile.trees import Global, Value, namespace
from ckpt2pt.io.inputs import InputFile, quoted, read_object
from ckpt2pt.io.paths import is_file, listing

_MAX_CONFIG_BYTES = 1 << 20
_MAX_INDEX_BYTES = 256 << 20
_HINT = "copy the whole folder again from where it was saved"
_DTYPES = ("bfloat16", "float16", "float32")
_SHARD = re.compile(r"[\w][\w.-]{0,200}\.safetensors")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_FUSED = re.compile(r"((?:mlp|block_sparse_moe)\.experts)\.(gate_up_proj|down_proj)")
"""All experts in one tensor, as transformers 5 holds them in memory."""
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|(?:^|\.)attn\.(?:masked_)?bias$")
"""Buffers that older releases saved, and that every release computes."""


class _Part(NamedTuple):
    """What a tensor of the class is of a tensor of Megatron core."""

    name: str
    form: Form
    expert: int | None = None
    """Which of those that a fused tensor holds."""


class Saved(NamedTuple):
    """What the files of a model say: config.json, the class, the tensors of each file, and what lies beside them."""

    fields: Fields
    family: Family
    headers: Mapping[str, Mapping[str, TensorRef]]
    remarks: tuple[str, ...]

    @property
    def tensors(self) -> dict[str, TensorRef]:
        """All of them, by the names of the class."""
        return {name: ref for held in self.headers.values() for name, ref in held.items()}


def open_huggingface(path: Path, wanted: Selection) -> Checkpoint:
    """Read config.json and the headers of all files.

    Raises :class:`FormatError` for a class that is not read, :class:`CoverageError` for tensors that are missing or unexpected,
    :class:`MissingInputError` for files that are not there.
    """
    return checkpoint_of(read_saved(path), path, wanted)


def read_saved(path: Path) -> Saved:
    """The same, as it is written down."""
    fields = _config(path)
    return Saved(fields, family_of(fields), *_headers(path))


def checkpoint_of(saved: Saved, path: Path, wanted: Selection) -> Checkpoint:
    """The global tensors, proved to be all that the class has, and the arguments of Megatron-LM."""
    fields, family, _, remarks = saved
    agreed((wanted.tensor, wanted.pipeline), (1, 1), path)
    index, left_out = _index(fields, family, saved.tensors, str(path))
    inner = {split_layer(key.name)[1] for key in index if layer_of(key.name) is not None}
    args, said = arguments_of(
        fields,
        family,
        biases={name.removesuffix(".bias") for name in inner if name.endswith(".bias")},
        sparse=sparse_layers(key.name for key in index),
        tokens=index[Key("param", EMBEDDING)].shape[0],
    )
    dtype = next((one for one in _DTYPES if any(tensor.dtype == one for tensor in index.values())), "float32")
    values: dict[str, Value] = {name: cast("Value", value) for name, value in args.items()}
    values |= {"bf16": dtype == "bfloat16", "fp16": dtype == "float16", "params_dtype": Global("torch", dtype)}
    numbered = (
        ()
        if wanted.iteration
        else (
            "a model of transformers states no iteration: it is taken for iteration 1, of which no optimizer is there",
        )
    )
    return Checkpoint(
        path=path,
        format="huggingface",
        iteration=wanted.iteration or 1,
        tensor=1,
        pipeline=1,
        index=index,
        warnings=(*remarks, *left_out, *said, *numbered),
        template=Template(path=fields.where, tree={"args": namespace(values)}, storages={}),
        samples=0,
    )


def _config(path: Path) -> Fields:
    """The fields of config.json."""
    file = path / CONFIG
    if not is_file(file, InputFile.option):
        raise MissingInputError(
            f"{CONFIG} is not there, which says what model the tensors are of", where=path, hint=_HINT
        )
    return Fields(read_object(file, InputFile.option, _MAX_CONFIG_BYTES, _HINT), str(file))


def _headers(path: Path) -> tuple[Mapping[str, Mapping[str, TensorRef]], tuple[str, ...]]:
    """The tensors of each file, and what lies beside them."""
    there = {file.name for file in listing(path, "*.safetensors", InputFile.option)}
    if not is_file(path / INDEX, InputFile.option):
        if SINGLE not in there:
            raise MissingInputError(
                f"neither {SINGLE} nor {INDEX} is there",
                where=path,
                hint="save the model as safetensors (save_pretrained)",
            )
        return {SINGLE: index_safetensors(path / SINGLE)}, _beside(there - {SINGLE})
    listed = _listed(path / INDEX)
    files = dict.fromkeys(listed.values())
    if SINGLE in there and SINGLE not in files:
        raise FormatError(
            f"{SINGLE} lies beside {INDEX}: transformers loads that file, and whatever is not in it is random",
            where=path,
            hint="remove the one that does not belong to this model",
        )
    lost = sorted(files.keys() - there)
    if lost:
        raise MissingInputError(f"{lost[0]} is not there, which {INDEX} names", where=path, hint=_HINT)
    found = {name: index_safetensors(path / name) for name in files}
    for name, file in listed.items():
        if name not in found[file]:
            raise CoverageError(f"{quoted(name)} is not in it, as {INDEX} says", where=path / file, hint=_HINT)
    for file, held in found.items():
        other = next((name for name in held if listed.get(name) != file), None)
        if other is not None:
            raise CoverageError(f"{quoted(other)} is in it, which {INDEX} does not say", where=path / file, hint=_HINT)
    return found, _beside(there - files.keys())


def _beside(others: set[str]) -> tuple[str, ...]:
    return (f"{', '.join(sorted(others)[:6])} hold no part of the model",) if others else ()


def _listed(file: Path) -> dict[str, str]:
    """Tensor -> file, each of them a name in this very folder."""
    weights = read_object(file, InputFile.option, _MAX_INDEX_BYTES, _HINT).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise FormatError("it has no weight_map", where=file, hint=_HINT)
    found: dict[str, str] = {}
    for name, held in cast("dict[str, object]", weights).items():
        if not isinstance(held, str) or not _SHARD.fullmatch(held):
            raise FormatError(
                f"weight_map names {quoted(str(held))} for {quoted(name)}, which is no .safetensors in this folder",
                where=file,
                hint="give the folder as it was saved",
            )
        found[name] = held
    return found


def _index(fields: Fields, family: Family, refs: Mapping[str, TensorRef], where: str) -> tuple[Index, tuple[str, ...]]:
    heads, layers = heads_of(fields, family), layers_of(fields, family)
    if layers > len(refs):
        raise CoverageError(
            f"{len(refs)} tensors are there, and config.json has {layers} layers", where=where, hint=_HINT
        )
    # The base model of a class is saved without the name that its head gives it (openai-community/gpt2).
    base = f"{family.prefix.partition('.')[0]}."
    prefix = base if any(name.startswith(base) for name in refs) else ""
    inner = {row.own: row for row in family.layer}
    outside = {row.own.removeprefix(base) if not prefix else row.own: row for row in family.outside}
    found: dict[str, list[tuple[TensorRef, Iterator[Stored]]]] = {}
    shapes: dict[str, Shape] = {}
    predicting: set[int] = set()
    more = fields.values.get("num_nextn_predict_layers")
    last = layers + (more if type(more) is int else 0)
    for own, ref in refs.items():
        layer, rest = _split(own, prefix + family.prefix.removeprefix(base))
        if layer is not None and layer >= layers and layer < last:
            predicting.add(layer)
            continue
        if _COMPUTED.search(own):
            continue
        for part, piece in _parts(own, layer, rest, ref, inner, outside):
            if ref.dtype not in _DTYPES:
                raise FormatError(f"{own} is {ref.dtype}", where=where, hint="give a model in bf16, fp16 or fp32")
            shape = natural_shape(part.form, piece.shape, heads)
            if shapes.setdefault(part.name, shape) != shape:
                raise CoverageError(
                    f"{own} makes {list(shape)} of {part.name}, others {list(shapes[part.name])}",
                    where=where,
                    hint=_HINT,
                )
            views = (
                placed(part.form, piece.shape, heads, ref.extents)
                if part.expert is None
                else _of_expert(part, piece, ref)
            )
            found.setdefault(part.name, []).append((ref, views))
    tied = is_tied(fields, family)
    head = found.pop(HEAD, []) if tied else []
    index = {Key("param", name): _tensor(name, shapes[name], held, where) for name, held in found.items()}
    if head:
        key = Key("param", EMBEDDING)
        copies = tuple(view for _, views in head for view in views)
        if key not in index or index[key].shape != shapes[HEAD]:
            raise CoverageError("lm_head.weight is tied to an embedding of another shape", where=where, hint=_HINT)
        index[key] = index[key]._replace(replicas=copies)
    _check_complete(index, fields, family, layers, where)
    remarks = (f"layer {min(predicting)} and on predict further tokens (MTP): they are left out",) if predicting else ()
    return ordered(index, where, partial=True), remarks


def _split(own: str, prefix: str) -> tuple[int | None, str]:
    """The number of the layer in a name, and what follows it."""
    if own.startswith(prefix):
        number, _, rest = own.removeprefix(prefix).partition(".")
        if number.isascii() and number.isdecimal() and len(number) < 7:
            return int(number), rest
    return None, own


def _parts(
    own: str, layer: int | None, rest: str, ref: TensorRef, inner: Mapping[str, Row], outside: Mapping[str, Row]
) -> Iterator[tuple[_Part, TensorRef]]:
    """What a tensor is of Megatron core's, each with what it is read from.  Raises :class:`CoverageError` for one that the class has not."""
    fused = _FUSED.fullmatch(rest)
    if layer is not None and fused and len(ref.shape) == 3:
        yield from _of_all_experts(layer, fused[2], ref)
        return
    number = found[1] if (found := _EXPERT.search(rest)) else None
    row = outside.get(rest) if layer is None else inner.get(_EXPERT.sub(".experts.*.", rest))
    if row is None or (number is not None and len(number) > 6):
        raise CoverageError(
            f"{quoted(own)} is a tensor that this class has not",
            where=ref.extents[0].path if ref.extents else own,
            hint="give the config.json that belongs to these tensors; adapters and quantised weights are not read",
        )
    yield _Part(_named(row.name, layer, number), row.form), ref


def _named(name: str, layer: int | None, expert: str | None) -> str:
    if expert is not None:
        name = name.replace(".local_experts.", f".local_experts.{int(expert)}.")
    return name if layer is None else f"decoder.layers.{layer}.{name}"


def _of_all_experts(layer: int, kind: str, ref: TensorRef) -> Iterator[tuple[_Part, TensorRef]]:
    """(experts, gate and up, hidden), or (experts, hidden, ffn)."""
    count, rows, columns = ref.shape
    gated = kind == "gate_up_proj"
    shape = (2, rows // 2, columns) if gated else (rows, columns)
    for expert in range(min(count, 1 << 16)):
        name = f"mlp.experts.local_experts.linear_{'fc1' if gated else 'fc2'}.weight"
        yield _Part(_named(name, layer, str(expert)), "whole", expert), ref._replace(shape=shape)


def _of_expert(part: _Part, piece: TensorRef, ref: TensorRef) -> Iterator[Stored]:
    shape = piece.shape
    yield View((0,) * len(shape), shape, dense_strides(shape), (part.expert or 0) * math.prod(shape), ref.extents)


def _tensor(name: str, shape: Shape, held: list[tuple[TensorRef, Iterator[Stored]]], where: str) -> Tensor:
    dtypes = dict.fromkeys(ref.dtype for ref, _ in held)
    if len(dtypes) > 1:
        raise CoverageError(f"parts of {name} are {' and '.join(dtypes)}", where=where, hint=_HINT)
    gated = ".linear_fc1." in name and any(len(ref.shape) in {len(shape) - 1, 3} for ref, _ in held)
    fused = (2 * shape[1], *shape[2:]) if gated else shape
    tensor = Tensor(
        Key("param", name), next(iter(dtypes)), shape, fused, tuple(view for _, views in held for view in views)
    )
    check_coverage(tensor, where)
    return tensor


def sparse_layers(names: Iterable[str]) -> frozenset[int]:
    """The layers with experts, by canonical names."""
    parts = map(split_layer, names)
    return frozenset(layer for layer, inner in parts if layer is not None and has_experts(inner))


def _check_complete(index: Index, fields: Fields, family: Family, layers: int, where: str) -> None:
    """Refuse a model that lacks what any of its class has, which transformers would make up, and layers beyond the last."""
    names = {key.name for key in index}
    other = next((layer for name in names if (layer := layer_of(name)) is not None and layer >= layers), None)
    if other is not None:
        raise CoverageError(f"layer {other} is there, and config.json has {layers} layers", where=where, hint=_HINT)
    sparse = sparse_layers(names)
    outside = (row.name for row in family.outside if row.name != HEAD or not is_tied(fields, family))
    for name in chain(outside, *(_wanted(fields, family, layer, sparse=layer in sparse) for layer in range(layers))):
        if name not in names:
            raise CoverageError(
                f"what {name} of Megatron core is made of is not there",
                where=where,
                hint="copy the whole folder again, with the config.json that belongs to it",
            )


def _wanted(fields: Fields, family: Family, layer: int, *, sparse: bool) -> Iterator[str]:
    """The weights that a layer of the class has: one MLP or experts, and queries by way of a latent vector or directly."""
    experts = experts_of(fields, family) if sparse else 0
    direct = fields.get("q_lora_rank") is None
    for row in family.layer:
        module, _, leaf = row.name.rpartition(".")
        if leaf == "bias" and family is not GPT2:
            continue
        if module.startswith("mlp.linear_") and sparse:
            continue
        if module.startswith(("mlp.router", "mlp.experts", "mlp.shared_experts")) and not sparse:
            continue
        if family is DEEPSEEK_V3 and module in (_LATENT_QUERY if direct else _DIRECT_QUERY):
            continue
        for number in map(str, range(experts)) if ".local_experts." in row.name else (None,):
            yield _named(row.name, layer, number)


_DIRECT_QUERY = frozenset({"self_attention.linear_q_proj"})
_LATENT_QUERY = frozenset(
    f"self_attention.{name}" for name in ("linear_q_down_proj", "q_layernorm", "linear_q_up_proj")
)
