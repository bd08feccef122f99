"""The pt_meta folder: read, proved, and given to the right chunks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from archives import write_archive
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import FormatError, InputError, MissingInputError, UnsafePickleError
from ckpt2pt.formats.ptmeta.metadata import (
    RankMeta,
    data_parallel_size,
    metadata_files,
    read_arguments,
    read_rank_meta,
    read_template,
)
from ckpt2pt.formats.torchfile.pickles import write_pickle
from ckpt2pt.formats.torchfile.trees import Global, Value, namespace
from handmade import Handmade

VIRTUAL = Topology(num_layers=6, virtual=3)
NOOP = Topology(num_layers=6, virtual=3, noop=frozenset({2, 3}))


def made(folder: Path, topology: Topology, **more: Any) -> Handmade:
    model = Handmade(topology=topology, **more)
    model.write_meta(folder)
    return model


def read(folder: Path, topology: Topology, **more: Any) -> RankMeta:
    return read_rank_meta(folder, topology, tp=0, pp=0, **more)


def write_args(folder: Path, tree: Value, *, stem: str = "args_tp00_pp000") -> Path:
    folder.mkdir(exist_ok=True)
    write_archive(folder / f"{stem}.pt", stem, write_pickle(tree), [])
    return folder / f"{stem}.pt"


def test_names_come_in_registration_order_with_their_buffer(tmp_path: Path) -> None:
    model = made(tmp_path, Topology(num_layers=2))
    (chunk,) = read(tmp_path, model.topology).chunks
    assert chunk.names == tuple(each.megatron for each in model.parameters(0, 0))
    assert chunk.buffer is not None
    assert [p.name for p in chunk.buffer.placements] == list(reversed(chunk.names))


def test_files_are_listed_for_the_identity_of_the_conversion(tmp_path: Path) -> None:
    made(tmp_path, VIRTUAL)
    assert [path.name for path in metadata_files(tmp_path, tp=0, pp=0)] == [
        "args_tp00_pp000.pt", *(f"param_map_buffer0_dp0tp0pp0vpp{n}.json" for n in range(3)),
    ]  # fmt: skip


def test_a_chunk_of_noop_layers_is_not_counted_by_the_maps(tmp_path: Path) -> None:
    made(tmp_path, NOOP)
    assert sorted(p.name[-6:-5] for p in tmp_path.glob("*.json")) == ["0", "1"]
    chunks = read(tmp_path, NOOP).chunks
    assert [chunk.vpp for chunk in chunks] == [0, 2]
    assert any("final_norm" in name for name in chunks[1].names)


@pytest.mark.parametrize("prefix", ["module.", "model.", "model1.", ""])
@pytest.mark.parametrize("empty", [True, False], ids=["listed-empty", "left-out"])
def test_name_lists_of_a_params_only_run_are_read_backwards(tmp_path: Path, prefix: str, empty: bool) -> None:
    model = Handmade(topology=NOOP)
    lists = [[prefix + p.megatron for p in reversed(model.parameters(0, vpp))] for vpp in range(3)]
    tree = model.template() | {"param_name_list": [names for names in lists if names or empty]}
    write_args(tmp_path, cast("Value", tree))
    chunks = read(tmp_path, NOOP).chunks
    assert [(c.vpp, c.buffer) for c in chunks] == [(0, None), (2, None)]
    assert [c.names for c in chunks] == [tuple(p.megatron for p in model.parameters(0, vpp)) for vpp in (0, 2)]


@pytest.mark.parametrize(
    ("args", "target", "padded"),
    [
        ({"data_parallel_size": 8}, None, 8),
        ({"data_parallel_size": 8, "context_parallel_size": 4}, None, 32),
        ({"data_parallel_size": 8}, 16, 16),
        ({}, None, 1),
        ({"data_parallel_size": None}, None, 1),
    ],
)
def test_padding_is_for_the_run_to_come_or_that_of_the_arguments(
    tmp_path: Path, args: dict[Value, Value], target: int | None, padded: int
) -> None:
    topology = Topology(num_layers=2)
    model = made(tmp_path, topology)
    write_args(tmp_path, {"args": namespace({str(key): value for key, value in args.items()}), "iteration": 1})
    (chunk,) = read(tmp_path, topology, target_data=target).chunks
    assert chunk.buffer is not None
    numel = model.buckets(0, 0)[0][-1][2]
    assert chunk.buffer.numel == -(-numel // padded) * padded
    assert numel % 8  # so the padding is there to be seen


ARGUMENTS: dict[str, tuple[dict[str, Value], str, object]] = {
    "type": ({"params_dtype": Global("torch", "float16")}, "params_dtype", "float16"),
    "type-not-said": ({}, "params_dtype", "bfloat16"),
    "tied": ({"untie_embeddings_and_output_weights": False}, "tied", True),
    "untied": ({"untie_embeddings_and_output_weights": True}, "tied", False),
    "tied-not-said": ({}, "tied", False),
    "sizes": ({"hidden_size": 4, "swiglu": True, "lr": 0.1, "name": "x"}, "sizes", {"hidden_size": 4, "swiglu": True}),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_say(case: str, tmp_path: Path) -> None:
    args, question, answer = ARGUMENTS[case]
    template = read_template(write_args(tmp_path, {"args": namespace(args)}))
    assert getattr(RankMeta(template=template, chunks=()), question) == answer


BATCHES: dict[str, tuple[dict[str, Value], int | None]] = {
    "said": ({"global_batch_size": 16}, 16),
    "ramped-up": ({"global_batch_size": 16, "rampup_batch_size": ["1", "2", "3"]}, None),
    "of-nothing": ({"global_batch_size": 0}, None),
    "not-said": ({}, None),
}


@pytest.mark.parametrize("case", BATCHES)
def test_batch(case: str, tmp_path: Path) -> None:
    args, answer = BATCHES[case]
    write_args(tmp_path, {"args": namespace(args)})
    assert read_arguments(tmp_path, (0, 0)).global_batch_size == answer


def test_a_group_of_no_ranks_is_no_group(tmp_path: Path) -> None:
    template = read_template(write_args(tmp_path, {"args": namespace({"data_parallel_size": 0})}))
    assert data_parallel_size(template) is None


def refused(folder: Path, topology: Topology = VIRTUAL) -> str:
    with pytest.raises((InputError, MissingInputError)) as caught:
        read(folder, topology)
    assert str(folder) in caught.value.where
    return caught.value.what


def test_arguments_that_were_written_anew_are_read_anew(tmp_path: Path) -> None:
    for layers in (2, 4):
        path = write_args(tmp_path, {"args": namespace({"num_layers": layers})})
        assert read_template(path).args == {"num_layers": layers}


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "metadata folder" in refused(tmp_path / "nowhere")


def test_a_rank_without_arguments_is_refused(tmp_path: Path) -> None:
    made(tmp_path, VIRTUAL)
    (tmp_path / "args_tp00_pp000.pt").unlink()
    refused(tmp_path)


def test_neither_maps_nor_lists_are_refused(tmp_path: Path) -> None:
    write_args(tmp_path, {"args": namespace({})})
    assert "neither a param map" in refused(tmp_path)


@pytest.mark.parametrize("lists", ["names", ["name"], [["a", 3]], [["a", "a"]], [3]])
def test_name_lists_of_another_shape_are_refused(lists: Value, tmp_path: Path) -> None:
    write_args(tmp_path, {"args": namespace({}), "param_name_list": lists})
    assert "param_name_list" in refused(tmp_path)


@pytest.mark.parametrize("tree", [[], 3, {1: 2}, None])
def test_arguments_that_are_no_dictionary_are_refused(tree: Value, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="dictionary with text keys"):
        read_template(write_args(tmp_path, tree))


def test_code_in_the_arguments_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "args_tp00_pp000.pt"
    write_archive(path, "args_tp00_pp000", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00exit\x85R.", [])
    with pytest.raises(UnsafePickleError):
        read_template(path)


def test_a_second_buffer_is_refused(tmp_path: Path) -> None:
    made(tmp_path, VIRTUAL)
    (tmp_path / "param_map_buffer1_dp0tp0pp0vpp0.json").write_text("{}")
    assert "a second buffer: param_map_buffer1" in refused(tmp_path)


def test_maps_numbered_with_a_hole_are_refused(tmp_path: Path) -> None:
    made(tmp_path, VIRTUAL)
    (tmp_path / "param_map_buffer0_dp0tp0pp0vpp1.json").unlink()
    assert "numbered vpp [0, 2]" in refused(tmp_path)


def test_more_maps_than_chunks_are_refused(tmp_path: Path) -> None:
    made(tmp_path, VIRTUAL)
    assert "3 model chunks are described for stage 0, the options ask for 1" in refused(
        tmp_path, Topology(num_layers=6)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a JSON"), ("[" * 50000, "not a JSON"), ('{"a": 1, "a": 2}', "appears twice"), ("\udcff", "not a JSON")],
    ids=["cut", "nested", "twice", "not-utf8"],
)
def test_a_map_that_is_no_json_is_refused(text: str, message: str, tmp_path: Path) -> None:
    made(tmp_path, VIRTUAL)
    (tmp_path / "param_map_buffer0_dp0tp0pp0vpp1.json").write_text(text, errors="surrogateescape")
    assert message in refused(tmp_path)


def test_maps_of_other_ranks_and_other_files_are_not_looked_at(tmp_path: Path) -> None:
    made(tmp_path, VIRTUAL)
    for name in ("param_map_buffer0_dp1tp0pp0vpp0.json", "param_map_buffer0_dp0tp1pp0vpp0.json", "notes.json"):
        (tmp_path / name).write_text("{")
    assert len(read(tmp_path, VIRTUAL).chunks) == 3


def test_every_golden_folder_is_read(golden_set: Path) -> None:
    from conversions import topology_of

    topology = topology_of(golden_set)
    for tp, pp in topology.ranks():
        found = read_rank_meta(golden_set / "pt_meta", topology, tp=tp, pp=pp)
        maps = sorted(golden_set.glob(f"pt_meta/param_map_buffer0_dp0tp{tp}pp{pp}vpp*.json"))
        assert [len(c.names) for c in found.chunks] == [len(json.loads(path.read_text())) for path in maps]
