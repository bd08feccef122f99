"""What a rank has to hold of a checkpoint: the names of its stage, and its box of each global tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ckpt2pt.core.index import Index
from ckpt2pt.core.params import EMBEDDING, HEAD, axes_of, is_padded, layer_of
from ckpt2pt.core.tensor import Key, Role, Tensor, box_of, sharded
from ckpt2pt.mapping.topology import Topology
from ckpt2pt.pt.payload import Template
from ckpt2pt.tensors import Box, Shape

_STANDS_FOR: dict[Role, Role] = {"param": "main_param", "main_param": "param"}


class Held(NamedTuple):
    """What the source of a conversion holds, for the ranks of its result.

    ``layout`` is None where ``tensors`` are those of one rank alone; else they are global, and this is how the result is
    laid out.  ``template`` is what is no tensor of the model, ``roles`` are those that are asked for: ``param`` alone for
    a conversion of the parameters.
    """

    tensors: Index
    layout: Topology | None
    template: Template
    iteration: int
    roles: Sequence[Role]

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

    def names(self, pp: int) -> Iterator[str]:
        """The parameters of a stage."""
        names, layout = dict.fromkeys(key.name for key in self.tensors), self.layout
        if layout is None:
            yield from names
            return
        layers = {layer for vpp in range(layout.virtual) for layer in layout.slots(pp, vpp)}
        last = pp == layout.pipeline - 1
        copied = last and HEAD not in names and self.template.args.get("untie_embeddings_and_output_weights") is False
        for name in names:
            layer = layer_of(name)
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
