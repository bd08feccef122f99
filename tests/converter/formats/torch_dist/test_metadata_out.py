"""``.metadata`` as written, for torch 2.3 and all later ones."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from ckpt2pt.formats.torch_dist.metadata import Entry, read_metadata
from distcp import written


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path)


@pytest.mark.torch
def test_properties_are_the_five_that_every_torch_reads(folder: Path) -> None:
    class Seen(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            if name == "TensorProperties":
                return type(name, (), {"__setstate__": lambda self, state: setattr(self, "state", state)})
            return super().find_class(module, name)

    with (folder / ".metadata").open("rb") as file:
        found = Seen(file).load()
    assert {
        len(entry.properties.state) for entry in found.state_dict_metadata.values() if hasattr(entry, "chunks")
    } == {5}


def test_entries_of_a_table_are_what_the_reader_makes_of_them(folder: Path) -> None:
    entry = read_metadata(folder).tensors["a"]
    assert isinstance(entry, Entry)
    assert [chunk.origin for chunk in entry.chunks] == [(0, 0), (2, 0)]
