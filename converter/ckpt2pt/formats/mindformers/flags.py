"""What nothing in the files of MindFormers tells: how the rows of fused weights are ordered.  Asked for, and never guessed.

    use_interleaved_weight_layout_mlp        linear_fc1: gate, up, gate, up, ... (default), or all of gate, then all of up
    use_contiguous_weight_layout_attention   linear_qkv: queries, key and value of each group (default), or [Q; K; V]

They stand in the YAML of the training, which ``config`` names.  A training in PyNative mode has the first form of both
(MindFormers 2.1.0, mindformers/pynative/transformers/mlp.py, attention.py).  Names and defaults:
mindformers/parallel_core/transformer_config.py, transformer_config_utils.py (``COMMON_CONFIG_MAPPING``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, cast

from ckpt2pt.errors import FormatError, UsageError, ref
from ckpt2pt.io.access import access_error
from ckpt2pt.io.files import read_text

INTERLEAVED = "use_interleaved_weight_layout_mlp"
CONTIGUOUS = "use_contiguous_weight_layout_attention"
_DEFAULTS = {INTERLEAVED: True, CONTIGUOUS: False}
_CONFIG = "source.mindformers.config"
_FIELDS = {
    INTERLEAVED: "source.mindformers.useInterleavedWeightLayoutMlp",
    CONTIGUOUS: "source.mindformers.useContiguousWeightLayoutAttention",
}
_SPELLED: Mapping[str, tuple[str, ...]] = {
    "num_attention_heads": ("num_heads", "num_attention_heads", "n_head"),
    "num_query_groups": ("n_kv_heads", "num_key_value_heads", "num_query_groups"),
    "kv_channels": ("head_dim", "kv_channels"),
    "hidden_size": ("hidden_size",),
    "ffn_hidden_size": ("intermediate_size", "ffn_hidden_size"),
    "num_layers": ("num_layers", "num_hidden_layers", "n_layer"),
}
"""Numbers of the model by the names of MindFormers and of Hugging Face."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """What is said of a checkpoint of MindFormers: the YAML of its training, or either flag; None is unsaid."""

    config: Path | None = None
    interleaved: bool | None = None
    contiguous: bool | None = None

    @classmethod
    def of(cls, config: str | Path | None, interleaved: bool | None, contiguous: bool | None) -> Flags:
        """From what a caller or a document gives; an empty path is none."""
        return cls(config=Path(config) if config else None, interleaved=interleaved, contiguous=contiguous)


@dataclass(frozen=True, slots=True)
class Said:
    """The flags that are said, by name, each with where; and numbers of the model."""

    flags: Mapping[str, tuple[bool, str]]
    sizes: Mapping[str, int]
    config: Path | None

    def flag(
        self, name: str, *, pynative: bool, matter: str, where: Path, of: str = "the checkpoint"
    ) -> tuple[bool, str]:
        """The value of a flag and where it is from; ``matter`` is the tensor that it decides of, and ``of`` what holds it.

        Raises :class:`UsageError` where nothing says it, and where what is said contradicts the files.
        """
        said = self.flags.get(name)
        field = _FIELDS[name]
        if pynative:
            if said and said[0] != _DEFAULTS[name]:
                raise UsageError(
                    f"{name} is {said[0]} ({said[1]}), and {of} is of a training in PyNative mode, which has it {_DEFAULTS[name]}",
                    where=where,
                    hint=f"leave {ref(field)} out, and give the YAML of this training",
                    field=field,
                )
            proof = ", which the precision of the weights proves" if of == "the checkpoint" else ""
            return _DEFAULTS[name], f"PyNative mode{proof}"
        if said is None:
            raise UsageError(
                f"nothing in {of} says how the rows of {matter} are ordered ({name} of its training)",
                where=where,
                hint=f"give the YAML of the training in {ref(_CONFIG)}, or say it with {ref(field)}",
                field=field,
            )
        return said

    def missing_heads(self, matter: str, where: Path) -> NoReturn:
        """Refuse a weight whose rows cannot be distinguished, as nothing says how many heads there are, or of which size."""
        raise UsageError(
            f"nothing says how many attention heads and groups the rows of {matter} are, which {CONTIGUOUS} needs",
            where=where,
            hint=f"give the YAML of the training in {ref(_CONFIG)}, with num_attention_heads and head_dim",
            field=_CONFIG,
        )


def read_flags(given: Flags) -> Said:
    """What is said.  Raises :class:`UsageError` for a file that is no YAML of a training, or that says otherwise than a flag."""
    model: Mapping[str, object] = _model_config(given.config) if given.config else {}
    flags: dict[str, tuple[bool, str]] = {}
    for name, asked in ((INTERLEAVED, given.interleaved), (CONTIGUOUS, given.contiguous)):
        stated = model.get(name)
        if stated is not None and type(stated) is not bool:
            raise _not_one(given.config, f"{name} is {stated!r}, which is neither true nor false")
        if asked is not None and stated not in {None, asked}:
            raise UsageError(
                f"{ref(_FIELDS[name])} is {asked}, and the YAML of the training says {stated}",
                where=given.config or "",
                hint="leave it out, or give the YAML of this training",
                field=_FIELDS[name],
            )
        if asked is not None:
            flags[name] = asked, "as asked for"
        elif isinstance(stated, bool):
            flags[name] = stated, f"{given.config}"
        elif given.config:
            flags[name] = _DEFAULTS[name], f"the default of MindFormers, as {given.config} does not say it"
    sizes = {
        name: value
        for name, spellings in _SPELLED.items()
        for spelled in spellings
        if type(value := model.get(spelled)) is int and value > 0
    }
    return Said(flags, sizes, given.config)


def refuse_flags(given: Flags, where: Path) -> None:
    """Refuse what is said of another checkpoint than one of MindFormers.  Raises :class:`UsageError`."""
    said = {_CONFIG: given.config, _FIELDS[INTERLEAVED]: given.interleaved, _FIELDS[CONTIGUOUS]: given.contiguous}
    for field, value in said.items():
        if value is not None:
            raise UsageError(
                f"{ref(field)} is given, and the source is no checkpoint of MindFormers",
                where=where,
                hint="leave it out",
                field=field,
            )


def _model_config(path: Path) -> Mapping[str, object]:
    """The model's part of a training's YAML, or all of a file that has no such part."""
    import yaml  # noqa: PLC0415 - only when a file is given

    try:
        document: object = yaml.safe_load(read_text(path))
    except OSError as error:
        raise access_error(error, path, "reading", option=ref(_CONFIG)) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise _not_one(path, f"not a YAML document: {str(error)[:200]}") from error
    found, named = _strings(document), False
    for key in ("model", "model_config"):
        if found is not None and key in found:
            found, named = _strings(found[key]), key == "model_config"
    if found is None:
        raise _not_one(path, "no mapping of model_config is in it")
    if not named and not found.keys() & {*_DEFAULTS, *(name for names in _SPELLED.values() for name in names)}:
        raise _not_one(path, "it says nothing of a model")
    return found


def _strings(value: object) -> dict[str, object] | None:
    """A mapping by its keys as texts; None for anything else."""
    if not isinstance(value, dict):
        return None
    return {str(key): item for key, item in cast("dict[object, object]", value).items()}


def _not_one(path: Path | None, what: str) -> UsageError:
    return UsageError(what, where=path or "", hint="give the YAML that the training was started with", field=_CONFIG)


def check_sizes(said: Said, found: Mapping[str, int]) -> None:
    """Refuse the YAML of another model.  Raises :class:`FormatError`."""
    for name, value in found.items():
        if said.sizes.get(name, value) != value:
            raise FormatError(
                f"{name} is {said.sizes[name]}, and the checkpoint has {value}",
                where=said.config or "",
                hint=f"check that {ref(_CONFIG)} belongs to this model",
                field=_CONFIG,
            )
