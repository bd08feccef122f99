"""What a user says of a Megatron run: arguments from a YAML mapping or a training script.  The script is never run.

GPT_ARGS="--num-layers 24 --swiglu"      -> {"num_layers": 24, "swiglu": True}
num-layers: 24                           -> the same
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml

from ckpt2pt.errors import UsageError, ref
from ckpt2pt.formats.ptmeta.gpt import Argument
from ckpt2pt.io.access import access_error
from ckpt2pt.io.files import read_text

_HINT = "see docs/pt-meta.md: a YAML mapping of Megatron's arguments, or the script that starts the training"
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)\+?=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?[-=]([^}]*))?\})")
_ARITHMETIC = re.compile(r"\$\(\((.+?)\)\)", re.DOTALL)
_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: int.__add__, ast.Sub: int.__sub__, ast.Mult: int.__mul__, ast.Div: int.__floordiv__, ast.Mod: int.__mod__,
}  # fmt: skip
_SELECTIVE = "recompute_activations"  # stands for recompute_granularity: selective
_UNTYPED = {"lazy_mpu_init", "params_dtype", "model_type"}
_KINDS: Mapping[str, tuple[set[type], Callable[[Any], Argument]]] = {
    "true or false": ({bool}, bool),
    "a whole number": ({int}, int),
    "a number": ({int, float}, float),
    "text": ({str, int, float}, str),
}
_LAUNCHER = {"nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "rdzv_id", "rdzv_backend",
             "rdzv_endpoint", "max_restarts", "log_dir", "redirects", "tee"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """The arguments of Megatron-LM 0.6: defaults in order, negating flags, and what values each of them takes."""

    arguments: Mapping[str, Argument]
    negations: Mapping[str, str]
    lists: frozenset[str]
    switches: frozenset[str]
    integers: frozenset[str]
    reals: frozenset[str]
    choices: Mapping[str, tuple[str, ...]]

    def is_switch(self, name: str) -> bool:
        """Whether the flag takes no value."""
        bare = name in self.switches or name in self.negations or name == _SELECTIVE
        return bare or isinstance(self.arguments.get(name), bool)

    def expected(self, name: str) -> str:
        """What the value of an argument has to be; empty where the table does not know."""
        default = self.arguments.get(name)
        if self.is_switch(name):
            return "true or false"
        if name in self.choices:
            return f"one of {', '.join(self.choices[name])}"
        if name in self.lists:
            return "a list"
        if name in self.reals or isinstance(default, float):
            return "a number"
        if name in self.integers or isinstance(default, int):
            return "a whole number"
        return "text" if name in self.arguments and name not in _UNTYPED else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """``given`` are Megatron's arguments, ``unknown`` those that Megatron-LM 0.6 does not have."""

    path: str
    given: Mapping[str, Argument]
    unknown: Mapping[str, Argument]
    world_size: int | None


@cache
def known() -> Known:
    """The table ``megatron06.yaml``."""
    document = yaml.safe_load(Path(__file__).with_name("megatron06.yaml").read_text(encoding="utf-8"))
    return Known(
        arguments=document["arguments"],
        negations=document["negations"],
        lists=frozenset(document["lists"]),
        switches=frozenset(document["switches"]),
        integers=frozenset(document["integers"]),
        reals=frozenset(document["reals"]),
        choices={name: tuple(values) for name, values in document["choices"].items()},
    )


def describe(path: Path) -> Description:
    """Read a description: YAML by the suffix ``.yaml``, ``.yml`` or ``.json``, a script otherwise."""
    try:
        text = read_text(path)
    except OSError as error:
        raise access_error(error, path, "reading", option=ref("description")) from error
    except UnicodeDecodeError as error:
        raise UsageError("the description is not text", where=path, hint=_HINT) from error
    if path.suffix in {".yaml", ".yml", ".json"}:
        return _sort(dict(_of_mapping(text, path)), path)
    return _sort(dict(_of_script(text, path)), path)


def _of_mapping(text: str, path: Path) -> Iterator[tuple[str, Argument]]:
    try:
        document: object = yaml.safe_load(text)
        root = cast("yaml.MappingNode", yaml.compose(text, yaml.SafeLoader))
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"not a YAML document: {error}", where=path, hint=_HINT) from error
    if not isinstance(document, dict):
        raise UsageError("not a mapping of arguments", where=path, hint=_HINT)
    _refuse_twice([str(key.value) for key, _ in root.value], path)
    for name, value in cast("dict[object, object]", document).items():
        if not isinstance(name, str) or not isinstance(value, bool | int | float | str | list | None):
            raise UsageError(f"{name} is not an argument with a plain value", where=path, hint=_HINT)
        yield _plain(name), value


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def _refuse_twice(keys: Sequence[str], path: Path) -> None:
    """A mapping has one value for each argument, however it is spelled: ``num-layers``, ``num_layers``, ``no-...``."""
    first: dict[str, str] = {}
    for key in keys:
        name = known().negations.get(_plain(key), _plain(key))
        if name in first:
            raise UsageError(
                f"{name} is given twice, as {first[name]} and as {key}", where=path, hint="leave one of them out"
            )
        first[name] = key


