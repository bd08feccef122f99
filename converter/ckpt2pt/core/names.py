"""Names of Megatron-LM (0.6, legacy GPT) <-> MindSpeed-Core-MS, and what else a source file may hold.

Pure: no files.  The pairs are those of the one table (``core.params``); names are compared segment by segment and never by
substring.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from types import MappingProxyType
from typing import Literal, NamedTuple

from ckpt2pt.core.params import LAYER_MODULES, MODULES, modules
from ckpt2pt.errors import UnmappedNameError, UsageError, aside

# Parameters of one kind of module: Megatron's name -> MindSpore's spellings, the one we write first.
LINEAR = MappingProxyType({"weight": ("weight",), "bias": ("bias",)})
NORM = MappingProxyType({"weight": ("weight", "gamma"), "bias": ("bias", "beta")})
_KINDS = {"linear": LINEAR, "norm": NORM}

_LAYER_MODULES, _MODULES = tuple(modules(LAYER_MODULES).items()), tuple(modules(MODULES).items())
_EMBEDDING, _OUTPUT = "language_model.embedding.word_embeddings", "language_model.output_layer"

TIED_HEAD = "word_embeddings.weight"
"""The last stage's copy of tied embeddings, as Megatron's parameter buffers call it."""

_TIED_HEAD_SPELLINGS = frozenset({TIED_HEAD, "word_embeddings_for_head.weight"})
# The last stage's own file names its copy after the output layer; converted ones keep Megatron's names.
_TIED_HEAD_SOURCES = (f"{_OUTPUT}.weight", *sorted(_TIED_HEAD_SPELLINGS), f"{_EMBEDDING}.weight")

HAS_EXTRA_STATE = frozenset({"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "output_layer"})
"""Modules whose ``_extra_state`` (None) Megatron 0.6 saves after the module's own parameters."""

# Of these each tensor-parallel rank holds another part; of norms, biases of rows and learned positions all hold the same.
_SPLIT = {"word_embeddings_for_head"}.union(
    spelled.rpartition(".")[2]
    for row in (*LAYER_MODULES, *MODULES)
    if row.kind.cuts.get("weight") is not None
    for spelled in (row.name, row.legacy, row.mindspore)
    if spelled
)

Role = Literal["param", "exp_avg", "exp_avg_sq", "ignored"]
MOMENTS: dict[str, Literal["exp_avg", "exp_avg_sq"]] = {
    "exp_avg": "exp_avg", "adam_m": "exp_avg", "moment1": "exp_avg",
    "exp_avg_sq": "exp_avg_sq", "adam_v": "exp_avg_sq", "moment2": "exp_avg_sq",
}  # fmt: skip
"""First segment of an optimizer entry -> the moment of Adam that it is."""

SHARD = re.compile(r"(?:exp_avg\.|exp_avg_sq\.)?buffer_\d+_bucket_\d+")
"""A flat shard of the distributed optimizer; the names inside are in ``opt_shard_info``."""

# What a training file holds besides parameters and moments (MindSpeed-Core-MS feature-0.1, br_master; MindFormers).
_IGNORED = {
    "training progress": r"epoch_num|step_num|num_steps|iteration|global_step|state_step|checkpoint_version|global_batch_size",
    "scheduler state": r"max_lr|min_lr|start_wd|end_wd|lr_warmup_steps|lr_decay_style|lr_decay_steps"
    r"|wd_incr_style|wd_incr_steps|learning_rate",
    "optimizer scalar": r"(?:wd_mult|lr_mult|is_expert_parallel|is_decoupled_lr|max_lr|min_lr|learning_rate|betas?\d?"
    r"|bias_correction|eps|weight_decay)_group_\d+|beta1_power|beta2_power",
    "loss scaling": r"loss_scale|scale_sense|current_iterator_step|last_overflow_iterator_step",
    "random generator": r"(?:dp_rng|tp_rng|exp_rng|default)_generator",
    "activation buffer": r"set_hidden_states.*",
    "gradient accumulator": r"accu_grads\..*",
    "moment of amsgrad, which Megatron does not have": r"max_exp_avg_sq\..*",
    "momentum without a second moment, which Adam needs": r"moments\..*|momentum",
}
_IGNORED_PATTERN = re.compile("|".join(f"({pattern})" for pattern in _IGNORED.values()))
_REASONS = tuple(_IGNORED)

