"""What one rank's result must hold, worked out a second time: from the source's names back to Megatron's.

    source names --NameTable.to_megatron--> (chunk, Megatron name)   what must be there
    param maps   --running offsets-------->  (bucket, first element)  where it must be

The conversion goes the other way, from the map to the source, and its plan is not used here: a mistake in one of the
two does not hide in the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Literal, cast

from ckpt2pt.ckpt import statement_of
from ckpt2pt.ckpt.source import read_source
from ckpt2pt.errors import FormatError, UnmappedNameError, ref
from ckpt2pt.inputs import read_whole
from ckpt2pt.mapping import names
from ckpt2pt.mapping.names import TIED_HEAD, NameTable, SourceName, is_tied_head
from ckpt2pt.mapping.topology import Rank
from ckpt2pt.plan.stated import carry
from ckpt2pt.request import Request
from ckpt2pt.survey import Survey, meta_of
from ckpt2pt.system.paths import is_there
from ckpt2pt.tensors import TensorRef
from ckpt2pt.untrusted.jsontext import parse_json
from ckpt2pt.verify.leaves import Leaf, Leaves, Symbol
from ckpt2pt.verify.sharded import expected_index

Role = Literal["param", "exp_avg", "exp_avg_sq"]
ROLES: tuple[Role, ...] = ("param", "exp_avg", "exp_avg_sq")
_EMBEDDING = "language_model.embedding.word_embeddings.weight"
_HEAD = "language_model.output_layer.weight"
_LAYER = re.compile(r"(language_model\.encoder\.layers\.)(\d+)(\..+)")

Problem = tuple[str, str]
"""(tensor or entry, what is wrong with it)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedWeight:
    """One parameter: Megatron's name, its leaf in the model file, and the source of each role.

    ``bucket`` and ``start`` (elements into the bucket) are None in a params-only conversion.
    """

    name: str
    leaf: str
    dtype: str
    sources: Mapping[str, TensorRef]
    bucket: int | None
    start: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedChunk:
    """One model chunk: weights in registration order, and (padded, unpadded) elements of each bucket.

    ``pair`` is Megatron's key of its buffer: the types of its parameters and of their gradients.
    """

    key: str
    pair: str
    weights: tuple[ExpectedWeight, ...]
    buckets: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """A rank's result; ``twins`` are source tensors that must be equal, ``problems`` what speaks against the inputs."""

    chunks: tuple[ExpectedChunk, ...]
    twins: tuple[tuple[TensorRef, TensorRef], ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...] | None = None
    start: int = 0
    stop: int = 0
    bucket: int = 0


@dataclass(slots=True)
class _Found:
    """Source tensors by (chunk, Megatron name) and role."""

    weights: dict[tuple[int, str], dict[str, TensorRef]] = field(
        default_factory=dict[tuple[int, str], dict[str, TensorRef]]
    )
    twins: list[tuple[TensorRef, TensorRef]] = field(default_factory=list[tuple[TensorRef, TensorRef]])
    problems: list[Problem] = field(default_factory=list[Problem])


def expect(request: Request, chosen: Survey, rank: Rank, template: Mapping[str, Leaf]) -> Expected:
    """Read the source's header and the rank's param maps, and say what must come out of them."""
    tp, pp = rank
    lists = _listed(request.metadata or request.source, tp, pp, template)
    filled = request.topology.filled_chunks(pp)
    listed = (
        dict(enumerate(lists)) if len(lists) == request.topology.virtual else dict(zip(filled, lists, strict=False))
    )
    found = _sources(
        request, chosen, rank, listed, tied=template.get("/args/untie_embeddings_and_output_weights") is False
    )
    divisor = request.target_data or _integer(template, "data_parallel_size") * _integer(
        template, "context_parallel_size"
    )
    alike = template.get("/args/accumulate_allreduce_grads_in_fp32") is False
    chunks = tuple(
        _chunk(vpp, listed.get(vpp, []), found, request, divisor, grads_alike=alike)
        for vpp in range(request.topology.virtual)
    )
    for (_, name), roles in found.weights.items():
        # What a chunk took was taken out; the rest has no slot.
        found.problems.extend(
            (tensor_ref.name, f"the source has it, and pt_meta no slot for {name}") for tensor_ref in roles.values()
        )
    return Expected(chunks=chunks, twins=tuple(found.twins), problems=tuple(found.problems))


