"""YAML text -> what JSON can say, within bounds: a text from anywhere may be read without harm.  Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import yaml

from ckpt2pt.errors import UsageError

MAX_BYTES = 1 << 20
MAX_NODES = 100_000
MAX_DEPTH = 50
_MOST = 1 << 63


class _Loader(yaml.SafeLoader):
    """YAML without objects, where a field given twice is an error rather than the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def load(data: bytes | str, where: str) -> object:
    """The one document of a YAML text: mappings, lists, texts, numbers and nothing else.  UsageError says what is wrong.

    A syntax error has yaml's own as its cause, with the place; its words quote the text.
    """
    try:
        documents = [document for document in _documents(data, where) if document is not None]
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UsageError(f"not a YAML document: {error}", where=where, hint="correct it there") from error
    if not documents:
        raise UsageError("the file holds no document", where=where, hint="write one document into it")
    if len(documents) > 1:
        raise UsageError(f"{len(documents)} documents in one file", where=where, hint="give each a file of its own")
    _prove_plain(documents[0], where)
    return documents[0]


def _documents(data: bytes | str, where: str) -> Iterator[object]:
    loader: Any = _Loader(data)
    try:
        while loader.check_node():
            node = loader.get_node()
            _prove_small(node, where)
            yield loader.construct_document(node)
    finally:
        loader.dispose()


def _prove_small(document: yaml.Node, where: str) -> None:
    """Refuse what would unfold into more than a document of this size holds, before anything is made of it.

    An alias costs nothing until it is copied, and a merge key (``<<``) copies what is below all aliases that it names.
    """
    left = MAX_NODES

    def walk(node: yaml.Node, depth: int) -> None:
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            what = f"more than {MAX_NODES} values, or more than {MAX_DEPTH} inside each other"
            raise UsageError(what, where=where, hint="write it without YAML aliases")
        for inner in _inside(node):
            walk(inner, depth + 1)

    walk(document, 0)


def _inside(node: yaml.Node) -> list[yaml.Node]:
    """The items of a sequence; names and values of a mapping."""
    if isinstance(node, yaml.MappingNode):
        return [each for pair in cast("list[tuple[yaml.Node, yaml.Node]]", node.value) for each in pair]
    return cast("list[yaml.Node]", node.value) if isinstance(node, yaml.SequenceNode) else []


def _prove_plain(document: object, where: str) -> None:
    """Refuse what JSON cannot say, and numbers that no API server and no field takes."""

    def walk(value: object, path: str) -> None:
        if isinstance(value, dict):
            for key, item in cast("dict[object, object]", value).items():
                if not isinstance(key, str):
                    raise UsageError(f"{key!r} is used as a name", where=f"{where}: {path}", hint="put it in quotes")
                walk(item, f"{path}.{key}".lstrip("."))
        elif isinstance(value, list):
            for item in cast("list[object]", value):
                walk(item, path)
        elif isinstance(value, int | float) and not _is_sent(value):
            what = "a number does not fit into 64 bits"
            raise UsageError(what, where=f"{where}: {path}", hint="write a smaller one, or put it in quotes")
        elif value is not None and not isinstance(value, str | int | float):
            what = f"{value} is read as a {type(value).__name__}"
            raise UsageError(what, where=f"{where}: {path}", hint="put it in quotes")

    walk(document, "")


def _is_sent(number: float) -> bool:
    """Whether JSON has it, for every reader: whole numbers of 64 bits, and no NaN or infinity."""
    return -_MOST <= number < _MOST if type(number) is int else math.isfinite(number)
