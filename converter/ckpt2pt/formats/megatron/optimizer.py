"""The optimizer of a run without ``--use-distributed-optimizer``: whole tensors for each parameter in ``model_optim_rng.pt``.

    optimizer                       bf16, fp16: {optimizer: <torch's state_dict>, fp32_from_fp16_params: [[copy, ...], ...]}
                                    fp32:       <torch's state_dict>
    torch's state_dict              {state: {id: {exp_avg, exp_avg_sq}}, param_groups: [{wd_mult, ..., params: [id, ...]}, ...]}

Ids run through the groups; inside a group parameters stand in order of registration, chunk after chunk.  Without weight
decay are biases and what has one dimension (Megatron-LM cac60ce4, megatron/core/optimizer/__init__.py,
``_get_param_groups``, and core/optimizer/optimizer.py, ``Float16OptimizerWithFloat16Params.state_dict``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.errors import FormatError, aside
from ckpt2pt.formats.torchfile.trees import Value

_COPIES = "fp32_from_fp16_params"
_MOMENTS = ("exp_avg", "exp_avg_sq")

Weights = Sequence[Sequence[tuple[str, TensorRef]]]
"""For each model chunk its parameters in order of registration."""
Copies = tuple[Mapping[str, Mapping[str, TensorRef]], ...]
"""For each model chunk: name -> param, exp_avg, exp_avg_sq, all float32."""


def groups_alone(optimizer: Value) -> Value:
    """The groups without tensors and without ids of parameters, as the distributed optimizer saves them."""
    inner = optimizer.get("optimizer", optimizer) if isinstance(optimizer, dict) else None
    if not isinstance(inner, dict) or "state" not in inner:
        return optimizer
    found = inner.get("param_groups")
    groups: list[Value] = [
        {key: value for key, value in group.items() if key != "params"} if isinstance(group, dict) else group
        for group in (found if isinstance(found, list) else ())
    ]
    others = optimizer if isinstance(optimizer, dict) and inner is not optimizer else {}
    kept: dict[Value, Value] = {key: value for key, value in others.items() if key != _COPIES}
    kept["optimizer"] = {"param_groups": groups}
    return kept


def read_copies(
    optimizer: Value, weights: Weights, to_ref: Callable[[Value, str], TensorRef], *, where: Path
) -> Copies:
    """The float32 copy and both moments of every parameter.  Raises :class:`FormatError` when they do not fit the weights."""
    tree = _dictionary(optimizer, "the optimizer", where)
    mains = tree.get(_COPIES)
    torch_state = _dictionary(tree["optimizer"], "the optimizer", where) if "optimizer" in tree else tree
    state = _dictionary(torch_state.get("state"), "the optimizer's state", where)
    groups = [_dictionary(group, "a group", where) for group in _list(torch_state.get("param_groups"), where)]
    copies = [_list(group, where) for group in _list(mains, where)] if mains is not None else None
    found: list[dict[str, Mapping[str, TensorRef]]] = [{} for _ in weights]
    for number, (group, members) in enumerate(zip(groups, _members(groups, weights, where), strict=True)):
        ids = _list(group.get("params"), where)
        mine = copies[number] if copies is not None and number < len(copies) else None
        if len(ids) != len(members) or (copies is not None and (mine is None or len(mine) != len(ids))):
            _refuse(f"group {number} holds {len(ids)} parameters, the model has {len(members)} of its kind", where)
        for place, (chunk, name, weight) in enumerate(members):
            moments = _dictionary(state.get(ids[place]), f"the state of {name}", where)
            refs = {kind: to_ref(moments.get(kind), f"{kind} of {name}") for kind in _MOMENTS}
            refs["param"] = weight if mine is None else to_ref(mine[place], f"the float32 copy of {name}")
            for kind, ref in refs.items():
                if ref.dtype != "float32" or ref.shape != weight.shape:
                    _refuse(f"{kind} of {name} is {ref.dtype}{list(ref.shape)}, not float32{list(weight.shape)}", where)
            found[chunk][name] = refs
    return tuple(found)


def _members(
    groups: Sequence[Mapping[Value, Value]], weights: Weights, where: Path
) -> list[list[tuple[int, str, TensorRef]]]:
    """The parameters of each group: those with weight decay, and those without."""
    kinds = [group.get("wd_mult") != 0 for group in groups]
    if len(set(kinds)) != len(kinds):
        _refuse("several groups with weight decay, or several without", where)
    members: dict[bool, list[tuple[int, str, TensorRef]]] = {kind: [] for kind in kinds}
    for chunk, named in enumerate(weights):
        for name, ref in named:
            decays = not name.endswith(".bias") and len(ref.shape) != 1
            if decays not in members:
                _refuse(f"no group is there for {name}", where)
            members[decays].append((chunk, name, ref))
    return [members[kind] for kind in kinds]


def _dictionary(value: Value, what: str, where: Path) -> Mapping[Value, Value]:
    if not isinstance(value, dict):
        _refuse(f"{what} is not a dictionary", where)
    return value


def _list(value: Value, where: Path) -> Sequence[Value]:
    if not isinstance(value, list):
        _refuse("a list of the optimizer is missing", where)
    return value


def _refuse(what: str, where: Path) -> NoReturn:
    raise FormatError(
        f"the optimizer does not fit the model: {what}",
        where=where,
        hint=f"import weights alone{aside('mode')}",
    )