def _chunk(
    vpp: int, listed: list[_Entry], found: _Found, request: Request, divisor: int, *, grads_alike: bool
) -> ExpectedChunk:
    key = "model" if request.topology.virtual == 1 else f"model{vpp}"
    homes, buckets = _lay(listed, divisor, found.problems) if request.full else ({}, ())
    weights: list[ExpectedWeight] = []
    for entry in reversed(listed):
        sources = found.weights.pop((vpp, entry.name), {})
        missing = [role for role in (ROLES if request.full else ROLES[:1]) if role not in sources]
        if missing:
            found.problems.append((entry.name, f"the source has no {' and no '.join(missing)} for it"))
        for tensor_ref in sources.values():
            if entry.shape is not None and tensor_ref.shape != entry.shape:
                found.problems.append(
                    (tensor_ref.name, f"has shape {list(tensor_ref.shape)}, the param map {list(entry.shape)}")
                )
        bucket, start = homes.get(entry.name, (None, None))
        leaf = "/".join(("", key, *names.state_dict_path(entry.name)))
        weights.append(
            ExpectedWeight(name=entry.name, leaf=leaf, dtype=entry.dtype, sources=sources, bucket=bucket, start=start)
        )
    dtype = listed[0].dtype if listed else ""
    pair = f"(torch.{dtype}, torch.{dtype if grads_alike else 'float32'})"
    return ExpectedChunk(key=key, pair=pair, weights=tuple(weights), buckets=buckets)


