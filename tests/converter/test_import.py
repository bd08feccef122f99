"""The road back, and there again: golden sets to the byte, layouts without golden data, and what goes wrong on the way."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.core.topology import Topology
from ckpt2pt.engine.write import Stop
from ckpt2pt.errors import (
    Ckpt2ptError,
    FormatError,
    InterruptedRunError,
    MissingInputError,
    TopologyError,
    UsageError,
    VolumeTooSmallError,
)
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.run.conversion import Outcome, run
from ckpt2pt.verification.compare import compare
from conversions import Quiet, request_for, topology_of
from disk import fill_at_every_step
from goldens import golden_sets
from handmade import Handmade
from imports import import_request, run_all
from layouts import LAYOUTS

SETS = golden_sets()
# An OrderedDict's _metadata, which Megatron's files have and loading ignores (docs/format-pt.md).
STATE = "*@state*"


def imported(folder: Path, target: Path, **more: Any) -> Outcome:
    cut = topology_of(folder)
    suffix = "safetensors" if "safetensors" in folder.name else "ckpt"
    options: dict[str, Any] = {
        "source": folder / "A",
        "target": target,
        "data": cut.data,
        "format": suffix,
    }
    return run_all(import_request(**(options | more)))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("rank_*/*"))}


@pytest.mark.parametrize("place", ["A", "A/iter_0000002", "link"])
def test_an_import_into_what_it_reads_is_refused(place: str, tmp_path: Path) -> None:
    shutil.copytree(SETS[0] / "A", tmp_path / "A")
    (tmp_path / "link").symlink_to("A")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=r"would take the place of source\.path"):
        imported(SETS[0], tmp_path / place, source=tmp_path / "A")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("folder", SETS, ids=lambda folder: folder.name)
def test_files_are_those_of_the_reference_to_the_byte(folder: Path, full: bool, tmp_path: Path) -> None:
    outcome = imported(folder, tmp_path / "ms", full=full, verify="full")
    assert outcome.published
    suffix = "" if full else "_params"
    assert files(tmp_path / "ms") == files(folder / f"ms{suffix}")
    maps = {path.name: path.read_bytes() for path in (folder / f"pt_meta{suffix}").glob("param_map_*_dp0*.json")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "ms" / "pt_meta").glob("*.json")} == maps
    # The reference saves numpy's arrays anew, under the name of numpy 2.
    compare(tmp_path / "ms" / "pt_meta", folder / f"pt_meta{suffix}", ignore=("*/np_rng_state/1",)).raise_differences()


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("folder", SETS, ids=lambda folder: folder.name)
def test_there_and_back_is_bit_exact(folder: Path, full: bool, tmp_path: Path) -> None:
    imported(folder, tmp_path / "ms", full=full)
    request = request_for(
        folder, tmp_path / "out", full=full, source=tmp_path / "ms", metadata=tmp_path / "ms" / "pt_meta", verify="full"
    )
    assert run(request, range(request.topology.pipeline), Quiet()).published
    source = folder / "A"
    if not full:
        source = tmp_path / "A"
        shutil.copytree(folder / "A", source, ignore=shutil.ignore_patterns("distrib_optim.pt"))
    compare(tmp_path / "out", source, ignore=(STATE,), ignore_padding=True).raise_differences()


@pytest.mark.parametrize("folder", SETS, ids=lambda folder: folder.name)
def test_given_maps_and_computed_ones_give_the_same(folder: Path, tmp_path: Path) -> None:
    imported(folder, tmp_path / "one")
    imported(folder, tmp_path / "other", maps=folder / "A" / "param_map", verify="full")
    assert files(tmp_path / "one") == files(tmp_path / "other")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_back_as_it_was(layout: str, tmp_path: Path) -> None:
    """What was converted is imported; names, shapes and values are those of the source."""
    made = Handmade(**LAYOUTS[layout])
    made.convert(tmp_path)
    request = import_request(
        source=tmp_path / "out",
        target=tmp_path / "back",
        maps=tmp_path / "pt_meta",
        data=made.topology.data,
        context=made.topology.context,
        layers_per_stage=made.topology.layers_per_stage,
        noop=made.topology.noop if made.topology.layers_per_stage else None,
    )
    assert run_all(request).published
    for rank, entries in made.entries.items():
        path = tmp_path / "back" / f"rank_{made.topology.source_rank(*rank)}" / "network.ckpt"
        data, index = path.read_bytes(), index_file(path)
        for entry in entries.values():
            # Norms come back under the name that Megatron's own converter gives them.
            name = entry.name.replace(".gamma", ".weight").replace(".beta", ".bias")
            if entry.name in {"epoch_num", "step_num", "num_steps"}:
                continue
            (extent,) = index[name].extents
            assert data[extent.offset :][: extent.nbytes] == entry.data, (rank, name)
            assert index[name].shape == entry.shape


def test_a_file_for_every_replica(tmp_path: Path) -> None:
    folder = next(folder for folder in SETS if folder.name == "b_st_tp2pp2_safetensors")
    imported(folder, tmp_path / "one")
    imported(folder, tmp_path / "all", data=2, context=2, copies=True)
    found, single = files(tmp_path / "all"), files(tmp_path / "one")
    assert len(found) == 16
    for number in range(16):
        tp, pp = number % 2, number // 8
        assert found[f"rank_{number}/network.safetensors"] == single[f"rank_{pp * 2 + tp}/network.safetensors"]


def test_some_of_the_optimizer(tmp_path: Path) -> None:
    folder = SETS[0]
    imported(folder, tmp_path, contents=("param",), prefix="model")
    names = list(index_file(tmp_path / "rank_0" / "model.ckpt"))
    assert not [name for name in names if name.startswith("exp_avg")]
    assert "language_model.embedding.word_embeddings.weight" in names


def test_processes_give_the_same_files(tmp_path: Path) -> None:
    folder = next(folder for folder in SETS if folder.name == "b_st_tp2pp2_safetensors")
    imported(folder, tmp_path / "here")
    imported(folder, tmp_path / "there", workers=2)
    assert files(tmp_path / "here") == files(tmp_path / "there")


@pytest.mark.parametrize("full", [True, False], ids=["full", "params-only"])
@pytest.mark.parametrize("name", ["model_optim_rng.pt", "distrib_optim.pt"])
def test_a_byte_that_changed_in_the_archive_is_not_passed_on(tmp_path: Path, name: str, full: bool) -> None:
    source = shutil.copytree(SETS[0] / "A", tmp_path / "A")
    path = max(source.rglob(name))
    record = max(Archive.open(path).records.values(), key=lambda record: record.extent.nbytes).extent
    with path.open("r+b") as file:
        file.seek(record.offset + 1)
        byte = file.read(1)[0]
        file.seek(record.offset + 1)
        file.write(bytes([byte ^ 1]))
    if name == "distrib_optim.pt" and not full:
        assert imported(SETS[0], tmp_path / "ms", source=source, full=full).published, "it is not read"
        return
    with pytest.raises(FormatError, match=r"the CRC-32 of data|is not what the optimizer holds"):
        imported(SETS[0], tmp_path / "ms", source=source, full=full)
    assert not list((tmp_path / "ms").glob("rank_*/network.ckpt"))


def test_a_file_of_another_rank_is_noticed(tmp_path: Path) -> None:
    folder = next(folder for folder in SETS if folder.name == "b_tp2pp2")
    source = shutil.copytree(folder / "A", tmp_path / "A")
    for name in ("model_optim_rng.pt", "distrib_optim.pt"):
        [one], [other] = source.glob(f"iter_*/mp_rank_00_000/{name}"), source.glob(f"iter_*/mp_rank_01_000/{name}")
        kept = other.read_bytes()
        shutil.copyfile(one, other)
        with pytest.raises(FormatError, match="is not what the optimizer holds"):
            imported(folder, tmp_path / "ms", source=source)
        other.write_bytes(kept)


def test_running_it_again_keeps_what_is_there(tmp_path: Path) -> None:
    folder = next(folder for folder in SETS if folder.name == "b_st_tp2pp2_safetensors")
    imported(folder, tmp_path)
    again = imported(folder, tmp_path)
    assert (len(again.converted), len(again.kept), again.published) == (0, 4, True)
    (tmp_path / "pt_meta" / "args_tp01_pp000.pt").unlink()
    os.chmod(tmp_path / "rank_2", 0o755)
    (tmp_path / "rank_2" / "network.safetensors").unlink()
    mended = imported(folder, tmp_path)
    assert sorted(mended.converted) == [(0, 1), (1, 0)]
    assert files(tmp_path) == files(folder / "ms")


def test_another_import_is_not_overwritten(tmp_path: Path) -> None:
    imported(SETS[0], tmp_path)
    with pytest.raises(UsageError, match="another conversion"):
        imported(SETS[1], tmp_path)
    imported(SETS[1], tmp_path, overwrite=True)
    assert files(tmp_path) == files(SETS[1] / "ms")


def test_files_of_somebody_else_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "rank_0").mkdir()
    (tmp_path / "rank_0" / "network.ckpt").write_text("training")
    (tmp_path / "train.log").write_text("anything")
    with pytest.raises(UsageError, match="did not write"):
        imported(SETS[0], tmp_path)
    assert (tmp_path / "rank_0" / "network.ckpt").read_text() == "training"


def test_a_stop_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Stop] = []
    check = Stop.check

    def stopping(self: Stop) -> None:
        asked.append(self)
        if len(asked) > 3:
            self.ask(InterruptedRunError("stopped", where="here", hint="again"))
        check(self)

    with monkeypatch.context() as patch:
        patch.setattr(Stop, "check", stopping)
        with pytest.raises(InterruptedRunError):
            imported(SETS[0], tmp_path)
    assert not list(tmp_path.glob("rank_*/*"))
    assert not (tmp_path / ".ckpt2pt" / "report.json").exists()
    assert imported(SETS[0], tmp_path).published
    assert files(tmp_path) == files(SETS[0] / "ms")


def test_no_room_is_met_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt2pt.io.volume.free_bytes", lambda folder: 1000)
    with pytest.raises(VolumeTooSmallError, match=r"target\.path"):
        imported(SETS[0], tmp_path / "ms")
    assert not (tmp_path / "ms").exists()


def test_a_disk_that_fills_up_at_any_write_leaves_only_whole_files_and_the_next_run_ends_it(tmp_path: Path) -> None:
    folder = next(folder for folder in SETS if folder.name == "j_tp1pp2dp2")
    expected, target = files(folder / "ms"), tmp_path / "ms"
    failures = 0
    for _ in fill_at_every_step(lambda: imported(folder, target), target):
        failures += 1
        assert files(target).items() <= expected.items()
        assert not (target / ".ckpt2pt" / "report.json").exists()
        if failures % 3 == 0:  # now and then from the beginning, so that the first rank fails late as well
            shutil.rmtree(target)
    assert failures > 10
    assert files(target) == expected
    assert (target / ".ckpt2pt" / "report.json").exists()


@pytest.mark.parametrize(
    ("more", "error", "what"),
    [
        ({"tensor": 4}, TopologyError, r"parallelism\.tensor is 4, the checkpoint has 2"),
        ({"pipeline": 1}, TopologyError, r"parallelism\.pipeline is 1, the checkpoint has 2"),
        ({"virtual": 2}, TopologyError, r"parallelism\.virtualPipeline is 2, the checkpoint has 1"),
        ({"num_layers": 8}, TopologyError, r"model\.numLayers is 8, the checkpoint has 4"),
        ({"noop": frozenset({1})}, TopologyError, r"model\.noopLayers is 1, the checkpoint has none"),
        ({"layers_per_stage": (3, 1)}, TopologyError, "holds a layer 1, by the options it has 1"),
        ({"layers_per_stage": (1, 1)}, UsageError, "adds up to 2"),
        ({"source": Path("/none")}, MissingInputError, "not there"),
        ({"maps": Path("/none")}, MissingInputError, "param maps is not there"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_and_nothing_is_written(
    more: dict[str, Any], error: type[Ckpt2ptError], what: str, tmp_path: Path
) -> None:
    folder = next(folder for folder in SETS if folder.name == "b_st_tp2pp2_safetensors")
    with pytest.raises(error, match=what):
        imported(folder, tmp_path / "ms", **more)
    assert not (tmp_path / "ms").exists()


def test_a_checkpoint_without_its_optimizer_can_give_its_parameters(tmp_path: Path) -> None:
    shutil.copytree(SETS[0] / "A", tmp_path / "A", ignore=shutil.ignore_patterns("distrib_optim.pt"))
    with pytest.raises(MissingInputError, match=r"distrib_optim\.pt is not there"):
        imported(SETS[0], tmp_path / "ms", source=tmp_path / "A")
    imported(SETS[0], tmp_path / "ms", source=tmp_path / "A", full=False)
    assert files(tmp_path / "ms") == files(SETS[0] / "ms_params")


def test_the_report_names_every_file_and_what_proves_the_order(tmp_path: Path) -> None:
    outcome = imported(SETS[0], tmp_path)
    report = json.loads((outcome.target.state / "report.json").read_text())
    (rank,) = report["stages"][0]["ranks"]
    assert "elements" in rank["evidence"] or "offsets equal" in rank["evidence"]
    assert {file["path"] for file in rank["files"]} == {
        "rank_0/network.ckpt", "pt_meta/args_tp00_pp000.pt", "pt_meta/param_map_buffer0_dp0tp0pp0vpp0.json",
    }  # fmt: skip


def test_uneven_stages_need_no_map(tmp_path: Path) -> None:
    made = Handmade(topology=Topology(num_layers=5, pipeline=3, layers_per_stage=(1, 3, 1)), bias=True)
    made.convert(tmp_path)
    request = import_request(source=tmp_path / "out", target=tmp_path / "back", layers_per_stage=(1, 3, 1))
    assert run_all(request).published
    for path in (tmp_path / "pt_meta").glob("*.json"):
        assert (tmp_path / "back" / "pt_meta" / path.name).read_bytes() == path.read_bytes()
