"""metadata.json, right and hostile: every fault is a FormatError with a sentence, and takes no time and no memory to find."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.errors import FormatError, InputError
from ckpt2pt.formats.mindformers.metadata import read_metadata

NAME = "output_layer.weight"
FILES = [f"qwen3-model-000000{rank}-0000002.safetensors" for rank in range(2)]


def document() -> dict[str, Any]:
    parts = [{"global_offset": [number], "local_shape": [8, 4]} for number in range(2)]
    entry = {
        "properties": {"dtype": "BFloat16", "replica_id": [0, 0]},
        "global_shape": [16, 4],
        "axis_fragmentations": [2, 1],
        "layout": {
            "device_matrix": [1, 2], "tensor_map": [0, -1], "interleaved_parallel": False, "alias_name": ["dp", "tp"], "rank_list": [0, 1],
        },
        "chunk": parts,
    }  # fmt: skip
    storage = {
        f"('{NAME}', ({number},))": [{"file_name": FILES[number], "storage_rank": number, "rank_group": [number]}]
        for number in range(2)
    }
    return {"state_dict_metadata": {NAME: entry}, "storage_data": storage}


def written(folder: Path, value: object) -> Path:
    (folder / "metadata.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def test_offsets_number_the_parts_row_by_row(tmp_path: Path) -> None:
    value = document()
    entry = value["state_dict_metadata"][NAME]
    entry["axis_fragmentations"], shape = [2, 4], [8, 1]
    entry["chunk"] = [{"global_offset": [number], "local_shape": shape} for number in reversed(range(8))]
    value["storage_data"] = {f"('{NAME}', ({n},))": [{"file_name": FILES[n % 2]}] for n in range(8)}
    found = (read_metadata(written(tmp_path, value)) or {})[NAME]
    assert [chunk.origin for chunk in found.chunks] == [(8 * row, column) for row in range(2) for column in range(4)]
    assert (found.dtype, found.shape, found.mesh, found.ranks) == ("bfloat16", (16, 4), {"dp": 1, "tp": 2}, (0, 1))


def test_without_the_file_there_is_none(tmp_path: Path) -> None:
    assert read_metadata(tmp_path) is None


def entry_of(value: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = value["state_dict_metadata"][NAME]
    return found


def at(value: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = value["storage_data"][f"('{NAME}', (1,))"]
    return found


def _set(target: Callable[[dict[str, Any]], Any], key: Any, new: object) -> Callable[[dict[str, Any]], object]:
    return lambda value: target(value).__setitem__(key, new)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a gap": (lambda value: entry_of(value)["chunk"].pop(), "1 parts .* 2 make it up"),
    "an overlap": (_set(lambda value: entry_of(value)["chunk"][1], "global_offset", [0]), "is there once"),
    "an offset in elements": (_set(lambda value: entry_of(value)["chunk"][1], "global_offset", [8, 0]), "is there once"),
    "an offset outside": (_set(lambda value: entry_of(value)["chunk"][1], "global_offset", [2]), "is there once"),
    "a negative offset": (_set(lambda value: entry_of(value)["chunk"][1], "global_offset", [-1]), "no sizes"),
    "a part of another shape": (_set(lambda value: entry_of(value)["chunk"][1], "local_shape", [7, 4]), "has the shape"),
    "fragments that do not divide": (_set(entry_of, "axis_fragmentations", [3, 1]), "do not divide"),
    "no fragments": (_set(entry_of, "axis_fragmentations", [0, 1]), "do not divide"),
    "fragments of other axes": (_set(entry_of, "axis_fragmentations", [2]), "do not divide"),
    "absurd fragments": (_set(entry_of, "axis_fragmentations", [1 << 40, 1]), "do not divide"),
    "absurdly many parts": (lambda value: entry_of(value).update(global_shape=[1 << 40, 4], axis_fragmentations=[1 << 40, 1]), "make it up"),
    "an absurd shape": (_set(entry_of, "global_shape", [1 << 60, 4]), "no sizes"),
    "a shape of many axes": (_set(entry_of, "global_shape", [1] * 99), "no sizes"),
    "a shape of texts": (_set(entry_of, "global_shape", ["16", "4"]), "no sizes"),
    "true for a size": (_set(entry_of, "global_shape", [True, 4]), "no sizes"),
    "no shape": (_set(entry_of, "global_shape", None), "is not a list"),
    "no entry": (lambda value: value["state_dict_metadata"].update({NAME: 3}), "is not a JSON object"),
    "an interleaved layout": (_set(lambda value: entry_of(value)["layout"], "interleaved_parallel", True), "interleaved_parallel"),
    "no file": (lambda value: value["storage_data"].popitem(), "names no file"),
    "an empty list of files": (lambda value: at(value).clear(), "names no part"),
    "a file above": (_set(lambda value: at(value)[0], "file_name", f"../{FILES[0]}"), "no name of a file of this folder"),
    "a file anywhere": (_set(lambda value: at(value)[0], "file_name", "/etc/passwd"), "no name of a file of this folder"),
    "a file by a NUL": (_set(lambda value: at(value)[0], "file_name", f"a\0-{FILES[0]}"), "no name of a file of this folder"),
    "a file that is a number": (_set(lambda value: at(value)[0], "file_name", 3), "no name of a file of this folder"),
    "a part of nothing": (lambda value: value["storage_data"].update({"('x', (0,))": [{"file_name": FILES[0]}]}), "state_dict_metadata has not"),
    "a key that is code": (lambda value: value["storage_data"].update({"__import__('os')": [{"file_name": FILES[0]}]}), "names no part"),
    "no storage": (lambda value: value.pop("storage_data"), "is not a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "match"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_metadata_is_refused_with_a_sentence(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], object], match: str
) -> None:
    value = document()
    spoil(value)
    started = time.process_time()
    with pytest.raises(FormatError, match=match) as caught:
        read_metadata(written(tmp_path, value))
    assert caught.value.where == str(tmp_path / "metadata.json")
    assert time.process_time() - started < 2  # CPU time of this process alone


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, '{"a": 1, "a": 2}', "NaN", "\0", '{"state_dict_metadata": ' + "[" * 5000]
)
def test_what_is_no_such_document_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError):
        read_metadata(written(tmp_path, text))


def test_whatever_is_changed_it_is_read_or_refused(tmp_path: Path) -> None:
    """Values of any type in any place, a thousand times."""
    rng = random.Random(3)
    odd: list[Any] = [None, True, -1, 0, 1, 1 << 70, 1.5, "", "x", [], [1], {}, [[]], {"a": 1}]
    for _ in range(1000):
        value: Any = copy.deepcopy(document())
        inner: Any = value
        while isinstance(inner, dict | list) and inner:
            key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            if rng.random() < 0.3 or not isinstance(inner[key], dict | list) or not inner[key]:
                inner[key] = rng.choice(odd)
                break
            inner = inner[key]
        with suppress(FormatError):
            read_metadata(written(tmp_path, value))
