"""The trees inside Megatron's two files, from a rank's plan and the template that pt_meta holds.

Megatron-LM cac60ce4: megatron/checkpointing.py (``save_checkpoint``) and
megatron/core/optimizer/distrib_optimizer.py (``save_parameter_state``).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from ckpt2pt.core import names
from ckpt2pt.core.extents import Extent
from ckpt2pt.core.moves import MODEL_FILE, OPTIM_FILE, OPTIM_KINDS, Storage, model_storages, optim_storages
from ckpt2pt.core.stage import ChunkPlan, RankPlan
from ckpt2pt.core.stated import Carried, Statement, carry
from ckpt2pt.core.training_step import TrainingStep
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
    tensor,
    with_attrs,
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


def model_payload(plan: RankPlan, template: Template, *, reference_samples: bool = False) -> FilePayload:
    """``model_optim_rng.pt``: the template with the weights and the true time put in.

    ``reference_samples`` zeroes ``consumed_train_samples`` as the reference converter does.
    """
    storages = model_storages(plan)
    weights = iter(range(len(storages)))
    model = {chunk.key: _model(chunk, storages, weights) for chunk in plan.chunks}
    copied: list[str] = []
    rest = cast("dict[str, Value]", renumbered(cast("Value", template.tree), copied, len(storages)))
    tree: dict[Value, Value] = {}
    for key, value in rest.items():
        if key != "param_name_list" and key not in model:
            tree[key] = value
        if key == "iteration":
            tree.update(model)
    if "iteration" not in tree:
        tree["iteration"] = plan.training_step.iteration
        tree.update(model)
    _set_time(tree, plan.training_step, reference_samples=reference_samples)
    _set_optimizer(tree, plan, template)
    check_storages(copied, template.storages, template.where)
    extents = tuple(template.storages[key] for key in copied)
    return FilePayload(
        name=MODEL_FILE,
        pickle=write_pickle(tree, check=False),
        storages=(*(storage.nbytes for storage in storages), *(extent.nbytes for extent in extents)),
        copied=extents,
    )


def optim_payload(plan: RankPlan, template: Template) -> FilePayload:
    """``distrib_optim.pt`` as Megatron 0.6 keeps it: padded buckets with their true and padded sizes.

    A buffer's key are the types of its parameters and of their gradients.
    """
    storages = optim_storages(plan)
    numbers = iter(range(len(storages)))
    padded: list[Value] = []
    unpadded: list[Value] = []
    buffers: list[dict[Value, Value]] = []
    for chunk in plan.chunks:
        if chunk.buffer is None:
            continue
        dtype = chunk.buffer.dtype
        key = (Global("torch", dtype), Global("torch", dtype if template.gradients_as_parameters else "float32"))
        buckets = chunk.buffer.buckets
        padded.append({key: [bucket.numel for bucket in buckets]})
        unpadded.append({key: [bucket.numel_unpadded for bucket in buckets]})
        buffers.append({key: {kind: [_tensor(storages, next(numbers)) for _ in buckets] for kind in OPTIM_KINDS}})
    tree: dict[Value, Value] = {"per_bucket_numel": padded, "per_bucket_numel_unpadded": unpadded}
    tree.update(enumerate(buffers))
    return FilePayload(
        name=OPTIM_FILE,
        pickle=write_pickle(tree, check=False),
        storages=tuple(storage.nbytes for storage in storages),
        copied=(),
    )


def payloads(plan: RankPlan, template: Template, *, reference_samples: bool = False) -> tuple[FilePayload, ...]:
    """The files of one rank: the model's, and the optimizer's in a full conversion."""
    model = model_payload(plan, template, reference_samples=reference_samples)
    return (model, optim_payload(plan, template)) if plan.full else (model,)


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


def _tensor(storages: Sequence[Storage], number: int) -> StoredTensor:
    storage = storages[number]
    return tensor(storage.dtype, str(number), storage.numel, 0, storage.shape)


def _model(chunk: ChunkPlan, storages: Sequence[Storage], numbers: Iterator[int]) -> Value:
    """The weights of a chunk; a module's ``_extra_state`` follows its last parameter."""
    entries: list[tuple[tuple[str, ...], Value]] = []
    for position, weight in enumerate(chunk.weights):
        path = names.state_dict_path(weight.name)
        entries.append((path, _tensor(storages, next(numbers))))
        module = weight.name.rpartition(".")[0]
        following = chunk.weights[position + 1].name if position + 1 < len(chunk.weights) else ""
        if module.rpartition(".")[2] in names.HAS_EXTRA_STATE and following.rpartition(".")[0] != module:
            leaf = f"{path[-1].rpartition('.')[0]}._extra_state".removeprefix(".")
            entries.append(((*path[:-1], leaf), None))
    return nested(entries)


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


def _set_time(tree: dict[Value, Value], training_step: TrainingStep, *, reference_samples: bool) -> None:
    """Put the source's iteration and sample count where Megatron looks for them."""
    tree["iteration"] = training_step.iteration
    if training_step.as_saved and not reference_samples:
        return
    args = tree.get("args")
    if isinstance(args, Call) and is_namespace(args):
        known = namespace_attrs(args)
        changes: dict[str, Value] = {"iteration": training_step.iteration} if "iteration" in known else {}
        if reference_samples:
            changes["consumed_train_samples"] = 0
        elif training_step.samples is not None:
            changes["consumed_train_samples"] = training_step.samples
        tree["args"] = with_attrs(args, changes)


def _set_optimizer(tree: dict[Value, Value], plan: RankPlan, template: Template) -> None:
    """Put what the source states into scheduler and groups, and the true time."""
    carried, training_step = template.carried(plan.stated), plan.training_step
    if training_step.as_saved:
        return
    scheduler = tree.get("opt_param_scheduler")
    if isinstance(scheduler, dict):
        time: dict[Value, Value] = {}
        if "num_steps" in scheduler and training_step.samples is not None:
            time["num_steps"] = training_step.samples
        tree["opt_param_scheduler"] = scheduler | dict(carried.scheduler.items()) | time
    outer = tree.get("optimizer")
    if template.groups and isinstance(outer, dict):
        inner = cast("dict[Value, Value]", outer["optimizer"])
        groups = cast("list[dict[Value, Value]]", inner["param_groups"])
        changed: list[Value] = [
            group | dict(more.items()) | {"step": training_step.iteration}
            for group, more in zip(groups, carried.groups, strict=True)
        ]
        tree["optimizer"] = {**outer, "optimizer": {**inner, "param_groups": changed}}


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
