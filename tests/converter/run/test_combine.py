"""Merged files: the reference's to the byte, the same conversion as the shards themselves, and nothing half done."""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from checked import checked
from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.topology import Topology
from ckpt2pt.discover import discover, target_of
from ckpt2pt.engine.write import write_files
from ckpt2pt.errors import (
    Ckpt2ptError,
    CoverageError,
    InputError,
    MissingInputError,
    TargetConflictError,
    TryAgainError,
    UsageError,
    VolumeTooSmallError,
    ref,
    rendered,
)
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.kube.conversion.spelling import of_command
from ckpt2pt.publish import locked
from ckpt2pt.run.conversion import run
from ckpt2pt.verification.prove import verify_records
from ckptfiles import Tensor
from conversions import Quiet
from disk import fill_at_every_step
from goldens import golden_root
from handmade import Handmade
from imports import merge, merge_request
from sharding import Sharding

J = golden_root() / "megatron06" / "j_tp1pp2dp2"
DIST = golden_root() / "mindspore" / "dist_opt_dp2_tp2"


def payload(ref: TensorRef) -> bytes:
    return b"".join(Path(e.path).read_bytes()[e.offset : e.offset + e.nbytes] for e in ref.extents)


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and ".ckpt2pt" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.mark.parametrize(("suffix", "golden"), [("ckpt", "ms_zero_merged"), ("safetensors", "ms_zero_merged_st")])
def test_the_files_are_those_of_the_reference_to_the_byte(suffix: str, golden: str, tmp_path: Path) -> None:
    outcome = merge(J / "ms_zero_src", tmp_path, dst_format=suffix, copies=suffix == "safetensors")
    assert files_of(tmp_path) == files_of(J / golden)
    reported = outcome.document()
    assert reported["bytesWritten"] == sum(map(len, files_of(tmp_path).values()))
    assert [reported[key] for key in ("ranksMerged", "ranksKept", "epoch", "step", "shardsPerRank")] == [2, 0, 0, 2, 2]
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("rank_*/*")} == {0o400}


@pytest.mark.parametrize("tp", [0, 1])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_the_golden_shards_merge_to_the_expected_values(tp: int, suffix: str, tmp_path: Path) -> None:
    merge(DIST, tmp_path, dst_format=suffix, crc=suffix == "ckpt")
    (path,) = (tmp_path / f"rank_{tp}").iterdir()
    found = checked(path)
    expected = np.load(DIST / f"expected_merged_tp{tp}.npz")
    for name in expected.files:
        assert (found[name].dtype, found[name].shape) == (expected[name].dtype.name, expected[name].shape)
        assert payload(found[name]) == expected[name].tobytes()


CASES = {
    "dp1": (Topology(num_layers=2), Sharding()),
    "dp4": (Topology(num_layers=2, tensor=2, data=4), Sharding(per_bucket=2)),
    "dp8-buffers": (Topology(num_layers=2, data=8), Sharding(per_bucket=1, buffers=2)),
    "dp2-cp2-pp2": (Topology(num_layers=2, pipeline=2, data=2, context=2), Sharding()),
    "br-master": (Topology(num_layers=2, tensor=2, pipeline=2, data=2), Sharding(v2=True)),
    "zero3": (Topology(num_layers=2, data=4), Sharding(zero3=("language_model.output_layer.weight",))),
}


def made_in(folder: Path, case: str = "dp4") -> Handmade:
    topology, cut = CASES[case]
    made = Handmade(topology, hidden=8, vocab=12, data=2)
    cut.write(made, folder / "ms")
    made.write_meta(folder / "pt_meta")
    return made


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize("case", CASES)
def test_merged_files_convert_to_what_the_shards_convert_to(case: str, suffix: str, tmp_path: Path) -> None:
    made = made_in(tmp_path, case)
    merge(tmp_path / "ms", tmp_path / "merged", dst_format=suffix)
    stages = range(made.topology.pipeline)
    fused = run(made.request(tmp_path, verify="digest"), stages, Quiet())
    merged = made.request(tmp_path, source=tmp_path / "merged", target=tmp_path / "again", verify="digest")
    outcome = run(merged, stages, Quiet())
    made.check(outcome)
    assert files_of(outcome.target.folder) == files_of(fused.target.folder)


