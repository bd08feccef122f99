"""Metadata of a conversion to a Megatron after 0.6: a ``pt_meta`` folder, or a description (the launch script, or YAML)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

from ckpt2pt.core.layout import Parameter
from ckpt2pt.formats.checkpoint import Checkpoint
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.ptmeta.arguments import complete
from ckpt2pt.formats.ptmeta.defaults import reported_by_checkpoint
from ckpt2pt.formats.ptmeta.describe import describe
from ckpt2pt.formats.ptmeta.metadata import METADATA, read_arguments
from ckpt2pt.formats.ptmeta.schedule import param_groups, scheduler
from ckpt2pt.formats.torchfile.trees import Value, namespace
from ckpt2pt.io.paths import is_file

_SILENT = ("transformer_impl", "use_mcore_models", "tensor_model_parallel_size", "padded_vocab_size")
"""Arguments whose default in 0.6 says nothing of a later run."""
_BOTH = (
    Parameter(name="weight", shape=(1, 1), dtype="float32"),
    Parameter(name="bias", shape=(1,), dtype="float32"),
)
"""One parameter that decays, and one that does not."""


def template_at(path: Path, checkpoint: Checkpoint, *, allow: tuple[str, ...] = ()) -> Template:
    """What metadata says that is no tensor; ``checkpoint`` is the source, which fills in what a description leaves out.

    Raises :class:`UsageError` for a description that is not one, or of a run whose state cannot be made from it.
    """
    if not is_file(path, METADATA):
        return read_arguments(path, (0, 0), allow=allow)
    said = describe(path)
    stated = reported_by_checkpoint(said.given, checkpoint.statement, {})
    found = complete(replace(said, given={**said.given, **stated}), data=None, vocabulary=None, today=True)
    args = {name: value for name, value in found.values.items() if name not in _SILENT or name in said.given}
    iteration = checkpoint.iteration or 0
    samples = checkpoint.samples
    state = scheduler(args, iteration * found.number("global_batch_size") if samples is None else samples)
    groups = param_groups(args, state, _BOTH, step=iteration)
    return Template(
        path=str(path),
        tree={
            "args": namespace(cast("dict[str, Value]", args)),
            "optimizer": {"optimizer": {"param_groups": groups}},
            "opt_param_scheduler": dict(state.items()),
        },
        storages={},
        defaults=frozenset(found.defaults),
    )
