"""``.distcp`` files as written: every item where it is said to be, read by our reader and by torch's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load

from ckpt2pt.formats.torch_dist.metadata import read_metadata
from ckpt2pt.formats.torch_dist.slots import tensors_of
from distcp import FILES, write, written


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path)


def test_our_reader_finds_what_was_written(folder: Path) -> None:
    found = read_metadata(folder)
    assert found.tensors == tensors_of(FILES, "here")
    assert set(found.objects) == {"x/shard_0_1", "x/shard_1_2"}
    assert found.extra == ()


def test_items_begin_where_torch_can_map_them() -> None:
    layout = FILES[0].lay_out()
    assert [place.offset % 64 for place in layout.places] == [0] * 5
    assert [layout.storage_offset(number) % 64 for number in range(layout.storages)] == [0] * 3


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_loads_tensors_and_objects(folder: Path) -> None:
    state = {"a": torch.zeros(3, 4, dtype=torch.bfloat16), "b": torch.zeros(5), "c": torch.zeros(())}
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    parts = [write(folder / file.name, file) for file in FILES]
    rows = np.concatenate([part["a"][0] for part in parts])
    assert state["a"].view(torch.int16).numpy().tobytes() == rows.tobytes()
    assert state["b"].numpy().tobytes() == parts[0]["b"][0].tobytes()
    assert float(state["c"]) == parts[0]["c"][0][0]
    metadata = FileSystemReader(folder).read_metadata()
    [place] = [place for index, place in metadata.storage_data.items() if index.fqn == "x/shard_1_2"]
    data = (folder / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
    (folder / "object.pt").write_bytes(data)
    assert torch.load(folder / "object.pt", weights_only=True) == [None]