def test_merged_files_beside_their_shards_are_converted_first_and_merged_no_second_time(tmp_path: Path) -> None:
    made = made_in(tmp_path)
    source = tmp_path / "ms"
    merge(source, source)
    assert merge(source, source).document()["ranksMerged"] == 0
    shutil.rmtree(source / "rank_4")  # a peer, which nobody needs any more
    made.check(run(made.request(tmp_path), [0], Quiet()))


@pytest.mark.parametrize("case", ["dp4", "br-master"])
def test_a_merge_that_was_broken_off_leaves_the_shards_as_good_as_before(case: str, tmp_path: Path) -> None:
    made = made_in(tmp_path, case)
    source = tmp_path / "ms"
    merge(source, source, section=(1, 2), dst_format="safetensors")
    assert len([*source.rglob("*_dp_merged.safetensors")]) == 1
    made.check(run(made.request(tmp_path), range(made.topology.pipeline), Quiet()))


def test_without_the_optimizer_its_moments_and_its_progress_are_missing(tmp_path: Path) -> None:
    """The reference leaves out what has ``step``, ``epoch``, ``learning_rate``, ``weight_decay`` or ``default_generator``."""
    topology, cut = CASES["dp4"]
    made = Handmade(topology, hidden=8, vocab=12)
    progress = {"lr_warmup_steps", "learning_rate_group_0", "weight_decay_group_1", "default_generator", "state_step"}
    for entries in made.entries.values():
        for name in (*progress, "max_lr", "lr_decay_style", "dp_rng_generator", "timestep.weight"):
            entries[name] = Tensor(name, "float32", (1,), bytes(4))
    cut.write(made, tmp_path / "ms")
    merge(tmp_path / "ms", tmp_path / "all")
    merge(tmp_path / "ms", tmp_path / "some", optimizer=False)
    for path in (tmp_path / "all").glob("rank_*/*"):
        everything = index_file(path)
        some = index_file(tmp_path / "some" / path.relative_to(tmp_path / "all"))
        moments = {name for name in everything if name.startswith("exp_avg")}
        assert everything.keys() - some.keys() == moments | progress | {"epoch_num", "step_num", "num_steps"}
        assert {name: payload(ref) for name, ref in some.items()} == {name: payload(everything[name]) for name in some}


def test_a_section_does_its_ranks_and_the_next_run_the_others(tmp_path: Path) -> None:
    made_in(tmp_path)
    source, out = tmp_path / "ms", tmp_path / "merged"
    assert merge(source, out, section=(1, 2)).document()["ranksMerged"] == 1
    assert list(files_of(out)) == ["rank_1/network_rank_1-0_12_dp_merged.ckpt"]
    outcome = merge(source, out)
    assert (len(outcome.outcome.converted), len(outcome.outcome.kept)) == (1, 1)
    with pytest.raises(UsageError, match=r"holds the first rank of no group") as caught:
        merge(source, out, section=(2, 9))
    assert "[0, 1]" in caught.value.hint


