"""The source in the layout of the result: its own files alone where that is the same, all of them where it is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.names import NameTable
from ckpt2pt.core.tensor import Key
from ckpt2pt.core.topology import Rank, Topology
from ckpt2pt.discover import discover, meta_of
from ckpt2pt.discover.training import read
from ckpt2pt.errors import CoverageError, TopologyError
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.formats.mindspore import source as module
from ckpt2pt.formats.mindspore.ranks import SourceFile
from ckpt2pt.formats.mindspore.source import collect, files_for, kept, paths_for, read_source
from layouts import topology
from relaid import Relaid


def test_a_rank_reads_its_own_file_where_the_layout_stays(tmp_path: Path) -> None:
    made = Relaid(topology=topology(tensor=2, pipeline=2))
    request = made.write(tmp_path)
    files = discover(request).files
    assert files_for((1, 1), files, request) == (files[1, 1],)
    chosen = discover(request)
    held, _ = read(request, chosen, (1, 1), meta_of(request, (1, 1)))
    assert {path for key in held.index for path in held.ref(key).paths} == {str(files[1, 1].path)}
    assert not held.copies


def test_a_rank_may_read_any_file_where_the_layout_changes(tmp_path: Path) -> None:
    one, other = Relaid(topology=topology(tensor=2, pipeline=2)), Relaid(topology=topology())
    request = one.becomes(other, tmp_path)
    files = discover(request).files
    assert paths_for((0, 0), files, request) == [file.path for file in files.values()]
    sizes = {"padded_vocab_size": 16, "num_attention_heads": 8}
    found = read_source(request, files, "id", (0, 0), sizes=sizes, tied=False)
    assert found.named("here").keys() == {name for name, each in other.entries[0, 0].items() if each.shape}
    assert {"epoch_num", "step_num"} <= set(found.others), "what is no tensor of the model is the first rank's"


def index_rank(_: Rank, file: SourceFile) -> Mapping[str, TensorRef]:
    return index_file(file.path)


def test_tensors_of_all_ranks_become_whole(tmp_path: Path) -> None:
    made = Relaid(topology=topology(tensor=2, pipeline=2))
    request = made.write(tmp_path)
    index, _ = collect(discover(request).files, request.topology, NameTable(), "here", index_rank)
    assert index[Key("exp_avg", "decoder.layers.3.mlp.linear_fc1.weight")].fused == (16, 6)
    assert len(index[Key("param", "decoder.layers.3.input_layernorm.weight")].replicas) == 1


def test_ranks_in_the_wrong_places_are_named(tmp_path: Path) -> None:
    made = Relaid(topology=topology(tensor=2, pipeline=2))
    request = made.write(tmp_path)
    files = discover(request).files
    lacking = {rank: file for rank, file in files.items() if rank != (1, 1)}
    with pytest.raises(TopologyError, match="is missing on tp 1"):
        collect(lacking, request.topology, NameTable(), "here", index_rank)
    with pytest.raises(CoverageError, match="is on two pipeline stages"):
        collect({**files, (1, 0): files[0, 1], (0, 1): files[1, 0]}, request.topology, NameTable(), "here", index_rank)


def test_headers_are_read_once_for_an_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT", {})
    read: list[str] = []

    def reading(what: str) -> list[str]:
        read.append(what)
        return read

    for identity in ("one", "one", "other", "one"):
        assert kept(identity, lambda identity=identity: reading(identity)) is read  # type: ignore[misc]
    assert read == ["one", "other", "one"]


def test_what_is_read_for_different_purposes_is_kept_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT", {})
    read: list[str] = []
    for _ in range(2):
        for purpose in ("plan", "proof"):
            kept("one", lambda purpose=purpose: read.append(purpose), purpose)  # type: ignore[misc]
    assert read == ["plan", "proof"]


def test_one_source_is_kept_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT", {})
    for identity in ("one", "other"):
        kept(identity, Topology(num_layers=1).ranks)
    assert [identity for identity, _ in module._KEPT.values()] == ["other"]
