"""A mixture of experts of MindSpeed-Core-MS is refused for its reason by whatever would read it: equal names hold different experts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import ckpt2pt
from ckpt2pt.cli.commands import main
from ckpt2pt.core.names import EXPERTS_IN_MINDSPORE
from ckpt2pt.errors import InputError

SIZES = ("--tp-size", "1", "--pp-size", "1")
ASKED = (*SIZES, "--num-layers", "2", "--ms-path", "SOURCE", "--param-map-path", "METADATA", "--megatron-path", "OUT")
COMMANDS = [
    *(
        [command, "--source", "SOURCE", "--target", "OUT", "--target-format", form, *sizes]
        for command in ("plan", "convert")
        for form, sizes in (
            ("torch_dist", ()),
            ("megatron", ()),
            ("torch_dist", SIZES),
            ("megatron", SIZES),
            ("mindspore", (*SIZES, "--dp-size", "2")),
        )
    ),
    ["plan", *ASKED],
    ["convert", *ASKED],
    ["verify", *ASKED],
    ["verify", "SOURCE", "MEGATRON"],
]


@pytest.fixture(scope="module")
def places(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The source, metadata of a dense model of one rank with a result that was made by it, and experts of Megatron-LM."""
    dense, out = golden / "megatron06" / "a2_tp1pp1_tied_bias", tmp_path_factory.mktemp("result")
    ckpt2pt.convert(source=dense / "ms", metadata=dense / "pt_meta", target=out)
    return {
        "SOURCE": str(golden / "mindspeed_moe_ep2" / "output"),
        "METADATA": str(dense / "pt_meta"),
        "MEGATRON": str(golden / "mcore" / "0.19.0" / "moe_ep2"),
        "RESULT": str(out),
    }


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_say_why(
    words: list[str], places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = places["RESULT"] if words[0] == "verify" else str(tmp_path / "out")
    assert main([{**places, "OUT": out}.get(word, word) for word in words]) == 65
    assert EXPERTS_IN_MINDSPORE in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["TorchDist", "Megatron", "MindSpore", "Megatron06"])
def test_a_document_says_why_and_does_not_wait(form: str, places: dict[str, str], tmp_path: Path) -> None:
    claim = {"persistentVolumeClaim": {"claimName": "golden"}}
    source, metadata = (Path(places[name]) for name in ("SOURCE", "METADATA"))
    spec: dict[str, object] = {
        "model": {"numLayers": 2},
        "parallelism": {"tensor": 1, "pipeline": 1, **({"data": 2} if form == "MindSpore" else {})},
        "source": {"volume": claim, "path": f"{source.parent.name}/{source.name}"},
        "target": {"path": "out", "format": form, "volume": {"persistentVolumeClaim": {"claimName": "results"}}},
    }
    if form == "Megatron06":
        spec["metadata"] = {"path": f"megatron06/{metadata.parent.name}/{metadata.name}"}
    document = {
        "apiVersion": "ckpt2pt.dev/v1alpha1",
        "kind": "CheckpointConversion",
        "metadata": {"name": "experts"},
        "spec": spec,
    }
    path, results = tmp_path / "conversion.yaml", tmp_path / "results"
    path.write_text(yaml.safe_dump(document))
    results.mkdir()
    words = ["run", "-f", path, "--volume", f"golden={source.parents[1]}", "--volume", f"results={results}"]
    done = subprocess.run(
        [sys.executable, "-m", "ckpt2pt", *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 65, done.stderr
    assert EXPERTS_IN_MINDSPORE in done.stdout
    assert list(results.rglob("*.pt")) == []


def test_inspect_says_why_of_a_training_and_of_a_file(
    places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(places["SOURCE"])
    assert main(["inspect", str(source)]) == 65
    assert EXPERTS_IN_MINDSPORE in capsys.readouterr().err
    for path in sorted(source.glob("rank_*/*.ckpt")):
        assert main(["inspect", str(path)]) == 0
        assert EXPERTS_IN_MINDSPORE in capsys.readouterr().out
        assert EXPERTS_IN_MINDSPORE in ckpt2pt.inspect(path)["problem"]


def test_the_library_says_why(places: dict[str, str], tmp_path: Path) -> None:
    source = places["SOURCE"]
    for call in (
        lambda: ckpt2pt.open(source),
        lambda: ckpt2pt.plan(source=source, target=tmp_path / "out", target_format="torch_dist"),
        lambda: ckpt2pt.convert(source=source, target=tmp_path / "out", target_format="megatron"),
        lambda: ckpt2pt.verify(source, places["MEGATRON"]),
    ):
        with pytest.raises(InputError, match=EXPERTS_IN_MINDSPORE):
            call()
    assert list(tmp_path.iterdir()) == []
