"""The tensors of a rank's files against those of the source: two indexes, each made by the reader of its format.

    source --reader--> (role, name): tensor -+- the rank's box, gathered block by block ---+
    files  --reader--> (role, name): tensor -+- block by block --------------------------- bits, or rounded to nearest even

Nothing here knows a format, nor how the files were made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from ckpt2pt.core.extents import Box, Shape
from ckpt2pt.core.index import Index
from ckpt2pt.core.params import EMBEDDING, HEAD, axes_of, expert_count, expert_of, is_buffer, is_padded, layer_of
from ckpt2pt.core.tensor import Key, Role, Tensor, box_of, sharded
from ckpt2pt.core.topology import Rank, Topology
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.verification.elements import Differing, rounded
from ckpt2pt.verification.gather import Files, Gathered, gathered, spans
from ckpt2pt.verification.report import Findings

_TIED = {HEAD: EMBEDDING, EMBEDDING: HEAD}
_STANDS_FOR: dict[Role, Role] = {"param": "main_param", "main_param": "param"}


class Held(NamedTuple):
    """What the source of a conversion holds, for the ranks of its result.

    ``layout`` is None where ``tensors`` are those of one rank alone; else they are global, and this is how the result is
    laid out, over ``expert`` expert parallel ranks besides.  ``template`` is what is no tensor of the model, ``roles`` are those that are asked for: ``param`` alone for
    a conversion of the parameters.
    """

    tensors: Index
    layout: Topology | None
    template: Template
    iteration: int
    roles: Sequence[Role]
    expert: int = 1

    def find(self, role: Role, name: str) -> Tensor | None:
        """What a tensor of the result is made from; a weight and its main parameter stand for each other."""
        found = self.tensors.get(Key(role, name))
        if found is None and role in _STANDS_FOR:
            found = self.tensors.get(Key(_STANDS_FOR[role], name))
        return found

    def weight_of(self, tensor: Tensor) -> Tensor | None:
        """The source's own weight of a main parameter, where the result has no weight of its own."""
        beside = tensor.key.role == "main_param" and "param" not in self.roles
        return self.tensors.get(Key("param", tensor.key.name)) if beside else None

    def experts(self, ep: int) -> range:
        """The global numbers of the experts of an expert parallel rank."""
        each = expert_count(key.name for key in self.tensors) // self.expert
        return range(ep * each, (ep + 1) * each)

    def names(self, pp: int, ep: int = 0) -> Iterator[str]:
        """The parameters of a stage, and of experts those of the rank ``ep``."""
        names, layout = dict.fromkeys(key.name for key in self.tensors), self.layout
        if layout is None:
            yield from names
            return
        layers = {layer for vpp in range(layout.virtual) for layer in layout.slots(pp, vpp)}
        last, experts = pp == layout.pipeline - 1, self.experts(ep)
        copied = last and HEAD not in names and self.template.args.get("untie_embeddings_and_output_weights") is False
        for name in names:
            layer, number = layer_of(name), expert_of(name)
            if number is not None and number not in experts:
                continue
            if layer is not None:
                held = layer in layers
            elif name.startswith("embedding."):
                held = pp == 0 or (copied and name == EMBEDDING)
            else:
                held = last
            if held:
                yield name

    def box(self, tensor: Tensor, shape: Shape, tp: int) -> Box | None:
        """The rank's part of a tensor; None where the result, which has ``shape``, holds none of that shape."""
        layout = self.layout
        if layout is None:
            return ((0,) * len(tensor.shape), tensor.shape) if shape == tensor.fused else None
        if len(shape) != len(tensor.fused):
            return None
        gated = len(tensor.shape) > len(tensor.fused)
        axes = axes_of(tensor.key.name, shape, layout.tensor, gated=gated)
        rows = self.template.args.get("padded_vocab_size")
        padded = is_padded(tensor.key.name) and axes.shape == (rows, *tensor.shape[1:])
        if axes.shape != tensor.shape and not padded:
            return None
        return box_of(sharded(axes.shape, axes.cut, tp, layout.tensor, 0, None))


class Place(NamedTuple):
    """Where a tensor has to be: its file, what that calls it, its type there, and the key that a loader looks for."""

    file: str
    name: str
    dtype: str
    leaf: str = ""


class _Side(NamedTuple):
    """Something that has to be the source, as its own type."""

    place: Place
    elements: Gathered
    tally: Differing