def _of_script(text: str, path: Path) -> Iterator[tuple[str, Argument]]:
    try:
        words = list(_words(text))
    except ValueError as error:
        raise UsageError(f"the script cannot be read: {error}", where=path, hint=_HINT) from error
    at = 0
    while at < len(words):
        flag, at = words[at], at + 1
        if not re.fullmatch(r"--[A-Za-z][\w-]*(=.*)?", flag, re.DOTALL):
            continue
        name, _, inline = flag[2:].partition("=")
        name = name.replace("-", "_")
        values = [inline] if inline else []
        if inline and known().is_switch(name):
            raise UsageError(f"{flag.partition('=')[0]} takes no value, and has {inline}", where=path, hint=_HINT)
        if not inline:
            stop = next((n for n in range(at, len(words)) if words[n].startswith("--")), len(words))
            values = words[at:stop]
        yield name, _value(name, values, path)


def _words(text: str) -> Iterator[str]:
    """The words of a script with variables filled in, also those inside the values of assignments."""
    variables: dict[str, str] = {}
    joined = _ARITHMETIC.sub(lambda found: "".join(found[0].split()), text.replace("\\\n", " "))
    for word in shlex.split(joined, comments=True):
        found = _ASSIGNMENT.fullmatch(word)
        if found and not word.startswith("-"):
            value = _fill(found[2], variables).rstrip(";")
            variables[found[1]] = value
            if "--" in value:
                yield from value.lstrip("(").rstrip(")").split()
                continue
        yield from (
            _fill(word, variables).split()
            if "$" in word and "--" in _fill(word, variables)
            else [_fill(word, variables)]
        )


def _fill(text: str, variables: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        given = variables.get(found[1] or found[2])
        return given if given is not None else found[3] if found[3] is not None else found[0]

    def computed(found: re.Match[str]) -> str:
        named = re.sub(r"[A-Za-z_]\w*", lambda name: variables.get(name[0], name[0]), found[1])
        try:
            return str(_compute(ast.parse(named, mode="eval").body))
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
            return found[0]

    return _ARITHMETIC.sub(computed, _VARIABLE.sub(value, text))


def _compute(node: ast.expr) -> int:
    """``2*(3+4)``: the arithmetic of a shell, as far as scripts use it.  ``ValueError`` for anything else."""
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_compute(left), _compute(right))
        case _:
            raise ValueError("no arithmetic of integers")


def _value(name: str, words: Sequence[str], path: Path) -> Argument:
    table = known()
    if table.is_switch(name):
        return True
    if not words:
        if name in table.arguments:
            raise UsageError(f"--{name.replace('_', '-')} has no value", where=path, hint=_HINT)
        return True
    if name in table.lists:
        return cast("list[object]", [_number(word) for word in words])
    if "$" in words[0] and name in table.arguments:
        raise UsageError(
            f"--{name.replace('_', '-')} is {words[0]}, which the script does not say",
            where=path,
            hint="give the value itself in a YAML description",
        )
    return words[0]


def _number(word: str) -> Argument:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def _typed(name: str, value: Argument, path: Path) -> Argument:
    """The value as Megatron's parser would have made it of the word; null stands for a default that is null."""
    table = known()
    expected = table.expected(name)
    if value is None and table.arguments.get(name) is None and name not in table.negations:
        return None
    number = _number(value) if isinstance(value, str) else value
    if not expected:
        return number
    if name in table.lists:
        return value if isinstance(value, list) else [number]
    if name in table.choices:
        if value in table.choices[name]:
            return value
    else:
        types, make = _KINDS[expected]
        word = value if make is str else number
        with suppress(OverflowError):
            if type(word) in types:
                return make(word)
    raise UsageError(
        f"{name} is {value!r}, not {expected}", where=path, hint=f"correct {name.replace('_', '-')} in the description"
    )


def _sort(found: dict[str, Argument], path: Path) -> Description:
    """Tell Megatron's arguments from the launcher's and from those of other programs."""
    table = known()
    given: dict[str, Argument] = {}
    unknown: dict[str, Argument] = {}
    found = {name: _typed(name, value, path) for name, value in found.items()}
    for name, value in found.items():
        if name in table.arguments:
            given[name] = value
        elif name in table.negations:
            given[table.negations[name]] = not value
        elif name not in {*_LAUNCHER, _SELECTIVE}:
            unknown[name] = value
    if found.get(_SELECTIVE):
        given["recompute_granularity"] = "selective"
    each, nodes = found.get("nproc_per_node"), found.get("nnodes", 1)
    world = each * nodes if isinstance(each, int) and isinstance(nodes, int) else None
    return Description(path=str(path), given=given, unknown=unknown, world_size=world)
