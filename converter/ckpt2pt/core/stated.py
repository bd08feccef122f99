"""What a MindSpore file states of optimizer and scheduler, and where Megatron-LM keeps the same.  Pure.

max_lr, lr_decay_steps, ...                          -> opt_param_scheduler
learning_rate_group_0, weight_decay_group_1, ...     -> optimizer.param_groups

Names and types: MindSpeed-Core-MS feature-0.1 (mindspeed_ms/core/optimizer, tools/converter/convert_pt2ckpt.py).  A group's
number is MindSpore's own; Megatron orders its groups by their first parameters, so groups are matched by weight decay.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

SCHEDULER = ("max_lr", "min_lr", "lr_warmup_steps", "lr_decay_style", "lr_decay_steps", "start_wd", "end_wd",
             "wd_incr_style", "wd_incr_steps")  # fmt: skip
STYLES = {
    "lr_decay_style": ("constant", "WSD", "linear", "cosine", "inverse-square-root"),
    "wd_incr_style": ("constant", "linear", "cosine"),
}
"""MindSpeed-Core-MS stores a style as its place in these lists."""
_GROUP = re.compile(
    r"(learning_rate|weight_decay|max_lr|min_lr|eps|bias_correction|lr_mult|wd_mult|is_expert_parallel|is_decoupled_lr)"
    r"_group_(\d{1,4})"
)
_SPELLED = {"learning_rate": "lr"}
_PROGRESS = frozenset({"lr", "weight_decay"})
"""What changes in the course of a training: a template of another step differs, and contradicts nothing."""

Number = bool | int | float | str


@dataclass(frozen=True, slots=True)
class Stated:
    """A number as a file holds it.  float32 is less than the float that Megatron keeps, and equal where it rounds to it."""

    value: Number
    dtype: str

    def equals(self, other: object) -> bool:
        """Whether the file would say the same of ``other``."""
        if isinstance(self.value, str) or not isinstance(other, int | float):
            return self.value == other
        if self.dtype != "float32":
            return self.value == other
        with suppress(OverflowError):
            return struct.pack("<f", self.value) == struct.pack("<f", other)
        return False

    @property
    def exact(self) -> Number:
        """The number that was meant: of a float32 the one with the fewest digits that rounds to it."""
        if self.dtype != "float32" or isinstance(self.value, str):
            return self.value
        return next((n for digits in range(6, 10) if self.equals(n := float(f"{self.value:.{digits}g}"))), self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """All that a file states: scheduler entries by Megatron's names, and groups by number; ``names`` are its entries."""

    scheduler: Mapping[str, Stated] = field(default_factory=dict[str, Stated])
    groups: Mapping[int, Mapping[str, Stated]] = field(default_factory=dict[int, Mapping[str, Stated]])
    names: frozenset[str] = frozenset()

    def in_all_groups(self, key: str) -> Stated | None:
        """What all groups that say it say alike."""
        found = [group[key] for group in self.groups.values() if key in group]
        return found[0] if found and all(one.equals(found[0].value) for one in found) else None


def is_stated(name: str) -> bool:
    """Whether an entry of a MindSpore file is one that :func:`read_statement` takes."""
    return name in SCHEDULER or _GROUP.fullmatch(name) is not None


def read_statement(values: Mapping[str, Stated]) -> Statement:
    """Sort the entries of a file for which :func:`is_stated` holds; a style becomes its name."""
    scheduler: dict[str, Stated] = {}
    groups: dict[int, dict[str, Stated]] = {}
    taken: set[str] = set()
    for name, stated in values.items():
        group = _GROUP.fullmatch(name)
        if group:
            groups.setdefault(int(group[2]), {})[_SPELLED.get(group[1], group[1])] = stated
        elif name in STYLES:
            styles, index = STYLES[name], stated.value
            if not isinstance(index, int) or not 0 <= index < len(styles):
                continue
            scheduler[name] = Stated(styles[index], "str")
        else:
            scheduler[name] = stated
        taken.add(name)
    return Statement(scheduler=scheduler, groups=groups, names=frozenset(taken))


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """Values that take the place of a template's: of the scheduler, and of each group.  ``conflicts`` tells of settings."""

    scheduler: Mapping[str, Number]
    groups: tuple[Mapping[str, Number], ...]
    conflicts: tuple[str, ...]


def carry(statement: Statement, scheduler: Mapping[str, object], groups: Sequence[Mapping[str, object]]) -> Carried:
    """What the file states otherwise than the template; a value that says the same stays as Megatron saved it."""
    conflicts: dict[str, None] = {}

    def differing(stated: Mapping[str, Stated], known: Mapping[str, object]) -> dict[str, Number]:
        found: dict[str, Number] = {}
        for key, one in stated.items():
            if key not in known or one.equals(known[key]):
                continue
            found[key] = bool(one.value) if isinstance(known[key], bool) else one.exact
            if key not in _PROGRESS:
                conflicts[f"{key} {found[key]} (not {known[key]})"] = None
        return found

    state = differing(statement.scheduler, scheduler)
    return Carried(
        scheduler=state,
        groups=tuple(differing(_matching(statement, group), group) for group in groups),
        conflicts=tuple(conflicts),
    )


def _matching(statement: Statement, group: Mapping[str, object]) -> dict[str, Stated]:
    """What the file's groups of the same weight decay say alike; where nothing tells their decay, what all say alike."""
    wanted = bool(group.get("wd_mult", 1.0))
    kinds = [decays(one) for one in statement.groups.values()]
    distinct = len(set(kinds)) > 1 and None not in kinds
    alike = [one for one, kind in zip(statement.groups.values(), kinds, strict=True) if not distinct or kind == wanted]
    keys = dict.fromkeys(key for one in alike for key in one if key != "wd_mult")
    found = {key: [one[key] for one in alike if key in one] for key in keys}
    stated = {key: values[0] for key, values in found.items() if all(one.equals(values[0].value) for one in values)}
    if not group.get("is_decoupled_lr"):  # such a group has limits of its own
        for key in ("max_lr", "min_lr"):
            if key not in found and key in statement.scheduler:
                stated[key] = statement.scheduler[key]
    return stated


def decays(group: Mapping[str, Stated]) -> bool | None:
    """Whether the weights of a group decay; None where it does not say."""
    for key in ("wd_mult", "weight_decay"):
        if key in group:
            return bool(group[key].value)
    return None