_LAYERS = "language_model.encoder.layers."
_LAYER = re.compile(r"language_model\.encoder\.layers\.(\d{1,9})(?:_pp\w+)?\.(.+)")
_EXPERT = ".mlp.experts.local_experts."
EXPERTS_IN_MINDSPORE = "a mixture of experts of MindSpeed-Core-MS, whose ranks number experts of their own"
"""Why these checkpoints are not read: files hold different experts by equal names (MindSpeed-Core-MS feature-0.1, ``MoELayer``)."""
_NEIGHBOURS, _LONGEST = 32, 512
_WRAPPERS = re.compile(
    r"(?:(?:module|model)\.)+(?=language_model\.|word_embeddings|embedding\.|decoder\.|output_layer\.)"
)
_PREFIX = re.compile(r"\A(?:module|model\d*)\.")


def is_split(name: str) -> bool:
    """Whether a parameter (of any format) is a matrix of which each tensor-parallel rank holds another part."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and module.rpartition(".")[2] in _SPLIT


@dataclass(frozen=True, slots=True)
class Rules:
    """House-specific additions to the table, from a rule file (``--rules``, ``spec.model.rules``)."""

    layer_modules: Mapping[str, str] = field(default_factory=dict[str, str])
    modules: Mapping[str, str] = field(default_factory=dict[str, str])
    ignore: tuple[str, ...] = ()
    pickle_globals: tuple[str, ...] = ()


class SourceName(NamedTuple):
    """What one entry of a MindSpore file is: a parameter, its first or second moment, or nothing we carry."""

    role: Role
    name: str
    """The MindSpore parameter name without the optimizer's prefix; the reason when ignored."""


