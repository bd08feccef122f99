"""Importing this makes ``ConversionHook`` known to MindFormers, for ``callbacks: [{type: ConversionHook, ...}]`` in its YAML.

The static graph calls callbacks of mindspore, and sorts its own to the front, CheckpointMonitor among them; PyNative mode calls
callbacks of its own, those of the YAML after its CheckpointCallback (mindformers/trainer/base_trainer.py; mindformers 2.0.0,
mindformers/pynative/trainer/trainer.py, ``_create_callback_handler``).  The hook is one of either kind.
"""

# mindformers is not there where types are checked.
# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false, reportUntypedBaseClass=false

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from ckpt2pt.hooks import mindspore, submit_conversion

log = logging.getLogger("ckpt2pt.hooks")


class ConversionHook(mindspore.ConversionHook):
    """The same in trainings of MindFormers; ``output_dir`` names the folder of ``iteration_*`` where no callback says it."""

    def on_train_begin(self, run_context: Any, *state: Any, **more: Any) -> None:  # noqa: ANN401 - mindspore's, or MindFormers'
        """Say at once what would be noticed hours later.  In PyNative mode the first argument is the configuration."""
        if not state:
            super().on_train_begin(run_context)
        elif not Path(self._template).is_file():
            log.error("ConversionHook has no template: %s is not there", self._template)

    def on_train_end(self, run_context: Any, *state: Any, **more: Any) -> None:  # noqa: ANN401 - as above
        """Submit, on rank 0."""
        callbacks = mindspore.callbacks_of(run_context)
        monitors = [each for each in callbacks if getattr(each, "use_legacy_format", True) is False]
        if state:
            folder = _folder(getattr(run_context, "checkpoint", None), "save_path")
            self._submit(folder, getattr(state[0], "global_step", None))
        elif monitors:
            steps = (
                getattr(mindspore.parameters_of(run_context), "cur_step_num", None),
                getattr(monitors[-1], "_append_step_num", 0),
            )
            numbers = [one for one in steps if isinstance(one, int)]  # in this run, and before it
            self._submit(_folder(monitors[-1], "directory") or _default(), sum(numbers) if len(numbers) == 2 else None)
        else:
            super().on_train_end(run_context)

    def _submit(self, folder: str | None, iteration: object) -> None:
        folder = self._options["output_dir"] or folder
        if folder is None or not isinstance(iteration, int):
            log.error("no conversion is submitted: nothing says where the training saves, or its step; give output_dir")
            return
        options: dict[str, Any] = self._options | {"output_dir": folder}
        submit_conversion(
            self._template, step=iteration, iteration=iteration, rank=mindspore.rank_of_group(), **options
        )


def _folder(owner: object, name: str) -> str | None:
    found = getattr(owner, name, None)
    return str(found) if found else None


def _default() -> str:
    """Where ``save_checkpoint`` puts what no folder is given for."""
    from mindformers.tools.utils import get_output_subpath  # noqa: PLC0415

    return str(get_output_subpath("checkpoint", append_rank=False))


def _nothing(*_: object, **__: object) -> None:
    """Of an event that is none for the hook."""


# Callbacks of PyNative mode are called by their methods alone, and have those that a callback of mindspore has not.
for _event in ("on_begin", "on_end", "on_epoch_begin", "on_epoch_end", "on_step_begin", "on_step_end"):
    if not hasattr(ConversionHook, _event):
        setattr(ConversionHook, _event, _nothing)

MindFormerRegister.register(MindFormerModuleType.CALLBACK)(ConversionHook)
