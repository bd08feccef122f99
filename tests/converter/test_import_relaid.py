"""Import into another parallel layout, judged by tensors that numpy cut from whole arrays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.engine.write import write_files
from ckpt2pt.errors import Ckpt2ptError, FormatError, InputError, TargetConflictError, TryAgainError
from ckpt2pt.formats.megatron.headers import read_rank
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.formats.ptmeta.capture import lay_out_rank
from ckpt2pt.run.conversion import run
from ckpt2pt.verification.gather import Files
from ckpt2pt.verification.leaves import leaf_of
from conversions import Quiet
from goldens import golden_sets
from imports import import_request, run_all
from layouts import topology
from relaid import Relaid, check_mindspore
from undistributed import without_distributed_optimizer

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "tp2-tp1": ({"tensor": 2}, {}, {}),
    "tp2-tp4": ({"tensor": 2}, {"tensor": 4}, {"bias": True}),
    "tp2-tp8-not-gated": ({"tensor": 2}, {"tensor": 8}, {"gated": False, "bias": True}),
    "tp1-tp4-grouped": ({}, {"tensor": 4}, {"groups": 4, "heads": 16}),
    "pp4-pp1-tied": ({"pipeline": 4}, {}, {"tied": True}),
    "pp1-pp4-tied": ({}, {"pipeline": 4}, {"tied": True}),
    "pp2vpp2-tp2pp1": ({"pipeline": 2, "virtual": 2}, {"tensor": 2}, {"bucket_numel": 60, "data": 3}),
    "noop": ({"pipeline": 4, "noop": frozenset({3})}, {"pipeline": 2, "noop": frozenset({3})}, {}),
    "uneven": ({"pipeline": 2, "layers_per_stage": (3, 1)}, {"pipeline": 4}, {}),
}


def imported(one: Relaid, other: Relaid, folder: Path, **more: Any) -> None:
    if not (folder / "out").exists():
        one.convert(folder)
    target = other.topology
    options: dict[str, Any] = {
        "source": folder / "out",
        "target": folder / "back",
        "maps": folder / "pt_meta",
        "layers_per_stage": one.topology.layers_per_stage,
        "noop": one.topology.noop if one.topology.layers_per_stage else None,
        "target_tensor": target.tensor,
        "target_pipeline": target.pipeline,
        "target_virtual": target.virtual,
        "verify": "full",
    }
    assert run_all(import_request(**(options | more))).published


@pytest.mark.parametrize("case", CASES)
def test_every_rank_holds_what_numpy_cuts(case: str, tmp_path: Path) -> None:
    source, target, kind = CASES[case]
    one, other = (Relaid(topology=topology(**cut), **kind) for cut in (source, target))
    imported(one, other, tmp_path)
    check_mindspore(other, tmp_path / "back")


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_either_format_in_either_mode(suffix: str, full: bool, tmp_path: Path) -> None:
    one, other = Relaid(topology=topology(tensor=2), params_dtype="float32"), Relaid(topology=topology(pipeline=2))
    imported(one, other, tmp_path, format=suffix, full=full)
    if not full:
        other.entries = {
            rank: {name: each for name, each in found.items() if not name.startswith("exp_avg")}
            for rank, found in other.entries.items()
        }
    check_mindspore(other, tmp_path / "back", suffix=suffix)


@pytest.mark.parametrize("kinds", [("param",), ("exp_avg", "exp_avg_sq")])
def test_only_what_is_asked_for(kinds: tuple[str, ...], tmp_path: Path) -> None:
    one, other = Relaid(topology=topology(tensor=2)), Relaid(topology=topology())
    imported(one, other, tmp_path, contents=kinds)
    wanted = {
        name: each
        for name, each in other.entries[0, 0].items()
        if (name.split(".")[0] if name.startswith("exp_avg") else "param") in kinds
    }
    other.entries[0, 0] = wanted
    check_mindspore(other, tmp_path / "back")


def test_a_file_for_every_replica(tmp_path: Path) -> None:
    one, other = Relaid(topology=topology(tensor=2)), Relaid(topology=topology(pipeline=2))
    imported(one, other, tmp_path, data=2, copies=True)
    found = {path.parent.name: path.read_bytes() for path in (tmp_path / "back").glob("rank_*/network.ckpt")}
    assert sorted(found) == ["rank_0", "rank_1", "rank_2", "rank_3"]
    assert found["rank_0"] == found["rank_1"] != found["rank_2"] == found["rank_3"]


def test_metadata_is_that_of_the_checkpoint_and_brings_it_back(tmp_path: Path) -> None:
    """Import and conversion are each other's inverse, whatever layout lies between."""
    one, other = Relaid(topology=topology(tensor=2), data=3), Relaid(topology=topology(pipeline=2))
    imported(one, other, tmp_path)
    request = one.request(
        tmp_path,
        source=tmp_path / "back",
        metadata=tmp_path / "back" / "source_pt_meta",
        target=tmp_path / "again",
        source_topology=other.topology,
        iteration=12,
    )
    outcome = run(request, range(1), Quiet())
    one.check(outcome)
    for path in outcome.target.folder.rglob("distrib_optim.pt"):
        first = tmp_path / "out" / path.relative_to(tmp_path / "again")
        assert path.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("role", ["", "exp_avg."])
