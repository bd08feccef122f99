"""Trainings end, and conversions start by themselves: pods that save as MindSpore does, the operator of the chart."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.golden import KIND, digests, document, events, message, owner_of, reach, reported, status
from harness.kubectl import Kubectl
from harness.machine import wait_until
from harness.release import Release
from harness.training import training, waiting
from statuses import check_status


@pytest.fixture(scope="module")
def operator(releases: Callable[..., Release]) -> Iterator[Release]:
    """The operator, reported to watch two more kinds and to serve annotated trainings."""
    release = releases()
    kinds = {name: {"enabled": True} for name in ("pytorchJob", "volcanoJob")}
    release.install(trainingKinds=kinds, trainingTrigger={"enabled": True})
    yield release
    release.uninstall()


def reason(namespace: Kubectl, wanted: str, name: str = "golden") -> str:
    """Wait until that is why it is not ready; the message."""

    def there() -> bool:
        found = status(namespace, name)
        return "conditions" in found and reported(found, "Ready")[1] == wanted

    wait_until(f"{name} to say {wanted}", there, seconds=60)
    return message(status(namespace, name), "Ready")


def seen(namespace: Kubectl, kind: str = "job.batch", name: str = "golden", *, seconds: float = 30) -> None:
    """Wait until the operator has seen the training itself."""
    uid = namespace.get(kind, "pretrain")["metadata"]["uid"]
    wait_until("the training to be seen", lambda: status(namespace, name).get("trainingUID") == uid, seconds=seconds)


def test_a_conversion_starts_when_its_training_has_completed(
    operator: Release,
    checkpoint: Path,
    namespace: Kubectl,
    volume: Path,
    converter_image: str,
    expected: dict[str, str],
) -> None:
    namespace.apply(waiting(checkpoint, volume, verify="Full"))
    assert reason(namespace, "WaitingForTraining") == "Job pretrain is not there yet"
    namespace.apply(training(converter_image, checkpoint, volume, steps="1,2", pause=1.0))
    seen(namespace)
    found = status(namespace)
    check_status(found)
    assert (found["phase"], "startTime" in found) == ("Pending", False)
    assert message(found, "Ready") == "Job pretrain runs: not complete yet"
    assert not namespace.exists("job.batch", "golden-1")
    namespace.wait("job.batch", "pretrain", "Complete", seconds=90)
    found = reach(namespace, "Succeeded")
    check_status(found)
    assert reported(found, "Verified")[0] == "True"
    assert found["iteration"] == 2, "the last that it has saved"
    assert digests(volume / "out") == expected
    ended = namespace.get("job.batch", "pretrain")["status"]["completionTime"]
    assert namespace.get("job.batch", "golden-1")["metadata"]["creationTimestamp"] >= ended
    assert events(namespace)[-1] == "AllStagesSucceeded"
    # A second training of the same name is another training: the same conversion says so, a new one follows it.
    namespace("delete", "job.batch", "pretrain", "--wait")
    namespace.apply(training(converter_image, checkpoint, volume, steps="3"))
    namespace.apply({**waiting(checkpoint, volume), "metadata": {"name": "second"}})
    found = reach(namespace, "Succeeded", "second")
    assert (found["iteration"], (volume / "out" / "latest_checkpointed_iteration.txt").read_text()) == (3, "3")
    assert found["trainingUID"] == namespace.get("job.batch", "pretrain")["metadata"]["uid"]
    assert status(namespace)["iteration"] == 2, "the first is over"


def test_a_training_that_fails_is_no_reason_to_convert(
    operator: Release, checkpoint: Path, namespace: Kubectl, volume: Path, converter_image: str
) -> None:
    namespace.apply(waiting(checkpoint, volume))
    namespace.apply(training(converter_image, checkpoint, volume, pause=0.1, ending="fails"))
    found = reach(namespace, "Failed")
    check_status(found)
    assert reported(found, "Failed") == ("True", "TrainingFailed")
    said = message(found, "Failed")
    assert said.startswith("Job pretrain failed, so there is nothing whole to convert: BackoffLimitExceeded: ")
    assert not namespace.exists("job.batch", "golden-1")
    assert "out" not in os.listdir(volume)


def test_a_training_that_is_deleted_or_replaced_is_no_success(
    operator: Release, checkpoint: Path, namespace: Kubectl, volume: Path, converter_image: str
) -> None:
    stays = training(converter_image, checkpoint, volume, pause=0.1, ending="stays")
    namespace.apply(waiting(checkpoint, volume))
    namespace.apply(stays)
    seen(namespace)
    operator.scale(0)
    namespace("delete", "job.batch", "pretrain", "--wait")
    namespace.apply(training(converter_image, checkpoint, volume, pause=0.1))
    operator.scale(1)
    found = reach(namespace, "Failed")
    check_status(found)
    assert reported(found, "Failed") == ("True", "TrainingDeleted")
    assert message(found, "Failed").startswith("Job pretrain was deleted before it was seen to complete; ")
    # Asked again, it takes the training of that name that is there now.
    namespace.wait("job.batch", "pretrain", "Complete", seconds=90)
    namespace("annotate", KIND, "golden", "ckpt2pt.dev/retry=1")
    wait_until("another end", lambda: status(namespace)["phase"] != "Failed", seconds=30)
    reach(namespace, "Succeeded")


def test_a_training_that_ends_while_no_operator_runs(
    operator: Release,
    checkpoint: Path,
    namespace: Kubectl,
    volume: Path,
    converter_image: str,
    expected: dict[str, str],
) -> None:
    namespace.apply(waiting(checkpoint, volume))
    namespace.apply(training(converter_image, checkpoint, volume, pause=1.5))
    seen(namespace)
    operator.scale(0)
    namespace.wait("job.batch", "pretrain", "Complete", seconds=90)
    assert status(namespace)["phase"] == "Pending"
    operator.scale(1)
    found = reach(namespace, "Succeeded")
    assert found["iteration"] == 2
    assert digests(volume / "out") == expected


def test_a_training_that_is_gone_as_soon_as_it_has_ended(
    operator: Release, checkpoint: Path, namespace: Kubectl, volume: Path, converter_image: str
) -> None:
    namespace.apply(waiting(checkpoint, volume))
    brief = training(converter_image, checkpoint, volume)
    brief["spec"]["ttlSecondsAfterFinished"] = 0
    namespace.apply(brief)
    seen(namespace)
    reach(namespace, "Succeeded")
    assert not namespace.exists("job.batch", "pretrain")


# ------------------------------------------------------------------------------------------------------------ annotated


def template(checkpoint: Path, volume: Path) -> dict[str, Any]:
    """The ConfigMap of docs/automation.md."""
    text = waiting(checkpoint, volume, after=None)
    text["metadata"] = {"name": "${name}", "annotations": {"from": "${namespace}/${name} ${uid}"}}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "convert-pretrain"},
        "data": {"conversion.yaml": yaml.safe_dump(text)},
    }


def test_an_annotated_training_gets_a_conversion_of_its_own_once_per_run(
    operator: Release,
    checkpoint: Path,
    namespace: Kubectl,
    volume: Path,
    converter_image: str,
    expected: dict[str, str],
) -> None:
    namespace.apply(template(checkpoint, volume))
    names: list[str] = []
    for step in ("2", "3"):
        namespace.apply(training(converter_image, checkpoint, volume, steps=step, pause=0.2, asks="convert-pretrain"))
        uid = namespace.get("job.batch", "pretrain")["metadata"]["uid"]
        name = f"pretrain-{uid[:8]}"
        namespace("wait", "--for=create", f"{KIND}/{name}", "--timeout=60s")
        found = reach(namespace, "Succeeded", name)
        assert found["iteration"] == int(step)
        made = namespace.get(KIND, name)["metadata"]
        assert made["annotations"]["from"] == f"{namespace.namespace}/pretrain {uid}"
        assert made["labels"]["ckpt2pt.dev/training-uid"] == uid
        names.append(name)
        if step == "2":
            assert digests(volume / "out") == expected
            operator.kill()  # it sees every training anew, and makes nothing twice
        namespace("delete", "job.batch", "pretrain", "--wait")
    assert sorted(item["metadata"]["name"] for item in namespace.get(KIND)["items"]) == sorted(names)
    notes = [event for event in namespace.get("events")["items"] if event["reason"] == "ConversionMade"]
    assert [event["involvedObject"]["name"] for event in notes] == ["pretrain", "pretrain"]


def test_a_wrong_template_is_reported_at_the_training_and_may_be_corrected(
    operator: Release, checkpoint: Path, namespace: Kubectl, volume: Path, converter_image: str
) -> None:
    wrong = template(checkpoint, volume)
    wrong["data"]["conversion.yaml"] = wrong["data"]["conversion.yaml"].replace("${uid}", "${step}")
    namespace.apply(wrong, training(converter_image, checkpoint, volume, pause=0.0, asks="convert-pretrain"))

    def warned() -> list[str]:
        found = namespace.get("events", "--field-selector=reason=ConversionTemplateWrong")["items"]
        return [event["message"] for event in found]

    wait_until("the warning", lambda: bool(warned()), seconds=90)
    assert "it asks for a ${...} that is not known here" in warned()[0]
    assert namespace.get(KIND)["items"] == []
    namespace.apply(template(checkpoint, volume))
    wait_until("the conversion", lambda: len(namespace.get(KIND)["items"]) == 1, seconds=150)


# ---------------------------------------------------------------------------------------------------------- other kinds


def definition(group: str, version: str, kind: str) -> dict[str, Any]:
    """The CRD of a kind of workload, as far as anybody looks at it."""
    plural = f"{kind.lower()}s"
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    versions = [{"name": version, "served": True, "storage": True, "schema": schema, "subresources": {"status": {}}}]
    names = {"kind": kind, "plural": plural, "singular": kind.lower(), "listKind": f"{kind}List"}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {"group": group, "scope": "Namespaced", "names": names, "versions": versions},
    }


class Foreign:
    """A kind that another operator serves, played by the test: its CRD, and the status of its objects."""

    def __init__(self, api_version: str, kind: str, done: dict[str, Any], failed: dict[str, Any]) -> None:
        self.head = {"apiVersion": api_version, "kind": kind}
        group, _, version = api_version.partition("/")
        self.crd = definition(group, version, kind)
        self.resource: str = self.crd["metadata"]["name"]
        self.done, self.failed = done, failed

    def say(self, namespace: Kubectl, reported: dict[str, Any]) -> None:
        """Write a status."""
        patch = json.dumps({"status": reported})
        namespace("patch", self.resource, "pretrain", "--subresource=status", "--type=merge", f"--patch={patch}")


def conditions(kind: str) -> dict[str, Any]:
    """A status in the manner of Kubeflow."""
    reported = {"type": kind, "status": "True", "reason": f"Job{kind}", "message": "said by the test"}
    return {"conditions": [{"type": "Running", "status": "False"}, reported]}


def phase(name: str) -> dict[str, Any]:
    """A status in the manner of Volcano."""
    return {"state": {"phase": name}}


@pytest.fixture
def foreign(kubectl: Kubectl) -> Iterator[list[Foreign]]:
    """Two kinds of the table that nobody serves yet."""
    kinds = [
        Foreign("kubeflow.org/v1", "PyTorchJob", conditions("Succeeded"), conditions("Failed")),
        Foreign("batch.volcano.sh/v1alpha1", "Job", phase("Completed"), phase("Aborted")),
    ]
    yield kinds
    for kind in kinds:
        kubectl("delete", "crd", kind.resource, "--wait=false", "--ignore-not-found")


def test_any_kind_of_the_table_is_waited_for(
    operator: Release, checkpoint: Path, namespace: Kubectl, kubectl: Kubectl, volume: Path, foreign: list[Foreign]
) -> None:
    def converting(kind: Foreign, name: str) -> dict[str, Any]:
        own = document(checkpoint, volume, startAfter={**kind.head, "name": "pretrain"}, name=f"{name}-{number}")
        own["spec"]["target"]["path"] = f"{name}-{number}"
        return own

    for number, kind in enumerate(foreign):
        namespace.apply(converting(kind, "first"))
        said = reason(namespace, "WaitingForTraining", f"first-{number}")
        assert said.startswith(f"{kind.head['kind']} pretrain is not known yet"), "nobody serves the kind"
        kubectl.apply(kind.crd)
    for number, kind in enumerate(foreign):
        kubectl("wait", "--for=condition=Established", f"crd/{kind.resource}", "--timeout=60s")
        namespace.apply({**kind.head, "metadata": {"name": "pretrain"}})
        seen(namespace, kind.resource, f"first-{number}", seconds=90)
        assert message(status(namespace, f"first-{number}"), "Ready") == (
            f"{kind.head['kind']} pretrain runs: not complete yet"
        )
        kind.say(namespace, kind.done)
        reach(namespace, "Succeeded", f"first-{number}")
        kind.say(namespace, kind.failed)
        namespace.apply(converting(kind, "second"))
        found = reach(namespace, "Failed", f"second-{number}")
        assert reported(found, "Failed")[1] == "TrainingFailed"
        why = "JobFailed: said by the test" if number == 0 else "Aborted"
        assert message(found, "Failed").endswith(f"nothing whole to convert: {why}")


def test_a_kind_that_is_not_in_the_table(operator: Release, checkpoint: Path, namespace: Kubectl, volume: Path) -> None:
    other = {"apiVersion": "kubeflow.org/v2beta1", "kind": "MPIJob", "name": "pretrain"}
    namespace.apply(document(checkpoint, volume, startAfter=other))
    said = reason(namespace, "TrainingKindUnknown")
    assert "MPIJob pretrain is of kubeflow.org/v2beta1 MPIJob, which this operator does not watch; it watches " in said
    assert said.endswith("name one of them, or add the kind to trainingKinds in the values of the chart")
    for resource, allowed in (("pytorchjobs.kubeflow.org", True), ("mpijobs.kubeflow.org", False)):
        assert may(namespace, operator.account, "list", resource) is allowed, "the rights are those of the table"
        assert not may(namespace, operator.account, "delete", resource)


def may(namespace: Kubectl, account: str, verb: str, resource: str) -> bool:
    """Whether an account has a right, asked of the API server."""
    name, _, group = resource.partition(".")
    attributes = {"namespace": namespace.namespace, "verb": verb, "group": group, "resource": name}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": account, "resourceAttributes": attributes},
    }
    return bool(namespace.create(review)["status"]["allowed"])


# ------------------------------------------------------------------------------------------------------------ readiness


def test_a_training_that_has_ended_without_all_its_ranks(
    operator: Release, checkpoint: Path, namespace: Kubectl, volume: Path, converter_image: str
) -> None:
    namespace.apply(waiting(checkpoint, volume, readiness={"timeoutSeconds": 3}))
    namespace.apply(training(converter_image, checkpoint, volume, steps="1,2", pause=0.1, ending="stops"))
    found = reach(namespace, "Failed")
    check_status(found)
    assert {stage["reason"] for stage in found["stageStatuses"]} == {"InputWrong"}
    assert "after 3 s the checkpoint 0_2 is incomplete: rank_1 is at 0_1; " in message(found, "Failed")
    assert all(stage["attempts"] == 1 for stage in found["stageStatuses"])
    late = volume / "ms" / "rank_1" / "network_rank_1-0_1.ckpt"
    late.unlink()
    own = waiting(checkpoint, volume, readiness={"timeoutSeconds": 3})
    namespace.apply({**own, "metadata": {"name": "second"}})
    found = reach(namespace, "Failed", "second")
    assert {stage["reason"] for stage in found["stageStatuses"]} == {"InputMissing"}
    assert "after 3 s the checkpoint 0_2 is incomplete: rank_1 has none yet; " in message(found, "Failed")


def test_slow_storage_is_waited_for(
    operator: Release,
    checkpoint: Path,
    namespace: Kubectl,
    volume: Path,
    converter_image: str,
    expected: dict[str, str],
) -> None:
    # No startAfter: the workers are there first, and the ranks come one by one while they wait.
    namespace.apply(waiting(checkpoint, volume, after=None, readiness={"timeoutSeconds": 120}))
    (volume / "ms").mkdir()
    os.chown(volume / "ms", owner_of(checkpoint), -1)
    wait_until("the workers", lambda: status(namespace).get("phase") == "Running", seconds=60)
    one_by_one = training(converter_image, checkpoint, volume, pause=1.0)
    one_by_one["spec"]["parallelism"] = 2
    namespace.apply(one_by_one)
    reach(namespace, "Succeeded")
    assert digests(volume / "out") == expected