@dataclass(frozen=True, slots=True)
class TensorComparison:
    """The tensors of a rank's files, ``result``, against what ``held`` says; ``places`` are all that have to be there."""

    held: Held
    rank: Rank
    result: Index
    places: Mapping[Key, Place]
    findings: Findings
    files: Files
    ep: int = 0
    """The rank's place among expert parallel ranks; of those but the first, dense parameters have no optimizer state."""

    def _roles(self, name: str) -> Sequence[Role]:
        return self.held.roles[:1] if is_buffer(name) or (self.ep and expert_of(name) is None) else self.held.roles

    def run(self) -> None:
        """Compare every tensor of the source that is the rank's; nothing may be missing, and nothing besides."""
        complete = not self.findings.differences  # else the structure of the files has reported what is missing
        wanted = dict.fromkeys(self.places) | dict.fromkeys(self.result if complete else ())
        matched: set[Key] = set()
        for name in self.held.names(self.rank[1], self.ep):
            roles = self._roles(name)
            keys = {role: self._saved_as(Key(role, name)) for role in roles}
            sources = {role: found for role in roles if (found := self.held.find(role, name))}
            wanted |= dict.fromkeys(keys.values())
            matched.update(keys[role] for role in sources)
            for source in {found.key: found for found in sources.values()}.values():
                self._compare(source, [keys[role] for role, found in sources.items() if found is source], complete)
        for key in wanted:
            if key not in matched:
                self.findings.differ("", str(key), "is not in the source")

    def _saved_as(self, key: Key) -> Key:
        """Tied embeddings have two names; each copy in the source is compared with the one of the result."""
        other = key._replace(name=_TIED.get(key.name, key.name))
        return key if key in self.places or other not in self.places else other

    def _compare(self, source: Tensor, keys: Iterable[Key], complete: bool) -> None:
        results: list[tuple[Place, Tensor]] = []
        boxes: list[Box] = []
        for key in keys:
            place, target = self.places.get(key), self.result.get(key)
            if place is None or target is None:
                if place is None or complete:
                    self.findings.differ("", str(key), "is in the source, and not in the result")
                continue
            box = self.held.box(source, target.fused, self.rank[0])
            if box is None or target.dtype != place.dtype:
                kinds = (f"{dtype}{list(one.fused)}" for dtype, one in ((place.dtype, source), (target.dtype, target)))
                self.findings.differ(place.file, place.name, "has another type or shape", *kinds)
                continue
            results.append((place, target))
            boxes.append(box)
        if not results:
            return
        # A rank's own file may hold a tied weight under two names.
        copies = source.replicas if self.held.layout is None else ()
        for views in (source.views, *((view,) for view in copies)):
            self._compare_elements(source, Gathered(source.dtype, views, boxes[0]), results)

    def _compare_elements(self, source: Tensor, elements: Gathered, results: Sequence[tuple[Place, Tensor]]) -> None:
        """Read the source once, and beside it all that is made from it: a weight and its main parameter.

        So is a weight of the source itself that the result does not have.
        """
        sides, weight = [_side(place, gathered(tensor)) for place, tensor in results], self.held.weight_of(source)
        own = (
            [_side(Place("", "", weight.dtype), replace(elements, dtype=weight.dtype, views=weight.views))]
            if weight
            else []
        )
        between = Differing(sides[0].place.dtype, sides[0].place.dtype)
        for start, stop in spans(math.prod(elements.box[1]), 4):
            data = elements.block(self.files, start, stop)
            blocks = [side.elements.block(self.files, start, stop) for side in (*sides, *own)]
            for side, block in zip((*sides, *own), blocks, strict=True):
                side.tally.see(start, rounded(data, source.dtype, side.place.dtype), block)
            if len(sides) > 1 and any(side.tally.count for side in sides):
                # Whether the two agree tells which of them is wrong, or that it is the source.
                between.see(start, rounded(blocks[1], sides[1].place.dtype, between.left), blocks[0])
                between.seen = stop
        for side in sides:
            self.findings.tensors += 1
            as_type = "" if side.place.dtype == "float32" else f" as {side.place.dtype}"
            problem = f"differ from the source {source.key}{as_type}"
            self.findings.settle(side.place.file, side.place.name, side.tally, problem)
        for first, second in pairwise(sides):
            problem = f"differ from {second.place.name} in {second.place.file} as {between.left}"
            self.findings.settle(first.place.file, first.place.name, between, problem)
        if own and own[0].tally.count:
            raise FormatError(
                f"{source.key.name} is not what the optimizer holds of it, from element {own[0].tally.index} on",
                where=self.held.template.where,
                hint="make sure that the files are of one checkpoint of Megatron-LM 0.6, and save it again if they are",
            )


def _side(place: Place, elements: Gathered) -> _Side:
    return _Side(place, elements, Differing(place.dtype, place.dtype, strict=place.dtype == "float32"))
