"""The commands as functions: verify, inspect, plan and convert, with values instead of flags.

ckpt2pt.verify("ms_ckpt", "megatron_pt").same
ckpt2pt.convert(source="ms_ckpt", metadata="pt_meta", target="megatron_pt").document()
ckpt2pt.convert(source="megatron_pt", target="megatron_tp4", target_tp=4).document()
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Required, TypedDict, Unpack, cast

from ckpt2pt.core.names import Rules
from ckpt2pt.kube.conversion.spelling import in_python, of_function, spelled_document

if TYPE_CHECKING:
    from ckpt2pt.discover.request import Verify
    from ckpt2pt.run.conversion import Outcome
    from ckpt2pt.run.targets.request import AnyRequest
    from ckpt2pt.show.preview import Plan
    from ckpt2pt.verification.compare import Comparison


@in_python("verify")
def verify(
    left: str | Path,
    right: str | Path,
    *,
    tp: int | None = None,
    pp: int | None = None,
    ignore: Collection[str] = (),
    ignore_padding: bool = False,
    rules: Rules | None = None,
    mindformers_config: str | Path | None = None,
    use_interleaved_weight_layout_mlp: bool | None = None,
    use_contiguous_weight_layout_attention: bool | None = None,
) -> Comparison:
    """Compare two checkpoints bit for bit, as ``ckpt2pt verify A B`` does: any formats, any parallel sizes.

    ``tp`` and ``pp`` are the parallel sizes of a MindSpore training that does not tell them.  ``same`` of the result says
    whether all is equal, ``rows`` are the differences; nothing is raised for them.  The last three say of checkpoints of MindFormers
    what their files do not (docs/mindformers.md).
    """
    from ckpt2pt.formats.mindformers.flags import Flags  # noqa: PLC0415
    from ckpt2pt.verification.across import compare_any  # noqa: PLC0415

    paths = (Path(left), Path(right))
    flags = Flags.of(mindformers_config, use_interleaved_weight_layout_mlp, use_contiguous_weight_layout_attention)
    return compare_any(paths, (tp, pp), rules, ignore=ignore, ignore_padding=ignore_padding, mindformers=flags)


@in_python("inspect")
def inspect(path: str | Path, *, details: bool = False) -> dict[str, Any]:
    """What a file or a folder holds, by its headers: the document of ``ckpt2pt inspect --output json``."""
    from ckpt2pt.show.checkpoint import inspect as look  # noqa: PLC0415

    return cast("dict[str, Any]", spelled_document(look(Path(path), details=details), of_function("inspect")))


class Asked(TypedDict, total=False):
    """What a conversion is asked for.

    ``source`` is a MindSpore training output, with ``metadata``, the ``pt_meta`` folder; or a Megatron checkpoint, which
    says itself what that would say.  ``source_format`` is ``auto``, ``mindspore``, ``ckpt``, ``safetensors``,
    ``megatron``, ``msadapter``, ``huggingface`` or ``mindformers``, of which ``mindformers_config`` and the two flags below it say what its files
    do not, ``target_format`` ``megatron06``, ``megatron``, ``torch_dist``, ``mindspore`` or ``torch``.  Sizes that are not given are those
    that metadata or checkpoint state; those of the result (``target_tp`` and its like) are those of the source.
    ``verify`` is ``none``, ``digest`` or ``full``; given, it reads again what an earlier call finished.
    """

    source: Required[str | Path]
    target: Required[str | Path]
    metadata: str | Path | None
    source_format: str
    mindformers_config: str | Path | None
    use_interleaved_weight_layout_mlp: bool | None
    use_contiguous_weight_layout_attention: bool | None
    target_format: Literal["megatron06", "megatron", "torch_dist", "mindspore", "torch", "safetensors", "mindformers"]
    names: Literal["auto", "mcore", "legacy"]
    transformer_impl: Literal["auto", "local", "transformer_engine"]
    megatron_version: str | None
    num_layers: int | None
    tp: int | None
    pp: int | None
    vpp: int | None
    dp: int | None
    cp: int | None
    target_tp: int | None
    target_pp: int | None
    target_vpp: int | None
    target_ep: int | None
    vocab_size: int | None
    rope_scaling_factor: float | None
    tokenizer: str | Path | None
    mindformers_trainer: Literal["pynative", "graph"]
    noop_layers: Collection[int] | None
    layers_per_stage: Sequence[int] | None
    iteration: int | None
    params_only: bool
    overwrite: bool
    verify: Verify
    rules: Rules | None


@in_python("convert")
def convert(**asked: Unpack[Asked]) -> Outcome:
    """Carry out a conversion as ``ckpt2pt convert`` does, in this process; the arguments are those of :class:`Asked`.

    The same call after any interruption does what is missing.  Call it in the main thread: it heeds SIGTERM and SIGINT, after
    which it raises :class:`~ckpt2pt.errors.InterruptedRunError`.
    """
    from ckpt2pt.core.progress import SILENCE  # noqa: PLC0415
    from ckpt2pt.run.conversion import run  # noqa: PLC0415

    request = replace(_request(asked), reread=asked.get("verify") in {"digest", "full"})
    return run(request, range(request.topology.pipeline), SILENCE)


@in_python("convert")
def plan(**asked: Unpack[Asked]) -> Plan:
    """What :func:`convert` would do, from headers; nothing is written.

    ``document`` is that of ``ckpt2pt plan --output json``; ``check()`` raises what would keep it from being written.
    """
    from ckpt2pt.show.preview import planned  # noqa: PLC0415

    request = _request(asked)
    return planned(request, range(request.topology.pipeline))


def _request(asked: Asked) -> AnyRequest:
    from ckpt2pt.kube.asked import NAMES, TRANSFORMER_IMPLS, source_format_of, target_format_of  # noqa: PLC0415
    from ckpt2pt.kube.conversion import schema  # noqa: PLC0415
    from ckpt2pt.kube.resolve import resolve_any  # noqa: PLC0415

    layers, noop, metadata = asked.get("layers_per_stage"), asked.get("noop_layers"), asked.get("metadata")
    config = asked.get("mindformers_config")
    tokenizer = asked.get("tokenizer")
    spec = schema.Spec(
        mode="ParamsOnly" if asked.get("params_only") else "Full",
        model=schema.Model(
            num_layers=asked.get("num_layers"),
            noop_layers=None if noop is None else tuple(noop),
            layers_per_stage=tuple(layers) if layers else None,
            rules=schema.rules_of(asked.get("rules") or Rules()),
        ),
        parallelism=schema.Parallelism(
            tensor=asked.get("tp"),
            pipeline=asked.get("pp"),
            virtual_pipeline=asked.get("vpp"),
            data=asked.get("dp"),
            context=asked.get("cp"),
        ),
        source=schema.Source(
            path=str(asked["source"]),
            iteration=asked.get("iteration"),
            format=source_format_of(asked.get("source_format", "auto")),
            mindformers=schema.MindFormers(
                config=None if config is None else str(config),
                use_interleaved_weight_layout_mlp=asked.get("use_interleaved_weight_layout_mlp"),
                use_contiguous_weight_layout_attention=asked.get("use_contiguous_weight_layout_attention"),
            ),
        ),
        metadata=schema.Place(path="" if metadata is None else str(metadata)),
        target=schema.Target(
            path=str(asked["target"]),
            format=target_format_of(asked.get("target_format", "megatron06")),
            names=NAMES[asked.get("names", "auto")],
            transformer_impl=TRANSFORMER_IMPLS[asked.get("transformer_impl", "auto")],
            megatron_version=asked.get("megatron_version"),
            trainer="Graph" if asked.get("mindformers_trainer") == "graph" else "PyNative",
            overwrite=asked.get("overwrite", False),
            parallelism=schema.Degrees(
                tensor=asked.get("target_tp"),
                pipeline=asked.get("target_pp"),
                virtual_pipeline=asked.get("target_vpp"),
                expert=asked.get("target_ep"),
            ),
            huggingface=schema.HuggingFaceFiles(
                vocab_size=asked.get("vocab_size"),
                rope_scaling_factor=asked.get("rope_scaling_factor"),
                tokenizer_path=None if tokenizer is None else str(tokenizer),
            ),
        ),
        verify=schema.LEVELS[asked.get("verify", "digest")],
    )
    return resolve_any(spec, in_process=True)
