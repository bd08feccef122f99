"""A callback for ``mindspore.train.Model.train``: the last in the list, so that the last checkpoint is there before it.

Only this module imports mindspore; ``CallbackManager`` calls callbacks in the order of the list, and
``ModelCheckpoint.end`` makes the last save (mindspore/train/callback/_callback.py, _checkpoint.py; mindspore 2.10).
"""

# mindspore is not there where types are checked.
# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false, reportUntypedBaseClass=false

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mindspore.train import Callback

from ckpt2pt.hooks import rank_of_environment, submit_conversion

log = logging.getLogger("ckpt2pt.hooks")


class ConversionHook(Callback):  # type: ignore[misc]
    """Submits a conversion when the training has ended and saved; arguments as of :func:`ckpt2pt.hooks.submit_conversion`.

    Wrong arguments are a TypeError or ValueError here, before the training; nothing is raised into it.
    """

    def __init__(
        self,
        template: str,
        *,
        run: str | None = None,
        uid: str | None = None,
        namespace: str | None = None,
        output_dir: str | None = None,
        set_fields: Mapping[str, object] | None = None,
        ready_seconds: float = 300.0,
        request_seconds: float = 60.0,
    ) -> None:
        super().__init__()
        self._template = template
        self._options: dict[str, Any] = {
            "run": run,
            "uid": uid,
            "namespace": namespace,
            "output_dir": output_dir,
            "set_fields": dict(set_fields or {}),
            "ready_seconds": float(ready_seconds),
            "request_seconds": float(request_seconds),
        }

    def on_train_begin(self, run_context: Any) -> None:  # noqa: ANN401 - mindspore's
        """Say at once what would be noticed hours later."""
        callbacks = callbacks_of(run_context)
        if any(_saves(callback) for callback in callbacks[_place(self, callbacks) :]):
            log.error(
                "ConversionHook comes before ModelCheckpoint in the list of callbacks: list it last, it submits nothing now"
            )
        if not Path(self._template).is_file():
            log.error("ConversionHook has no template: %s is not there", self._template)

    def on_train_end(self, run_context: Any) -> None:  # noqa: ANN401 - mindspore's
        """Submit, on rank 0."""
        callbacks = callbacks_of(run_context)
        before = callbacks[: _place(self, callbacks)]
        latest = next((str(found) for each in reversed(before) if (found := _saves(each) and _latest(each))), None)
        if latest is None:
            log.error("no conversion is submitted: no ModelCheckpoint before ConversionHook has saved anything")
            return
        iteration = getattr(parameters_of(run_context), "cur_step_num", None)
        submit_conversion(
            self._template,
            latest=latest,
            rank=rank_of_group(),
            iteration=iteration if isinstance(iteration, int) else None,
            **self._options,
        )


def parameters_of(run_context: Any) -> Any:  # noqa: ANN401 - mindspore's
    """What a training says of itself; None where it says nothing."""
    try:
        return run_context.original_args()
    except (AttributeError, TypeError):
        return None


def callbacks_of(run_context: Any) -> Sequence[object]:  # noqa: ANN401 - mindspore's
    """All callbacks of a training, in their order."""
    found: object = getattr(parameters_of(run_context), "list_callback", None)
    found = getattr(found, "_callbacks", found)
    return cast("Sequence[object]", found) if isinstance(found, list | tuple) else ()


def _place(hook: object, callbacks: Sequence[object]) -> int:
    return next((place for place, callback in enumerate(callbacks) if callback is hook), len(callbacks))


def _saves(callback: object) -> bool:
    """ModelCheckpoint and what is made from it (mindformers' CheckpointMonitor) know their latest file."""
    return hasattr(type(callback), "latest_ckpt_file_name")


def _latest(callback: object) -> str:
    return str(getattr(callback, "latest_ckpt_file_name", "") or "")


def rank_of_group() -> int:
    """The rank in the group where there is one, else what the launcher says."""
    try:
        from mindspore.communication import get_rank  # noqa: PLC0415

        return int(get_rank())
    except (ImportError, RuntimeError, ValueError, TypeError, AttributeError):
        return rank_of_environment()