def test_ranks_that_disagree_on_a_norm_are_refused(role: str, tmp_path: Path) -> None:
    one, other = Relaid(topology=topology(tensor=2)), Relaid(topology=topology())
    name = f"{role}language_model.encoder.layers.2.input_norm.weight"
    tensor = one.entries[1, 0][name]
    one.entries[1, 0][name] = replace(tensor, data=tensor.data[:8] + b"\0\0\x80\x3f" + tensor.data[12:])
    with pytest.raises(InputError, match=f"(?s){name}.*held by several ranks.*differ at element 2") as caught:
        imported(one, other, tmp_path)
    assert "mp_rank_00" in str(caught.value.where)
    assert "mp_rank_01" in str(caught.value.where)
    assert not list(tmp_path.rglob("back/rank_*/*"))


def test_a_flipped_bit_in_a_strided_tensor_is_found_by_the_archive_s_checksum(tmp_path: Path) -> None:
    one, other = Relaid(topology=topology(tensor=2)), Relaid(topology=topology(tensor=4))
    one.convert(tmp_path)
    path = tmp_path / "out" / "iter_0000012" / "mp_rank_01" / "distrib_optim.pt"
    rank = read_rank(path.parent)
    assert rank.buffers
    extent = rank.buffers[0][0].tensors["exp_avg_sq"].extents[0]
    placements = lay_out_rank(rank, 0).buffers[0][0].placements
    strided = next(one for one in placements if one.name.endswith("1.mlp.dense_4h_to_h.weight"))
    data = bytearray(path.read_bytes())
    data[extent.offset + 4 * strided.start + 9] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="CRC-32"):
        imported(one, other, tmp_path)
    assert not list(tmp_path.rglob("back/rank_2/*"))


def test_a_checkpoint_replaced_in_place_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Relaid(topology=topology(tensor=2)), Relaid(topology=topology())
    real = write_files

    def replacing(*args: Any, **more: Any) -> Any:
        for path in (tmp_path / "out").rglob("*.pt"):
            path.write_bytes(path.read_bytes())
        return real(*args, **more)

    monkeypatch.setattr("ckpt2pt.run.rank.write_files", replacing)
    with pytest.raises(TryAgainError, match="was written while it was read"):
        imported(one, other, tmp_path)
    assert not list(tmp_path.rglob("back/rank_*/*"))


def test_two_layouts_into_one_place_are_two_imports(tmp_path: Path) -> None:
    one, other, third = (Relaid(topology=topology(tensor=tp)) for tp in (2, 4, 1))
    imported(one, other, tmp_path)
    with pytest.raises(TargetConflictError):
        imported(one, third, tmp_path)
    check_mindspore(other, tmp_path / "back")
    imported(one, third, tmp_path, overwrite=True)
    check_mindspore(third, tmp_path / "back")
    assert [str(path.relative_to(tmp_path)) for path in (tmp_path / "back").glob("rank_*/*")] == [
        "back/rank_0/network.ckpt"
    ]


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ({"target_tensor": 3}, "num_attention_heads is 8, which a tensor parallel size of 3 does not divide"),
        ({"target_pipeline": 3}, "4 layers do not divide into 3 stages"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(target: dict[str, int], what: str, tmp_path: Path) -> None:
    one = Relaid(topology=topology(tensor=2))
    with pytest.raises(Ckpt2ptError, match=what):
        imported(one, one, tmp_path, **target)


def test_a_run_without_the_distributed_optimizer_is_cut_anew(tmp_path: Path) -> None:
    """Its optimizer holds a tensor for each parameter."""
    folder = next(folder for folder in golden_sets() if folder.name == "b_tp2pp2")
    undistributed = without_distributed_optimizer(folder, tmp_path / "A")
    target = {"target_tensor": 1, "target_pipeline": 1}
    for name, source in {"one": folder / "A", "other": undistributed}.items():
        request = import_request(source=source, target=tmp_path / name, **target)
        assert run_all(request).published
    one, other = (index_file(tmp_path / name / "rank_0" / "network.ckpt") for name in ("one", "other"))
    tensors = [name for name, ref in one.items() if ref.numel > 1]
    assert len(tensors) > 30
    with Files() as files:
        for name in tensors:
            left, right = (leaf_of(index[name]).elements.block(files, 0, one[name].numel) for index in (one, other))
            assert (left == right).all(), name