def _lay(
    listed: list[_Entry], divisor: int, problems: list[Problem]
) -> tuple[dict[str, tuple[int, int]], tuple[tuple[int, int], ...]]:
    """Running offsets: name -> (bucket, element in it), and the buckets' sizes."""
    homes: dict[str, tuple[int, int]] = {}
    groups = [list(group) for _, group in groupby(listed, key=lambda entry: entry.bucket)]
    begins = [group[0].start for group in groups]
    sizes: list[tuple[int, int]] = []
    end = 0
    for number, group in enumerate(groups):
        begin, used = begins[number], 0
        for entry in group:
            numel = math.prod(entry.shape or ())
            if (entry.start, entry.stop, entry.bucket) != (begin + used, begin + used + numel, number):
                problems.append(
                    (entry.name, f"is in the param map at [{entry.start}, {entry.stop}) of bucket {entry.bucket}, "
                     f"running offsets give [{begin + used}, {begin + used + numel}) of bucket {number}")
                )  # fmt: skip
            homes[entry.name] = (number, used)
            used += numel
        padded = begins[number + 1] - begin if number + 1 < len(begins) else -(-used // divisor) * divisor
        if begin != end or padded % divisor or not 0 <= padded - used < divisor:
            problems.append(
                (f"bucket {number}", f"[{begin}, {begin + padded}) holds {used} elements, data parallel {divisor}")
            )
        sizes.append((padded, used))
        end = begin + padded
    return homes, tuple(sizes)


def _listed(folder: Path, tp: int, pp: int, template: Mapping[str, Leaf]) -> list[list[_Entry]]:
    """Parameters of each chunk in buffer order, from the param maps or the name list of a params-only pt_meta."""
    found: list[list[_Entry]] = []
    while is_there(path := folder / f"param_map_buffer0_dp0tp{tp}pp{pp}vpp{len(found)}.json"):
        found.append(_read_map(path))
    if found:
        return found
    dtype = template.get("/args/params_dtype")
    spelled = dtype.text.removeprefix("torch.") if isinstance(dtype, Symbol) else "bfloat16"
    while (chunk := f"/param_name_list/{len(found)}") in template:
        listed: list[_Entry] = []
        while isinstance(name := template.get(f"{chunk}/{len(listed)}"), str):
            listed.append(_Entry(names.bare(name), spelled))
        found.append(listed)
    return found


def _read_map(path: Path) -> list[_Entry]:
    try:
        document = cast(
            "dict[str, tuple[str, list[int], int, int, int]]",
            parse_json(read_whole(path, ref("metadata.path"))),
        )
        return [
            _Entry(
                names.bare(name),
                str(dtype).removeprefix("torch."),
                tuple(map(int, shape)),
                int(start),
                int(stop),
                int(bucket),
            )
            for name, (dtype, shape, start, stop, bucket) in document.items()
        ]
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FormatError(
            f"cannot be read as a param map: {error}", where=path, hint="restore pt_meta as it was for the conversion"
        ) from error


def _sources(request: Request, chosen: Survey, rank: Rank, listed: Mapping[int, list[_Entry]], *, tied: bool) -> _Found:
    """Give every parameter and moment of the source its chunk and its Megatron name."""
    pp = rank[1]
    table, found = NameTable(request.rules), _Found()
    tied_names: dict[str, dict[str, TensorRef]] = {}
    index = _entries(request, chosen, rank)
    known, _ = table.classify_all(index, where=str(request.source))
    for entry, tensor_ref in index.items():
        what = known[entry]
        if what.role == "ignored" or (what.role != "param" and not request.full):
            continue
        name = names.without_pipeline_suffix(what.name)
        if tied and (name in {_EMBEDDING, _HEAD} or is_tied_head(name)):
            tied_names.setdefault(what.role, {})[name] = tensor_ref
            continue
        try:
            home = _home(table.to_megatron(name), pp, request, listed)
        except UnmappedNameError as error:
            found.problems.append((entry, error.what))
            continue
        if home is None:
            found.problems.append((entry, "the source has it, and no chunk of this stage holds it"))
        elif found.weights.setdefault(home, {}).setdefault(what.role, tensor_ref) is not tensor_ref:
            found.problems.append((entry, f"is a second {what.role} of {home[1]}"))
    if tied:
        _tie(tied_names, chosen, rank, request, table, found)
    return found


def _entries(request: Request, chosen: Survey, rank: Rank) -> Mapping[str, TensorRef]:
    """The entries of the source for a rank of the result."""
    if request.source_topology is None:
        return expected_index(chosen.files[rank])
    meta = meta_of(request, rank)
    return read_source(request, chosen.files, chosen.identity, rank, sizes=meta.sizes, tied=meta.tied).entries


def _home(megatron: str, pp: int, request: Request, listed: Mapping[int, list[_Entry]]) -> tuple[int, str] | None:
    """(chunk, name with the local layer number); outside the layers the chunk that lists the name."""
    layer = _LAYER.fullmatch(megatron)
    if layer is None:
        return next(
            ((vpp, megatron) for vpp, entries in listed.items() if any(e.name == megatron for e in entries)), None
        )
    for vpp in range(request.topology.virtual):
        slots = request.topology.slots(pp, vpp)
        if int(layer[2]) in slots:
            return vpp, f"{layer[1]}{int(layer[2]) - slots.start}{layer[3]}"
    return None


def _tie(
    tied: Mapping[str, Mapping[str, TensorRef]],
    chosen: Survey,
    rank: Rank,
    request: Request,
    table: NameTable,
    found: _Found,
) -> None:
    """The first stage holds the embedding, the last of several its copy under a name of its own; further copies are twins."""
    pp, last = rank[1], request.topology.pipeline - 1
    if 0 < pp < last:
        return
    is_copy = pp == last and last > 0
    home = (request.topology.virtual - 1, TIED_HEAD) if is_copy else (0, _EMBEDDING)
    for role in ROLES if request.full else ROLES[:1]:
        copies = dict(tied.get(role, {}))
        if is_copy and not copies and request.source_topology is None:
            # A last stage without a copy of its own takes the first stage's: both ends hold the same values.
            file = chosen.files[rank[0], 0]
            index = expected_index(file)
            for entry, what in table.classify_all(index, where=str(file.path))[0].items():
                if what == SourceName(role, _EMBEDDING):
                    copies[_EMBEDDING] = index[entry]
        order = sorted(copies, key=lambda name: (name != _HEAD if is_copy else name != _EMBEDDING, name))
        if order:
            found.weights.setdefault(home, {})[role] = copies[order[0]]
            found.twins.extend((copies[order[0]], copies[name]) for name in order[1:])


def _integer(template: Mapping[str, Leaf], name: str) -> int:
    value = template.get(f"/args/{name}")
    return value if isinstance(value, int) and value > 0 else 1


def others(template: Leaves, chosen: Survey, rank: Rank, *, reference_samples: bool) -> Leaves:
    """The leaves outside the model: the template's, with what the source states and the true time put in."""
    found = {
        path: _for_any_numpy(leaf)
        for path, leaf in template.items()
        if not is_model(path) and not path.startswith("/param_name_list")
    }
    iteration, samples = chosen.clock.iteration, chosen.clock.samples
    found["/iteration"] = iteration
    if "/args/iteration" in found:
        found["/args/iteration"] = iteration
    if "/args" not in found:
        pass
    elif reference_samples:
        found["/args/consumed_train_samples"] = 0
    elif samples is not None:
        found["/args/consumed_train_samples"] = samples
    if samples is not None and "/opt_param_scheduler/num_steps" in found:
        found["/opt_param_scheduler/num_steps"] = samples
    groups = "/optimizer/optimizer/param_groups"
    numbers = [number for number in range(len(found)) if f"{groups}/{number}" in found]
    carried = carry(
        statement_of(expected_index(chosen.files.get(rank) or chosen.files[0, 0])),
        _below(found, "/opt_param_scheduler"),
        [_below(found, f"{groups}/{number}") for number in numbers],
    )
    for key, value in carried.scheduler.items():
        found[f"/opt_param_scheduler/{key}"] = value
    for number, values in zip(numbers, carried.groups, strict=True):
        found |= {f"{groups}/{number}/{key}": value for key, value in values.items()}
        found[f"{groups}/{number}/step"] = iteration
    return found


def _below(leaves: Leaves, folder: str) -> dict[str, object]:
    prefix = f"{folder}/"
    return {path.removeprefix(prefix): leaf for path, leaf in leaves.items() if path.startswith(prefix)}


def _for_any_numpy(leaf: Leaf) -> Leaf:
    """The result names numpy's arrays as numpy 1 did, which both majors read, whatever numpy wrote the template."""
    return replace(leaf, text=leaf.text.replace("numpy._core.", "numpy.core.", 1)) if isinstance(leaf, Symbol) else leaf


def is_model(path: str) -> bool:
    """True for a leaf of ``model``, ``model0``, ``model1``, ..."""
    return re.match(r"/model\d*(?:/|$)", path) is not None
