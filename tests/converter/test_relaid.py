"""Conversion into another parallel layout, judged by tensors that numpy cut from whole arrays, and by torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.core.names import Rules
from ckpt2pt.engine.write import write_files
from ckpt2pt.errors import Ckpt2ptError, FormatError, TargetConflictError, TopologyError, TryAgainError
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.run.conversion import run
from ckptfiles import Tensor
from conversions import Quiet
from handmade import HEAD
from layouts import topology
from relaid import Relaid
from sharding import Sharding

CUTS = [(2, 1), (2, 4), (2, 8), (1, 2), (1, 4), (4, 2), (8, 1)]
KINDS: dict[str, dict[str, Any]] = {
    "gated": {},
    "biases": {"bias": True},
    "not-gated": {"gated": False, "bias": True},
    "grouped-queries": {"groups": 8, "heads": 16},
    "tied": {"tied": True},
    "float16": {"params_dtype": "float16"},
    "float32": {"params_dtype": "float32"},
    "several-buckets": {"bucket_numel": 60, "data": 3},
    "gamma": {"bias": True, "gamma": True},
}


def convert(one: Relaid, other: Relaid, folder: Path, **more: Any) -> None:
    request = one.becomes(other, folder, **more)
    outcome = run(request, range(other.topology.pipeline), Quiet())
    assert outcome.published
    other.check(outcome)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"tp{cut[0]}-tp{cut[1]}")
def test_every_rank_holds_what_numpy_cuts(cut: tuple[int, int], kind: str, tmp_path: Path) -> None:
    one, other = (Relaid(topology=topology(tensor=tp), **KINDS[kind]) for tp in cut)
    convert(one, other, tmp_path)


STAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pp1-pp4": ({}, {"pipeline": 4}),
    "pp4-pp1": ({"pipeline": 4}, {}),
    "pp2-pp2vpp2": ({"pipeline": 2}, {"pipeline": 2, "virtual": 2}),
    "pp2vpp2-pp4": ({"pipeline": 2, "virtual": 2}, {"pipeline": 4}),
    "vpp2-vpp4": ({"pipeline": 1, "virtual": 2}, {"pipeline": 1, "virtual": 4}),
    "even-uneven": ({"pipeline": 2}, {"pipeline": 3, "layers_per_stage": (1, 2, 1)}),
    "uneven-even": ({"pipeline": 3, "layers_per_stage": (2, 0, 2)}, {"pipeline": 2}),
    "uneven-uneven-chunks": (
        {"pipeline": 2, "layers_per_stage": (3, 1)},
        {"pipeline": 2, "virtual": 2, "layers_per_stage": (1, 1, 2, 0)},
    ),
    "noop-tail": ({"pipeline": 2, "noop": frozenset({3})}, {"pipeline": 4, "noop": frozenset({3})}),
    "noop-middle": ({"pipeline": 4, "noop": frozenset({1})}, {"pipeline": 2, "virtual": 2, "noop": frozenset({1})}),
    "both": ({"tensor": 2, "pipeline": 2, "data": 2}, {"tensor": 4, "pipeline": 1}),
}


@pytest.mark.parametrize("kind", ["gated", "tied", "several-buckets"])
@pytest.mark.parametrize("stages", STAGES)
def test_layers_go_to_the_stages_of_the_target(stages: str, kind: str, tmp_path: Path) -> None:
    one, other = (Relaid(topology=topology(**cut), **KINDS[kind]) for cut in STAGES[stages])
    convert(one, other, tmp_path)


# ------------------------------------------------------------------------------------------------ sources of other kinds


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize("full", [True, False])
def test_a_source_of_either_format_in_either_mode(suffix: str, full: bool, tmp_path: Path) -> None:
    one, other = Relaid(topology=topology(tensor=2)), Relaid(topology=topology(tensor=4, pipeline=2))
    request = one.becomes(other, tmp_path, full=full)
    shutil.rmtree(request.source)
    one.write_source(request.source, suffix=suffix, crc=True)
    outcome = run(request, range(2), Quiet())
    assert outcome.published
    if full:
        other.check(outcome)
    else:
        other.check_weights(outcome)


@pytest.mark.parametrize("sharding", [Sharding(), Sharding(v2=True), Sharding(suffix="safetensors", buffers=2)])
def test_data_parallel_shards_are_joined_and_cut_anew(sharding: Sharding, tmp_path: Path) -> None:
    one = Relaid(topology=topology(tensor=2, pipeline=2, data=2))
    other = Relaid(topology=topology(tensor=4), data=3)
    sharding.write(one, tmp_path / "ms")
    other.write_meta(tmp_path / "pt_meta")
    outcome = run(other.request(tmp_path, source_topology=one.topology), range(1), Quiet())
    other.check(outcome)


# -------------------------------------------------------------------------------------------------------- the vocabulary


def vocabulary(rows: int, tp: int, **more: Any) -> Relaid:
    return Relaid(topology=topology(tensor=tp), rows=rows, **more)


@pytest.mark.parametrize("arguments", [{"vocab_size": 15}, {"make_vocab_size_divisible_by": 6}], ids=["tokens", "rule"])
def test_a_larger_vocabulary_gets_zero_rows_and_a_warning(arguments: dict[str, Any], tmp_path: Path) -> None:
    one, other = vocabulary(18, 1), vocabulary(24, 4, known=18, more=arguments)
    outcome = run(one.becomes(other, tmp_path), range(1), Quiet())
    other.check(outcome)
    assert outcome.warnings == ("the vocabulary is padded from 18 to 24 rows: rows 18 to 23 are zero",)


def test_a_rank_that_gets_padding_alone_is_zero(tmp_path: Path) -> None:
    one, other = vocabulary(10, 1), vocabulary(16, 8, known=10, more={"vocab_size": 9})
    convert(one, other, tmp_path)


@pytest.mark.parametrize("arguments", [{"vocab_size": 15}, {"make_vocab_size_divisible_by": 6}], ids=["tokens", "rule"])
def test_a_smaller_vocabulary_loses_padding_alone_and_a_warning_says_so(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    one, other = vocabulary(24, 4), vocabulary(18, 1, more=arguments)
    outcome = run(one.becomes(other, tmp_path), range(1), Quiet())
    other.check(outcome)
    assert outcome.warnings == ("the vocabulary has 24 rows and the target 18: rows 18 to 23 are padding and left out",)


@pytest.mark.parametrize(
    ("rows", "arguments", "why"),
    [
        ((24, 18), {"vocab_size": 19}, "there are 19 tokens"),
        ((18, 24), {"vocab_size": 19}, "there are 19 tokens"),
        ((24, 12), {"make_vocab_size_divisible_by": 4}, "padding is to a multiple of 8"),
        ((16, 32), {"make_vocab_size_divisible_by": 4}, "padding is to a multiple of 8"),
        ((24, 18), {}, "neither the number of tokens nor make_vocab_size_divisible_by is known"),
    ],
)
def test_rows_that_may_be_tokens_are_neither_lost_nor_made_up(
    rows: tuple[int, int], arguments: dict[str, Any], why: str, tmp_path: Path
) -> None:
    one, other = vocabulary(rows[0], 2), vocabulary(rows[1], 2, more=arguments)
    request = one.becomes(other, tmp_path, source_topology=replace(one.topology, virtual=2))
    with pytest.raises(TopologyError, match=why) as caught:
        run(request, range(1), Quiet())
    assert "--vocab-size" in str(caught.value)
    assert caught.value.exit_code == 65
    assert not list((tmp_path / "out").rglob("*.pt"))


def test_the_plan_warns_of_the_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = vocabulary(18, 1), vocabulary(24, 4, known=18, more={"vocab_size": 15})
    one.becomes(other, tmp_path)
    assert main(["plan", *flags(tmp_path, "--tp-size", "1", "--target-tp-size", "4"), "--output", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["warnings"] == ["the vocabulary is padded from 18 to 24 rows: rows 18 to 23 are zero"]
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------- what cannot be done


def flags(folder: Path, *more: str) -> list[str]:
    places = {"--ms-path": "ms", "--param-map-path": "pt_meta", "--megatron-path": "out"}
    return [text for flag, name in places.items() for text in (flag, str(folder / name))] + list(more)


def refused(one: Relaid, other: Relaid, folder: Path, match: str, **more: Any) -> Ckpt2ptError:
    request = one.becomes(other, folder, **more)
    with pytest.raises(Ckpt2ptError, match=match) as caught:
        run(request, range(other.topology.pipeline), Quiet())
    assert caught.value.exit_code == 65
    last = other.topology.directory(0, other.topology.pipeline - 1)
    assert not list(folder.rglob(f"out/**/{last}/*"))
    assert not list(folder.glob("out/latest*"))
    return caught.value


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ({"heads": 6, "channels": 4}, "num_attention_heads is 6, which a tensor parallel size of 4 does not divide"),
        ({"heads": 16, "groups": 2}, "num_query_groups is 2, which a tensor parallel size of 4 does not divide"),
    ],
)
def test_heads_are_not_cut(kind: dict[str, Any], what: str, tmp_path: Path) -> None:
    one = Relaid(topology=topology(tensor=2), **kind)
    other = Relaid(topology=topology(tensor=4), **kind)
    assert "target.parallelism.tensor" in str(refused(one, other, tmp_path, what))


def test_columns_that_do_not_divide_are_refused_by_name(tmp_path: Path) -> None:
    one, other = (Relaid(topology=topology(tensor=tp), columns=10) for tp in (2, 4))
    refused(one, other, tmp_path, "linear_fc1.*which 4 ranks do not divide|has shape")


@pytest.mark.parametrize("role", ["", "exp_avg.", "exp_avg_sq."])
def test_ranks_that_disagree_on_a_norm_are_refused_with_both_places(role: str, tmp_path: Path) -> None:
    one, other = Relaid(topology=topology(tensor=2)), Relaid(topology=topology())
    name = f"{role}language_model.encoder.layers.2.input_norm.weight"
    tensor = one.entries[1, 0][name]
    one.entries[1, 0][name] = replace(tensor, data=tensor.data[:8] + b"\0\0\x80\x3f" + tensor.data[12:])
    error = refused(one, other, tmp_path, f"(?s){name}.*held by several ranks.*differ at element 2")
    assert "rank_0" in str(error.where)
    assert "rank_1" in str(error.where)
    assert "parallel sizes that it was saved with" in str(error)


def test_ranks_that_disagree_on_a_norm_stay_as_they_are_where_the_layout_stays(tmp_path: Path) -> None:
    made = Relaid(topology=topology(tensor=2))
    name = "language_model.encoder.layers.2.input_norm.weight"
    tensor = made.entries[1, 0][name]
    made.entries[1, 0][name] = replace(tensor, data=b"\0\0\x80\x3f" + tensor.data[4:])
    assert made.convert(tmp_path).published


def test_the_moments_of_replicas_do_not_matter_for_parameters_alone(tmp_path: Path) -> None:
    one, other = Relaid(topology=topology(tensor=2)), Relaid(topology=topology())
    name = "exp_avg.language_model.encoder.layers.2.input_norm.weight"
    one.entries[1, 0][name] = replace(one.entries[1, 0][name], data=bytes(24))
    assert run(one.becomes(other, tmp_path, full=False), range(1), Quiet()).published


@pytest.mark.parametrize("stages", [(4, 1), (4, 2), (2, 4)])
def test_tied_copies_that_differ_are_refused(stages: tuple[int, int], tmp_path: Path) -> None:
    one, other = (Relaid(topology=topology(pipeline=pp), tied=True) for pp in stages)
    head = one.entries[0, stages[0] - 1][HEAD]
    one.entries[0, stages[0] - 1][HEAD] = replace(head, data=head.data[:-4] + b"\0\0\x80\x3f")
    refused(one, other, tmp_path, "(?s)one tied weight, but they differ at element 95")


def test_a_module_that_no_table_knows_cannot_change_its_layout(tmp_path: Path) -> None:
    one, other = Relaid(topology=topology(tensor=2)), Relaid(topology=topology(tensor=4))
    for entries in one.entries.values():
        for role in ("", "exp_avg.", "exp_avg_sq."):
            name = f"{role}language_model.encoder.layers.0.attention.gate.weight"
            entries[name] = Tensor(name, "float32", (3,), bytes(12))
    rules = Rules(layer_modules={"self_attention.gate": "attention.gate"})
    error = refused(one, other, tmp_path, "nothing says how .*gate.* is cut", rules=rules)
    assert "parallel sizes that it was saved with" in str(error)


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    one, other = Relaid(topology=topology(pipeline=2)), Relaid(topology=topology())
    one.entries[0, 1] = {name: each for name, each in one.entries[0, 1].items() if "layers.3." not in name}
    refused(one, other, tmp_path, "layer 3 of the target is not in the source")


def test_layers_that_the_target_has_not_are_named(tmp_path: Path) -> None:
    one, other = Relaid(topology=topology(num_layers=6, pipeline=2)), Relaid(topology=topology())
    assert "model.numLayers" in str(refused(one, other, tmp_path, "layer 4 of the source has no place in the target"))


def test_a_tensor_that_one_rank_lacks_is_named(tmp_path: Path) -> None:
    one, other = Relaid(topology=topology(tensor=2)), Relaid(topology=topology())
    del one.entries[1, 0]["exp_avg.language_model.encoder.layers.1.mlp.projection.weight"]
    refused(one, other, tmp_path, r"exp_avg of decoder.layers.1.mlp.linear_fc2.weight is missing on tp 1")


@pytest.mark.parametrize(
    "wrong", [{"tensor": 1}, {"tensor": 4}, {"tensor": 1, "pipeline": 2}, {"tensor": 1, "data": 2}]
)
def test_wrong_sizes_of_the_source_are_found(wrong: dict[str, Any], tmp_path: Path) -> None:
    one, other = Relaid(topology=topology(tensor=2)), Relaid(topology=topology(pipeline=4))
    request = one.becomes(other, tmp_path)
    with pytest.raises(Ckpt2ptError) as caught:
        run(replace(request, source_topology=topology(**wrong)), range(4), Quiet())
    assert caught.value.exit_code in {65, 66}
    assert not list(tmp_path.rglob("out/**/*.pt"))


# ---------------------------------------------------------------------------------------------------- damage and identity


def flip_a_bit(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("verify", ["none", "full"])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_flipped_bit_in_a_strided_tensor_is_found_by_the_source_s_own_checksum(
    suffix: str, verify: str, tmp_path: Path
) -> None:
    one, other = Relaid(topology=topology(tensor=2)), Relaid(topology=topology(tensor=4))
    request = one.becomes(other, tmp_path, verify=verify)
    shutil.rmtree(request.source)
    one.write_source(request.source, suffix=suffix, crc=True)
    assert run(replace(request, target=tmp_path / "right"), range(1), Quiet()).source_checksums["verified"]
    path = request.source / "rank_1" / f"network_rank_1-0_12.{suffix}"
    extent = index_file(path)["exp_avg.language_model.encoder.layers.1.mlp.projection.weight"].extents[0]
    flip_a_bit(path, extent.offset + extent.nbytes // 2)
    with pytest.raises(FormatError, match="crc_num"):
        run(request, range(1), Quiet())
    assert not list(tmp_path.rglob("out/**/mp_rank_02/*"))


def test_a_source_replaced_in_place_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Relaid(topology=topology(tensor=2)), Relaid(topology=topology())
    request = one.becomes(other, tmp_path)
    real = write_files

    def replacing(*args: Any, **more: Any) -> Any:
        one.write_source(request.source)  # the same names, shapes and sizes
        return real(*args, **more)

    monkeypatch.setattr("ckpt2pt.run.rank.write_files", replacing)
    with pytest.raises(TryAgainError, match="was written while it was read"):
        run(request, range(1), Quiet())
    assert not list(tmp_path.rglob("out/**/*.pt"))


def test_a_retrained_source_is_read_anew_in_the_same_process(tmp_path: Path) -> None:
    """Headers are kept for a process: not those of files that were there before."""
    one, other = Relaid(topology=topology(tensor=2)), Relaid(topology=topology())
    request = one.becomes(other, tmp_path)
    run(request, range(1), Quiet())
    for entries in one.entries.values():  # moves every tensor, and changes one
        entries["first"] = Tensor("first", "float32", (100,), bytes(400))
    one.entries = {rank: dict(sorted(found.items())) for rank, found in one.entries.items()}
    norm = "language_model.encoder.final_norm.weight"
    for entries in one.entries.values():
        entries[norm] = replace(entries[norm], data=bytes(24))
    other.truth[0, 0, "param", f"0:{norm}"][:] = 0
    one.write_source(request.source)
    outcome = run(replace(request, target=tmp_path / "again", rules=Rules(ignore=("first",))), range(1), Quiet())
    other.check(outcome)


def test_stages_one_at_a_time_in_processes_of_their_own(tmp_path: Path) -> None:
    one, other = Relaid(topology=topology(tensor=2)), Relaid(topology=topology(tensor=1, pipeline=4))
    one.becomes(other, tmp_path)
    more = ["--tp-size", "2", "--pp-size", "1", "--target-tp-size", "1", "--target-pp-size", "4", "--progress", "none"]
    for stage in (2, 0, 3, 1):
        assert not (tmp_path / "out" / "latest_checkpointed_iteration.txt").exists()
        command = ["convert", *flags(tmp_path, *more), "--stage", str(stage)]
        subprocess.run([sys.executable, "-m", "ckpt2pt", *command], check=True, capture_output=True)
    other.check(run(other.request(tmp_path, source_topology=replace(one.topology)), range(4), Quiet()))


def test_a_killed_conversion_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Relaid(topology=topology(tensor=2)), Relaid(topology=topology(tensor=1, pipeline=4))
    request = one.becomes(other, tmp_path)
    script = (
        "import os, sys\n"
        "from ckpt2pt.cli.commands import main\n"
        "from ckpt2pt.run.rank import RankTask\n"
        "real, done = RankTask.run, []\n"
        "def killed(*args):\n"
        "    real(*args)\n"
        "    done.append(args)\n"
        "    if len(done) == 2:\n"
        "        os.kill(os.getpid(), 9)\n"
        "RankTask.run = killed\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    more = ["--tp-size", "2", "--pp-size", "1", "--target-tp-size", "1", "--target-pp-size", "4", "--multiprocess-off"]
    command = [sys.executable, "-c", script, "convert", *flags(tmp_path, *more), "--verify", "full"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -9
    assert not (tmp_path / "out" / "latest_checkpointed_iteration.txt").exists()
    outcome = run(request, range(4), Quiet())
    assert (len(outcome.kept), len(outcome.converted)) == (2, 2)
    other.check(outcome)


def test_another_layout_of_the_same_iteration_is_another_conversion(tmp_path: Path) -> None:
    one, other = Relaid(topology=topology(tensor=2)), Relaid(topology=topology(tensor=4))
    run(one.becomes(other, tmp_path), range(1), Quiet())
    third = Relaid(topology=topology(pipeline=2))
    third.write_meta(tmp_path / "other_meta")
    request = third.request(tmp_path, metadata=tmp_path / "other_meta", source_topology=one.topology)
    with pytest.raises(TargetConflictError):
        run(request, range(2), Quiet())
    other.check(run(other.request(tmp_path, source_topology=one.topology), range(1), Quiet()))
    outcome = run(replace(request, overwrite=True), range(2), Quiet())
    assert outcome.published
    third.check(outcome)
    assert not list(outcome.target.folder.glob("mp_rank_03*"))