@pytest.mark.parametrize("check", [True, False])
def test_files_are_read_back_unless_stated_otherwise(
    check: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_in(tmp_path)
    read: list[Path] = []
    monkeypatch.setattr("ckpt2pt.engine.write.read_back", lambda path, *_: read.append(path))
    merge(tmp_path / "ms", tmp_path / "merged", check=check)
    assert len(read) == (2 if check else 0)


def test_workers_write_the_same(tmp_path: Path) -> None:
    made_in(tmp_path)
    merge(tmp_path / "ms", tmp_path / "one")
    merge(tmp_path / "ms", tmp_path / "two", workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_run_that_broke_is_taken_up_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_in(tmp_path)
    source, out = tmp_path / "ms", tmp_path / "merged"
    calls: list[object] = []

    def breaks(*args: object, **more: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise TryAgainError("broken", where="here", hint="again")
        return write_files(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("ckpt2pt.run.rank.write_files", breaks)
    with pytest.raises(TryAgainError, match="broken"):
        merge(source, out)
    assert len(files_of(out)) == 1
    (out / "rank_1").mkdir(exist_ok=True)
    (out / "rank_1" / ".network_rank_1-0_12_dp_merged.ckpt.1-2.partial").touch()
    outcome = merge(source, out)
    assert (len(outcome.outcome.converted), len(outcome.outcome.kept)) == (1, 1)
    merge(source, tmp_path / "fresh")
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_a_run_that_broke_between_its_files_and_its_manifest_knows_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = J / "ms_zero_src", tmp_path / "merged"

    def breaks(*args: object, **more: object) -> object:
        write_files(*args, **more)  # type: ignore[arg-type]
        raise TryAgainError("killed", where="here", hint="again")

    with monkeypatch.context() as patch:
        patch.setattr("ckpt2pt.run.rank.write_files", breaks)
        with pytest.raises(TryAgainError, match="killed"):
            merge(source, out, section=(0, 1))
    assert len(files_of(out)) == 1
    assert merge(source, out).document()["ranksMerged"] == 2
    assert files_of(out) == files_of(J / "ms_zero_merged")


def test_a_later_step_joins_the_earlier_one(tmp_path: Path) -> None:
    topology, cut = CASES["dp4"]
    for step in (12, 20):
        cut.write(Handmade(topology, hidden=8, vocab=12, data=2, iteration=step), tmp_path / "ms")
        assert merge(tmp_path / "ms", tmp_path / "merged").when == (0, step)
    files = files_of(tmp_path / "merged")
    assert len(files) == 4
    report = verify_records(tmp_path / "merged")
    assert (report.ranks, report.checked_bytes, report.differences) == (4, sum(map(len, files.values())), ())


def test_what_another_command_wrote_is_not_replaced_unasked(tmp_path: Path) -> None:
    made_in(tmp_path)
    source, out = tmp_path / "ms", tmp_path / "merged"
    merge(source, out)
    with pytest.raises(UsageError, match="the result of another conversion") as caught:
        merge(source, out, optimizer=False)
    assert ref("target.overwrite") in caught.value.hint
    assert merge(source, out, optimizer=False, overwrite=True).document()["ranksMerged"] == 2


# ------------------------------------------------------------------------------------------------------------- refusals


def no_shards(root: Path) -> None:
    made = Handmade(CASES["dp4"][0], hidden=8, vocab=12)
    for path in root.glob("rank_*/*"):
        path.unlink()
    made.write_source(root)


def extra(root: Path) -> None:
    (root / "rank_8").mkdir()
    shutil.copy(root / "rank_7" / "network_rank_7-0_12.ckpt", root / "rank_8" / "network_rank_8-0_12.ckpt")


REFUSED: dict[str, tuple[Callable[[Path], object], type[Ckpt2ptError], str]] = {
    "nothing-described": (lambda root: shutil.rmtree(root / "opt_shard_info"), MissingInputError, "no .*dist_opt_shard_info"),
    "a-description-is-missing": (lambda root: shutil.rmtree(root / "opt_shard_info" / "rank_0"), InputError, "not the first ranks of equal groups"),
    "a-rank-is-missing": (lambda root: shutil.rmtree(root / "rank_6"), MissingInputError, "1 of 8 rank folders are missing: rank_6"),
    "a-rank-too-many": (extra, MissingInputError, "1 folders .* nothing describes: rank_8\n"),
    "named-parameters": (no_shards, InputError, "named parameters and no shards"),
}  # fmt: skip


def test_stages_that_nothing_describes_are_not_left_out(tmp_path: Path) -> None:
    made_in(tmp_path, "dp2-cp2-pp2")
    shutil.rmtree(tmp_path / "ms" / "opt_shard_info" / "rank_4")
    with pytest.raises(MissingInputError, match=r"4 folders .* nothing describes: rank_4, rank_5, rank_6, rank_7\n"):
        merge(tmp_path / "ms", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("case", ["dp4", "br-master"])
def test_a_name_that_the_contents_contradict_is_remarked_and_kept(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made_in(tmp_path, case)
    merge(tmp_path / "ms", tmp_path / "before")
    assert not caplog.records
    for path in [*(tmp_path / "ms").rglob("*-0_12.ckpt"), *(tmp_path / "ms").glob("iter_*")]:
        path.rename(path.with_name(path.name.replace("12", "13")))
    assert merge(tmp_path / "ms", tmp_path / "merged").when == (0, 13)
    [remark] = [record.getMessage() for record in caplog.records]
    assert re.search(r"is named 0_13, and holds (step_num|iteration) 12: the merged file keeps the name", remark)


@pytest.mark.parametrize("name", ["mp_rank_00_001", "mp_rank_01_001", "mp_rank_00_000"])
def test_a_model_folder_that_nothing_describes_is_named(name: str, tmp_path: Path) -> None:
    made_in(tmp_path, "br-master")
    shutil.rmtree(tmp_path / "ms" / "opt_shard_info" / name)
    with pytest.raises(MissingInputError, match=rf"1 folders .* nothing describes: {name}\n"):
        merge(tmp_path / "ms", tmp_path / "merged")


def test_a_whole_stage_that_nothing_describes_is_named(tmp_path: Path) -> None:
    made_in(tmp_path, "br-master")
    for name in ("mp_rank_00_001", "mp_rank_01_001"):
        shutil.rmtree(tmp_path / "ms" / "opt_shard_info" / name)
    with pytest.raises(MissingInputError, match=r"2 folders .* nothing describes: mp_rank_00_001, mp_rank_01_001\n"):
        merge(tmp_path / "ms", tmp_path / "merged")


@pytest.mark.parametrize("number", [0, 1, 6, -1], ids=["first", "second", "in-the-midst", "last"])
@pytest.mark.parametrize("source", [J / "ms_zero_src", DIST], ids=["two-stages", "two-models"])
def test_a_parameter_that_the_description_lacks_is_not_left_out(number: int, source: Path, tmp_path: Path) -> None:
    shutil.copytree(source / "opt_shard_info", tmp_path / "info")
    [path] = (tmp_path / "info" / "rank_0").iterdir()
    path.chmod(0o600)
    document = json.loads(path.read_text())
    large = [name for name, reported in document["param_info"].items() if np.prod(reported["shape"]) > 32]
    _, _, start, stop = document["param_info"].pop(large[number])["range_map"]
    path.write_text(json.dumps(document))
    with pytest.raises(CoverageError, match=r"nothing describes elements \[\d+, \d+\) of buffer 0") as caught:
        merge(source, tmp_path / "merged", strategy=tmp_path / "info")
    first, last = map(int, re.findall(r"\[(\d+), (\d+)\)", caught.value.what)[0])
    assert first <= start < stop <= last
    assert not (tmp_path / "merged").exists()


def test_ranks_that_another_run_left_at_an_older_step_are_no_obstacle(tmp_path: Path) -> None:
    made_in(tmp_path)
    extra(tmp_path / "ms")
    [left] = (tmp_path / "ms" / "rank_8").iterdir()
    left.rename(left.with_name("network_rank_8-0_10.ckpt"))
    assert merge(tmp_path / "ms", tmp_path / "merged").document()["ranksMerged"] == 2


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    change, kind, what = REFUSED[case]
    made_in(tmp_path)
    change(tmp_path / "ms")
    with pytest.raises(kind, match=what):
        merge(tmp_path / "ms", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_format_that_is_not_there_is_reported_with_the_flags_of_this_command(tmp_path: Path) -> None:
    made_in(tmp_path)
    with pytest.raises(MissingInputError, match="no safetensors file") as caught:
        merge(tmp_path / "ms", tmp_path / "merged", src_format="safetensors")
    assert rendered(caught.value.hint, of_command("combine")) == "check --checkpoint-dir and --src-format"
    (tmp_path / "ms" / "rank_0").rename(tmp_path / "ms" / "other")
    with pytest.raises(MissingInputError) as caught:
        merge(tmp_path / "ms", tmp_path / "merged")
    assert rendered(caught.value.hint, of_command("combine")) == (
        "check the parallel sizes of the training that wrote it, and --checkpoint-dir"
    )


def test_a_full_disk_is_met_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_in(tmp_path)
    monkeypatch.setattr("ckpt2pt.io.volume.free_bytes", lambda _: 100)
    with pytest.raises(VolumeTooSmallError, match="100 B are free"):
        merge(tmp_path / "ms", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_disk_that_fills_up_at_any_write_leaves_only_whole_files_and_the_next_run_ends_it(tmp_path: Path) -> None:
    expected, out = files_of(J / "ms_zero_merged"), tmp_path / "merged"
    failures = 0
    for _ in fill_at_every_step(lambda: merge(J / "ms_zero_src", out), out):
        failures += 1
        assert files_of(out).items() <= expected.items()
        if failures % 3 == 0:  # now and then from the beginning, so that the first group fails late as well
            shutil.rmtree(out)
    assert failures > 10
    assert files_of(out) == expected


def test_the_manifests_name_inputs_and_digests(tmp_path: Path) -> None:
    merge(J / "ms_zero_src", tmp_path)
    state = tmp_path / ".ckpt2pt" / "merged-0_2"
    stage = json.loads((state / "stage-001.json").read_text())
    assert [entry.get("source", entry.get("shards")) for entry in stage["inputs"]] == [
        "rank_2/network_rank_2-0_2.ckpt",
        "rank_3/network_rank_3-0_2.ckpt",
        "dist_opt_shard_info_rank_2-0_0.json",
    ]
    [rank] = stage["ranks"]
    assert len(rank["tensors"]) == len(index_file(tmp_path / rank["files"][0]["path"]))
    assert (state / "report.json").exists()


def test_files_that_an_older_version_merged_are_not_replaced(tmp_path: Path) -> None:
    """Its manifests were of another kind: nobody can tell any more which of the files it had finished."""
    merge(J / "ms_zero_src", tmp_path / "now")
    shutil.rmtree(tmp_path / "now" / ".ckpt2pt")
    (tmp_path / "now" / ".ckpt2pt" / "combined").mkdir(parents=True)
    before = files_of(tmp_path / "now")
    for more in ({}, {"overwrite": True}):
        with pytest.raises(TargetConflictError, match="may be those of an older version of ckpt2pt") as caught:
            merge(J / "ms_zero_src", tmp_path / "now", **more)
        assert "move those files away" in caught.value.hint
    assert files_of(tmp_path / "now") == before
    shutil.rmtree(tmp_path / "now" / "rank_0")
    shutil.rmtree(tmp_path / "now" / "rank_2")
    assert merge(J / "ms_zero_src", tmp_path / "now").document()["ranksMerged"] == 2


def test_sections_are_merged_at_a_time_and_the_last_one_ends_the_report(tmp_path: Path) -> None:
    """As on several machines: the groups of one stage hold each other up no more than those of others."""
    made_in(tmp_path)
    source, out = tmp_path / "ms", tmp_path / "out"
    assert merge(source, out, section=(0, 1)).document()["published"] is False
    request, _ = merge_request(source, out)
    with locked(target_of(request, discover(request)).state / "stage-000.lock", "merging elsewhere"):
        done = merge(source, out, section=(1, 2)).document()
    assert (done["ranksMerged"], done["published"]) == (1, True)


def test_an_older_result_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    for case in ("dp4", "br-master"):
        made_in(tmp_path / case, case)
        source, out = tmp_path / case / "ms", tmp_path / case / "out"
        merge(source, out)
        before = files_of(out)
        groups = merge_request(source, out)[0].topology.pipeline
        first = merge(source, out, optimizer=False, overwrite=True, section=(0, 1))
        assert (first.document()["published"], files_of(out)) == (False, before)
        assert "stays until" in first.sentence()
        assert merge(source, out, optimizer=False, overwrite=True).document()["ranksMerged"] == groups - 1
        assert files_of(out).keys() == before.keys()
        assert all(len(data) < len(before[name]) for name, data in files_of(out).items())


def test_a_sentence_tells_what_was_merged_and_kept(tmp_path: Path) -> None:
    source = J / "ms_zero_src"
    first = merge(source, tmp_path, section=(0, 1)).sentence()
    assert re.fullmatch(rf"epoch 0, step 2: merged 1 rank of 2 shards each \(\S+ KiB\) in \S+ s\n{tmp_path}", first), (
        first
    )
    assert ", kept 1 that were there\n" in merge(source, tmp_path).sentence()
    assert "step 2: everything was there already\n" in merge(source, tmp_path).sentence()


def test_merged_files_prove_themselves(tmp_path: Path) -> None:
    made_in(tmp_path)
    out = tmp_path / "merged"
    merge(tmp_path / "ms", out)
    report = verify_records(out)
    assert (report.ranks, report.differences) == (2, ())
    assert report.checked_bytes == sum(map(len, files_of(out).values()))
    path = out / "rank_1/network_rank_1-0_12_dp_merged.ckpt"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    [record] = out.glob(".ckpt2pt/*/stage-000.json")
    record.unlink()
    found = {(one.file, one.tensor) for one in verify_records(out).differences}
    assert found == {(path.relative_to(out).as_posix(), "file"), (record.relative_to(out).as_posix(), "record")}
