"""The seed's two commands: parameters alone, then everything, into one folder; and the other way round."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from ckpt2pt.cli.commands import main
from ckpt2pt.core.topology import Topology
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import UsageError, ref
from ckpt2pt.run.conversion import Outcome, run
from conversions import Quiet, request_for
from goldens import golden_root
from handmade import Handmade
from torchload import differences

B = golden_root() / "megatron06" / "b_tp2pp2"
TRACKER = "latest_checkpointed_iteration.txt"
# As the reference's documentation shows it, no-op layers beyond the model included.
VERBATIM = "--num-layers 8 --dp-size 1 --cp-size 1 --tp-size 2 --pp-size 4 --vpp-size 2 --noop 62 63"


def convert(request: Request, *stages: int) -> Outcome:
    return run(request, stages or range(request.topology.pipeline), Quiet())


def pair(target: Path) -> tuple[Request, Request]:
    """Parameters alone and everything, of one source and one pt_meta."""
    full = request_for(B, target)
    return replace(full, full=False), full


def contents(target: Path) -> dict[str, bytes]:
    folder = target / "iter_0000002"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.pt"))}


def is_full(target: Path, reference: Path) -> bool:
    theirs = contents(reference)
    return contents(target).keys() == theirs.keys() and not any(
        differences(reference / "iter_0000002" / name, target / "iter_0000002" / name) for name in theirs
    )


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A full conversion into a folder of its own."""
    convert(request_for(B, tmp_path / "alone"))
    return tmp_path / "alone"


def test_the_two_commands_of_the_reference_work_one_after_the_other(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = Handmade(Topology(num_layers=8, tensor=2, pipeline=4, virtual=2))
    outcome = made.convert(tmp_path, target=tmp_path / "alone")
    made.check(outcome)
    words = ["convert", *VERBATIM.split(), "--ms-path", str(tmp_path / "ms")]
    words += ["--param-map-path", str(tmp_path / "pt_meta"), "--megatron-path", str(tmp_path / "out")]
    assert main([*words, "--convert-param-only"]) == 0
    assert "no-op layers 62, 63 are ignored" in capfd.readouterr().err
    assert {path.name for path in (tmp_path / "out").rglob("*.pt")} == {"model_optim_rng.pt"}
    assert main(words) == 0
    theirs = {path.relative_to(tmp_path / "alone"): path.read_bytes() for path in (tmp_path / "alone").rglob("*.pt")}
    assert theirs == {
        path.relative_to(tmp_path / "out"): path.read_bytes() for path in (tmp_path / "out").rglob("*.pt")
    }
    assert (tmp_path / "out" / TRACKER).read_text() == "12"
    capfd.readouterr()
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(words) == 0
    assert "everything was there already" in capfd.readouterr().out


def test_parameters_that_a_full_conversion_holds_are_there_already(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    params, full = pair(tmp_path)
    convert(full)
    before = contents(tmp_path)
    outcome = convert(params)
    assert (outcome.converted, len(outcome.kept), outcome.published) == ((), 4, True)
    assert outcome.warnings == (
        "a full conversion of the same source is there, and holds the parameters that are asked for",
    )
    assert "everything was there already" in outcome.sentence()
    words = ["--ms-path", str(B / "ms"), "--param-map-path", str(B / "pt_meta"), "--megatron-path", str(tmp_path)]
    assert main(["plan", *words, "--convert-param-only"]) == 0
    assert "holds the parameters that are asked for" in capfd.readouterr().err
    assert contents(tmp_path) == before


def test_the_metadata_of_the_parameters_may_lack_the_maps(tmp_path: Path, alone: Path) -> None:
    """The reference's documentation says that they are not needed."""
    _, full = pair(tmp_path / "out")
    convert(replace(full, full=False, metadata=B / "pt_meta_params"))
    convert(full)
    assert is_full(tmp_path / "out", alone)


def test_an_extension_that_was_stopped_goes_on(tmp_path: Path, alone: Path) -> None:
    params, full = pair(tmp_path / "out")
    convert(params)
    convert(full, 0)
    outcome = convert(full)
    assert [pp for _, pp in outcome.converted] == [1, 1]
    assert [pp for _, pp in outcome.kept] == [0, 0]
    assert is_full(tmp_path / "out", alone)
    assert (tmp_path / "out" / TRACKER).read_text() == "2"


def test_parameters_that_were_stopped_are_extended(tmp_path: Path, alone: Path) -> None:
    params, full = pair(tmp_path / "out")
    convert(params, 1)
    convert(full)
    assert is_full(tmp_path / "out", alone)


def test_what_is_there_is_verified_as_asked_for(tmp_path: Path) -> None:
    params, full = pair(tmp_path)
    convert(replace(full, verify="none"))
    with pytest.raises(UsageError, match="verified none; digest is asked for") as reported:
        convert(params)
    assert ref("verify") in reported.value.hint
    assert convert(replace(params, verify="none")).verified == "none"
    convert(replace(full, verify="full"))
    assert convert(params).verified == "full"


def test_parameters_beside_a_full_conversion_that_is_not_complete_are_refused(tmp_path: Path) -> None:
    params, full = pair(tmp_path)
    convert(full, 0)
    with pytest.raises(UsageError, match="a full conversion of the same source was begun there") as reported:
        convert(params)
    assert "run the full conversion again" in reported.value.hint
    convert(full)
    assert convert(params).converted == ()


def other_source(folder: Path) -> dict[str, object]:
    shutil.copytree(B / "ms", folder / "ms")
    os.utime(folder / "ms" / "rank_3" / "network.ckpt", (1, 1))  # what was written since is another source
    return {"source": folder / "ms"}


OTHERS: dict[str, Callable[[Path], dict[str, object]]] = {
    "another-source": other_source,
    "another-padding": lambda _: {"target_data": 4},
    "other-samples": lambda _: {"reference_samples": True},
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("first", ["params", "full"])
def test_another_conversion_is_refused_as_before(first: str, case: str, tmp_path: Path) -> None:
    params, full = pair(tmp_path / "out")
    changed = OTHERS[case](tmp_path)
    one, other = (params, replace(full, **changed)) if first == "params" else (full, replace(params, **changed))  # type: ignore[arg-type]
    convert(one)
    before = contents(tmp_path / "out")
    with pytest.raises(UsageError, match="the result of another conversion"):
        convert(other)
    assert contents(tmp_path / "out") == before


def test_two_documents_with_one_target_extend_it_too(
    tmp_path: Path, alone: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "volume").mkdir()
    for name in ("ms", "pt_meta"):
        shutil.copytree(B / name, tmp_path / "volume" / name)
    document = {
        "apiVersion": "ckpt2pt.dev/v1alpha1",
        "kind": "CheckpointConversion",
        "metadata": {"name": "both"},
        "spec": {
            "model": {"numLayers": 4, "noopLayers": [62, 63]},
            "parallelism": {"tensor": 2, "pipeline": 2},
            "source": {"volume": {"persistentVolumeClaim": {"claimName": "data"}}, "path": "ms"},
            "metadata": {"path": "pt_meta"},
            "target": {"path": "out"},
            "readiness": {"settleSeconds": 0},
        },
    }
    for mode in ("ParamsOnly", "Full", "ParamsOnly"):
        document["spec"]["mode"] = mode  # type: ignore[index]
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(document))
        assert main(["run", "-f", str(tmp_path / "c.yaml"), "--volume", f"data={tmp_path / 'volume'}"]) == 0
        assert "no-op layers 62, 63 are ignored" in capfd.readouterr().err
    assert is_full(tmp_path / "volume" / "out", alone)
