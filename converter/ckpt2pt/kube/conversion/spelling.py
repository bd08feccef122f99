"""How the edges spell the fields that a text names by ``ckpt2pt.errors.ref``: as a flag, as an argument in Python, as a path of the
document.  Each in one table.  Pure.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from ckpt2pt.errors import FIELDS, Ckpt2ptError, Spell, rendered

if TYPE_CHECKING:
    import argparse

_LAYOUT = {
    "model":                              "--num-layers --noop --stage-list",
    "model.numLayers":                    "--num-layers",
    "model.noopLayers":                   "--noop",
    "model.layersPerStage":               "--stage-list",
    "model.rules":                        "--rules",
    "parallelism":                        "--tp-size --pp-size --vpp-size --dp-size --cp-size",
    "parallelism.tensor":                 "--tp-size",
    "parallelism.pipeline":               "--pp-size",
    "parallelism.virtualPipeline":        "--vpp-size",
    "parallelism.data":                   "--dp-size",
    "parallelism.context":                "--cp-size",
    "target.parallelism.tensor":          "--target-tp-size",
    "target.parallelism.pipeline":        "--target-pp-size",
    "target.parallelism.virtualPipeline": "--target-vpp-size",
}  # fmt: skip
_MINDSPORE = {
    "target.mindspore":                   "--format --file-prefix --generate-all-dp-cp --dist-opt-content",
    "target.mindspore.format":            "--format",
    "target.mindspore.prefix":            "--file-prefix",
    "target.mindspore.allReplicas":       "--generate-all-dp-cp",
    "target.mindspore.contents":          "--dist-opt-content",
}  # fmt: skip
_MINDFORMERS = {
    "source.mindformers.config":          "--mindformers-config",
    "source.mindformers.useInterleavedWeightLayoutMlp":      "--use-interleaved-weight-layout-mlp",
    "source.mindformers.useContiguousWeightLayoutAttention": "--use-contiguous-weight-layout-attention",
}  # fmt: skip
_RUN = {
    "verify":                             "--verify",
    "workers.processes":                  "--process-limit",
    "workers.rankTimeoutSeconds":         "--process_timeout",
}  # fmt: skip
_CONVERSION = {
    **_LAYOUT,
    **_MINDSPORE,
    "mode":                               "--convert-param-only",
    "source.path":                        "--ms-path",
    "source.format":                      "--source-format",
    **_MINDFORMERS,
    "source.optShardInfoPath":            "--opt-shard-info-path",
    "metadata.path":                      "--param-map-path",
    "target.path":                        "--megatron-path",
    "target.format":                      "--target-format",
    "target.names":                       "--names",
    "target.transformerImpl":             "--transformer-impl",
    "target.megatronVersion":             "--megatron-version",
    "target.trainer":                     "--mindformers-trainer",
    "target.dataParallel":                "--target-dp-size",
    "target.parallelism.expert":          "--target-ep-size",
    "target.zeroConsumedSamples":         "--zero-consumed-samples",
    "target.huggingface":                 "--vocab-size --rope-scaling-factor --tokenizer-from",
    "target.huggingface.vocabSize":       "--vocab-size",
    "target.huggingface.ropeScalingFactor": "--rope-scaling-factor",
    "target.huggingface.tokenizerPath":   "--tokenizer-from",
}  # fmt: skip
_CHOSEN = {
    "source.iteration":                   "--iteration",
    "target.overwrite":                   "--overwrite",
    "readiness.timeoutSeconds":           "--readiness-timeout",
    "readiness.settleSeconds":            "--readiness-settle",
}  # fmt: skip
_PT_META = {
    "metadata.path":                      "--param-map-path",
    "target.path":                        "--param-map-path",
    "target.overwrite":                   "--overwrite",
    "target.dataParallel":                "--target-dp-size",
    "model.rules":                        "--rules",
    "bucketSize":                         "--bucket-size",
    "description":                        "--description",
}  # fmt: skip
_NEW_LAYOUT = {
    "model":                              "--noop --stage-list",
    "model.noopLayers":                   "--noop",
    "model.layersPerStage":               "--stage-list",
}  # fmt: skip

FLAGS = {
    "convert": {**_CONVERSION, **_RUN, **_CHOSEN},
    "plan":    {**_CONVERSION, **_CHOSEN, "workers.processes": "--process-limit"},
    "watch":   {
        **_CONVERSION, **_RUN,
        "target.overwrite":         "--overwrite",
        "readiness.timeoutSeconds": "--readiness-timeout",
        "readiness.settleSeconds":  "--settle",
        "follow.keep":              "--keep",
        "follow.intervalSeconds":   "--interval",
    },
    "import":  {
        **_LAYOUT, **_RUN,
        "mode":                     "--convert-param-only",
        "source.path":              "--megatron-path",
        "metadata.path":            "--param-map-path",
        "target.path":              "--ms-path",
        **_MINDSPORE,
        "source.iteration":         "--iteration",
        "target.overwrite":         "--overwrite",
        "readiness.timeoutSeconds": "--readiness-timeout",
        "readiness.settleSeconds":  "--readiness-settle",
    },
    "combine": {
        "mode":                     "--no-save-optim",
        "source.path":              "--checkpoint-dir",
        "source.format":            "--src-format",
        "source.optShardInfoPath":  "--strategy-dir",
        "target.path":              "--output-dir",
        "target.format":            "--dst-format",
        "target.overwrite":         "--overwrite",
        "verify":                   "--verify",
        "workers.processes":        "--max-proccess-limit",
        "section":                  "--rank-section",
    },
    "verify":  {**_CONVERSION, "source.iteration": "--iteration", "reader": "--reader"},
    "verify PATH": {
        "source.path":              "PATH",
        "target.path":              "PATH",
        "parallelism":              "--tp-size --pp-size",
        "parallelism.tensor":       "--tp-size",
        "parallelism.pipeline":     "--pp-size",
        "model.rules":              "--rules",
        **_MINDFORMERS,
        "ignore":                   "--ignore",
        "ignorePadding":            "--ignore-padding",
    },
    "inspect": {"source.path": "PATH", "details": "--details"},
    "pt-meta": _PT_META,
    "pt-meta --megatron-path": {**_PT_META, "source.path": "--megatron-path", "synthesize": "--synthesize"},
    "pt-meta --description":   {
        **_PT_META, **_NEW_LAYOUT,
        "source.path":              "--ms-path",
        "source.optShardInfoPath":  "--opt-shard-info-path",
        "parallelism.data":         "--dp-size",
        "parallelism.context":      "--cp-size",
        "details":                  "--details",
        "acceptAssumptions":        "--accept-assumptions",
    },
    "pt-meta --from-pt-meta":  {
        **_PT_META, **_NEW_LAYOUT,
        "source.path":              "--from-pt-meta",
        "metadata.path":            "--from-pt-meta",
        "target.parallelism.tensor":          "--target-tp-size",
        "target.parallelism.pipeline":        "--target-pp-size",
        "target.parallelism.virtualPipeline": "--target-vpp-size",
        "vocabSize":                "--vocab-size",
    },
    "submit":  {"source.path": "--ready-in", "readiness.timeoutSeconds": "--readiness-timeout"},
}  # fmt: skip
"""By command, and by what was asked of it where that decides which of its options count; a test tries each flag."""

_ARGUMENTS = {path: flag[2:].replace("-", "_") for path, flag in _MINDFORMERS.items()}
_SIZES = {
    **_ARGUMENTS,
    "parallelism":                        "tp, pp",
    "parallelism.tensor":                 "tp",
    "parallelism.pipeline":               "pp",
    "model.rules":                        "rules",
}  # fmt: skip
ARGUMENTS = {
    "open":    {**_SIZES, "source.path": "path", "source.format": "source_format", "source.iteration": "iteration"},
    "verify":  {**_SIZES, "ignore": "ignore", "ignorePadding": "ignore_padding"},
    "inspect": {"source.path": "path", "details": "details"},
    "convert": {
        **_SIZES,
        "mode":                               "params_only",
        "model":                              "num_layers, noop_layers, layers_per_stage",
        "model.numLayers":                    "num_layers",
        "model.noopLayers":                   "noop_layers",
        "model.layersPerStage":               "layers_per_stage",
        "parallelism":                        "tp, pp, vpp, dp, cp",
        "parallelism.virtualPipeline":        "vpp",
        "parallelism.data":                   "dp",
        "parallelism.context":                "cp",
        "source.path":                        "source",
        "source.format":                      "source_format",
        "source.iteration":                   "iteration",
        "metadata.path":                      "metadata",
        "target.path":                        "target",
        "target.format":                      "target_format",
        "target.names":                       "names",
        "target.transformerImpl":             "transformer_impl",
        "target.megatronVersion":             "megatron_version",
        "target.trainer":                     "mindformers_trainer",
        "target.overwrite":                   "overwrite",
        "target.parallelism.tensor":          "target_tp",
        "target.parallelism.pipeline":        "target_pp",
        "target.parallelism.virtualPipeline": "target_vpp",
        "target.parallelism.expert":          "target_ep",
        "target.huggingface":                 "vocab_size, rope_scaling_factor, tokenizer",
        "target.huggingface.vocabSize":       "vocab_size",
        "target.huggingface.ropeScalingFactor": "rope_scaling_factor",
        "target.huggingface.tokenizerPath":   "tokenizer",
        "verify":                             "verify",
    },
}  # fmt: skip
"""By function of the library: the names of its arguments."""

_DOCUMENT = {"spec": "spec", "mode": "spec.mode ParamsOnly"}
_OF_DOCUMENTS = ("run", "submit")


def in_document(path: str) -> str | None:
    """The field as a CheckpointConversion has it; None where it has none."""
    return _DOCUMENT.get(path) or (f"spec.{path}" if path in FIELDS else None)


def of_command(name: str) -> Spell:
    """The flag of a command, by its key in :data:`FLAGS`; None where it has none."""
    flags = FLAGS.get(name, {})
    if name in _OF_DOCUMENTS or not flags:
        return lambda path: flags.get(path) or in_document(path)
    return lambda path: "the command line" if path == "spec" else flags.get(path)


def of_call(options: argparse.Namespace) -> Spell:
    """As the user has given it: flags of the command called, or fields where a document was read or a Job runs it."""
    name = str(getattr(options, "command", ""))
    if name in {"convert", "plan", "watch", "import"}:
        given = ("spec", "filename", "termination_log")
        if any(getattr(options, each, None) for each in given):
            return in_document
    if name in {"convert", "plan", "watch", "verify"} and not getattr(options, "paths", None):
        return _of_conversion(options, of_command(name))
    if name == "verify" and getattr(options, "paths", None):
        name = "verify PATH"
    if name == "pt-meta":
        flags = ("--megatron-path", "--description", "--from-pt-meta")
        found = [flag for flag in flags if getattr(options, flag[2:].replace("-", "_"), None)]
        name = f"pt-meta {found[0]}" if len(found) == 1 else name
    return of_command(name)


def of_function(name: str) -> Spell:
    """The argument of a function of the library, by its key in :data:`ARGUMENTS`; None where it has none."""
    arguments = ARGUMENTS[name]
    return lambda path: "the call" if path == "spec" else arguments.get(path)


def _of_conversion(options: argparse.Namespace, spell: Spell) -> Spell:
    """The folders by the flags that gave them: the general names, or the reference's, which tell the framework."""
    places = ["--ms-path", "--megatron-path"]
    if getattr(options, "target_format", None) == "mindspore":
        places.reverse()
    for at, flag in enumerate(("--source", "--target")):
        if getattr(options, flag[2:], None) is not None:
            places[at] = flag
    found: dict[str, str] = dict(zip(("source.path", "target.path"), places, strict=True))
    return lambda path: found.get(path) or spell(path)


@contextmanager
def in_python(name: str) -> Generator[None]:
    """Errors that leave the block or the function so decorated speak of the arguments of a function of the library."""
    try:
        yield
    except Ckpt2ptError as error:
        raise error.spelled(of_function(name)).with_traceback(error.__traceback__) from error.__cause__


def spelled_document(document: object, spell: Spell) -> object:
    """A JSON document with the markers of its texts as ``spell`` has them."""
    if isinstance(document, str):
        return rendered(document, spell)
    if isinstance(document, dict):
        pairs = cast("dict[object, object]", document).items()
        return {key: spelled_document(value, spell) for key, value in pairs}
    if isinstance(document, list | tuple):
        return [spelled_document(value, spell) for value in cast("list[object]", document)]
    return document
