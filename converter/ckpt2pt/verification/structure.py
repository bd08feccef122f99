"""What a rank's files hold besides the elements of parameters: keys and their order, sizes of buckets, header numbers.

    pt_meta's template + what the source states --> every other key of model_optim_rng.pt, by value
    its param maps                              --> names in order of registration, and the buckets of distrib_optim.pt

The writer makes a tree of it; here the leaves of the files, as they were read, are looked at one by one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ckpt2pt.core.buckets import Bucket
from ckpt2pt.core.names import HAS_EXTRA_STATE, is_tied_head, state_dict_path
from ckpt2pt.core.params import EMBEDDING, canonical_name
from ckpt2pt.core.stated import Statement, carry
from ckpt2pt.core.tensor import Key, Role
from ckpt2pt.core.topology import Topology
from ckpt2pt.core.training_step import TrainingStep
from ckpt2pt.formats.ptmeta.metadata import RankMeta
from ckpt2pt.io.text import short
from ckpt2pt.verification.elements import Differing
from ckpt2pt.verification.gather import Files, spans, width
from ckpt2pt.verification.leaves import CONTAINERS, Leaf, Leaves, Symbol, TensorLeaf, same_scalar
from ckpt2pt.verification.report import Findings
from ckpt2pt.verification.tensors import Place

MODEL_FILE, OPTIM_FILE = "model_optim_rng.pt", "distrib_optim.pt"
_ENCODER = "/language_model/encoder"
KINDS = ("param", "exp_avg", "exp_avg_sq")
"""The tensors of a bucket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One model chunk, as pt_meta describes it.

    ``names`` are Megatron's in order of registration, by canonical name; ``homes`` has the bucket of each, ``buckets`` the
    (padded, unpadded) elements of each bucket.  ``buffer`` is the number of its buffer and Megatron's key of that: the
    types of its parameters and of their gradients.
    """

    key: str
    dtype: str = ""
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    buffer: str = ""
    homes: Mapping[str, int] = field(default_factory=dict[str, int])
    buckets: tuple[tuple[int, int], ...] = ()

    def path(self, name: str) -> str:
        """The leaf of a weight."""
        return "/".join(("", self.key, *state_dict_path(name)))

    def places(self, roles: Collection[Role]) -> Iterator[tuple[Key, Place]]:
        """Where the tensors of its parameters have to be."""
        for canonical, name in self.names.items():
            for role in roles:
                kind = "param" if role == "main_param" else role
                place = Place(MODEL_FILE, name, self.dtype, self.path(name))
                if role != "param":
                    place = Place(
                        OPTIM_FILE, f"{kind} of {name}", "float32", f"/{self.buffer}/{kind}/{self.homes[name]}"
                    )
                yield Key(role, canonical), place


def chunks_of(meta: RankMeta, topology: Topology, pp: int, divisor: int | None, findings: Findings) -> list[Chunk]:
    """The chunks of a stage, also those without layers, which have no buffer.

    ``divisor`` is the size of the data-parallel group, of which each bucket's size is a multiple.
    """
    described = {chunk.vpp: (number, chunk) for number, chunk in enumerate(meta.chunks)}
    found: list[Chunk] = []
    for vpp in range(topology.virtual):
        key = "model" if topology.virtual == 1 else f"model{vpp}"
        if vpp not in described:
            found.append(Chunk(key=key))
            continue
        number, chunk = described[vpp]
        dtype, slots = chunk.buffer.dtype if chunk.buffer else meta.params_dtype, topology.slots(pp, vpp)
        gradients = dtype if meta.template.args.get("accumulate_allreduce_grads_in_fp32") is False else "float32"
        buckets = chunk.buffer.buckets if chunk.buffer else ()
        found.append(
            Chunk(
                key=key,
                dtype=dtype,
                names={EMBEDDING if is_tied_head(name) else canonical_name(name, slots): name for name in chunk.names},
                buffer=f"{number}/(torch.{dtype}, torch.{gradients})",
                homes={placement.name: bucket.index for bucket in buckets for placement in bucket.placements},
                buckets=tuple(bucket_size(bucket, divisor, findings) for bucket in buckets),
            )
        )
    return found


def bucket_size(bucket: Bucket, divisor: int | None, findings: Findings) -> tuple[int, int]:
    """Padded and unpadded, by the shapes of what is in it."""
    used = 0
    for placement in bucket.placements:
        if placement.start - bucket.start != used:
            findings.differ("", placement.name, "lies elsewhere in its bucket than what is before it takes", used)
        used += math.prod(placement.shape)
    return -(-used // divisor) * divisor if divisor else bucket.numel, used


@dataclass(frozen=True, slots=True)
class Structure:
    """A check of the leaves of a rank's files; ``files`` reads what has to be looked at."""

    chunks: Sequence[Chunk]
    findings: Findings
    files: Files

    def check_model(self, model: Leaves) -> None:
        """Weights and ``_extra_state`` complete, nothing besides, and in the order of registration."""
        wanted = [path for chunk in self.chunks for path in _model_paths(chunk)]
        folders = {f"/{chunk.key}{below}" for chunk in self.chunks for below in ("", "/language_model", _ENCODER)}
        for path in wanted:
            parts = path.split("/")
            folders |= {"/".join(parts[:depth]) for depth in range(2, len(parts))}
        for path in sorted(folders):
            if path not in model or model[path] not in CONTAINERS:
                self.findings.differ(MODEL_FILE, path, "is not there" if path not in model else "is no dictionary")
        # Attributes of a state dict (its _metadata) may or may not be there: no loader needs them.
        there = [path for path in model if is_model(path) and path not in folders and "/@state" not in path]
        self._check_keys(MODEL_FILE, wanted, there)
        for path in wanted:
            leaf = model.get(path)
            if path.endswith("_extra_state") and leaf is not None:
                self.findings.differ(MODEL_FILE, path, "holds something", "None", short(leaf))
            elif not path.endswith("_extra_state") and path in model and not isinstance(leaf, TensorLeaf):
                self.findings.differ(MODEL_FILE, path, "has another type or shape", "a tensor", short(leaf))
        self._check_order(wanted, there)

    def _check_order(self, wanted: Sequence[str], there: Sequence[str]) -> None:
        """In each dictionary by itself."""
        orders: list[dict[str, list[str]]] = [{}, {}]
        for order, paths, other in zip(orders, (wanted, there), (set(there), set(wanted)), strict=True):
            for path in paths:
                if path in other:
                    order.setdefault(path.rpartition("/")[0], []).append(path)
        for folder, paths in sorted(orders[0].items()):
            moved = next((pair for pair in zip(paths, orders[1][folder], strict=True) if pair[0] != pair[1]), None)
            if moved:
                problem = "keys are in another order than Megatron registers them"
                self.findings.differ(MODEL_FILE, folder, problem, *moved)

    def check_rest(self, wanted: Leaves, model: Leaves) -> None:
        """Everything that is not the model, leaf by leaf."""
        self.check_leaves(MODEL_FILE, wanted, {path: leaf for path, leaf in model.items() if not is_model(path)})

    def check_leaves(self, file: str, wanted: Mapping[str, Leaf], there: Mapping[str, Leaf]) -> None:
        """All that has to be in a file, and nothing besides: keys, values, and tensors bit for bit."""
        self._check_keys(file, wanted, there)
        for path in wanted.keys() & there.keys():
            one, other = wanted[path], there[path]
            if not isinstance(one, TensorLeaf) or not isinstance(other, TensorLeaf):
                if not same_scalar(one, other):
                    self.findings.differ(file, path, "has another value", short(one), short(other))
            elif (one.dtype, one.shape) != (other.dtype, other.shape):
                self.findings.differ(file, path, "has another type or shape", one, other)
            else:
                tally = Differing(one.dtype, one.dtype, strict=True)
                tally.compare(self.files, one.elements, other.elements, one.numel)
                self.findings.tensors += 1
                self.findings.settle(file, path, tally, "differ")

    def _check_keys(self, file: str, wanted: Iterable[str], there: Iterable[str]) -> None:
        wanted, there = set(wanted), set(there)
        for path in sorted(wanted - there):
            self.findings.differ(file, path, "is missing")
        for path in sorted(there - wanted):
            self.findings.differ(file, path, "is unexpected")

    def check_optimizer(self, optim: Leaves) -> None:
        """Sizes of every bucket, as the file states them and as its tensors are; behind the last parameter all is zero."""
        wanted: dict[str, Leaf] = {}
        for chunk in self.chunks:
            for number, (padded, used) in enumerate(chunk.buckets):
                wanted[f"/per_bucket_numel/{chunk.buffer}/{number}"] = padded
                wanted[f"/per_bucket_numel_unpadded/{chunk.buffer}/{number}"] = used
                for kind in KINDS:
                    path = f"/{chunk.buffer}/{kind}/{number}"
                    wanted[path] = None
                    self._check_bucket(path, optim, padded, used)
        self._check_keys(OPTIM_FILE, wanted, [path for path, leaf in optim.items() if leaf not in CONTAINERS])
        for path, leaf in wanted.items():
            if path.startswith("/per_bucket") and path in optim and not same_scalar(leaf, optim[path]):
                self.findings.differ(OPTIM_FILE, path, "is another number", short(leaf), short(optim[path]))

    def _check_bucket(self, path: str, optim: Leaves, padded: int, used: int) -> None:
        leaf = optim.get(path)
        if path not in optim:
            return
        if not isinstance(leaf, TensorLeaf) or str(leaf) != f"float32[{padded}]":
            self.findings.differ(OPTIM_FILE, path, "has another type or size", f"float32[{padded}]", short(leaf))
            return
        tally = Differing("float32", "float32", strict=True)
        for start, stop in spans(padded - used, width("float32")):
            data = leaf.elements.block(self.files, used + start, used + stop)
            tally.see(used + start, np.zeros_like(data), data)
        self.findings.settle(OPTIM_FILE, path, tally, "of the padding are not zero")


