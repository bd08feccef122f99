"""Prove an import: a rank's MindSpore file, read as tensors, compared with the Megatron checkpoint's, element by element.

    checkpoint --formats.megatron--> tensors -+- the rank's box of each, gathered --+
    network.ckpt --names--> (role, name) ----------------------------------------+-- every bit; and the weights of the model file

The import goes from the buckets' offsets to entries and moves; here the names of the result are read back as a conversion
would read them, and the elements of the checkpoint are found by its index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, permutations
from pathlib import Path
from typing import NamedTuple, cast

from ckpt2pt.ckpt import index_file, read_scalars
from ckpt2pt.core.index import Index
from ckpt2pt.core.params import EMBEDDING, HEAD, axes_of, canonical_name, is_padded, layer_of
from ckpt2pt.core.tensor import Key, Role, Tensor, box_of, sharded
from ckpt2pt.errors import FormatError, UnmappedNameError
from ckpt2pt.mapping.names import NameTable, is_tied_head, without_pipeline_suffix
from ckpt2pt.mapping.topology import Rank, Topology
from ckpt2pt.plan.stated import STYLES, Stated
from ckpt2pt.pt.payload import Template
from ckpt2pt.tensors import Box, TensorRef
from ckpt2pt.verify.elements import Differing, rounded
from ckpt2pt.verify.examine import Difference
from ckpt2pt.verify.gather import Gathered
from ckpt2pt.verify.leaves import Files, leaf_of, spans
from ckpt2pt.verify.prove import NOTHING_PUBLISHED, Report, crcs_of

_ORDERS = 1000
Entries = Mapping[str, TensorRef]


class Held(NamedTuple):
    """What the checkpoint holds for a rank of the result.

    ``layout`` is None where ``tensors`` are those of the rank alone; else they are global, and this is how the result cuts
    them.  ``template`` is what is no tensor of the model, ``roles`` are those that are asked for, ``param`` among them for
    an import of the parameters alone.
    """

    tensors: Index
    layout: Topology | None
    template: Template
    iteration: int
    roles: Sequence[Role]


def prove_import(
    held: Held, rank: Rank, partials: Mapping[str, Path], table: NameTable, *, heed: Callable[[], None]
) -> Mapping[str, int]:
    """Compare a rank's files, which lie under temporary names, with the checkpoint; returns the CRC-32 of each.

    ``heed`` is called after every block, and may raise.  Raises :class:`VerificationError` for a difference, and
    :class:`FormatError` where the checkpoint contradicts itself: a weight that is not its float32 copy, rounded.
    """
    name, path = next(iter(partials.items()))
    with Files([path], lambda _: heed()) as files:
        proof = _Proof(held, rank, name, files)
        proof.run(index_file(path), table)
    crcs = crcs_of(partials, {str(path): sorted(files.pieces[str(path)])})
    for other, crc in crcs.items():  # the files of data-parallel ranks hold the same
        if crc != crcs[name]:
            proof.differ("file", f"is not that of {name}", file=other)
    Report(
        folder=str(path.parent),
        level="full",
        differences=tuple(proof.differences),
        checked_tensors=proof.tensors,
        checked_bytes=0,
    ).raise_differences(hint=NOTHING_PUBLISHED)
    return crcs


@dataclass(slots=True)
class _Proof:
    held: Held
    rank: Rank
    file: str
    files: Files
    differences: list[Difference] = field(default_factory=list[Difference])
    tensors: int = 0

    def differ(self, tensor: str, problem: str, expected: object = "", found: object = "", file: str = "") -> None:
        self.differences.append(
            Difference(file=file or self.file, tensor=tensor, problem=problem, expected=str(expected), found=str(found))
        )

    def run(self, entries: Entries, table: NameTable) -> None:
        """Every tensor and every scalar; nothing is missing, nothing besides."""
        known, _ = table.classify_all(entries, where=self.file)
        scalars = {entry: ref for entry, ref in entries.items() if known[entry].role == "ignored"}
        there: dict[tuple[str, str], TensorRef] = {}
        for entry, ref in entries.items():
            if entry in scalars:
                continue
            name = without_pipeline_suffix(known[entry].name)
            try:
                canonical = EMBEDDING if is_tied_head(name) else canonical_name(table.to_megatron(name))
            except UnmappedNameError as error:
                self.differ(entry, error.what)
                continue
            if there.setdefault((known[entry].role, canonical), ref) is not ref:
                self.differ(entry, f"is a second {known[entry].role} of {canonical}")
        for name in self._names():
            for role in self.held.roles:
                tensor = self.held.tensors.get(Key(role, name))
                stored = "param" if role == "main_param" else role
                place = stored, name
                if place not in there and name == EMBEDDING and self.rank[1] > 0:
                    place = stored, HEAD  # so MindSpore's files call the last stage's copy of tied embeddings
                if tensor is None or place not in there:
                    self.differ(f"{role}/{name}", "is missing" if tensor else "is not in the checkpoint")
                    continue
                self._compare(tensor, there.pop(place))
        for ref in there.values():
            self.differ(ref.name, "is there, and should not be")
        kinds = {_decays(ref) for entry, ref in entries.items() if entry not in scalars}
        self._check_scalars(scalars, kinds)

    def _names(self) -> Iterator[str]:
        """The parameters of the rank's stage."""
        names, layout, pp = dict.fromkeys(key.name for key in self.held.tensors), self.held.layout, self.rank[1]
        if layout is None:
            yield from names
            return
        layers = {layer for vpp in range(layout.virtual) for layer in layout.slots(pp, vpp)}
        last = pp == layout.pipeline - 1
        tied = self.held.template.args.get("untie_embeddings_and_output_weights") is False and HEAD not in names
        for name in names:
            layer = layer_of(name)
            if layer is not None:
                held = layer in layers
            elif name.startswith("embedding."):
                held = pp == 0 or (last and tied and name == EMBEDDING)
            else:
                held = last
            if held:
                yield name

    def _box(self, tensor: Tensor, ref: TensorRef) -> Box | None:
        """The rank's part of a tensor; None where the result has another shape."""
        layout = self.held.layout
        if layout is None:
            return ((0,) * len(tensor.shape), tensor.shape) if ref.shape == tensor.fused else None
        if len(ref.shape) != len(tensor.fused):
            return None
        gated = len(tensor.shape) > len(tensor.fused)
        axes = axes_of(tensor.key.name, ref.shape, layout.tensor, gated=gated)
        rows = self.held.template.args.get("padded_vocab_size")
        padded = is_padded(tensor.key.name) and axes.shape == (rows, *tensor.shape[1:])
        if axes.shape != tensor.shape and not padded:
            return None
        return box_of(sharded(axes.shape, axes.cut, self.rank[0], layout.tensor, 0, None))

    def _compare(self, tensor: Tensor, ref: TensorRef) -> None:
        """Read checkpoint and result side by side, once; and the weight beside its float32 copy."""
        box = self._box(tensor, ref)
        if box is None or ref.dtype != "float32":
            self.differ(ref.name, "has another type or shape", tensor, ref)
            return
        source, result = Gathered(tensor.dtype, tensor.views, box), leaf_of(ref)
        weight = self.held.tensors.get(Key("param", tensor.key.name)) if tensor.key.role == "main_param" else None
        weights = Gathered(weight.dtype, weight.views, box) if weight else None
        differing = Differing("float32", "float32", strict=True)
        for start, stop in spans(ref.numel, 4):
            expected = rounded(source.block(self.files, start, stop), tensor.dtype, "float32")
            differing.see(start, expected, result.elements.block(self.files, start, stop))
            if weights:
                own = Differing(weights.dtype, weights.dtype)
                own.see(start, rounded(expected, "float32", weights.dtype), weights.block(self.files, start, stop))
                if own.count:
                    raise _contradiction(tensor, own, self.held.template.path)
        self.tensors += 1
        if differing.count:
            self.differences.append(
                Difference(
                    file=self.file,
                    tensor=ref.name,
                    problem=f"{differing.count:,} of {differing.seen:,} elements differ from the source {tensor.key}",
                    count=differing.count,
                    index=differing.index,
                    expected=differing.shown[0],
                    found=differing.shown[1],
                )
            )

    # --------------------------------------------------------------------------------------------------------- scalars

    def _check_scalars(self, refs: Entries, kinds: set[bool]) -> None:
        """Iteration, parameter groups and scheduler.

        A rank of another layout has the groups of its own parameters, with weight decay and without (``kinds``), in any order.
        """
        values = {name: Stated(value, refs[name].dtype) for name, value in read_scalars(refs.values()).items()}
        groups = _groups(self.held.template)
        if self.held.layout and kinds <= {group.get("wd_mult") != 0 for group in groups}:
            groups = [group for group in groups if (group.get("wd_mult") != 0) in kinds]
        orders = islice(permutations(groups), _ORDERS) if self.held.layout else [groups]
        told = [list(_unlike(self._scalars(order), values)) for order in orders]
        for name, expected, found in min(told, key=len):
            self.differ(name, "has another value", expected, found)

    def _scalars(self, groups: Sequence[Mapping[str, object]]) -> dict[str, float]:
        found: dict[str, float] = {"step_num": self.held.iteration, "epoch_num": 0}
        for number, group in enumerate(groups):
            for key, value in group.items():
                if isinstance(value, int | float):
                    spelled = f"{'learning_rate' if key == 'lr' else key}_group_{number}"
                    found["state_step" if key == "step" else spelled] = value
        for key, value in _mapping(self.held.template.tree.get("opt_param_scheduler")).items():
            numeral: object = STYLES[key].index(str(value)) if key in STYLES and value is not None else value
            if isinstance(numeral, int | float):
                found[key] = numeral
        return found


