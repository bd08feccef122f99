"""A running training is followed on the cluster: each whole checkpoint, the last results, one last look at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from harness.golden import KIND, by_command, digests, events, message, owner_of, reach, reported, status
from harness.kubectl import Kubectl
from harness.machine import wait_until
from harness.pods import host_path
from harness.release import Release
from harness.training import AFTER, training, waiting
from mindformers_made import LAUNCH
from statuses import check_status

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def checkpoint(checkpoint: Path, volume: Path) -> Path:
    """The set whose tensors are trained; its owner may write the volume, and its output has a place."""
    (volume / "ms").mkdir()
    os.chown(volume / "ms", owner_of(checkpoint), -1)
    return checkpoint


def following(checkpoint: Path, volume: Path, **spec: Any) -> dict[str, Any]:
    """A conversion that follows the training and keeps two results."""
    return waiting(
        checkpoint, volume, after=None, **{"follow": {"until": AFTER, "keep": 2, "intervalSeconds": 1}, **spec}
    )


def converted(namespace: Kubectl, iteration: int) -> dict[str, Any]:
    """Wait until that is the last that is converted; the status then."""
    wait_until(f"iteration {iteration}", lambda: status(namespace).get("iteration", 0) >= iteration, seconds=90)
    return status(namespace)


def results(volume: Path) -> list[str]:
    """What lies there for Megatron."""
    return sorted(path.name for path in (volume / "out").glob("*"))


def test_each_checkpoint_of_a_training_is_converted_until_it_ends(
    operator: Release, checkpoint: Path, namespace: Kubectl, volume: Path, converter_image: str, tmp_path: Path
) -> None:
    namespace.apply(following(checkpoint, volume))
    wait_until("the follower", lambda: status(namespace).get("phase") == "Running", seconds=60)
    assert reported(status(namespace), "Ready") == ("False", "Following")
    namespace.apply(training(converter_image, checkpoint, volume, steps="1,2,3", pause=8.0))
    found = converted(namespace, 1)
    check_status(found)
    assert (found["phase"], found["outputPath"]) == ("Running", "out/iter_0000001")
    assert not namespace.get("job.batch", "pretrain")["status"].get("completionTime"), "the training runs"
    [follower] = [pod for pod in namespace.get("pods")["items"] if pod["metadata"]["name"].startswith("golden-")]
    assert follower["spec"]["containers"][0]["args"][0] == "watch"
    converted(namespace, 2)
    assert {name: text for name, text in digests(volume / "out").items() if "iter_0000002" in name} == {
        name: text for name, text in by_command(checkpoint, tmp_path / "by", full=True).items() if "iter_" in name
    }
    namespace.wait("job.batch", "pretrain", "Complete", seconds=120)
    found = reach(namespace, "Succeeded")
    check_status(found)
    assert reported(found, "Ready") == ("True", "TrainingFollowed")
    assert (found["followEnd"], found["iteration"], found["job"]) == ("Succeeded", 3, "golden-2")
    assert results(volume) == ["iter_0000002", "iter_0000003", TRACKER]
    assert (volume / "out" / TRACKER).read_text() == "3"
    assert not namespace.exists("job.batch", "golden-1")
    assert events(namespace)[-1] == "TrainingFollowed"


def test_a_training_that_fails_while_it_saves_leaves_what_was_whole(
    operator: Release, checkpoint: Path, namespace: Kubectl, volume: Path, converter_image: str
) -> None:
    namespace.apply(following(checkpoint, volume))
    broken = training(converter_image, checkpoint, volume, steps="1,2", pause=0.5, ending="stops")
    broken["spec"]["activeDeadlineSeconds"] = 12
    broken["spec"]["template"]["spec"]["containers"][0]["args"][-1] = "stays"
    broken["spec"]["completions"], broken["spec"]["parallelism"] = 4, 3  # rank 3 never comes to its turn
    namespace.apply(broken)
    wait_until("three ranks", lambda: len(list((volume / "ms").glob("*/*-0_2.ckpt"))) == 3, seconds=60)
    found = reach(namespace, "Succeeded")
    assert found["followEnd"] == "Failed"
    assert "iteration" not in found
    assert results(volume) == [], "no checkpoint was whole"


def test_an_operator_that_is_down_at_the_end_and_a_follower_that_is_suspended_and_cancelled(
    operator: Release, checkpoint: Path, namespace: Kubectl, volume: Path, converter_image: str
) -> None:
    namespace.apply(following(checkpoint, volume))
    namespace.apply(training(converter_image, checkpoint, volume, steps="1,2", pause=2.0))
    converted(namespace, 1)
    operator.scale(0)
    namespace.wait("job.batch", "pretrain", "Complete", seconds=90)
    operator.scale(1)
    found = reach(namespace, "Succeeded")
    assert (found["iteration"], results(volume)) == (2, ["iter_0000001", "iter_0000002", TRACKER])
    # Without a training to wait for, only the user ends it.
    namespace.apply({**following(checkpoint, volume, follow={"intervalSeconds": 1}), "metadata": {"name": "endless"}})
    wait_until("it to run", lambda: status(namespace, "endless").get("phase") == "Running", seconds=60)
    namespace("patch", KIND, "endless", "--type=merge", '--patch={"spec":{"suspend":true}}')
    wait_until("it to be suspended", lambda: status(namespace, "endless")["phase"] == "Suspended", seconds=60)
    namespace("patch", KIND, "endless", "--type=merge", '--patch={"spec":{"cancel":true}}')
    found = reach(namespace, "Cancelled", "endless")
    assert "their files stay" in message(found, "Failed")


# ------------------------------------------------------------------------------------------------------- MindFormers

SAVES = """
import json, sys, time
from pathlib import Path