def _model_paths(chunk: Chunk) -> Iterator[str]:
    """Leaves of a chunk: weights in order, each module's ``_extra_state`` after its last parameter."""
    modules = [name.rpartition(".")[0] for name in chunk.names.values()]
    last = {module: number for number, module in enumerate(modules)}
    for number, (name, module) in enumerate(zip(chunk.names.values(), modules, strict=True)):
        path = chunk.path(name)
        yield path
        if last[module] == number and module.rpartition(".")[2] in HAS_EXTRA_STATE:
            folder, _, key = path.rpartition("/")
            inner, dot, _ = key.rpartition(".")
            yield f"{folder}/{inner}{dot}_extra_state"


# ------------------------------------------------------------------------------------------------------ header numbers


def others(template: Leaves, training_step: TrainingStep, statement: Statement, *, reference_samples: bool) -> Leaves:
    """The leaves outside the model: the template's, with what the source states and the true time put in."""
    found = {
        path: _for_any_numpy(leaf)
        for path, leaf in template.items()
        if not is_model(path) and not path.startswith("/param_name_list")
    }
    if training_step.as_saved:
        return found | ({"/args/consumed_train_samples": 0} if "/args" in found and reference_samples else {})
    iteration, samples = training_step.iteration, training_step.samples
    found["/iteration"] = iteration
    if "/args/iteration" in found:
        found["/args/iteration"] = iteration
    if "/args" in found and reference_samples:
        found["/args/consumed_train_samples"] = 0
    elif "/args" in found and samples is not None:
        found["/args/consumed_train_samples"] = samples
    groups = "/optimizer/optimizer/param_groups"
    numbers = [number for number in range(len(found)) if f"{groups}/{number}" in found]
    carried = carry(
        statement,
        _below(found, "/opt_param_scheduler"),
        [_below(found, f"{groups}/{number}") for number in numbers],
    )
    for key, value in carried.scheduler.items():
        found[f"/opt_param_scheduler/{key}"] = value
    if samples is not None and "/opt_param_scheduler/num_steps" in found:
        found["/opt_param_scheduler/num_steps"] = samples
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
