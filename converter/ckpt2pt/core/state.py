"""What a checkpoint holds besides tensors: time, arguments, parameter groups, scheduler, seed.  Pure: plain values.

pt_meta, a Megatron source, a launch script  -.
                                               >  State  -->  what the writer of a format puts into its own files
what a MindSpore file states                 -'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from ckpt2pt.errors import MissingInputError, ref

Values = Mapping[str, object]
"""Names as Megatron has them; bool, int, float, str, None, and lists, tuples and dictionaries of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """``args`` are training arguments by Megatron's names, without any that is no plain value.

    ``samples`` are consumed training samples, None where nothing tells them; ``step`` counts steps of the optimizer, which are
    fewer than iterations where some were skipped.  ``groups`` hold hyperparameters of the parameter groups, ``wd_mult`` 0
    for what does not decay.  ``scaler`` is the state of an fp16 training's loss scale (``scale``, ``growth_tracker``,
    ``hysteresis_tracker``), empty where the scale is constant, None for other trainings.  ``where`` names what was read,
    ``assumed`` what nobody said.
    """

    where: str
    iteration: int
    samples: int | None
    step: int
    args: Values = field(default_factory=dict[str, object])
    groups: tuple[Values, ...] = ()
    scheduler: Values = field(default_factory=dict[str, object])
    scaler: Values | None = None
    assumed: Values = field(default_factory=dict[str, object])

    @property
    def sizes(self) -> dict[str, int | bool]:
        """The arguments that are whole numbers or switches."""
        return {name: value for name, value in self.args.items() if isinstance(value, int)}

    def number(self, name: str) -> int:
        """An argument that the result needs.  Raises :class:`MissingInputError` where nothing states it."""
        value = self.args.get(name)
        if type(value) is not int or value < 1:
            raise MissingInputError(
                f"nothing states {name}" if value is None else f"{name} is {value!r}",
                where=self.where,
                hint=f"give a pt_meta, or the launch script of the Megatron run, in {ref('metadata.path')}",
                field="metadata.path",
            )
        return value

    def group(self, *, decays: bool, experts: bool = False) -> Values:
        """The hyperparameters of what decays, or of what does not, with the true ``step``.

        ``experts`` asks for those of experts with an optimizer of their own; where nobody stated them they are those of the rest.
        """
        alike = [group for group in self.groups if bool(group.get("wd_mult", 1.0)) == decays]
        own = (group for group in alike if bool(group.get("is_expert_parallel")) == experts)
        found = next(own, next(iter(alike), None))
        if found is None:
            raise MissingInputError(
                f"nothing states the hyperparameters of parameters with{'' if decays else 'out'} weight decay",
                where=self.where,
                hint=f"give a pt_meta, or the launch script of the Megatron run, in {ref('metadata.path')}",
                field="metadata.path",
            )
        return {
            **found,
            **({"is_expert_parallel": experts} if "is_expert_parallel" in found else {}),
            "step": self.step,
        }


def plain_values(values: Mapping[str, object]) -> dict[str, object]:
    """Those of ``values`` that are plain: objects of a framework are left out."""
    return {name: value for name, value in values.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, cast("list[object]", value)))
    if isinstance(value, dict):
        return all(_is_plain(one) for pair in cast("dict[object, object]", value).items() for one in pair)
    return value is None or type(value) in {bool, int, float, str}
