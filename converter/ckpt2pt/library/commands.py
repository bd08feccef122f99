"""The commands as functions: compare, inspect and convert, with values instead of flags.

ckpt2pt.compare("ms_ckpt", "megatron_pt").same
ckpt2pt.convert(source="ms_ckpt", metadata="pt_meta", target="megatron_pt").document()
ckpt2pt.convert(source="megatron_pt", target="megatron_tp4", target_tp=4).document()
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ckpt2pt.conversion.spelling import in_python, of_function, spelled_document
from ckpt2pt.mapping.names import Rules

if TYPE_CHECKING:
    from ckpt2pt.request import Verify
    from ckpt2pt.run import Outcome
    from ckpt2pt.verification.compare import Comparison


@in_python("compare")
def compare(
    left: str | Path,
    right: str | Path,
    *,
    tp: int | None = None,
    pp: int | None = None,
    ignore: Collection[str] = (),
    ignore_padding: bool = False,
    rules: Rules | None = None,
) -> Comparison:
    """Compare two checkpoints bit for bit, as ``ckpt2pt verify A B`` does: any formats, any parallel sizes.

    ``tp`` and ``pp`` are the parallel sizes of a MindSpore training that does not tell them.  ``same`` of the result says
    whether all is equal, ``rows`` are the differences; nothing is raised for them.
    """
    from ckpt2pt.verification.across import compare_any  # noqa: PLC0415

    paths = (Path(left), Path(right))
    return compare_any(paths, (tp, pp), rules, ignore=ignore, ignore_padding=ignore_padding)


@in_python("inspect")
def inspect(path: str | Path, *, details: bool = False) -> dict[str, Any]:
    """What a file or a folder holds, by its headers: the document of ``ckpt2pt inspect --output json``."""
    from ckpt2pt.show.checkpoint import inspect as look  # noqa: PLC0415

    return cast("dict[str, Any]", spelled_document(look(Path(path), details=details), of_function("inspect")))


@in_python("convert")
def convert(
    *,
    source: str | Path,
    target: str | Path,
    metadata: str | Path | None = None,
    source_format: str = "auto",
    num_layers: int | None = None,
    tp: int | None = None,
    pp: int | None = None,
    vpp: int | None = None,
    dp: int | None = None,
    cp: int | None = None,
    target_tp: int | None = None,
    target_pp: int | None = None,
    target_vpp: int | None = None,
    noop_layers: Collection[int] | None = None,
    layers_per_stage: Sequence[int] | None = None,
    iteration: int | None = None,
    params_only: bool = False,
    overwrite: bool = False,
    verify: Verify = "digest",
    rules: Rules | None = None,
) -> Outcome:
    """Convert a checkpoint into one of Megatron-LM 0.6, as ``ckpt2pt convert`` does, in this process.

    ``source`` is a MindSpore training output, with ``metadata``, the ``pt_meta`` folder; or a Megatron checkpoint, which
    says itself what that would say.  ``source_format`` is ``auto``, ``mindspore``, ``ckpt``, ``safetensors`` or
    ``megatron``.  Sizes that are not given are those that metadata or checkpoint state; those of the
    result (``target_tp`` and its like) are those of the source unless they are given.  ``verify`` is ``none``, ``digest``
    or ``full``.  The same call after any interruption does what is missing.  Call it in the main thread: it heeds SIGTERM
    and SIGINT, after which it raises :class:`~ckpt2pt.errors.InterruptedRunError`.
    """
    from ckpt2pt.conversion import schema  # noqa: PLC0415
    from ckpt2pt.options.asked import source_format_of  # noqa: PLC0415
    from ckpt2pt.options.resolve import resolve_convert  # noqa: PLC0415
    from ckpt2pt.request import SILENCE  # noqa: PLC0415
    from ckpt2pt.run import run  # noqa: PLC0415

    names = rules or Rules()
    spec = schema.Spec(
        mode="ParamsOnly" if params_only else "Full",
        model=schema.Model(
            num_layers=num_layers,
            noop_layers=None if noop_layers is None else tuple(noop_layers),
            layers_per_stage=tuple(layers_per_stage) if layers_per_stage else None,
            rules=schema.rules_of(names),
        ),
        parallelism=schema.Parallelism(tensor=tp, pipeline=pp, virtual_pipeline=vpp, data=dp, context=cp),
        source=schema.Source(path=str(source), iteration=iteration, format=source_format_of(source_format)),
        metadata=schema.Place(path="" if metadata is None else str(metadata)),
        target=schema.Target(
            path=str(target),
            overwrite=overwrite,
            parallelism=schema.Degrees(tensor=target_tp, pipeline=target_pp, virtual_pipeline=target_vpp),
        ),
        verify=schema.LEVELS[verify],
    )
    request = resolve_convert(spec, in_process=True)
    return run(request, range(request.topology.pipeline), SILENCE)