root, steps, pause = Path("/volumes/data/mf"), sys.argv[1].split(","), float(sys.argv[2])
[made] = Path("/volumes/model").glob("iteration_*")
for step in steps:
    folder = root / f"iteration_{int(step):08d}"
    folder.mkdir()
    files = sorted(made.glob("*.safetensors"), key=lambda file: "-opt-" in file.name)
    for file in [*files, made / "common.json", made / "metadata.json"]:
        content = file.read_bytes()
        if file.name == "common.json":
            content = json.dumps(json.loads(content) | {"global_step": int(step), "step_num": int(step)}).encode()
        part = folder / (file.stem + ".tmp")
        part.write_bytes(content)
        part.rename(folder / file.name).chmod(0o400)
        time.sleep(pause / 10)
    (root / "latest_checkpointed_iteration.txt").write_text(step)
    time.sleep(pause)
"""
"""Saves as MindFormers does: files of ranks under temporary names, common.json, metadata.json, and last the tracker."""


def of_mindformers(checkpoint: Path, volume: Path, **spec: Any) -> dict[str, Any]:
    """The golden training on four ranks, into a distributed checkpoint; ``launch.sh`` describes the run to come."""
    flags = {"useInterleavedWeightLayoutMlp": True, "useContiguousWeightLayoutAttention": False}
    source = {"volume": host_path(volume), "path": "mf", "format": "MindFormers", "mindformers": flags}
    return {
        "apiVersion": "ckpt2pt.dev/v1alpha1",
        "kind": "CheckpointConversion",
        "metadata": {"name": "golden"},
        "spec": {
            "model": {"numLayers": 4},
            "parallelism": {"tensor": 2, "pipeline": 2},
            "source": source,
            "metadata": {"path": "launch.sh"},
            "target": {"path": "out", "format": "TorchDist"},
            "readiness": {"settleSeconds": 1},
            "workers": {"security": {"runAsUser": owner_of(checkpoint)}},
            **spec,
        },
    }


@pytest.fixture
def mindformers(checkpoint: Path, golden: Path, volume: Path) -> Path:
    """What such a training saved; its output has a place, and the run to come its script."""
    (volume / "mf").mkdir()
    os.chown(volume / "mf", owner_of(checkpoint), -1)
    sizes = {
        "--hidden-size 8": "--hidden-size 32",
        "--ffn-hidden-size 12": "--ffn-hidden-size 48",
        "channels 4": "channels 8",
    }
    text = LAUNCH.replace("--num-layers 2", "--num-layers 4").replace("--vocab-size 16", "--vocab-size 64")
    for own, theirs in sizes.items():
        text = text.replace(own, theirs)
    (volume / "launch.sh").write_text(text)
    return golden / "mindformers" / "qwen3_tp2pp2" / "checkpoint"


def training_of_mindformers(image: str, checkpoint: Path, volume: Path, made: Path, steps: str) -> dict[str, Any]:
    found = training(image, checkpoint, volume)
    pod = found["spec"]["template"]["spec"]
    pod["volumes"][1] |= host_path(made)
    pod["containers"][0] |= {"command": ["python3", "-c", SAVES], "args": [steps, "6"]}
    found["spec"] |= {"completions": 1, "parallelism": 1}
    return found


def test_each_iteration_of_mindformers_is_converted_until_the_training_ends(
    operator: Release, checkpoint: Path, mindformers: Path, namespace: Kubectl, volume: Path, converter_image: str
) -> None:
    namespace.apply(of_mindformers(checkpoint, volume, follow={"until": AFTER, "keep": 2, "intervalSeconds": 1}))
    wait_until("the follower", lambda: status(namespace).get("phase") == "Running", seconds=60)
    namespace.apply(training_of_mindformers(converter_image, checkpoint, volume, mindformers, "2,4,6"))
    assert converted(namespace, 2)["outputPath"] == "out/iter_0000002"
    found = reach(namespace, "Succeeded")
    check_status(found)
    assert (found["followEnd"], found["iteration"]) == ("Succeeded", 6)
    assert results(volume) == ["iter_0000004", "iter_0000006", TRACKER]


def test_a_conversion_starts_after_a_training_of_mindformers(
    operator: Release, checkpoint: Path, mindformers: Path, namespace: Kubectl, volume: Path, converter_image: str
) -> None:
    namespace.apply(of_mindformers(checkpoint, volume, startAfter=AFTER))
    namespace.apply(training_of_mindformers(converter_image, checkpoint, volume, mindformers, "2,4"))
    found = reach(namespace, "Succeeded")
    assert (found["iteration"], results(volume)) == (4, ["iter_0000004", TRACKER])
