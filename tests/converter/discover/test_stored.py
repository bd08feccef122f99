"""A Megatron checkpoint converted to Megatron, in its own layout and in others, is the same checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt2pt
from ckpt2pt.cli.commands import main
from ckpt2pt.core.progress import SILENCE
from ckpt2pt.core.tensor import ROLES, Role
from ckpt2pt.errors import Ckpt2ptError, FormatError, MissingInputError, TopologyError, UsageError, VerificationError
from ckpt2pt.formats.folders import iteration_folder
from ckpt2pt.formats.ptmeta.make import from_pt_meta
from ckpt2pt.formats.ptmeta.relayout import NewLayout
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.trees import namespace_attrs
from ckpt2pt.kube.conversion.schema import Source, Spec, Target
from ckpt2pt.kube.resolve import resolve
from ckpt2pt.run.conversion import run
from conversions import topology_of
from documents import minimal
from goldens import golden_root, golden_sets
from results import edit_tree, set_element, tree_of
from torchload import megatron_names
from undistributed import without_distributed_optimizer

SETS = {folder.name: folder for folder in golden_sets()}
OTHER = {
    "tp1": {"target_tp": 1},
    "tp4": {"target_tp": 4},
    "tp8": {"target_tp": 8},
    "pp1": {"target_pp": 1, "target_vpp": 1},
    "pp4": {"target_pp": 4, "target_vpp": 1},
    "tp2-pp2-vpp2": {"target_tp": 2, "target_pp": 2, "target_vpp": 2},
}  # fmt: skip
NOT_CARRIED = ("/rng_state",)


def same(one: Path, other: Path, *ignore: str) -> Sequence[Any]:
    return ckpt2pt.verify(one, other, ignore=ignore, ignore_padding=True).rows


def tensors(path: Path, *roles: Role) -> dict[str, bytes]:
    """Every element of a checkpoint, whatever its layout; without the zero rows that pad a vocabulary."""
    with ckpt2pt.open(path) as found:
        return {
            f"{role}/{name}": found.get(name, role=role).tobytes().rstrip(b"\0")
            for role in roles or ROLES
            for name in found.keys(role)
        }


def flip_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def possible(folder: Path, new: dict[str, int]) -> bool:
    """Whether the heads of the tiny model can be cut so often, and its layers divided."""
    cut, path = topology_of(folder), min(iteration_folder(folder / "A").rglob("model_optim_rng.pt"))
    found = namespace_attrs(tree_of(path)["args"])
    groups = found["num_query_groups"] if found.get("group_query_attention") else found["num_attention_heads"]
    assert isinstance(groups, int)
    stages = new.get("target_pp", cut.pipeline) * new.get("target_vpp", cut.virtual)
    return groups % new.get("target_tp", cut.tensor) == 0 and cut.num_layers % stages == 0


CASES = [
    pytest.param(folder, new, id=f"{name}-{layout}")
    for name, folder in SETS.items()
    for layout, new in OTHER.items()
    if possible(folder, new)
]


@pytest.mark.parametrize("name", SETS)
def test_a_checkpoint_in_its_own_layout_is_the_same_to_the_last_leaf(name: str, tmp_path: Path) -> None:
    source = SETS[name] / "A"
    outcome = ckpt2pt.convert(source=source, target=tmp_path / "new")
    assert (outcome.published, outcome.warnings, outcome.kept_of_template) == (True, (), ())
    assert same(source, tmp_path / "new") == ()


@pytest.mark.parametrize(("folder", "new"), CASES)
def test_another_layout_holds_the_same_and_leads_back(folder: Path, new: dict[str, int], tmp_path: Path) -> None:
    source, cut = folder / "A", topology_of(folder)
    outcome = ckpt2pt.convert(source=source, target=tmp_path / "new", **new)  # type: ignore[arg-type]
    assert outcome.published
    assert tensors(tmp_path / "new") == tensors(source)
    ckpt2pt.convert(
        source=tmp_path / "new", target=tmp_path / "back",
        target_tp=cut.tensor, target_pp=cut.pipeline, target_vpp=cut.virtual,
    )  # fmt: skip
    if folder.name.startswith("f_"):  # its Megatron had buckets of another size, which one bucket alone does not tell
        assert tensors(tmp_path / "back") == tensors(source)
    else:
        assert same(source, tmp_path / "back", *NOT_CARRIED) == ()


def test_it_is_what_the_way_over_mindspore_gives(tmp_path: Path) -> None:
    source, new = SETS["b_tp2pp2"] / "A", ["--target-tp-size", "4", "--target-pp-size", "1"]
    ckpt2pt.convert(source=source, target=tmp_path / "direct", target_tp=4, target_pp=1)
    assert main(["import", "--megatron-path", str(source), "--ms-path", str(tmp_path / "ms")]) == 0
    from_pt_meta(tmp_path / "ms" / "pt_meta", tmp_path / "meta", NewLayout(tensor=4, pipeline=1), overwrite=False)
    words = ["--ms-path", tmp_path / "ms", "--param-map-path", tmp_path / "meta", "--megatron-path", tmp_path / "over"]
    assert main(["convert", *map(str, words), *new]) == 0
    assert same(tmp_path / "over", tmp_path / "direct") == ()
    for path in iteration_folder(tmp_path / "over").rglob("*.pt"):
        assert (iteration_folder(tmp_path / "direct") / path.relative_to(iteration_folder(tmp_path / "over"))).read_bytes() == path.read_bytes()  # fmt: skip


def test_what_ranks_begin_with_that_did_not_exist_is_reported(tmp_path: Path) -> None:
    source = SETS["b_tp2pp2"] / "A"
    [reported] = ckpt2pt.convert(source=source, target=tmp_path / "new", target_tp=1).warnings
    assert reported.startswith("the states of the random number generators are as at the start of a run with seed")
    claim = json.loads(next((tmp_path / "new").rglob("stage-000.json")).read_text())
    assert "rng_state" in claim["assumed"]


def test_parameters_alone(tmp_path: Path) -> None:
    source = SETS["b_tp2pp2"] / "A"
    for name, new in (("same", {}), ("other", {"target_tp": 4})):
        outcome = ckpt2pt.convert(source=source, target=tmp_path / name, params_only=True, **new)  # type: ignore[arg-type]
        assert outcome.published
        assert not list((tmp_path / name).rglob("distrib_optim.pt"))
        assert tensors(tmp_path / name, "param") == tensors(source, "param")
    ckpt2pt.convert(source=tmp_path / "other", target=tmp_path / "back", target_tp=2, params_only=True)
    assert same(tmp_path / "same", tmp_path / "back", *NOT_CARRIED) == ()


def test_the_padding_of_buckets_is_for_the_ranks_to_come(tmp_path: Path) -> None:
    source = SETS["f_tp1pp1dp2_buckets"] / "A"
    words = ["--source", str(source), "--target", str(tmp_path / "new"), "--target-dp-size", "3"]
    assert main(["convert", *words]) == 0
    [path] = (tmp_path / "new").rglob("distrib_optim.pt")
    tree = tree_of(path)
    for padded, unpadded in zip(tree["per_bucket_numel"], tree["per_bucket_numel_unpadded"], strict=True):
        for one, other in zip(*padded.values(), *unpadded.values(), strict=True):
            assert (one % 3, one - other < 3) == (0, True)


def test_steps_that_the_optimizer_skipped_stay_skipped(tmp_path: Path) -> None:
    shutil.copytree(SETS["b_tp2pp2"] / "A", tmp_path / "old")

    def skip(tree: dict[Any, Any]) -> None:
        for group in tree["optimizer"]["optimizer"]["param_groups"]:
            group["step"] = 1
        tree["opt_param_scheduler"]["num_steps"] = 3

    for path in (tmp_path / "old").rglob("model_optim_rng.pt"):
        edit_tree(path, skip)
    ckpt2pt.convert(source=tmp_path / "old", target=tmp_path / "same")
    ckpt2pt.convert(source=tmp_path / "old", target=tmp_path / "new", target_tp=1)
    assert same(tmp_path / "old", tmp_path / "same") == ()
    for path in (tmp_path / "new").rglob("model_optim_rng.pt"):
        tree = tree_of(path)
        assert tree["iteration"] == 2
        assert [group["step"] for group in tree["optimizer"]["optimizer"]["param_groups"]] == [1, 1]
        assert tree["opt_param_scheduler"]["num_steps"] == 3


def test_metadata_that_is_given_is_that_of_the_result(tmp_path: Path) -> None:
    folder = SETS["b_tp2pp2"]
    outcome = ckpt2pt.convert(source=folder / "A", metadata=folder / "pt_meta", target=tmp_path / "new")
    assert outcome.warnings == ()
    assert same(folder / "A", tmp_path / "new") == ()


@pytest.mark.parametrize("new", [{}, {"target_tp": 1}], ids=str)
def test_a_bit_that_flipped_in_the_source_is_found(new: dict[str, int], tmp_path: Path) -> None:
    shutil.copytree(SETS["b_tp2pp2"] / "A", tmp_path / "old")
    path = max((tmp_path / "old").rglob("distrib_optim.pt"))
    extent = max(Archive.open(path).storages.values(), key=lambda one: one.nbytes)
    flip_bit(path, extent.offset + 9)
    with pytest.raises(FormatError, match="the CRC-32 of data/"):
        ckpt2pt.convert(source=tmp_path / "old", target=tmp_path / "new", **new)  # type: ignore[arg-type]
    assert not list((tmp_path / "new").rglob("tracker*"))


def test_a_bit_that_flipped_in_what_is_no_weight_is_found(tmp_path: Path) -> None:
    shutil.copytree(SETS["b_tp2pp2"] / "A", tmp_path / "old")
    path = max((tmp_path / "old").rglob("model_optim_rng.pt"))
    [extent] = [one for one in Archive.open(path).storages.values() if one.nbytes == 5056]
    flip_bit(path, extent.offset + 9)
    with pytest.raises(FormatError, match="the CRC-32 of data/"):
        ckpt2pt.convert(source=tmp_path / "old", target=tmp_path / "new")


def test_stages_one_by_one_are_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--source", str(SETS["b_tp2pp2"] / "A"), "--target", str(tmp_path / "new"), "--target-tp-size", "4"]
    assert main(["convert", *words, "--stage", "1"]) == 0
    assert "the tracker waits" in capsys.readouterr().out
    assert not (tmp_path / "new" / "latest_checkpointed_iteration.txt").exists()
    assert main(["convert", *words]) == 0
    assert "kept 4 that were there" in capsys.readouterr().out
    assert same(SETS["b_tp2pp2"] / "A", tmp_path / "new") == ()


def test_a_plan_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--source", str(SETS["b_tp2pp2"] / "A"), "--target", str(tmp_path / "new"), "--target-tp-size", "4"]
    assert main(["plan", *words, "--output", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["iteration"], len(plan["ranks"]), plan["doubts"], plan["fromTemplate"]) == (2, 8, [], [])
    assert [text[:40] for text in plan["warnings"]] == ["the states of the random number generato"]
    assert list(tmp_path.iterdir()) == []
    assert main(["plan", *words]) == 0
    assert "tp 4, pp 2, vpp 1" in capsys.readouterr().out


def test_a_document_is_carried_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(SETS["b_tp2pp2"] / "A", tmp_path / "data" / "old")
    document = minimal()
    del document["spec"]["metadata"]
    spec = document["spec"]
    spec["model"], spec["parallelism"] = {"numLayers": 4}, {"tensor": 2, "pipeline": 2}
    spec["source"] |= {"path": "old", "format": "Megatron"}
    spec["target"] |= {"path": "new", "parallelism": {"tensor": 1, "pipeline": 4}}
    (tmp_path / "c.yaml").write_text(json.dumps(document))
    assert main(["run", "-f", str(tmp_path / "c.yaml"), "--volume", f"training={tmp_path / 'data'}"]) == 0
    assert "Succeeded: 4/4 stages" in capsys.readouterr().out
    assert same(tmp_path / "data" / "old", tmp_path / "data" / "new") == ()


def test_an_iteration_can_be_asked_for(tmp_path: Path) -> None:
    shutil.copytree(SETS["b_tp2pp2"] / "A", tmp_path / "old")
    assert ckpt2pt.convert(source=tmp_path / "old", target=tmp_path / "new", iteration=2).published
    with pytest.raises(MissingInputError, match="no iteration 3"):
        ckpt2pt.convert(source=tmp_path / "old", target=tmp_path / "new", iteration=3)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ({"tp": 4}, "^tp is 4, the checkpoint has 2"),
        ({"num_layers": 5}, "^num_layers is 5, the checkpoint has 4"),
        ({"noop_layers": [1]}, "^noop_layers is 1, the checkpoint has none"),
        ({"target_tp": 16}, "does not divide"),
        ({"target_pp": 3}, "do not divide"),
        ({"layers_per_stage": [1, 2]}, "adds up to 3 layers, not 4"),
    ],
    ids=str,
)
def test_what_the_checkpoint_contradicts_or_cannot_be_is_refused(
    words: dict[str, Any], what: str, tmp_path: Path
) -> None:
    with pytest.raises(Ckpt2ptError, match=what):
        ckpt2pt.convert(source=SETS["b_tp2pp2"] / "A", target=tmp_path / "new", **words)
    assert not (tmp_path / "new").exists()


def test_the_result_cannot_take_the_place_of_the_source(tmp_path: Path) -> None:
    shutil.copytree(SETS["b_tp2pp2"] / "A", tmp_path / "old")
    with pytest.raises(UsageError, match="take the place of"):
        ckpt2pt.convert(source=tmp_path / "old", target=tmp_path / "old", target_tp=1)


def test_what_is_no_megatron_checkpoint_needs_metadata(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="metadata is missing"):
        ckpt2pt.convert(source=SETS["b_tp2pp2"] / "ms", target=tmp_path / "new")
    with pytest.raises(MissingInputError):
        ckpt2pt.convert(source=tmp_path / "none", target=tmp_path / "new", source_format="megatron")


def test_a_rank_of_another_save_is_refused(tmp_path: Path) -> None:
    shutil.copytree(SETS["b_tp2pp2"] / "A", tmp_path / "old")
    edit_tree(max((tmp_path / "old").rglob("model_optim_rng.pt")), lambda tree: tree.update(iteration=4))
    with pytest.raises(FormatError, match="iteration: 2, 4"):
        ckpt2pt.convert(source=tmp_path / "old", target=tmp_path / "new")


def test_a_missing_rank_is_reported(tmp_path: Path) -> None:
    shutil.copytree(SETS["b_tp2pp2"] / "A", tmp_path / "old")
    shutil.rmtree(max((tmp_path / "old").rglob("mp_rank_*_*")))
    with pytest.raises((MissingInputError, TopologyError), match="missing"):
        ckpt2pt.convert(source=tmp_path / "old", target=tmp_path / "new")


@pytest.mark.parametrize("new", [{}, {"target_tp": 1}], ids=str)
def test_an_optimizer_that_is_not_distributed_becomes_distributed(new: dict[str, int], tmp_path: Path) -> None:
    folder = SETS["b_tp2pp2"]
    old = without_distributed_optimizer(folder, tmp_path / "old")
    outcome = ckpt2pt.convert(source=old, target=tmp_path / "new", **new)  # type: ignore[arg-type]
    assert "the optimizer is that of a run without --use-distributed-optimizer" in str(outcome.warnings)
    assert tensors(tmp_path / "new") == tensors(folder / "A")
    if not new:  # saved anew as well: Pythons before 3.11.4 write enumerations otherwise
        shutil.copytree(folder / "A", tmp_path / "plain")
        for path in (tmp_path / "plain").rglob("model_optim_rng.pt"):
            with megatron_names():
                torch.save(torch.load(path, weights_only=False), path)
        ckpt2pt.convert(source=tmp_path / "plain", target=tmp_path / "again")
        assert same(tmp_path / "again", tmp_path / "new") == ()


def test_uneven_stages_stay_or_are_given(tmp_path: Path) -> None:
    source = SETS["b_tp2pp2"] / "A"
    ckpt2pt.convert(source=source, target=tmp_path / "uneven", target_tp=1, layers_per_stage=[3, 1])
    assert tensors(tmp_path / "uneven") == tensors(source)
    ckpt2pt.convert(source=tmp_path / "uneven", target=tmp_path / "same")
    assert same(tmp_path / "uneven", tmp_path / "same") == ()
    ckpt2pt.convert(source=tmp_path / "uneven", target=tmp_path / "cut", target_tp=2)
    with ckpt2pt.open(tmp_path / "cut") as found:
        assert found.tp == 2
    last = str(tree_of(max((tmp_path / "cut").rglob("mp_rank_00_001/model_optim_rng.pt")))["model"])
    assert ("layers.0." in last, "layers.1." in last) == (True, False), "one layer on the last stage, as it was"
    ckpt2pt.convert(source=tmp_path / "cut", target=tmp_path / "back", layers_per_stage=[2, 2])
    assert same(source, tmp_path / "back", *NOT_CARRIED) == ()


def test_a_tracker_that_moves_on_changes_nothing(tmp_path: Path) -> None:
    shutil.copytree(SETS["b_tp2pp2"] / "A", tmp_path / "old")
    request = resolve(Spec(source=Source(path=str(tmp_path / "old")), target=Target(path=str(tmp_path / "new"))))
    (tmp_path / "old" / "latest_checkpointed_iteration.txt").write_text("4")
    assert run(request, [0, 1], SILENCE).target.iteration == 2


FULL = {
    "its-own-layout": {},
    "tp1": {"target_tp": 1},
    "pp4": {"target_pp": 4},
    "parameters": {"params_only": True},
    "parameters-tp4": {"params_only": True, "target_tp": 4},
}


@pytest.mark.parametrize("more", FULL.values(), ids=FULL)
def test_every_element_is_compared_before_anything_is_published(more: dict[str, Any], tmp_path: Path) -> None:
    outcome = ckpt2pt.convert(source=SETS["b_tp2pp2"] / "A", target=tmp_path / "new", verify="full", **more)
    assert (outcome.published, outcome.verified) == (True, "full")


@pytest.mark.parametrize("more", [{}, {"target_tp": 1}], ids=str)
def test_every_element_of_an_optimizer_that_was_not_distributed_is_compared(
    more: dict[str, Any], tmp_path: Path
) -> None:
    old = without_distributed_optimizer(SETS["b_tp2pp2"], tmp_path / "old")
    assert ckpt2pt.convert(source=old, target=tmp_path / "new", verify="full", **more).verified == "full"


TODAY = [
    folder
    for name in ("odd_dp2", "gpt_dp2_buckets", "llama_tp2pp2", "llama_tp1pp2vpp2", "llama_pp2_uneven")
    if (folder := golden_root() / "mcore" / "0.19.0" / name).is_dir()
]


@pytest.mark.parametrize("more", [{}, {"target_tp": 2}, {"target_tp": 1}, {"params_only": True}], ids=str)
@pytest.mark.parametrize("folder", TODAY, ids=[folder.name for folder in TODAY])
def test_every_element_of_a_newer_checkpoint_is_compared(folder: Path, more: dict[str, Any], tmp_path: Path) -> None:
    """Its arguments hold objects of classes that 0.6 does not have: the result is compared with what is left of them."""
    assert ckpt2pt.convert(source=folder, target=tmp_path / "new", verify="full", **more).verified == "full"


def test_a_weight_that_is_not_its_float32_copy_is_found(tmp_path: Path) -> None:
    shutil.copytree(SETS["b_tp2pp2"] / "A", tmp_path / "old")
    leaf = "/model/language_model/encoder/layers.0.mlp.dense_h_to_4h.weight"
    set_element(max((tmp_path / "old").rglob("model_optim_rng.pt")), leaf, 2000, b"\x12\x34")
    with pytest.raises(VerificationError, match="1 of"):
        ckpt2pt.convert(source=tmp_path / "old", target=tmp_path / "new", verify="full")
    assert not list((tmp_path / "new").rglob("rank-001-001.json"))


@pytest.mark.parametrize("more", [[], ["--target-tp-size", "4"]], ids=str)
def test_a_result_is_proved_against_its_source(more: list[str], tmp_path: Path) -> None:
    words = ["--source", str(SETS["b_tp2pp2"] / "A"), "--target", str(tmp_path), *more]
    assert main(["convert", *words]) == 0
    assert main(["verify", *words]) == 0
    assert main(["verify", *words, "--level", "digest"]) == 0
    leaf = "/0/(torch.bfloat16, torch.float32)/exp_avg/0"
    set_element(max(tmp_path.rglob("distrib_optim.pt")), leaf, 77, b"\x01\x02\x03\x04")
    assert main(["verify", *words]) == 76
