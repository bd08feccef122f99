"""The template that pt_meta holds, files of ``torch`` before their bytes, and the parts of the trees inside them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from ckpt2pt.core.extents import Extent
from ckpt2pt.core.stated import Carried, Statement, carry
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.torchfile.archive import Layout, lay_out
from ckpt2pt.formats.torchfile.pickles import write_pickle
from ckpt2pt.formats.torchfile.trees import (
    Call,
    Global,
    Persistent,
    StoredTensor,
    Value,
    is_namespace,
    namespace_attrs,
    ordered_dict,
)
from ckpt2pt.io.inputs import quoted

_PLAIN = frozenset({int, float, str, bool, bytes, type(None)})
"""Types of values that name no storage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """One ``args_tp*_pp*.pt`` of pt_meta: the model file of a Megatron run without its weights."""

    path: str
    tree: dict[str, Value]
    storages: dict[str, Extent]
    defaults: frozenset[str] = frozenset()
    """Arguments that nobody stated, which have the default of Megatron-LM."""
    file: object = field(default=None, repr=False, compare=False)
    """What has to stay open for as long as ``path`` is read."""
    origin: str = ""
    """What it was made from, where ``path`` is a file in memory."""

    @property
    def where(self) -> str:
        """What errors are about."""
        return self.origin or self.path

    @property
    def args(self) -> dict[str, Value]:
        """Megatron's training arguments."""
        found = self.tree.get("args")
        return namespace_attrs(found) if is_namespace(found) else {}

    @property
    def global_batch_size(self) -> int | None:
        """Samples per iteration, None where the batch size was ramped up."""
        args = self.args
        size = args.get("global_batch_size")
        return size if isinstance(size, int) and size > 0 and not args.get("rampup_batch_size") else None

    @property
    def scheduler(self) -> dict[str, Value]:
        """The entry ``opt_param_scheduler``, empty where there is none."""
        found = self.tree.get("opt_param_scheduler")
        return {key: value for key, value in found.items() if isinstance(key, str)} if isinstance(found, dict) else {}

    @property
    def groups(self) -> list[dict[str, Value]]:
        """The parameter groups of a distributed optimizer, none where the entry has another form."""
        return [group for optimizer in self.optimizers for group in groups_of(optimizer)]

    @property
    def optimizers(self) -> list[Value]:
        """The states of the optimizers: of one, or, with expert parallelism, of dense parameters and of experts.

        Megatron-LM, megatron/core/optimizer/optimizer.py (``ChainedOptimizer``): a list in the ``torch`` format, a dictionary by
        number in a distributed checkpoint.
        """
        outer = self.tree.get("optimizer")
        if isinstance(outer, dict) and outer and all(type(key) is int for key in outer):
            return [*outer.values()]
        return outer if isinstance(outer, list) else [outer]

    def carried(self, statement: Statement) -> Carried:
        """What the source states otherwise of optimizer and scheduler."""
        return carry(statement, self.scheduler, self.groups)

    @property
    def gradients_as_parameters(self) -> bool:
        """True when gradients have the type of their parameters, as in fp16 unless stated otherwise; bf16 keeps float32."""
        return self.args.get("accumulate_allreduce_grads_in_fp32") is False


def groups_of(optimizer: Value) -> list[dict[str, Value]]:
    """The parameter groups of one optimizer, none where its state has another form."""
    inner = optimizer.get("optimizer") if isinstance(optimizer, dict) else None
    groups = inner.get("param_groups") if isinstance(inner, dict) else None
    found = groups if isinstance(groups, list) and all(isinstance(group, dict) for group in groups) else []
    return cast("list[dict[str, Value]]", found)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePayload:
    """One target file before its bytes: the pickle, and for each storage its size.

    The first ``len(storages) - len(copied)`` storages are filled by moves, the last ones are ``copied`` as they are.
    """

    name: str
    pickle: bytes
    storages: tuple[int, ...]
    copied: tuple[Extent | bytes, ...]
    mode: int = 0o644

    def lay_out(self) -> Layout:
        """The archive, named inside as torch names it: after the file."""
        return lay_out(self.name.rpartition(".")[0], self.pickle, self.storages)