class NameTable:
    """The built-in table with the rules of one house."""

    def __init__(self, rules: Rules | None = None) -> None:
        rules = rules or Rules()
        self._rules, self._ignore = rules, rules.ignore
        self._layer, self._layer_back = _tables(_LAYER_MODULES, tuple(rules.layer_modules.items()))
        self._outside, self._outside_back = _tables(_MODULES, tuple(rules.modules.items()))

    def to_mindspore(self, megatron: str, layer_of: Callable[[int], int]) -> tuple[str, ...]:
        """Spellings that the MindSpore file may use for a Megatron parameter, the usual one first.

        ``megatron`` has no ``module.`` prefix and a local layer number; ``layer_of`` turns it into the global one.
        """
        if megatron in _TIED_HEAD_SPELLINGS:
            return _TIED_HEAD_SOURCES
        found = _LAYER.fullmatch(megatron)
        spellings = self._layer.get(found[2]) if found else self._outside.get(megatron)
        if spellings is None:
            raise _unmapped(megatron, "Megatron", "layer_modules" if found else "modules")
        if found is None:
            return spellings
        prefix = f"{_LAYERS}{layer_of(int(found[1]))}."
        return tuple([prefix + spelling for spelling in spellings])

    def to_megatron(self, mindspore: str) -> str:
        """The Megatron name of a MindSpore parameter; the layer number stays global."""
        found = _LAYER.fullmatch(mindspore)
        megatron = self._layer_back.get(found[2]) if found else self._outside_back.get(mindspore)
        if megatron is None:
            raise _unmapped(mindspore, "MindSpore", "layer_modules" if found else "modules")
        return f"{_LAYERS}{found[1]}.{megatron}" if found else megatron

    def classify(self, entry: str) -> SourceName:
        """Say what an entry of a MindSpore file is, by its name alone."""
        if self._ignore and any(entry == pattern or fnmatchcase(entry, pattern) for pattern in self._ignore):
            return SourceName("ignored", "rule file")
        head, _, rest = entry.partition(".")
        if rest and head in MOMENTS:
            return SourceName(MOMENTS[head], rest)
        known = _IGNORED_PATTERN.fullmatch(entry)
        if known and known.lastindex:
            return SourceName("ignored", _REASONS[known.lastindex - 1])
        return SourceName("param", entry)

    def unused(self, entries: Iterable[str], parameters: Iterable[str]) -> frozenset[str]:
        """Rules that match none of the source's ``entries`` and of Megatron's ``parameters``."""
        rules = self._rules
        if not (rules.ignore or rules.modules or rules.layer_modules):
            return frozenset()
        there = tuple(entries)
        modules = (
            {name.rpartition(".")[0] for name in parameters} if rules.modules or rules.layer_modules else set[str]()
        )
        local = {found[2] for module in modules if (found := _LAYER.fullmatch(module))}
        return frozenset(
            [
                *(f"ignore: {p}" for p in rules.ignore if p not in there and not any(fnmatchcase(n, p) for n in there)),
                *(f"modules: {module}" for module in rules.modules if module not in modules),
                *(f"layer_modules: {module}" for module in rules.layer_modules if module not in local),
            ]
        )

    def classify_all(self, entries: Iterable[str], *, where: str) -> tuple[dict[str, SourceName], str]:
        """Every entry of a file by its name without the prefix that all parameters and moments carry, and that prefix.

        A model wrapped in others saves ``module.language_model...`` or ``model.language_model...``.  Raises
        :class:`UnmappedNameError` where some names carry a prefix and others do not, and for experts.
        """
        found = {entry: self.classify(entry) for entry in entries}
        carried = {entry: what for entry, what in found.items() if what.role != "ignored"}
        if has_experts(carried):
            raise UnmappedNameError(
                f"this is {EXPERTS_IN_MINDSPORE}",
                where=where,
                hint="convert a dense model, or a mixture of experts that Megatron-LM 0.8 to 0.19 saved",
            )
        prefix = common_prefix({what.name: entry for entry, what in carried.items()}, where=where)
        if prefix:
            found |= {entry: SourceName(what.role, what.name.removeprefix(prefix)) for entry, what in carried.items()}
        return found, prefix


def rules_remark(unused: Iterable[frozenset[str]]) -> tuple[str, ...]:
    """The warning for rules that match nothing on any rank, which may be misspelt; ``unused`` are those of each rank."""
    first, *others = unused
    names = sorted(first.intersection(*others))
    return (f"rules that match no name of this checkpoint: {'; '.join(names)}",) if names else ()


def has_experts(entries: Iterable[str]) -> bool:
    """Whether entries of a MindSpore file are parameters of experts, or their moments."""
    return any(_EXPERT in entry for entry in entries)


def common_prefix(parameters: Mapping[str, str], *, where: str) -> str:
    """``module.`` or ``model.`` where all parameters carry it, else nothing; ``parameters`` maps names to those to be shown."""
    prefix = next((found[0] for name in parameters if (found := _WRAPPERS.match(name))), "")
    if not prefix:
        return ""
    other = next(
        (name for name in parameters if not name.startswith(prefix) or _WRAPPERS.match(name, len(prefix))), None
    )
    if other is not None:
        one = next(name for name in parameters if name.startswith(prefix))
        raise UnmappedNameError(
            f"{parameters[one]} has the prefix {prefix} and {parameters[other]} has not",
            where=where,
            hint="save all parameters under names of one model; a prefix is left out only where all names carry it",
        )
    return prefix


def prefix_remark(prefix: str) -> str:
    """The warning for names that carry one."""
    return f"all parameters carry the prefix {prefix} in their names, which is left out"


def bare(name: str) -> str:
    """Take the wrapper's prefix off: ``module.`` in a param map, ``model.`` or ``model1.`` in a name list."""
    return _PREFIX.sub("", name, count=1)


