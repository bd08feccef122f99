"""Every error a user can meet, and its exit code: one table, read by the command line and by the Job's failure policy."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self


def printable(text: str, *, lines: bool = False) -> str:
    """``text`` for a terminal: what moves its cursor, changes its colours or turns its writing around is spelled out.

    Names come out of files that anybody may have written.  ``lines`` keeps line breaks, for text that is laid out already.
    A marker that no edge has spelled (:func:`ref`) is the bare path of its field.
    """
    if text.isascii() and text.isprintable():
        return text
    text = rendered(text)
    # A path that is not UTF-8 here may be so elsewhere (LC_ALL=POSIX); half a character is spelled out below.
    with suppress(UnicodeError):
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    kept = "\n\t" if lines else ""
    return "".join(
        char if char.isprintable() or char in kept else char.encode("unicode_escape").decode() for char in text
    )


FIELDS = {
    # What the command line has as well, by its path in a CheckpointConversion's spec.
    "mode":                               "weights alone",
    "dryRun":                             "a dry run",
    "model":                              "the number of layers and their split",
    "model.numLayers":                    "the number of layers",
    "model.noopLayers":                   "the no-op layers",
    "model.layersPerStage":               "the layers of each stage",
    "model.rules":                        "the rules for names",
    "parallelism":                        "the parallel sizes",
    "parallelism.tensor":                 "the tensor parallel size",
    "parallelism.pipeline":               "the pipeline parallel size",
    "parallelism.virtualPipeline":        "the number of model chunks",
    "parallelism.data":                   "the data parallel size",
    "parallelism.context":                "the context parallel size",
    "source.path":                        "the path of the checkpoint",
    "source.format":                      "the format of the source",
    "source.optShardInfoPath":            "the opt_shard_info folder",
    "source.iteration":                   "the iteration",
    "source.mindformers.config":          "the YAML of the MindFormers training",
    "source.mindformers.useInterleavedWeightLayoutMlp":        "use_interleaved_weight_layout_mlp",
    "source.mindformers.useContiguousWeightLayoutAttention":   "use_contiguous_weight_layout_attention",
    "metadata.path":                      "the pt_meta folder",
    "target.path":                        "the target folder",
    "target.format":                      "the format of the target",
    "target.names":                       "the names of parameters in the target",
    "target.transformerImpl":             "the layer spec of the target",
    "target.megatronVersion":             "the release that loads the target",
    "target.trainer":                     "the trainer of MindFormers that loads the target",
    "target.overwrite":                   "the replacement of an earlier result",
    "target.dataParallel":                "the data parallel size of the target",
    "target.zeroConsumedSamples":         "a count of samples from 0",
    "target.mindspore":                   "the files of the result",
    "target.mindspore.format":            "the format of the files",
    "target.mindspore.prefix":            "the name of the files",
    "target.mindspore.allReplicas":       "a file for every replica",
    "target.mindspore.contents":          "the selected parts of the optimizer",
    "target.huggingface":                 "what the arguments do not say of the model",
    "target.huggingface.vocabSize":       "the number of tokens of the vocabulary",
    "target.huggingface.ropeScalingFactor": "the factor of llama3's rope scaling",
    "target.huggingface.tokenizerPath":   "the folder of the tokenizer",
    "target.parallelism.tensor":          "the tensor parallel size of the target",
    "target.parallelism.pipeline":        "the pipeline parallel size of the target",
    "target.parallelism.virtualPipeline": "the number of model chunks of the target",
    "target.parallelism.expert":          "the expert parallel size of the target",
    "verify":                             "the verification",
    "workers.processes":                  "the number of processes",
    "workers.rankTimeoutSeconds":         "the time allowed for a rank",
    "workers.resources":                  "the memory limit",
    "workers.security.runAsUser":         "the user of the process",
    "readiness.timeoutSeconds":           "the time to wait",
    "readiness.settleSeconds":            "the time that a file has to rest",
    "follow.keep":                        "the number of results to keep",
    "follow.intervalSeconds":             "the time between two looks",
}  # fmt: skip
"""Each field that :func:`ref` may name, and what it is, for a command that has no option for it."""

FLAG_ONLY = {
    "spec":              "what was asked for",
    "acceptAssumptions": "the acceptance of the assumptions",
    "bucketSize":        "the number of elements of a bucket",
    "description":       "the description of the run",
    "details":           "the full listing",
    "ignore":            "the leaves to ignore",
    "ignorePadding":     "leaving the padding out",
    "reader":            "the reader",
    "section":           "the selected ranks",
    "synthesize":        "the entries to synthesize",
    "vocabSize":         "the number of tokens of the vocabulary",
}  # fmt: skip
"""The same of options that no CheckpointConversion has; ``spec`` is all that was asked for."""

_NOUNS = FIELDS | FLAG_ONLY
_MARK = re.compile("\x02(\\(?)([A-Za-z.]+)\x03")
MARKER = re.compile("(\x02\\(?[A-Za-z.]+\x03)")
"""What :func:`ref` and :func:`aside` make; a text that is split by it keeps them."""


def ref(path: str) -> str:
    """A marker in a text for the option of a field, as ``parallelism.tensor``; the edge spells it (:func:`rendered`).

    A path that is not known raises :class:`LookupError` at once.  No name out of a file can look like one where it is shown:
    the marker is made of control characters, which :func:`printable` spells out.
    """
    return f"\x02{_known(path)}\x03"


def aside(path: str) -> str:
    """The same in parentheses after a space, or nothing where the command called has no such option."""
    return f"\x02({_known(path)}\x03"


def refs(*paths: str) -> str:
    """Several of them: ``a, b and c``."""
    *most, last = map(ref, paths)
    return f"{', '.join(most)} and {last}" if most else last


def field_of(text: str) -> str | None:
    """The field whose marker ``text`` is; None where it is any other text."""
    found = _MARK.fullmatch(text)
    return found[2] if found and found[2] in _NOUNS else None


def _known(path: str) -> str:
    if path not in _NOUNS:
        raise LookupError(f"no field {path!r}; the known ones are in ckpt2pt.errors.FIELDS")
    return path


Spell = Callable[[str], str | None]
"""How an edge spells a field; None where it has no option for it."""


def rendered(text: str, spell: Spell = str) -> str:
    """``text`` with its markers as ``spell`` has them, by default as the bare path of the field."""

    def shown(found: re.Match[str]) -> str:
        parenthesis, path = found.groups()
        if path not in _NOUNS:
            return found[0]
        word = spell(path)
        if parenthesis:
            return f" ({word})" if word else ""
        return word or _NOUNS[path]

    return _MARK.sub(shown, text)


class Ckpt2ptError(Exception):
    """Base of every error a user can meet.

    ``what`` holds the value found and the value expected, ``where`` a path, rank or tensor, and ``hint`` an instruction;
    they name options by :func:`ref`.  ``field`` is the path of the one field that is wrong, None where it is no single one.
    """

    exit_code = 70
    reason = ""
    """In one word, where the exit code alone would mislead; that of the exit code where it is empty."""
    rank: tuple[int, int] | None = None
    """The (tp, pp) whose conversion failed; None where it is no single one."""

    def __init__(self, what: str, *, where: str | Path, hint: str, field: str | None = None) -> None:
        super().__init__(what, str(where), hint)
        self.what, self.where, self.hint = what, str(where), hint
        self.field = None if field is None else _known(field)

    def __str__(self) -> str:
        return message(*map(rendered, (self.what, self.where, self.hint)))

    def spelled(self, spell: Spell) -> Self:
        """The same error in the words of an edge."""
        what, where, hint = (rendered(part, spell) for part in (self.what, self.where, self.hint))
        found = type(self)(what, where=where, hint=hint)
        vars(found).update({**vars(self), "what": what, "where": where, "hint": hint})
        return found

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders; keyword-only arguments need help to be pickled.
        return _rebuild, (type(self), self.what, self.where, self.hint, self.field)


@contextmanager
def of_rank(rank: tuple[int, int]) -> Generator[None]:
    """Errors that are raised inside say which rank they are of."""
    try:
        yield
    except Ckpt2ptError as error:
        error.rank = error.rank or rank
        raise


def message(what: object, where: object, hint: object) -> str:
    """An error in three parts.  Lines of ``what`` are indented; a line break in a name is spelled out."""
    return f"{_FORGED.sub(_SPELLED, spelled(str(what)))}\n  where: {printable(str(where))}\n  hint:  {printable(str(hint))}"


def spelled(text: str) -> str:
    """A sentence for a terminal, with indented lines below it, a hint among them: a line break in a name is spelled out."""
    return _BREAK.sub(_SPELLED, printable(text, lines=True))


_BREAK = re.compile(r"\n(?!  (?!where:))")
_FORGED = re.compile(r"\n(?=  hint:)")
"""In what was found: the error has a hint of its own."""
_SPELLED = r"\\n"


def _rebuild(kind: type[Ckpt2ptError], what: str, where: str, hint: str, field: str | None) -> Ckpt2ptError:
    return kind(what, where=where, hint=hint, field=field)


class UsageError(Ckpt2ptError):
    """The command line or the document asks for something that cannot be."""

    exit_code = 64


class TargetConflictError(UsageError):
    """The target holds the result of another conversion, or files of another program."""

    reason = "TargetConflict"


class SetupError(Ckpt2ptError):
    """The machine or the volume, as it is set up, cannot do what is asked for: trying again cannot help."""

    exit_code = 64


class PermissionDeniedError(SetupError):
    """The user of this process may not read or write there."""

    reason = "PermissionDenied"


class ReadOnlyVolumeError(SetupError):
    """The target is mounted read-only."""

    reason = "ReadOnlyVolume"


class VolumeTooSmallError(SetupError):
    """The target has too little room, and this is known before the first byte is written."""

    reason = "VolumeTooSmall"


class UnsupportedFileSystemError(SetupError):
    """The file system lacks an operation that is needed."""

    reason = "UnsupportedFileSystem"


class TooManyFilesError(SetupError):
    """The limit of open files is too low."""

    reason = "TooManyFiles"


class InputError(Ckpt2ptError):
    """The checkpoint or its metadata is wrong: trying again cannot help."""

    exit_code = 65


class FormatError(InputError):
    """A file is not what its format says: truncated, overlapping, absurd lengths, wrong types."""


class UnsupportedFormatError(FormatError):
    """A checkpoint of a known program, or in a known form, that is not read."""


class UnsafePickleError(InputError):
    """A pickle names something that has no business in a checkpoint."""


class TopologyError(InputError):
    """The degrees given do not describe the files found."""


class UnmappedNameError(InputError):
    """A parameter name has no entry in the name table."""


class CoverageError(InputError):
    """A target slot has no source tensor, or a source tensor has no target slot."""


class MissingInputError(Ckpt2ptError):
    """A file or folder that the conversion needs is not there."""

    exit_code = 66


class FileAccessError(Ckpt2ptError):
    """Reading or writing failed in a way that may pass: a broken mount, a device error."""

    exit_code = 74


class TryAgainError(Ckpt2ptError):
    """Nothing is wrong with the input; the same command may succeed later."""

    exit_code = 75


class NoSpaceError(TryAgainError):
    """The target filled up while it was written."""


class TimedOutError(TryAgainError):
    """The time allowed ran out."""


class InterruptedRunError(TryAgainError):
    """A signal asked the run to stop."""


class VerificationError(Ckpt2ptError):
    """The result differs from its source."""

    exit_code = 76


EXIT_CODES: dict[int, str] = {
    0: "done",
    64: "wrong usage or configuration; also: no permission, read-only or too small a volume, a file system that cannot",
    65: "the input is wrong; retrying cannot help",
    66: "an input is missing",
    70: "a bug in ckpt2pt",
    74: "input/output error; retrying may help",
    75: "try again (space ran out, timeout, interrupted)",
    76: "verification found a difference",
}
"""What each exit code means. The Job's podFailurePolicy is made from :data:`RETRIED` and :data:`FAILS_JOB`."""

FAILS_JOB = frozenset({64})
"""Codes that are true for every stage alike: the whole Job fails at once."""

NOT_THE_SPEC = frozenset(
    kind.reason
    for kind in (
        TargetConflictError,
        PermissionDeniedError,
        ReadOnlyVolumeError,
        VolumeTooSmallError,
        UnsupportedFileSystemError,
        TooManyFilesError,
    )
)
"""Reasons of :data:`FAILS_JOB` with which nothing is wrong in the document: the target or the machine is what it is."""

FAILS_STAGE = frozenset({65, 66, 76})
"""Codes that retrying cannot change: the stage fails, the others go on."""

RETRIED = frozenset({70, 74, 75})
"""Codes after which the stage is tried again, as after a kill."""


def size(nbytes: float) -> str:
    """``1536`` -> ``1.5 KiB``."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def counted(number: int, noun: str) -> str:
    """``1 rank``, ``2 ranks``, ``12,345 ranks``."""
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"


def grouped(sentence: str) -> str:
    """A sentence with its counts of five digits or more as ``12,345``."""
    return re.sub(r"(?<![\w.])\d{5,}(?![\w.])", lambda found: f"{int(found[0]):,}", sentence)