def check_storages(keys: Iterable[str], storages: Container[str], where: str) -> None:
    """Refuse a pickle that names storages which its archive does not hold."""
    missing = sorted(key for key in keys if key not in storages)
    if missing:
        raise FormatError(
            f"the pickle names storages that the archive does not hold: {', '.join(map(quoted, missing[:4]))}",
            where=where,
            hint="copy the file again from where it was made",
        )


def tree_payload(tree: Mapping[str, Value], storages: Container[str], where: str) -> tuple[bytes, list[str]]:
    """The pickle of a small tree, and the keys of the storages it brings, in the order of their new numbers.

    Raises :class:`FormatError` for a key that ``storages`` lacks; ``where`` is the file that the tree is from.
    """
    keys: list[str] = []
    new = renumbered(dict(tree.items()), keys, 0)
    check_storages(keys, storages, where)
    return write_pickle(new), keys


def nested(entries: Iterable[tuple[tuple[str, ...], Value]]) -> Value:
    """The model of a legacy GPT chunk, as Megatron nests it: paths (``state_dict_path``) with what lies there."""
    root: dict[Value, Value] = {}
    inner: dict[tuple[str, ...], list[tuple[Value, Value]]] = {("language_model", "encoder"): []}
    for (*nesting, leaf), value in entries:
        inner.setdefault(tuple(nesting), []).append((leaf, value))
    # Megatron fills language_model in this order whatever came first in the buffer.
    order = {"embedding": 0, "encoder": 1, "output_layer": 2}
    for path, pairs in sorted(
        inner.items(), key=lambda item: (len(item[0]) == 1, order.get(item[0][1] if len(item[0]) > 1 else "", 3))
    ):
        node = root
        for segment in path[:-1]:
            node = cast("dict[Value, Value]", node.setdefault(segment, {}))
        node[path[-1]] = ordered_dict(pairs)
    return root


def _for_any_numpy(name: Global) -> Global:
    """numpy 2 pickles its arrays as numpy._core; the older name is the one that Megatron 0.6 wrote and both majors read."""
    return replace(name, module=name.module.replace("numpy._core.", "numpy.core.", 1))


def renumbered(tree: Value, copied: list[str], first: int, *, any_numpy: bool = True) -> Value:
    """Give each storage that the template brings a number after those of the weights; ``copied`` takes their keys.

    ``any_numpy`` writes names of numpy 2 as those that Megatron 0.6 knows.
    """
    numbers: dict[str, str] = {}
    seen: dict[int, Value] = {}

    def walk(value: Value) -> Value:
        if type(value) in _PLAIN or id(value) in seen:
            return seen.get(id(value), value)
        new: Value = value
        if isinstance(value, dict):
            new = {key: walk(item) for key, item in value.items()}
        elif isinstance(value, list):
            new = value if _PLAIN.issuperset(map(type, value)) else [walk(item) for item in value]
        elif isinstance(value, tuple):
            new = value if _PLAIN.issuperset(map(type, value)) else tuple(walk(item) for item in value)
        elif isinstance(value, Persistent):
            kind, storage_class, key, location, numel = cast("tuple[Value, ...]", value.id)
            number = numbers.setdefault(cast("str", key), str(first + len(numbers)))
            new = Persistent((kind, storage_class, number, location, numel))
        elif isinstance(value, StoredTensor):
            new = replace(value, key=numbers.setdefault(value.key, str(first + len(numbers))))
        elif isinstance(value, Global):
            new = _for_any_numpy(value) if any_numpy else value
        elif isinstance(value, Call):
            new = Call(
                func=_for_any_numpy(value.func) if any_numpy else value.func,
                args=cast("tuple[Value, ...]", walk(value.args)),
                new=value.new,
                state=walk(value.state),
                items=[walk(item) for item in value.items],
                pairs=[(key, walk(item)) for key, item in value.pairs],
            )
        seen[id(value)] = new
        return new

    found = walk(tree)
    copied.extend(numbers)
    return found