def _unlike(wanted: Mapping[str, float], values: Mapping[str, Stated]) -> Iterator[tuple[str, object, object]]:
    for name in wanted.keys() | values.keys():
        expected, found = wanted.get(name), values.get(name)
        if expected is None or found is None:
            yield name, "nothing" if expected is None else expected, "nothing" if found is None else found.value
        elif not found.equals(int(expected) if found.dtype.startswith("int") else expected):
            yield name, expected, found.value


def _decays(ref: TensorRef) -> bool:
    """Megatron-LM cac60ce4, megatron/core/optimizer/__init__.py: biases and what has one dimension do not decay."""
    return len(ref.shape) > 1 and not ref.name.endswith(".bias")


def _groups(template: Template) -> list[Mapping[str, object]]:
    inner = _mapping(_mapping(template.tree.get("optimizer")).get("optimizer")).get("param_groups")
    return [_mapping(group) for group in cast("list[object]", inner)] if isinstance(inner, list) else []


def _mapping(value: object) -> Mapping[str, object]:
    return cast("Mapping[str, object]", value) if isinstance(value, dict) else {}


def _contradiction(tensor: Tensor, found: Differing, path: str) -> FormatError:
    return FormatError(
        f"{tensor.key.name} is not what the optimizer holds of it, from element {found.index} on",
        where=path,
        hint="make sure that the files are of one checkpoint of Megatron-LM 0.6, and save it again if they are",
    )
