"""Which files a repair makes of those of MSAdapter, and what it refuses before the first byte is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ckpt2pt.errors import FormatError, MissingInputError, TopologyError
from ckpt2pt.formats.checkpoint import Selection
from ckpt2pt.formats.repaired import find_repairable, repaired
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.pickles import read_pickle, write_pickle
from ckpt2pt.formats.torchfile.trees import Value
from msadapter import rewrite, write_archive


@pytest.fixture
def source(golden: Path, tmp_path: Path) -> Path:
    return shutil.copytree(golden / "msadapter/moe_ep2", tmp_path / "in")


def test_ranks_of_experts_are_reported_from_stages_by_the_arguments(golden: Path, tmp_path: Path) -> None:
    experts = find_repairable(golden / "msadapter/moe_ep2", Selection())
    assert (experts.sizes, experts.iteration, experts.seed, experts.layers) == ((1, 1, 2), 2, 1234, 2)
    assert experts.generators
    stages = find_repairable(rewrite(golden / "megatron06/b_tp2pp2/A", tmp_path / "in"), Selection())
    assert stages.sizes == (2, 2, 1)
    assert [path.name for path in stages.files((1, 1, 0))] == ["model_optim_rng.pt", "distrib_optim.pt"]
    assert stages.checkpoint().pipeline == 2


def test_storages_are_copied_whole_and_the_pickle_is_one_of_torch(source: Path) -> None:
    checkpoint = find_repairable(source, Selection())
    [model, optim] = checkpoint.files((0, 0, 1))
    found = repaired(optim, (0, 0, 1), checkpoint)
    assert not found.generators
    assert [move.nbytes for move in found.moves] == [size for size in found.payload.storages if size]
    tree = read_pickle(found.payload.pickle, where="the result")
    assert isinstance(tree, list)
    assert tree[0] is None
    other = repaired(model, (0, 0, 1), checkpoint)
    assert other.generators
    assert [len(state) for state in other.payload.copied] == [5056, 16, 16, 16, 16]


DAMAGES = {
    "a rank lost": (lambda path: shutil.rmtree(path / "mp_rank_00_001"), MissingInputError, "expert_model_parallel_size 2"),
    "a model lost": (lambda path: (path / "mp_rank_00_001/model_optim_rng.pt").unlink(), MissingInputError, "ep 1 is missing"),
    "an optimizer lost": (
        lambda path: (path / "mp_rank_00_001/distrib_optim.pt").unlink(), MissingInputError, "distrib_optim.pt of the rank",
    ),
    "all ranks lost": (lambda path: [*map(shutil.rmtree, path.glob("mp_*"))], MissingInputError, "no folders of ranks"),
    "a model cut": (
        lambda path: (path / "mp_rank_00_000/model_optim_rng.pt").write_bytes(
            (path / "mp_rank_00_000/model_optim_rng.pt").read_bytes()[:999]
        ), FormatError, "cut short",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "kind", "said"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_missing_is_reported(damage: object, kind: type[Exception], said: str, source: Path) -> None:
    damage(source / "iter_0000002")  # type: ignore[operator]
    with pytest.raises(kind, match=said):
        find_repairable(source, Selection())


def test_sizes_that_are_said_have_to_be_those_of_the_folders(source: Path) -> None:
    with pytest.raises(TopologyError, match="the tensor parallel size is 1, not 2"):
        find_repairable(source, Selection(tensor=2))


def test_nothing_is_no_checkpoint(tmp_path: Path) -> None:
    for path, said in ((tmp_path, "no folders of ranks"), (tmp_path / "none", "no such folder")):
        with pytest.raises(MissingInputError, match=said):
            find_repairable(path, Selection())


def test_what_torch_wrote_needs_no_repair(golden: Path) -> None:
    with pytest.raises(FormatError, match="nothing to repair"):
        find_repairable(golden / "reference_torch/moe_ep2", Selection())


def test_files_of_two_iterations_are_refused(source: Path) -> None:
    path = source / "iter_0000002/mp_rank_00_001/model_optim_rng.pt"
    write_archive(path, write_pickle({"iteration": 3}), {})
    checkpoint = find_repairable(source, Selection())
    with pytest.raises(FormatError, match="of iteration 3, and that of the first rank of 2"):
        repaired(path, (0, 0, 1), checkpoint)


def test_a_storage_of_another_size_is_refused(source: Path) -> None:
    path = source / "iter_0000002/mp_rank_00_001/distrib_optim.pt"
    archive = Archive.open(path)
    payloads = {key: path.read_bytes()[one.offset :][: one.nbytes] for key, one in archive.storages.items()}
    largest = max(payloads, key=lambda key: len(payloads[key]))
    for data in (payloads[largest][:-4], None):
        changed = {key: held for key, held in payloads.items() if key != largest}
        write_archive(path, archive.pickle, changed | ({largest: data} if data else {}))
        with pytest.raises(FormatError, match=f"data/{largest} has|names storages that the archive does not hold"):
            repaired(path, (0, 0, 1), find_repairable(source, Selection()))


@pytest.mark.parametrize("states", [{"another": "form"}, ["no dictionary"], [], [{"of a fork": None}], None], ids=str)
def test_generators_of_another_form_are_left_out_and_never_carry_16_bytes(states: Value, source: Path) -> None:
    path = source / "iter_0000002/mp_rank_00_000/model_optim_rng.pt"
    checkpoint = find_repairable(source, Selection())
    tree: dict[Value, Value] = {"iteration": 2, "rng_state": states}
    write_archive(path, write_pickle(tree), {})
    found = repaired(path, (0, 0, 0), checkpoint)
    new = read_pickle(found.payload.pickle, where="the result")
    assert isinstance(new, dict)
    assert ("rng_state" in new) is found.generators
    assert found.payload.copied == () or states == [{"of a fork": None}]