def local_layer(megatron: str) -> int | None:
    """The local layer number in a Megatron name; None outside the layers."""
    found = _LAYER.fullmatch(megatron)
    return int(found[1]) if found else None


def without_pipeline_suffix(mindspore: str) -> str:
    """``layers.3_pp1_id3.`` -> ``layers.3.``: a suffix that br_master keeps in memory and may leave in a file."""
    found = _LAYER.fullmatch(mindspore) if "_pp" in mindspore else None
    return f"{_LAYERS}{int(found[1])}.{found[2]}" if found else mindspore


def is_tied_head(megatron: str) -> bool:
    """True for the last stage's copy of tied word embeddings."""
    return megatron in _TIED_HEAD_SPELLINGS


def state_dict_path(megatron: str) -> tuple[str, ...]:
    """Where Megatron 0.6 nests a parameter in ``model``: the dictionaries, then the key in the innermost.

    ``encoder`` and ``output_layer`` are flat below their name; ``embedding`` nests once more
    (Megatron-LM cac60ce4, megatron/model/language_model.py, ``state_dict_for_save_checkpoint``).
    """
    if is_tied_head(megatron):
        return ("word_embeddings_for_head", "weight")
    segments = megatron.split(".")
    depth = 3 if segments[1:2] == ["embedding"] else 2
    return (*segments[:depth], ".".join(segments[depth:]))


def _kind_of(module: str) -> str:
    return "norm" if module.endswith(("norm", "layernorm")) else "linear"


@lru_cache(4)  # each rank in turn asks for the same
def _tables(
    built_in: tuple[tuple[str, tuple[str, str]], ...], more: tuple[tuple[str, str], ...]
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Megatron's parameters of these modules -> MindSpore's spellings, and the way back."""
    named = dict(built_in) | {megatron: (mindspore, _kind_of(megatron)) for megatron, mindspore in more}
    found = {
        f"{megatron}.{leaf}": tuple(f"{mindspore}.{spelling}" for spelling in spellings)
        for megatron, (mindspore, kind) in named.items()
        for leaf, spellings in _KINDS[kind].items()
    }
    return found, _inverse(found)


def _inverse(table: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    back: dict[str, str] = {}
    for megatron, spellings in table.items():
        for mindspore in spellings:
            if mindspore in back:
                raise UsageError(
                    f"two Megatron parameters, {back[mindspore]} and {megatron}, map to {mindspore}",
                    where="the table of names",
                    hint=f"give each module a MindSpore name of its own in the rule file{aside('model.rules')}",
                )
            back[mindspore] = megatron
    return back


def _unmapped(name: str, side: str, section: str) -> UnmappedNameError:
    return UnmappedNameError(
        f"no mapping for the {side} parameter {name}",
        where=name,
        hint=f"if it is a module of your own, list it under {section} in a rule file{aside('model.rules')}, "
        "as docs/rules.md shows",
    )


def nearest(wanted: str, names: Sequence[str]) -> str:
    """The name that looks most like ``wanted``, for an error message; empty when none does.

    Comparing is slow, and very slow for long texts: of many names only those are looked at that stand beside it in a
    dictionary, or in one of the names read backwards.
    """
    import difflib  # noqa: PLC0415 - only on the way to an error

    short = [name for name in names if len(name) <= _LONGEST]
    backward = _around(wanted[::-1], [name[::-1] for name in short])
    likely = dict.fromkeys([*_around(wanted, short), *(name[::-1] for name in backward)])
    return next(iter(difflib.get_close_matches(wanted[:_LONGEST], likely, n=1, cutoff=0.7)), "")


def _around(wanted: str, names: Iterable[str]) -> list[str]:
    """The names before and after ``wanted`` in a dictionary of them."""
    found = sorted(names)
    at = bisect_left(found, wanted)
    return found[max(0, at - _NEIGHBOURS) : at + _NEIGHBOURS]


NameTable()  # refuses a name that stands twice, at import
