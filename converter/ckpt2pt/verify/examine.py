"""One rank's result under examination: every weight, slice, bucket and key, read anew and compared with the source.

    model_optim_rng.pt   every weight is the source's, rounded to nearest even; every other key is the template's
    distrib_optim.pt     every slice is the source's, bit for bit; rounded, it is the weight above; padding is zero
    source               every tensor is in the result

Nothing of the road that made the result is used: not the plan, not the moves, not the casts (``expected`` works out anew
what must be there, ``leaves`` reads it).  Only the table of names and the degrees are shared: they are the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ckpt2pt.errors import Ckpt2ptError, InputError, MissingInputError, printable
from ckpt2pt.mapping.names import HAS_EXTRA_STATE
from ckpt2pt.mapping.topology import Rank
from ckpt2pt.meta import read_template
from ckpt2pt.plan.layout import weight_decay_groups
from ckpt2pt.pt.archive import Archive
from ckpt2pt.pt.resume import TargetRun, unmet
from ckpt2pt.request import Advance, Request, unheard
from ckpt2pt.survey import Survey
from ckpt2pt.tensors import TensorRef
from ckpt2pt.text import short
from ckpt2pt.verify.elements import Differing, rounded
from ckpt2pt.verify.expected import ROLES, Expected, ExpectedChunk, ExpectedWeight, expect, is_model, others
from ckpt2pt.verify.leaves import (
    CONTAINERS,
    Bytes,
    Files,
    Leaf,
    Leaves,
    TensorLeaf,
    leaf_of,
    same_scalar,
    spans,
    width,
)

MODEL_FILE, OPTIM_FILE = "model_optim_rng.pt", "distrib_optim.pt"

Opener = Callable[[Path], Leaves]
"""Reads a ``.pt``: our own reader or torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that is not as it must be; ``index`` counts elements of the tensor in C order."""

    file: str
    tensor: str
    problem: str
    count: int = 1
    index: int | None = None
    expected: str = ""
    found: str = ""

    def __str__(self) -> str:
        where = "" if self.index is None else f", first at element {self.index}"
        both = f": expected {self.expected}, found {self.found}" if self.expected or self.found else ""
        return printable(f"{self.file}: {self.tensor}: {self.problem}{where}{both}")


@dataclass(slots=True)
class Examination:
    """One rank, whose files are ``results`` by name; :meth:`run` fills ``differences`` and the counts."""

    request: Request
    chosen: Survey
    rank: Rank
    results: Mapping[str, Path]
    open: Opener
    files: Files
    advance: Advance = unheard
    differences: list[Difference] = field(default_factory=list[Difference])
    tensors: int = 0
    nbytes: int = 0

    @property
    def directory(self) -> str:
        """The rank's folder inside the iteration's."""
        return self.request.topology.directory(*self.rank)

    def run(self) -> None:
        """Make every comparison."""
        tp, pp = self.rank
        template = self.open((self.request.metadata or self.request.source) / f"args_tp{tp:02d}_pp{pp:03d}.pt")
        expected = expect(self.request, self.chosen, self.rank, template)
        for tensor, problem in expected.problems:
            self._differ("", tensor, problem)
        for kept, copy in expected.twins:
            self._same(
                Path(next((e.path for e in kept.extents), self.request.source)).name,
                f"{copy.name} = {kept.name}",
                leaf_of(kept),
                leaf_of(copy),
            )
        model = self._open_result(MODEL_FILE)
        optim = self._open_result(OPTIM_FILE) if self.request.full else {}
        if model:
            self._check_model_keys(model, expected)
            rest = {path: leaf for path, leaf in model.items() if not is_model(path)}
            wanted = others(template, self.chosen, self.rank, reference_samples=self.request.reference_samples)
            known = len(self.differences)
            self._check_leaves(MODEL_FILE, wanted, rest)
            if len(self.differences) == known:  # else what was changed has been told, and the rest is as it should be
                self._check_loadable(expected)
        numbers = {chunk.key: number for number, chunk in enumerate(c for c in expected.chunks if c.buckets)}
        if optim:
            self._check_optim_keys(optim, expected)
        for chunk in expected.chunks:
            buffer = f"/{numbers[chunk.key]}/{chunk.pair}" if chunk.key in numbers else ""
            for weight in chunk.weights:
                self._check_weight(weight, chunk, model, optim, buffer)
            if optim and buffer:
                self._check_padding(chunk, optim, buffer)
        self._check_crcs([name for name, leaves in ((MODEL_FILE, model), (OPTIM_FILE, optim)) if leaves])

    def _differ(self, file: str, tensor: str, problem: str, expected: str = "", found: str = "") -> None:
        name = f"{self.directory}/{file}".rstrip("/")
        self.differences.append(Difference(file=name, tensor=tensor, problem=problem, expected=expected, found=found))

    def _settle(self, file: str, tensor: str, tally: Differing, problem: str) -> None:
        if tally.count:
            self.differences.append(
                Difference(
                    file=f"{self.directory}/{file}",
                    tensor=tensor,
                    problem=f"{tally.count:,} of {tally.seen:,} elements {problem}",
                    count=tally.count,
                    index=tally.index,
                    expected=tally.shown[0],
                    found=tally.shown[1],
                )
            )

    def _open_result(self, name: str) -> Leaves:
        """A result's leaves; a file that cannot be read is a difference and not an error."""
        try:
            return self.open(self.results[name])
        except (InputError, MissingInputError) as error:
            self._differ(name, "file", _first_line(error))
            return {}

    def _check_crcs(self, names: list[str]) -> None:
        """Records whose checksums are wrong are told of first; what was compared is not read again."""
        told, self.differences = self.differences, []
        for name in names:
            path = self.results[name]
            try:
                Archive.open(path).verify_crcs(sorted(self.files.pieces.get(str(path), ())), self.advance)
            except InputError as error:
                self._differ(name, "file", _first_line(error))
        self.differences += told

    def _check_loadable(self, expected: Expected) -> None:
        """Whether Megatron-LM can resume from the result, or load its weights where it holds no more."""
        template, topology = (
            read_template(self.results[MODEL_FILE], allow=self.request.rules.pickle_globals),
            self.request.topology,
        )
        weights = [weight.sources["param"]._replace(name=weight.name)
                   for chunk in expected.chunks for weight in chunk.weights if "param" in weight.sources]  # fmt: skip
        run = TargetRun(
            num_layers=topology.num_layers,
            tensor=topology.tensor,
            pipeline=topology.pipeline,
            virtual=topology.virtual,
            groups=weight_decay_groups(weights) if self.request.full else None,
        )
        for rule in unmet(template, run, full=self.request.full, checkpoint=True):
            self._differ(MODEL_FILE, rule.key, f"{rule.problem}: Megatron-LM 0.6 cannot load it")

    # ------------------------------------------------------------------------------------------------------------ keys

    def _check_model_keys(self, model: Leaves, expected: Expected) -> None:
        """Weights and ``_extra_state`` complete, nothing besides, and in the order of registration."""
        wanted: dict[str, bool] = {}
        folders: set[str] = set()
        for chunk in expected.chunks:
            for path in _model_paths(chunk):
                wanted[path] = True
            folders |= {f"/{chunk.key}", f"/{chunk.key}/language_model", f"/{chunk.key}/language_model/encoder"}
        for path in wanted:
            parts = path.split("/")
            folders |= {"/".join(parts[:depth]) for depth in range(2, len(parts))}
        for path in sorted(folders):
            if path not in model or model[path] not in CONTAINERS:
                self._differ(MODEL_FILE, path, "is not there" if path not in model else "is no dictionary")
        # Attributes of a state dict (its _metadata) may or may not be there: no loader needs them.
        there = [path for path in model if is_model(path) and path not in folders and "/@state" not in path]
        self._check_sets(MODEL_FILE, list(wanted), there)
        for path in there:
            if path.endswith("_extra_state") and path in wanted and model[path] is not None:
                self._differ(MODEL_FILE, path, "holds something", "None", short(model[path]))
        common = [path for path in there if path in wanted]
        for folder in sorted({path.rpartition("/")[0] for path in common}):
            one, other = ([p for p in paths if p.rpartition("/")[0] == folder] for paths in (wanted, common))
            moved = next(
                (pair for pair in zip((p for p in one if p in model), other, strict=True) if pair[0] != pair[1]), None
            )
            if moved:
                self._differ(MODEL_FILE, folder, "keys are in another order than Megatron registers them", *moved)

    def _check_optim_keys(self, optim: Leaves, expected: Expected) -> None:
        """Sizes of every bucket, as the file states them and as its tensors are."""
        wanted: dict[str, Leaf] = {}
        for number, chunk in enumerate(c for c in expected.chunks if c.buckets):
            key = chunk.pair
            for bucket, (padded, used) in enumerate(chunk.buckets):
                wanted[f"/per_bucket_numel/{number}/{key}/{bucket}"] = padded
                wanted[f"/per_bucket_numel_unpadded/{number}/{key}/{bucket}"] = used
                for role in ROLES:
                    path = f"/{number}/{key}/{role}/{bucket}"
                    wanted[path] = None
                    leaf = optim.get(path)
                    if path in optim and str(leaf) != f"float32[{padded}]":
                        self._differ(OPTIM_FILE, path, "has another type or size", f"float32[{padded}]", short(leaf))
        there = [path for path, leaf in optim.items() if leaf not in CONTAINERS]
        self._check_sets(OPTIM_FILE, list(wanted), there)
        for path, leaf in wanted.items():
            if path.startswith("/per_bucket") and path in optim and not same_scalar(leaf, optim[path]):
                self._differ(OPTIM_FILE, path, "is another number", short(leaf), short(optim[path]))

    def _check_sets(self, file: str, wanted: list[str], there: list[str]) -> None:
        for path in sorted(set(wanted) - set(there)):
            self._differ(file, path, "is missing")
        for path in sorted(set(there) - set(wanted)):
            self._differ(file, path, "is there, and should not be")

    def _check_leaves(self, file: str, wanted: Mapping[str, Leaf], there: Mapping[str, Leaf]) -> None:
        """Everything that is not the model, leaf by leaf."""
        self._check_sets(file, list(wanted), list(there))
        for path in wanted.keys() & there.keys():
            one, other = wanted[path], there[path]
            if isinstance(one, TensorLeaf) and isinstance(other, TensorLeaf):
                self._same(file, path, one, other)
            elif not same_scalar(one, other):
                self._differ(file, path, "has another value", short(one), short(other))

    # --------------------------------------------------------------------------------------------------------- numbers

    def _same(self, file: str, path: str, one: TensorLeaf, other: TensorLeaf) -> None:
        """Two tensors, bit for bit."""
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            self._differ(file, path, "has another type or shape", str(one), str(other))
            return
        tally = Differing(one.dtype, one.dtype, strict=True)
        for start, stop in spans(one.numel, width(one.dtype)):
            tally.see(start, self._block(one, start, stop), self._block(other, start, stop))
        self.tensors += 1
        self._settle(file, path, tally, "differ")

    def _block(self, leaf: TensorLeaf, start: int, stop: int) -> Bytes:
        self.nbytes += (stop - start) * width(leaf.dtype)
        return leaf.elements.block(self.files, start, stop)

    def _check_weight(
        self, weight: ExpectedWeight, chunk: ExpectedChunk, model: Leaves, optim: Leaves, buffer: str
    ) -> None:
        """A parameter in both files and its moments in the buckets."""
        leaf = model.get(weight.leaf)
        source = weight.sources.get("param")
        if leaf is not None and source and str(leaf) != f"{weight.dtype}{list(source.shape)}":
            self._differ(
                MODEL_FILE, weight.leaf, "has another type or shape", f"{weight.dtype}{list(source.shape)}", short(leaf)
            )
            leaf = None
        stored = leaf if isinstance(leaf, TensorLeaf) else None
        for role, ref in weight.sources.items():
            bucket = optim.get(f"{buffer}/{role}/{weight.bucket}") if buffer and weight.bucket is not None else None
            room = isinstance(bucket, TensorLeaf) and bucket.dtype == "float32"
            if isinstance(bucket, TensorLeaf) and room and (weight.start or 0) + ref.numel <= bucket.numel:
                self._check_role(weight, role, ref, stored if role == "param" else None, bucket)
            elif role == "param" and stored:
                self._check_role(weight, role, ref, stored, None)

    def _check_role(
        self, weight: ExpectedWeight, role: str, ref: TensorRef, model: TensorLeaf | None, bucket: TensorLeaf | None
    ) -> None:
        """Read source, slice and weight side by side, once."""
        source, first = leaf_of(ref), weight.start or 0
        in_model, in_bucket, both = (
            Differing(weight.dtype, weight.dtype),
            Differing("float32", "float32", strict=True),
            Differing(weight.dtype, weight.dtype),
        )
        for start, stop in spans(source.numel, 4):
            data = self._block(source, start, stop)
            found = None if model is None else self._block(model, start, stop)
            part = None if bucket is None else self._block(bucket, first + start, first + stop)
            if found is not None:
                in_model.see(start, rounded(data, ref.dtype, weight.dtype), found)
            if part is not None:
                in_bucket.see(start, rounded(data, ref.dtype, "float32"), part)
            if found is not None and part is not None:
                both.see(start, rounded(part, "float32", weight.dtype), found)
        self.tensors += (model is not None) + (bucket is not None)
        self._settle(MODEL_FILE, weight.name, in_model, f"differ from the source {ref.name} as {weight.dtype}")
        self._settle(OPTIM_FILE, f"{role} of {weight.name}", in_bucket, f"differ from the source {ref.name}")
        self._settle(MODEL_FILE, weight.name, both, f"differ from param in {OPTIM_FILE} as {weight.dtype}")

    def _check_padding(self, chunk: ExpectedChunk, optim: Leaves, buffer: str) -> None:
        """What lies behind the last parameter of a bucket is zeros."""
        for number, (padded, used) in enumerate(chunk.buckets):
            for role in ROLES:
                leaf = optim.get(f"{buffer}/{role}/{number}")
                if not isinstance(leaf, TensorLeaf) or str(leaf) != f"float32[{padded}]":
                    continue
                tally = Differing("float32", "float32", strict=True)
                for start, stop in spans(padded - used, 4):
                    data = self._block(leaf, used + start, used + stop)
                    tally.see(used + start, np.zeros_like(data), data)
                self._settle(OPTIM_FILE, f"{buffer}/{role}/{number}", tally, "of the padding are not zero")


def _first_line(error: Ckpt2ptError) -> str:
    return error.what.splitlines()[0]


def _model_paths(chunk: ExpectedChunk) -> Iterator[str]:
    """Leaves of a chunk: weights in order, each module's ``_extra_state`` after its last parameter."""
    modules = [weight.name.rpartition(".")[0] for weight in chunk.weights]
    last = {module: number for number, module in enumerate(modules)}
    for number, (weight, module) in enumerate(zip(chunk.weights, modules, strict=True)):
        yield weight.leaf
        if last[module] == number and module.rpartition(".")[2] in HAS_EXTRA_STATE:
            folder, _, key = weight.leaf.rpartition("/")
            inner, dot, _ = key.rpartition(".")
            yield f"{folder}/{inner}{dot}_extra_state"
