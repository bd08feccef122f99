"""What `inspect` says of every kind of file and folder, from headers alone."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from archives import write_archive
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import FormatError, InputError, MissingInputError, UsageError
from ckpt2pt.formats.torchfile.pickles import write_pickle
from ckpt2pt.formats.torchfile.trees import Value, tensor
from ckpt2pt.io.text import render
from ckpt2pt.show.checkpoint import inspect
from ckptfiles import Tensor, chunk, ckpt, number, safe, some_tensors, value
from conversions import request_for
from handmade import Handmade
from results import convert

Rows = list[dict[str, Any]]


def shown(path: Path, *, details: bool = False) -> dict[str, Any]:
    """The document, proved to be plain JSON and to have a text."""
    document = inspect(path, details=details)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert render(document).startswith(f"{document['kind']}  {path}")
    return cast("dict[str, Any]", document)


@pytest.fixture(scope="module")
def pipelined(golden: Path) -> Path:
    return golden / "megatron06" / "j_tp1pp2dp2"


# --------------------------------------------------------------------------------------------------------------- files


def test_a_mindspore_file_by_role_layer_and_time(pipelined: Path) -> None:
    document = shown(pipelined / "ms" / "rank_2" / "network.ckpt")
    assert (document["kind"], document["layers"], document["iteration"]) == ("MindSpore checkpoint (.ckpt)", "2-3", 2)
    totals = {row["role"]: row["count"] for row in document["totals"]}
    assert (totals["parameters"], totals["first moments"], totals["second moments"]) == (14, 14, 14)
    assert sum(totals.values()) == document["entries"]
    assert document["scalars"]["num_steps"] == 8
    assert document["scalars"]["step_num"] == 2
    first = document["tensors"][0]
    assert first["name"] == "language_model.output_layer.weight"
    norms = next(row for row in document["tensors"] if "{" in row["name"] and "input_norm" in row["name"])
    assert norms["name"] == "language_model.encoder.layers.{2-3}.input_norm.weight"
    assert (norms["count"], norms["dtype"], norms["shape"], norms["bytes"]) == (2, "float32", [64], 512)


def test_details_list_every_entry_with_its_place(pipelined: Path) -> None:
    path = pipelined / "ms" / "rank_2" / "network.ckpt"
    document = shown(path, details=True)
    assert len(document["tensors"]) == document["entries"]
    row = next(row for row in document["tensors"] if row["name"] == "step_num")
    assert int.from_bytes(path.read_bytes()[row["offset"] : row["offset"] + row["bytes"]], "little") == 2
    assert len(render(inspect(path)).splitlines()) < len(render(document).splitlines())


def test_tensors_of_unlike_shape_are_not_joined(tmp_path: Path) -> None:
    names = [(f"language_model.encoder.layers.{n}.mlp.mapping.weight", 8 if n < 3 else 4) for n in range(5)]
    (tmp_path / "x.ckpt").write_bytes(ckpt(Tensor(name, "int8", (n,), bytes(n)) for name, n in names))
    rows = [(row["name"], row["count"], row["shape"]) for row in shown(tmp_path / "x.ckpt")["tensors"]]
    assert rows == [
        ("language_model.encoder.layers.{0-2}.mlp.mapping.weight", 3, [8]),
        ("language_model.encoder.layers.{3-4}.mlp.mapping.weight", 2, [4]),
    ]


def test_shards_are_joined_whatever_their_size(pipelined: Path) -> None:
    shards = sorted((pipelined / "ms_zero_src").rglob("*.ckpt"))
    if not shards:
        pytest.skip("the set has no shards")
    document = shown(shards[0])
    assert "shards of the distributed optimizer" in {row["role"] for row in document["totals"]}


def test_buckets_of_unlike_size_are_one_row(tmp_path: Path) -> None:
    tensors = [Tensor(f"buffer_0_bucket_{n}", "int8", (n + 2,), bytes(n + 2)) for n in range(4)]
    (tmp_path / "x.ckpt").write_bytes(ckpt(tensors))
    (row,) = [row for row in shown(tmp_path / "x.ckpt")["tensors"] if "bucket" in row["name"]]
    assert (row["name"], row["count"], row["shape"], row["bytes"]) == ("buffer_0_bucket_{0-3}", 4, "various", 14)


@pytest.mark.parametrize(("write", "suffix"), [(ckpt, ".ckpt"), (safe, ".safetensors")], ids=["ckpt", "safetensors"])
def test_every_type_and_shape_is_shown(tmp_path: Path, write: Any, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(write(some_tensors()))
    document = shown(path, details=True)
    assert document["kind"] == f"MindSpore checkpoint ({suffix})"
    assert {row["name"] for row in document["tensors"]} == {each.name for each in some_tensors()}
    assert document["iteration"] == "unknown"
    assert document["scalars"]["one"] == 0


def test_golden_mindspore_files_of_every_corner_are_shown(golden: Path) -> None:
    seen = 0
    for path in sorted((golden / "mindspore").rglob("*")):
        if path.suffix in {".ckpt", ".safetensors"} and path.is_file():
            try:
                seen += bool(shown(path, details=True)["entries"] >= 0)
            except InputError:
                continue  # strategy files and encrypted ones are refused by name, which the readers' tests look at
    assert seen > 5


def test_a_model_file_is_summarised(pipelined: Path) -> None:
    path = pipelined / "A" / "iter_0000002" / "mp_rank_00_001" / "model_optim_rng.pt"
    document = shown(path)
    assert document["holds"] == "a Megatron model"
    assert [row["key"] for row in document["tree"]][:4] == ["args", "checkpoint_version", "iteration", "model"]
    model = next(row for row in document["tree"] if row["key"] == "model")
    assert (model["tensors"], model["bytes"]) == (14, 2 * 78_144)
    assert document["scalars"]["/iteration"] == 2
    assert document["scalars"]["/optimizer/optimizer/param_groups/1/step"] == 2
    assert document["arguments"]["parallelism"]["pipeline_model_parallel_size"] == 2
    assert document["arguments"]["model"]["params_dtype"] == "torch.bfloat16"
    assert str(document["arguments"]["others"]).endswith("more arguments (--details)")
    everything = shown(path, details=True)
    assert everything["arguments"]["others"]["lr_decay_iters"] == 100
    assert everything["scalars"]["/rng_state/0/random_rng_state/1/*"] == "625 values"
    assert everything["scalars"]["/opt_param_scheduler/lr_decay_style"] == "cosine"


def test_buckets_of_an_optimizer_file_with_their_padding(pipelined: Path, tmp_path: Path) -> None:
    result = convert(pipelined, tmp_path, target_data=3)
    document = shown(result.optim)
    assert document["holds"] == "a Megatron distributed optimizer"
    assert document["buckets"] == [
        {
            "buffer": 0,
            "types": "(torch.bfloat16, torch.float32)",
            "bucket": 0,
            "elements": 78_081,
            "padding": 1,
        }
    ]
    assert document["tensors"] == []
    assert len(shown(result.optim, details=True)["tensors"]) == 3


@pytest.mark.parametrize(
    ("tree", "holds"),
    [
        pytest.param({f"layers.{n}.weight": torch.zeros(2) for n in range(3000)}, "other data", id="a-flat-state-dict"),
        pytest.param([torch.zeros(2), 1], "other data", id="a-list"),
        pytest.param(torch.zeros(3), "other data", id="a-tensor"),
        pytest.param(float("nan"), "other data", id="a-number"),
    ],
)
def test_any_torch_archive_is_shown(tmp_path: Path, tree: object, holds: str) -> None:
    torch.save(tree, tmp_path / "x.pt")
    document = shown(tmp_path / "x.pt")
    assert document["holds"] == holds
    assert len(document["tensors"]) <= 1


# ------------------------------------------------------------------------------------------------------------- folders


def test_metadata_with_its_maps(golden_set: Path) -> None:
    topology = request_for(golden_set, Path()).topology
    document = shown(golden_set / "pt_meta")
    ranks = sorted((row["tp"], row["pp"]) for row in document["ranks"])
    assert ranks == sorted(topology.ranks())
    assert len(document["paramMaps"]) == sum(len(topology.filled_chunks(pp)) for _, pp in topology.ranks())
    assert all(row["elements"] > 0 for row in document["paramMaps"])
    assert shown(golden_set / "pt_meta_params")["mode"] == "parameters only: no param maps"


@pytest.mark.parametrize(
    "text",
    ["[1]", "", '{"a": 1}', '{"a": ["t", [1], 1e999, 1, 0]}', '{"a": ["t", [1], NaN, 1, 0]}', "[" * 99_999],
    ids=["list", "empty", "number", "infinity", "nan", "deep"],
)
def test_metadata_with_a_broken_map_is_a_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "param_map_buffer0_dp0tp0pp0vpp0.json").write_text(text)
    with pytest.raises(FormatError, match="cannot be read as a param map"):
        inspect(tmp_path)


def test_a_training_output_with_its_steps_and_the_chosen_one(tmp_path: Path) -> None:
    for rank in (0, 2):
        folder = tmp_path / f"rank_{rank}"
        folder.mkdir()
        steps = [(0, 100), (0, 200), (1, 10)] if rank == 0 else [(0, 100), (0, 200)]
        for epoch, step in steps:
            entries = [Tensor("step_num", "int64", (), step.to_bytes(8, "little"))]
            entries += [Tensor("epoch_num", "int64", (), epoch.to_bytes(8, "little"))]
            (folder / f"network_rank_{rank}-{epoch}_{step}.ckpt").write_bytes(ckpt(entries))
    document = shown(tmp_path)
    assert document["ranks"] == "0,2"
    assert [(row["name"], row["files"], row["chosen"]) for row in document["steps"]] == [
        ("epoch 0 step 100", 2, False),
        ("epoch 0 step 200", 2, True),
    ]
    assert (document["chosen"], document["iteration"]) == ("rank_0/network_rank_0-0_200.ckpt", 200)


def test_a_training_output_that_cannot_be_converted_says_why(tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / f"rank_{rank}").mkdir()
        (tmp_path / f"rank_{rank}" / f"n-0_{rank}.ckpt").write_bytes(ckpt(some_tensors()))
    document = shown(tmp_path)
    assert document["problem"].startswith("no checkpoint is complete on all ranks")
    assert len(document["files"]) == 2


def test_golden_training_outputs(golden_set: Path) -> None:
    document = shown(golden_set / "ms")
    assert (document["iteration"], len(document["steps"])) == (2, 1)


def test_megatrons_own_folder(golden_set: Path) -> None:
    topology = request_for(golden_set, Path()).topology
    document = shown(golden_set / "A")
    assert (document["tracker"], document["loads"]) == ("2", "iter_0000002")
    (row,) = document["iterations"]
    assert (row["tp"], row["pp"]) == (topology.tensor, topology.pipeline)
    assert (row["state"], row["converted"], row["optimizer"]) == ("published", "not by ckpt2pt", True)
    assert document["resumable"] == "yes, by Megatron-LM 0.6"
    assert "weightsLoadable" not in document


@pytest.mark.parametrize(("tracker", "name"), [("10000000", "iter_10000000"), ("release", "release")])
def test_any_iteration_that_the_tracker_names_is_loaded(golden: Path, tmp_path: Path, tracker: str, name: str) -> None:
    shutil.copytree(golden / "megatron06" / "b_tp2pp2" / "A" / "iter_0000002", tmp_path / name)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    document = shown(tmp_path)
    assert (document["tracker"], document["loads"]) == (tracker, name)
    assert [(row["name"], row["tp"], row["pp"]) for row in document["iterations"]] == [(name, 2, 2)]


def test_a_tensor_parallel_rank_may_have_three_digits(tmp_path: Path) -> None:
    for name in ("mp_rank_00_000", "mp_rank_100_000"):
        (tmp_path / "iter_0000001" / name).mkdir(parents=True)
    assert shown(tmp_path)["iterations"][0]["tp"] == shown(tmp_path / "iter_0000001")["tp"] == 101


def test_an_expert_parallel_checkpoint_has_one_more_size(tmp_path: Path) -> None:
    (tmp_path / "mp_rank_00_000_001").mkdir()
    document = shown(tmp_path)
    assert (document["tp"], document["pp"], document["ep"]) == (1, 1, 2)
    assert document["resumable"].startswith("unknown: ")


def test_a_conversion_half_way_and_finished(pipelined: Path, tmp_path: Path) -> None:
    from ckpt2pt.run.conversion import run
    from conversions import Quiet

    request = request_for(pipelined, tmp_path)
    run(request, [1], Quiet())
    (tmp_path / "iter_0000002" / "mp_rank_00_001" / ".distrib_optim.pt.7-ab.partial").write_bytes(b"")
    document = shown(tmp_path)
    assert (document["tracker"], document["loads"]) == ("none", "nothing")
    (row,) = document["iterations"]
    assert (row["state"], row["converted"]) == ("not named by the tracker, 1 unfinished files", "stages 1")
    run(request, [0], Quiet())
    (row,) = shown(tmp_path)["iterations"]
    assert row["converted"] == "stages 0-1"
    assert row["state"].startswith("published")
    assert shown(tmp_path / "iter_0000002")["kind"] == "Megatron iteration"


def test_what_megatron_cannot_resume_from_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ckpt2pt.run.conversion.check_loadable", lambda *_: None
    )  # which refuses to write such a checkpoint
    model = Handmade(topology=Topology(num_layers=2, pipeline=2), edit=lambda tree: tree.pop("rng_state"))
    folder = model.convert(tmp_path, verify="digest").target.folder
    for document in (shown(folder), shown(folder.parent)):
        assert document["resumable"] == "no: 2 of 2 ranks, first tp 0 pp 0: rng_state is missing"
        assert document["weightsLoadable"] == "yes"
    (folder / "mp_rank_00_001" / "distrib_optim.pt").unlink()
    assert "rng_state" in shown(folder)["resumable"]
    (folder / "mp_rank_00_001").rename(tmp_path / "away")
    why = "no: mp_rank_00_000 has to be mp_rank_00 for this pipeline size; args.pipeline_model_parallel_size is 2"
    assert shown(folder)["resumable"].startswith(why)
    assert shown(folder)["weightsLoadable"].startswith(why)


def test_without_the_optimizers_file_only_the_weights_are_loaded(golden: Path) -> None:
    document = shown(golden / "megatron06" / "b_tp2pp2" / "C_params")
    assert document["resumable"] == "no: 4 of 4 ranks, first tp 0 pp 0: distrib_optim.pt is missing"
    assert document["weightsLoadable"] == "yes"


def test_of_another_megatron_nothing_is_claimed(tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000001" / "mp_rank_00"
    folder.mkdir(parents=True)
    tree: Value = {
        "model": {"decoder.layers.0.x.weight": tensor("bfloat16", "0", 4, 0, (4,))},
        "checkpoint_version": 3.0,
    }
    write_archive(folder / "model_optim_rng.pt", "model_optim_rng", write_pickle(tree), [bytes(8)])
    assert shown(tmp_path)["loads"] == "nothing"
    assert shown(folder.parent)["resumable"].startswith("not by Megatron-LM 0.6")


def test_a_rank_folder_lists_its_files(pipelined: Path) -> None:
    document = shown(pipelined / "ms" / "rank_0")
    [row] = document["files"]
    assert (row["file"], row["holds"], row["layers"], row["iteration"]) == (
        "network.ckpt",
        "MindSpore checkpoint (.ckpt)",
        "0-1",
        2,
    )
    model = {row["file"]: row["holds"] for row in shown(pipelined / "A" / "iter_0000002" / "mp_rank_00_000")["files"]}
    assert model["model_optim_rng.pt"] == "a Megatron model"


def test_a_file_of_a_rank_folder_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"")
    (tmp_path / "b.ckpt").write_bytes(ckpt([Tensor("x", "float32", (1,), bytes(4))]))
    damaged, whole = shown(tmp_path)["files"]
    assert "empty" in damaged["holds"]
    assert whole["holds"] == "MindSpore checkpoint (.ckpt)"


def test_what_is_no_checkpoint_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint"):
        inspect(tmp_path)
    with pytest.raises(MissingInputError, match="the file or folder is not there"):
        inspect(tmp_path / "nowhere")
    (tmp_path / "x.txt").write_text("hello, this is no checkpoint at all")
    with pytest.raises(InputError):
        inspect(tmp_path / "x.txt")


# --------------------------------------------------------------------------------------------------------------- speed


def sparse(path: Path, count: int, nbytes: int) -> None:
    """A .ckpt of true size whose payloads are holes."""
    with path.open("wb") as file:
        for layer in range(count):
            head = number(1, nbytes) + chunk(2, b"Int8") + b"\x1a"
            length = _varint(nbytes)
            field = b"\x12" + _varint(len(head) + len(length) + nbytes) + head + length
            tag = chunk(1, f"language_model.encoder.layers.{layer}.mlp.mapping.weight".encode())
            file.write(b"\x0a" + _varint(len(tag) + len(field) + nbytes) + tag + field)
            file.seek(nbytes, os.SEEK_CUR)
        file.write(value("end", chunk(2, number(1, 1) + chunk(2, b"Int8") + chunk(3, b"x"))))


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def test_a_file_of_100_gigabytes_is_shown_at_once(tmp_path: Path) -> None:
    sparse(tmp_path / "x.ckpt", 80, 1280 << 20)
    began = time.monotonic()
    document = shown(tmp_path / "x.ckpt")
    assert time.monotonic() - began < 2
    assert document["bytes"] > 100 << 30
    assert document["tensors"][0]["name"] == "language_model.encoder.layers.{0-79}.mlp.mapping.weight"
    assert "100.0 GiB" in render(document)
