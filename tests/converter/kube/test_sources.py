"""A MindFormers source in a spec: its flags reach the reader, and results that are not made of it are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.errors import UsageError
from ckpt2pt.formats.mindformers.flags import Flags
from ckpt2pt.kube.conversion.schema import MindFormers, Source, Spec, Target, from_json, to_json
from ckpt2pt.kube.sources import flags_of, refuse_target
from mindformers_made import LAUNCH, Model, save, save_sharded


def test_flags_survive_the_way_to_a_worker() -> None:
    said = MindFormers(config="/v/train.yaml", use_contiguous_weight_layout_attention=True)
    spec = from_json(to_json(Spec(source=Source(format="MindFormers", mindformers=said))), "a test")
    assert flags_of(spec) == Flags(config=Path("/v/train.yaml"), contiguous=True)


def test_results_that_are_not_made_of_it_are_refused() -> None:
    refuse_target(Spec(), "mindspore")
    for spec, found in (
        (Spec(target=Target(format="MindSpore")), "mindformers"),
        (Spec(source=Source(format="MindFormers")), ""),
    ):
        with pytest.raises(UsageError, match="is a MindFormers checkpoint, of which no result for"):
            refuse_target(spec, found)


@pytest.mark.parametrize("target", ["megatron", "torch_dist"])
@pytest.mark.parametrize("kind", ["dense", "experts", "latent"])
def test_a_conversion_and_the_comparison_of_both_sides(
    tmp_path: Path, target: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(experts=0 if kind == "dense" else 4, latent=kind == "latent", mtp=kind == "latent")
    save(tmp_path / "in", model.arrays)
    launch, out = tmp_path / "launch.sh", tmp_path / "out"
    more = "" if kind == "dense" else " --num-experts 4 --moe-ffn-hidden-size 12"
    if kind == "latent":
        more += " --multi-latent-attention --q-lora-rank 6 --kv-lora-rank 4 --mtp-num-layers 1"
    launch.write_text(LAUNCH + more)
    said = ["--use-interleaved-weight-layout-mlp", "true"]
    said += [] if kind == "latent" else ["--use-contiguous-weight-layout-attention", "false"]
    words = [
        "--source",
        str(tmp_path / "in"),
        "--target",
        str(out),
        "--target-format",
        target,
        "--param-map-path",
        str(launch),
    ]
    assert main(["convert", *words, "--verify", "full"]) == 64
    assert "--mindformers-config" in capsys.readouterr().err
    assert not out.exists()
    assert main(["plan", *words, *said, "--output", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["iteration"] == 3
    assert main(["convert", *words, *said, "--verify", "full"]) == 0
    assert main(["verify", *words, *said, "--level", "full"]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "in"), str(out), *said]) == 0
    assert "no difference" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["megatron06", "mindspore"])
def test_other_targets_are_refused_before_anything_is_written(
    tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in", Model(pynative=True).arrays)
    words = ["--source", str(tmp_path / "in"), "--target", str(tmp_path / "out"), "--target-format", target]
    assert main(["convert", *words, "--param-map-path", str(tmp_path)]) == 64
    assert "choose Megatron, TorchDist or Safetensors (--target-format)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_main_parameters_that_do_not_round_go_to_their_own_place(tmp_path: Path) -> None:
    """What is there is carried over: the weights that were trained with, and the main parameters beside them."""
    model = Model(pynative=True)
    model.arrays["main_param.output_layer.weight"] = -model.arrays["main_param.output_layer.weight"]
    save(tmp_path / "in", model.arrays)
    launch = tmp_path / "launch.sh"
    launch.write_text(LAUNCH)
    for target in ("megatron", "torch_dist"):
        words = ["--source", str(tmp_path / "in"), "--target", str(tmp_path / target), "--target-format", target]
        assert main(["convert", *words, "--param-map-path", str(launch), "--verify", "full"]) == 0


def test_a_document_waits_until_the_checkpoint_is_complete(tmp_path: Path) -> None:
    """All but metadata.json and one file are there at first, as while a training saves."""
    model = Model()
    folder = save_sharded(tmp_path / "ck", model.arrays, {"output_layer.weight": (2, 1)}, ranks=2)
    late = [folder / "metadata.json", folder / "qwen3-opt-0000001-0000002.safetensors"]
    for file in late:
        file.rename(tmp_path / file.name)
    (tmp_path / "launch.sh").write_text(LAUNCH)
    (tmp_path / "train.yaml").write_text(
        "model: {model_config: {num_layers: 2, use_interleaved_weight_layout_mlp: true}}"
    )
    volume = {"persistentVolumeClaim": {"claimName": "v"}}
    spec = {
        "model": {"numLayers": 2},
        "source": {"volume": volume, "path": "ck", "format": "MindFormers", "mindformers": {"config": "train.yaml"}},
        "metadata": {"path": "launch.sh"},
        "target": {"path": "out", "format": "TorchDist"},
        "readiness": {"timeoutSeconds": 60, "settleSeconds": 0},
    }
    document = {
        "apiVersion": "ckpt2pt.dev/v1alpha1",
        "kind": "CheckpointConversion",
        "metadata": {"name": "mf"},
        "spec": spec,
    }
    (tmp_path / "doc.json").write_text(json.dumps(document))
    words = [sys.executable, "-m", "ckpt2pt", "run", "-f", str(tmp_path / "doc.json"), "--volume", f"v={tmp_path}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        waited = next((line for line in process.stderr if "iteration_00000003" in line and "is not there" in line), "")
        for file in reversed(late):
            (tmp_path / file.name).rename(file)
        out, err = process.communicate(timeout=60)
    assert waited
    assert process.returncode == 0, err
    assert "Succeeded" in out + err
    assert (
        main(
            [
                "verify",
                str(tmp_path / "ck"),
                str(tmp_path / "out"),
                "--mindformers-config",
                str(tmp_path / "train.yaml"),
            ]
        )
        == 0
    )
