"""Training outputs as they are, shards and all, converted in place: every layout, every mode, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.core.topology import Topology
from ckpt2pt.discover import discover
from ckpt2pt.errors import Ckpt2ptError, InputError, MissingInputError, TopologyError, ref
from ckpt2pt.run.conversion import run
from ckpt2pt.verification.compare import compare
from ckptfiles import Tensor
from conversions import Quiet, flags_for
from goldens import golden_root
from handmade import Handmade
from sharding import Sharding

LAYOUTS: dict[str, tuple[Topology, Sharding]] = {
    "dp1": (Topology(num_layers=2), Sharding()),
    "dp2": (Topology(num_layers=2, data=2), Sharding()),
    "dp4-tp2-pp2": (Topology(num_layers=4, tensor=2, pipeline=2, data=4), Sharding(per_bucket=2)),
    "dp8-buffers": (Topology(num_layers=2, data=8), Sharding(per_bucket=1, buffers=2)),
    "dp2-cp2-pp2": (Topology(num_layers=2, pipeline=2, data=2, context=2), Sharding()),
    "vpp2": (Topology(num_layers=4, pipeline=2, virtual=2, data=2), Sharding(buffers=2)),
    "safetensors": (Topology(num_layers=2, tensor=2, data=2), Sharding(suffix="safetensors")),
    "br-master": (Topology(num_layers=4, tensor=2, pipeline=2, data=2), Sharding(v2=True, tail="}}")),
    "br-master-one-stage": (Topology(num_layers=2, data=4), Sharding(v2=True)),
    "zero3": (
        Topology(num_layers=2, data=4),
        Sharding(zero3=("language_model.encoder.layers.0.mlp.projection.weight", "language_model.output_layer.weight")),
    ),
}


def made_of(topology: Topology, **more: object) -> Handmade:
    return Handmade(topology, **({"hidden": 8, "vocab": 12, "data": 2} | more))  # type: ignore[arg-type]


def place(made: Handmade, cut: Sharding, folder: Path) -> None:
    cut.write(made, folder / "ms")
    made.write_meta(folder / "pt_meta")


@pytest.mark.parametrize("case", LAYOUTS)
def test_shards_convert_to_the_truth_and_a_second_reading_agrees(case: str, tmp_path: Path) -> None:
    topology, cut = LAYOUTS[case]
    made = made_of(topology)
    place(made, cut, tmp_path)
    outcome = run(made.request(tmp_path, verify="full"), range(topology.pipeline), Quiet())
    assert outcome.published
    made.check(outcome)


def test_tied_stages_take_their_copy_from_shards_too(tmp_path: Path) -> None:
    made = made_of(Topology(num_layers=2, pipeline=2, data=2), tied=True)
    for role in ("param", "exp_avg", "exp_avg_sq"):
        first = made.entries[0, 0][
            f"{'' if role == 'param' else role + '.'}language_model.embedding.word_embeddings.weight"
        ]
        del made.entries[0, 1][first.name.replace("embedding.word_embeddings", "output_layer")]
        made.truth[0, 1, role, "0:word_embeddings.weight"] = made.truth[
            0, 0, role, "0:language_model.embedding.word_embeddings.weight"
        ]
    place(made, Sharding(), tmp_path)
    made.check(run(made.request(tmp_path, verify="full"), range(2), Quiet()))


@pytest.mark.parametrize("source", ["ms_zero_src", "ms_zero_merged"])
def test_the_golden_shards_give_what_megatron_itself_wrote(source: str, tmp_path: Path) -> None:
    golden = golden_root() / "megatron06" / "j_tp1pp2dp2"
    flags = flags_for(golden, tmp_path / "out")
    flags[flags.index("--ms-path") + 1] = str(golden / source)
    assert main(["convert", *flags, "--progress", "none", "--verify", "full"]) == 0
    assert main(["verify", *flags]) == 0
    found = compare(tmp_path / "out", golden / "A", ignore=["*/@state"], ignore_padding=True)
    assert found.same, found.render()


def test_plan_says_that_shards_are_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = golden_root() / "megatron06" / "j_tp1pp2dp2"
    flags = flags_for(golden, tmp_path / "out")
    flags[flags.index("--ms-path") + 1] = str(golden / "ms_zero_src")
    assert main(["plan", *flags]) == 0
    assert "data-parallel shards, joined in place: 2 files for each rank, described by" in capsys.readouterr().out
    assert main(["plan", *flags, "--output", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [[Path(path).parent.name for path in rank["shards"]] for rank in document["ranks"]] == [
        ["rank_0", "rank_1"],
        ["rank_2", "rank_3"],
    ]


def test_descriptions_may_lie_elsewhere(tmp_path: Path) -> None:
    made = made_of(Topology(num_layers=2, data=2))
    place(made, Sharding(), tmp_path)
    (tmp_path / "ms" / "opt_shard_info").rename(tmp_path / "elsewhere")
    with pytest.raises(MissingInputError, match="nothing describes them") as caught:
        discover(made.request(tmp_path))
    assert ref("source.optShardInfoPath") in caught.value.hint
    made.check(run(made.request(tmp_path, shard_info=tmp_path / "elsewhere"), [0], Quiet()))


def test_an_iteration_folder_itself_may_be_named(tmp_path: Path) -> None:
    made = made_of(Topology(num_layers=2, data=2))
    place(made, Sharding(v2=True), tmp_path)
    source = tmp_path / "ms" / f"iter_{made.iteration:07d}"
    made.check(run(made.request(tmp_path, source=source), [0], Quiet()))


def test_the_identity_changes_with_any_file_that_is_read(tmp_path: Path) -> None:
    made = made_of(Topology(num_layers=2, data=2))
    place(made, Sharding(), tmp_path)
    seen = {discover(made.request(tmp_path)).identity}
    peer = tmp_path / "ms" / "rank_1" / f"network_rank_1-0_{made.iteration}.ckpt"
    shutil.copy(peer, peer.with_suffix(".x"))
    peer.with_suffix(".x").replace(peer)
    seen.add(discover(made.request(tmp_path)).identity)
    (info,) = (tmp_path / "ms" / "opt_shard_info" / "rank_0").iterdir()
    info.write_text(info.read_text() + " ")
    seen.add(discover(made.request(tmp_path)).identity)
    assert len(seen) == 3


# ----------------------------------------------------------------------------------------------------- what is refused


def lose(name: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root / name)


def keep_two_steps(root: Path) -> None:
    """Rank 1 has saved once more, or once less."""
    (path,) = (root / "rank_1").glob("*.ckpt")
    path.rename(path.with_name(path.name.replace("-0_12", "-0_13")))


def another_time(root: Path) -> None:
    """The name of the step before on the content of another."""
    made = made_of(Topology(num_layers=2, data=2), iteration=13)
    Sharding().write(made, root / "other")
    (path,) = (root / "other" / "rank_1").iterdir()
    (old,) = (root / "rank_1").glob("*.ckpt")
    path.replace(old)


REFUSED: dict[str, tuple[Callable[[Path], None], type[Ckpt2ptError], str]] = {
    "a-rank-is-missing": (lose("rank_1"), MissingInputError, r"1 of 2 rank folders are missing: rank_1 \(there are rank_0"),
    "a-rank-is-at-another-step": (keep_two_steps, InputError, "rank_0 has 0_12; rank_1 has 0_13"),
    "a-rank-tells-another-time": (another_time, InputError, "ranks are at different steps: num_steps is 48 and 52"),
    "no-description": (lose("opt_shard_info"), MissingInputError, "nothing describes them"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_group_that_is_not_whole_is_refused(case: str, tmp_path: Path) -> None:
    change, kind, what = REFUSED[case]
    made = made_of(Topology(num_layers=2, data=2))
    place(made, Sharding(), tmp_path)
    change(tmp_path / "ms")
    with pytest.raises(kind, match=what):
        discover(made.request(tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("data", "shown"), [(1, r"\[0\]"), (2, r"\[0, 1\]")])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_wrong_data_parallel_size_is_reported_as_such(data: int, shown: str, pipeline: int, tmp_path: Path) -> None:
    made = made_of(Topology(num_layers=2, pipeline=pipeline, data=4))
    place(made, Sharding(), tmp_path)
    wrong = made.request(tmp_path, topology=replace(made.topology, data=data))
    with pytest.raises(TopologyError, match=rf"over ranks \[0, 1, 2, 3\], the options give ranks {shown}"):
        discover(wrong)


def test_a_rank_that_was_left_by_a_larger_run_is_not_looked_at(tmp_path: Path) -> None:
    made = made_of(Topology(num_layers=2, data=2))
    place(made, Sharding(), tmp_path)
    shutil.copytree(tmp_path / "ms" / "rank_1", tmp_path / "ms" / "rank_2")
    made.check(run(made.request(tmp_path), [0], Quiet()))


def test_an_older_checkpoint_counts_when_the_newest_is_not_there_in_all_ranks(tmp_path: Path) -> None:
    made = made_of(Topology(num_layers=2, data=2))
    place(made, Sharding(), tmp_path)
    (path,) = (tmp_path / "ms" / "rank_0").glob("*.ckpt")
    shutil.copy(path, path.with_name("network_rank_0-0_13.ckpt"))
    outcome = run(made.request(tmp_path), [0], Quiet())
    assert outcome.target.iteration == 12
    made.check(outcome)


# ----------------------------------------------------------------------- modes A to F (docs/format-ckpt.md), but for A


def renamed(made: Handmade, prefixes: dict[str, str]) -> None:
    for key, entries in made.entries.items():
        made.entries[key] = {}
        for name, each in entries.items():
            prefix = next((p for p in prefixes if name.startswith(p)), "")
            new = prefixes.get(prefix, "") + name.removeprefix(prefix)
            made.entries[key][new] = replace(each, name=new)


def add(made: Handmade, *tensors: Tensor) -> None:
    for entries in made.entries.values():
        entries.update({each.name: each for each in tensors})


SCALARS = [Tensor(name, "float32", (), bytes(4)) for name in ("beta1_power", "beta2_power", "learning_rate")]


def adam(made: Handmade) -> None:
    renamed(made, {"exp_avg.": "moment1.", "exp_avg_sq.": "moment2."})
    add(made, *SCALARS)


def without_optimizer(made: Handmade) -> None:
    for entries in made.entries.values():
        for name in [name for name in entries if name.startswith("exp_avg")]:
            del entries[name]
    add(made, Tensor("set_hidden_states", "float32", (2, 2), bytes(16)))


def momentum(made: Handmade) -> None:
    for entries in made.entries.values():
        for name in [name for name in entries if name.startswith("exp_avg_sq.")]:
            del entries[name]
    renamed(made, {"exp_avg.": "moments."})
    add(made, *SCALARS, Tensor("momentum", "float32", (), bytes(4)))


MODES: dict[str, tuple[Callable[[Handmade], None], bool]] = {
    "B-named-main-copies": (lambda _: None, True),
    "C-adam": (adam, True),
    "C-momentum": (momentum, False),
    "D-zero": (lambda made: renamed(made, {"exp_avg.": "adam_m.", "exp_avg_sq.": "adam_v."}), True),
    "E-no-optimizer": (without_optimizer, False),
}


@pytest.mark.parametrize("mode", MODES)
def test_named_sources_of_every_mode_convert(mode: str, tmp_path: Path) -> None:
    change, full = MODES[mode]
    made = made_of(Topology(num_layers=2, tensor=2, data=2))
    change(made)
    outcome = run(made.write(tmp_path, full=full), [0], Quiet())
    if full:
        made.check(outcome)
    assert outcome.published


def test_mode_f_named_files_of_br_master_convert(tmp_path: Path) -> None:
    made = made_of(Topology(num_layers=4, tensor=2, pipeline=2, data=2))
    made.write_source(tmp_path / "v1")
    for tp, pp in made.topology.ranks():
        (path,) = (tmp_path / "v1" / f"rank_{made.topology.source_rank(tp, pp)}").iterdir()
        place = tmp_path / "ms" / f"iter_{made.iteration:07d}" / made.topology.directory(tp, pp)
        place.mkdir(parents=True)
        path.rename(place / "gpt_model_optim_rng.ckpt")
    (tmp_path / "ms" / "latest_checkpointed_iteration.txt").write_text("12\n0")
    made.write_meta(tmp_path / "pt_meta")
    made.check(run(made.request(tmp_path, verify="full"), range(2), Quiet()))


def test_a_missing_model_rank_is_named_with_those_there_are(tmp_path: Path) -> None:
    made = made_of(Topology(num_layers=4, tensor=2, pipeline=2, data=2))
    place(made, Sharding(v2=True), tmp_path)
    shutil.rmtree(tmp_path / "ms" / "iter_0000012" / "mp_rank_01_001")
    with pytest.raises(MissingInputError, match=re.escape("mp_rank_01_001 (there are mp_rank_00_000, mp_rank_00_001")):
        discover(made.request(tmp_path))


def test_hundreds_of_shards_need_few_open_files(tmp_path: Path) -> None:
    """600 data-parallel ranks with a limit of 64 open files, cold, in a process of its own."""
    topology = Topology(num_layers=2, data=600)
    made = made_of(topology, hidden=32, vocab=64, ffn=64)
    place(made, Sharding(), tmp_path)
    script = """
import os, resource, sys
from pathlib import Path
from ckpt2pt.cli.commands import main
from ckpt2pt.engine.sources import drop_from_cache
os.sync()
for path in Path(sys.argv[1]).rglob("*.ckpt"):
    drop_from_cache(path)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
sys.exit(main(sys.argv[2:]))
"""
    flags = ["--num-layers", 2, "--dp-size", 600, "--verify", "full", "--multiprocess-off"]
    paths = [
        "--ms-path",
        tmp_path / "ms",
        "--param-map-path",
        tmp_path / "pt_meta",
        "--megatron-path",
        tmp_path / "out",
    ]
    words = [sys.executable, "-c", script, tmp_path / "ms", "convert", *flags, *paths]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
