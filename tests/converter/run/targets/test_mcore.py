"""``--target-format megatron``: MindSpore files become what Megatron-LM 0.7 to 0.19 held, element for element, at any layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckpt2pt
from ckpt2pt.cli.commands import main
from ckpt2pt.core.params import EMBEDDING, HEAD
from ckpt2pt.core.progress import SILENCE
from ckpt2pt.core.state import ARCHITECTURE
from ckpt2pt.core.tensor import Key
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import MissingInputError, TopologyError, UsageError
from ckpt2pt.formats.megatron.headers import read_rank
from ckpt2pt.kube.conversion import schema
from ckpt2pt.kube.resolve import resolve_any
from ckpt2pt.run.conversion import run
from ckpt2pt.run.targets.mcore import find
from ckpt2pt.run.targets.request import McoreRequest
from ckpt2pt.verification.leaves import TensorLeaf, open_pt
from goldens import golden_sets
from mcore import expected
from mcoresets import joined, mcore_sets, odd_set, rank_arrays, script_of, sizes_of

SETS = {f"{path.parent.name}-{path.name}": path for path in mcore_sets()}
ODD = odd_set()


def asked(folder: Path, tmp_path: Path, *script: str, **more: Any) -> McoreRequest:
    sizes = sizes_of(folder)
    tensor, pipeline = more.pop("target_tensor", sizes["tp"]), more.pop("target_pipeline", sizes["pp"])
    base = McoreRequest(
        topology=Topology(num_layers=pipeline, tensor=tensor, pipeline=pipeline),
        source=folder / "ms",
        target=tmp_path / "out",
        source_format="mindspore",
        metadata=script_of(folder, tmp_path, *script),
        tensor=sizes["tp"],
        pipeline=sizes["pp"],
    )
    return replace(base, **more)


def converted(request: McoreRequest) -> Path:
    topology = find(request).layout.topology
    outcome = run(request, range(topology.pipeline), SILENCE)
    assert outcome.published
    return outcome.target.folder


def held(folder: Path, topology: Topology, *, align: int = 64, gated: bool) -> dict[Key, Any]:
    parts: dict[Key, dict[int, Any]] = {}
    for tp, pp in topology.ranks():
        slots = [topology.slots(pp, vpp) for vpp in range(topology.virtual)]
        for (key, _), part in rank_arrays(folder / topology.directory(tp, pp), slots, align=align).items():
            parts.setdefault(key, {})[tp] = part
    return {key: joined(key.name, [ranks[tp] for tp in sorted(ranks)], gated=gated) for key, ranks in parts.items()}


def assert_equal(found: dict[Key, Any], folder: Path) -> None:
    wanted = expected(folder / "expected")
    for key, values in found.items():
        tied = key.name == HEAD and key not in wanted
        assert np.array_equal(values, wanted[Key(key.role, EMBEDDING) if tied else key]), key
    assert wanted.keys() <= found.keys()


@pytest.mark.parametrize(("tp", "pp", "vpp"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 2, 2)])
@pytest.mark.parametrize("name", SETS)
def test_every_element_arrives_at_any_layout(name: str, tp: int, pp: int, vpp: int, tmp_path: Path) -> None:
    folder = SETS[name]
    layers = len({key.name.split(".")[2] for key in expected(folder / "expected") if ".layers." in key.name})
    if layers % (pp * vpp):
        pytest.skip("the set has too few layers for so many chunks")
    request = asked(folder, tmp_path, target_tensor=tp, target_pipeline=pp, target_virtual=vpp)
    topology = find(request).layout.topology
    gated = "--swiglu" in json.loads((folder / "set.json").read_text())["args"]
    assert_equal(held(converted(request), topology, gated=gated), folder)


def test_buckets_of_the_run_to_come_decide_where_odd_sizes_leave_gaps(tmp_path: Path) -> None:
    request = replace(asked(ODD, tmp_path), metadata=script_of(ODD, tmp_path, buckets=True))
    [own] = (ODD / "iter_0000002").glob("mp_rank_00/distrib_optim.pt")
    made = converted(request) / "mp_rank_00" / "distrib_optim.pt"
    sizes = [
        [leaf for leaf_path, leaf in open_pt(path).items() if "numel_unpadded" in leaf_path] for path in (own, made)
    ]
    assert sizes[0] == sizes[1]


def test_release_0_7_leaves_no_gaps(tmp_path: Path) -> None:
    request = asked(ODD, tmp_path, release=(0, 7))
    result = converted(request)
    assert_equal(held(result, find(request).layout.topology, align=1, gated=False), ODD)


@pytest.mark.parametrize(
    ("more", "first"),
    [
        pytest.param({}, "/model/decoder.layers.0.input_layernorm.weight", id="local"),
        pytest.param(
            {"transformer": "transformer_engine"},
            "/model/decoder.layers.0.self_attention.linear_proj.weight",
            id="transformer-engine",
        ),
        pytest.param({"names": "legacy"}, "/model/language_model/encoder/layers.0.input_norm.weight", id="legacy"),
    ],
)
def test_names_and_order_are_those_of_the_run_to_come(more: dict[str, Any], first: str, tmp_path: Path) -> None:
    request = asked(ODD, tmp_path, target_pipeline=2, **more)
    result = converted(request)
    assert_equal(held(result, find(request).layout.topology, gated=False), ODD)
    leaves = open_pt(result / "mp_rank_00_001" / "model_optim_rng.pt")
    names = [path for path, leaf in leaves.items() if path.startswith("/model/") and isinstance(leaf, TensorLeaf)]
    assert names[0] == first
    fused = any(name.endswith("mlp.linear_fc1.layer_norm_weight") for name in names)
    assert fused == ("transformer" in more)


def test_rest_of_the_file_is_small_and_plain(tmp_path: Path) -> None:
    result = converted(asked(ODD, tmp_path, target_pipeline=2))
    for number, wanted in enumerate(([1.0, 0.0], [0.0, 1.0])):  # by the first parameter: an embedding, a norm
        leaves = open_pt(result / f"mp_rank_00_00{number}" / "model_optim_rng.pt")
        args = {path.removeprefix("/args/"): leaf for path, leaf in leaves.items() if path.startswith("/args/")}
        assert {name: args[name] for name in ("consumed_train_samples", "pipeline_model_parallel_size")} == {
            "consumed_train_samples": 12,
            "pipeline_model_parallel_size": 2,
        }
        assert len(args.keys() - {*ARCHITECTURE}) == 6
        groups = "/optimizer/optimizer/param_groups"
        assert [leaves[f"{groups}/{group}/wd_mult"] for group in (0, 1)] == wanted
        assert [leaves[f"{groups}/{group}/step"] for group in (0, 1)] == [2, 2]
        assert leaves["/opt_param_scheduler/num_steps"] == 12
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_stages_are_written_apart_and_a_second_run_writes_nothing(tmp_path: Path) -> None:
    request = asked(ODD, tmp_path, target_pipeline=2)
    assert not run(request, [1], SILENCE).published
    outcome = run(request, [0], SILENCE)
    assert outcome.published
    assert run(request, [0, 1], SILENCE).converted == ()


def test_weights_alone_need_no_hyperparameters(tmp_path: Path) -> None:
    result = converted(asked(ODD, tmp_path, full=False, target_pipeline=1, target_tensor=1))
    assert [path.name for path in (result / "mp_rank_00").iterdir()] == ["model_optim_rng.pt"]
    assert "/optimizer" not in open_pt(result / "mp_rank_00" / "model_optim_rng.pt")


@pytest.mark.parametrize(
    ("more", "error", "what"),
    [
        pytest.param(
            {"metadata": None}, MissingInputError, "nothing states num_attention_heads", id="nothing-says-the-heads"
        ),
        pytest.param(
            {"target_tensor": 3}, TopologyError, "which a tensor parallel size of 3 does not divide", id="heads"
        ),
        pytest.param({"num_layers": 1}, UsageError, "is 1, and the source has", id="fewer-layers-than-there-are"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    more: dict[str, Any], error: type[Exception], what: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=what):
        run(asked(ODD, tmp_path, **more), [0], SILENCE)
    assert not (tmp_path / "out").exists()


def test_release_that_has_another_format_is_refused() -> None:
    target = schema.Target(path="out", format="Megatron", megatron_version="0.6")
    spec = schema.Spec(source=schema.Source(path="ms"), target=target)
    with pytest.raises(UsageError, match=r"target\.megatronVersion.* is 0\.6"):
        resolve_any(spec)


def test_no_op_layers_are_left_out_and_not_counted(tmp_path: Path) -> None:
    [folder] = [path for path in golden_sets() if path.name == "e_tp1pp2vpp2_noop_tail"]
    out, whole = tmp_path / "out", ["--source", str(folder / "ms"), "--param-map-path", str(folder / "pt_meta")]
    words = ["convert", *whole, "--target", str(out), "--target-format", "megatron", "--verify", "full"]
    assert main([*words, "--target-pp-size", "1"]) == 0
    with ckpt2pt.open(folder / "A") as source, ckpt2pt.open(out) as result:
        layers = {key.split(".")[2] for key in result.keys() if ".layers." in key}  # noqa: SIM118 - no mapping
        assert layers == set("012345")
        for key in source.keys():  # noqa: SIM118
            assert np.array_equal(source.get(key, "exp_avg"), result.get(key, "exp_avg")), key
    assert read_rank(out / "iter_0000002" / "mp_rank_00").template.args["num_layers"] == 6


def test_a_number_of_layers_that_the_source_has_not_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", "--source", str(ODD / "ms"), "--target", str(tmp_path / "out"), "--target-format", "megatron"]
    script = script_of(ODD, tmp_path)
    assert main([*words, "--param-map-path", str(script), "--num-layers", "9"]) == 64
    err = capsys.readouterr().err
    assert "--num-layers is 9, and the source has" in err
    assert not (tmp_path / "out").exists()
