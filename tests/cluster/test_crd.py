"""What a real API server makes of the CRD: which documents it refuses, in which words, and what it puts in by itself.

Every rule of the CRD has a case here; the last tests see to that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest

from documents import ABSENT, CRD_PATH, EXAMPLE_PATH, HOSTILE_NAMES, NAMED_FIELDS, changed, claim, root_schema
from harness.kubectl import Kubectl
from harness.machine import ClusterError
from statuses import kstatus

AFTER = {"apiVersion": "batch/v1", "kind": "Job", "name": "pretrain"}
HOST = {"hostPath": {"path": "/data"}}
TWO = {**claim("a"), "nfs": {"server": "s", "path": "/x"}}
PATH = "write the path relative to the root of its volume"
ONE_KIND = "name exactly one kind of volume"
ABSOLUTE = "give the absolute path of a folder on the node"
EXPORT = "give the exported path as the server names it"
ROLES = ("source", "metadata", "target")


def rules(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, str, bool]]:
    """Field, message, and whether it looks at the old object, of every rule below a schema."""
    for rule in node.get("x-kubernetes-validations", ()):
        yield path + rule.get("fieldPath", ""), rule["message"], "oldSelf" in rule["rule"]
    for name, inner in node.get("properties", {}).items():
        yield from rules(inner, f"{path}.{name}")


RULES = [(field.removeprefix("."), message, old) for field, message, old in rules(root_schema())]


@pytest.fixture(scope="module")
def conversions(kubectl: Kubectl) -> Iterator[Kubectl]:
    """A namespace with the CRD, which no operator looks after."""
    kubectl("apply", "--filename", CRD_PATH)
    kubectl("wait", "--for=condition=Established", "crd/checkpointconversions.ckpt2pt.dev", "--timeout=30s")
    kubectl("create", "namespace", "test-crd")
    yield kubectl.within("test-crd")
    kubectl("delete", "namespace", "test-crd", "--wait=false")


def to_error(kubectl: Kubectl, verb: str, document: dict[str, Any]) -> str:
    with pytest.raises(ClusterError) as refused:
        kubectl(verb, "--dry-run=server", "--validate=strict", "--filename", "-", stdin=json.dumps(document))
    return str(refused.value)


# ------------------------------------------------------------------------------------------------------------- refused

#     what is changed -> the field that is reported, and a piece of the advice
REFUSED: dict[str, tuple[list[tuple[str, object]], str, str]] = {
    "name-too-long": ([("metadata.name", "a" * 46)], "metadata.name", "choose a name of at most 45 characters"),
    "name-with-a-dot": ([("metadata.name", "a.b")], "metadata.name", "choose a name of lower-case letters, digits and dashes"),
    "layers-do-not-divide": ([("spec.parallelism", {"pipeline": 3})], "spec.model.numLayers", "make numLayers"),
    "layers-do-not-divide-by-chunks": (
        [("spec.parallelism", {"pipeline": 2, "virtualPipeline": 3})], "spec.model.numLayers", "make numLayers",
    ),
    "layers-do-not-divide-in-the-result": (
        [("spec.parallelism", {"pipeline": 2}), ("spec.target", {"path": "out", "parallelism": {"pipeline": 3}})],
        "spec.model.numLayers", "make numLayers",
    ),
    "no-ranks-in-the-result": (
        [("spec.target", {"path": "out", "parallelism": {"tensor": 0}})],
        "spec.target.parallelism.tensor", "greater than or equal to 1",
    ),
    "split-of-another-length": (
        [("spec.parallelism", {"pipeline": 2}), ("spec.model.layersPerStage", [4])],
        "spec.model.layersPerStage", "give one count for each stage",
    ),
    "split-of-another-sum": (
        [("spec.parallelism", {"pipeline": 2}), ("spec.model.layersPerStage", [3, 2])],
        "spec.model.layersPerStage", "make the counts add up",
    ),
    "nothing-but-noop": ([("spec.model.noopLayers", [0, 1, 2, 3, 62])], "spec.model.noopLayers", "leave at least one layer"),
    "target-is-source": ([("spec.target.path", "ms")], "spec.target.path", "cannot take the place of its source"),
    "target-is-source-on-a-volume-named-twice": (
        [("spec.target.path", "ms"), ("spec.target.volume", claim("training"))],
        "spec.target.path", "cannot take the place of its source",
    ),
    "target-is-metadata": ([("spec.target.path", "pt_meta")], "spec.target.path", "cannot take the place of pt_meta"),
    "target-is-metadata-on-its-volume": (
        [("spec.target", {"path": "pt_meta", "volume": HOST}), ("spec.metadata.volume", HOST)],
        "spec.target.path", "cannot take the place of pt_meta",
    ),
    **{
        f"{role}-{name}": ([(f"spec.{role}.{field}", value)], f"spec.{role}.{where}", advice)
        for role in ROLES
        for name, field, value, where, advice in (
            ("two-volumes", "volume", TWO, "volume", ONE_KIND),
            ("no-kind-of-volume", "volume", {}, "volume", ONE_KIND),
            ("relative-host-path", "volume", {"hostPath": {"path": "data"}}, "volume.hostPath.path", ABSOLUTE),
            ("host-path-upwards", "volume", {"hostPath": {"path": "/a/../b"}}, "volume.hostPath.path", ABSOLUTE),
            ("relative-export", "volume", {"nfs": {"server": "s", "path": "x"}}, "volume.nfs.path", EXPORT),
            ("absolute-path", "path", "/ms", "path", PATH),
            ("path-upwards", "path", "a/../b", "path", PATH),
            ("path-with-a-slash-at-the-end", "path", "a/", "path", PATH),
        )
    },
    "no-model": ([("spec.model", ABSENT)], "spec.model", "Required value"),
    "no-layers": ([("spec.model.numLayers", ABSENT)], "spec.model.numLayers", "Required value"),
    "no-source-volume": ([("spec.source.volume", ABSENT)], "spec.source.volume", "Required value"),
    "no-target-path": ([("spec.target.path", ABSENT)], "spec.target.path", "Required value"),
    "mode": ([("spec.mode", "Half")], "spec.mode", 'supported values: "Full", "ParamsOnly"'),
    "verify": ([("spec.verify", "Twice")], "spec.verify", 'supported values: "None", "Digest", "Full"'),
    "no-stages": ([("spec.parallelism", {"pipeline": 0})], "spec.parallelism.pipeline", "greater than or equal to 1"),
    "too-many-stages": ([("spec.parallelism", {"pipeline": 1025})], "spec.parallelism.pipeline", "less than or equal to 1024"),
    "text-for-a-number": ([("spec.model.numLayers", "4")], "spec.model.numLayers", "must be of type integer"),
    "misspelled": ([("spec.parallelism", {"tensr": 2})], "spec.parallelism.tensr", "unknown field"),
    "no-quantity": (
        [("spec.workers", {"resources": {"limits": {"memory": "lots"}}})], "spec.workers.resources.limits.memory", "should match",
    ),
    "noop-twice": ([("spec.model.noopLayers", [1, 1])], "spec.model.noopLayers[1]", "Duplicate value"),
    "retries": ([("spec.retries", {"perStage": 21})], "spec.retries.perStage", "less than or equal to 20"),
    "start-after-without-a-name": ([("spec.startAfter", {"apiVersion": "batch/v1", "kind": "Job"})], "spec.startAfter.name", "Required"),
    "shard-info-with-dots": (
        [("spec.source.optShardInfoPath", "a/../b")], "spec.source.optShardInfoPath", "write the path relative",
    ),
    "a-training-without-a-name": ([("spec.follow", {"until": {"kind": "Job"}})], "spec.follow.until.name", "Required value"),
    "follow-and-start-after": ([("spec.follow", {}), ("spec.startAfter", AFTER)], "spec.follow", "give one of startAfter and follow"),
    "follow-one-iteration": ([("spec.follow", {}), ("spec.source.iteration", 5)], "spec.follow", "leave source.iteration out"),
    "no-interval": ([("spec.follow", {"intervalSeconds": 0})], "spec.follow.intervalSeconds", "greater than or equal to 1"),
    "no-metadata": ([("spec.metadata", ABSENT)], "spec.metadata", "name the pt_meta folder"),
    "shards-cut-anew-without-metadata": (
        [
            ("spec.source.format", "Ckpt"), ("spec.metadata", ABSENT),
            ("spec.target", {"path": "out", "format": "MindSpore", "parallelism": {"tensor": 2}}),
        ],
        "spec.metadata", "name the pt_meta folder, which says where another layout",
    ),
    "import-that-follows": (
        [("spec.follow", {}), ("spec.target", {"path": "out", "format": "MindSpore"})],
        "spec.follow", "a training is followed to Megatron06, one of MindFormers",
    ),
    "follow-into-megatron-of-today": (
        [("spec.follow", {}), ("spec.target", {"path": "out", "format": "Megatron"})],
        "spec.follow", "a training is followed to Megatron06, one of MindFormers",
    ),
    "names-of-another-format": (
        [("spec.target", {"path": "out", "names": "Legacy"})], "spec.target.format", "set target.format to Megatron",
    ),
    "a-release-that-is-none": (
        [("spec.target", {"path": "out", "format": "Megatron", "megatronVersion": "0.6"})],
        "spec.target.megatronVersion", "should match",
    ),
    "follow-into-torch-dist": (
        [("spec.follow", {}), ("spec.target", {"path": "out", "format": "TorchDist"})],
        "spec.follow", "leave follow out, or set target.format",
    ),
    "mindformers-into-mindformers": (
        [("spec.source.format", "MindFormers"), ("spec.target", {"path": "out", "format": "MindFormers"})],
        "spec.target.format", "of a MindFormers checkpoint results of the formats",
    ),
    "a-trainer-of-another-format": (
        [("spec.target", {"path": "out", "trainer": "Graph"})], "spec.target.trainer", "it is about a result for MindFormers",
    ),
    "a-layout-of-mindformers": (
        [("spec.target", {"path": "out", "format": "MindFormers", "parallelism": {"tensor": 2}})],
        "spec.target.parallelism", "weights for MindFormers are loaded at any parallel sizes",
    ),
    "follow-mindformers-into-safetensors": (
        [("spec.follow", {}), ("spec.source.format", "MindFormers"), ("spec.target", {"path": "out", "format": "Safetensors"})],
        "spec.follow", "one of MindFormers (source.format) to Megatron or TorchDist",
    ),
    "repair-of-what-torch-wrote": (
        [("spec.source.format", "Megatron"), ("spec.metadata", ABSENT), ("spec.target", {"path": "out", "format": "Torch"})],
        "spec.source.format", "only what MSAdapter wrote becomes files of torch",
    ),
    "repair-with-metadata": (
        [("spec.source.format", "MSAdapter"), ("spec.target", {"path": "out", "format": "Torch"})],
        "spec.target.format", "leave metadata out, and mode Full",
    ),
    "repair-into-another-layout": (
        [("spec.source.format", "MSAdapter"), ("spec.metadata", ABSENT),
         ("spec.target", {"path": "out", "format": "Torch", "parallelism": {"tensor": 2}})],
        "spec.target.parallelism", "files of torch keep the layout",
    ),
    "torch-dist-for-a-data-parallel-size": (
        [("spec.target", {"path": "out", "format": "TorchDist", "dataParallel": 2})],
        "spec.target.dataParallel", "leave dataParallel out where target.format is TorchDist",
    ),
    "torch-dist-with-virtual-stages": (
        [("spec.target", {"path": "out", "format": "TorchDist", "parallelism": {"virtualPipeline": 2}})],
        "spec.target.parallelism.virtualPipeline", "leave virtualPipeline out where target.format is TorchDist",
    ),
    "experts-in-megatron-06": (
        [("spec.target", {"path": "out", "parallelism": {"expert": 2}})],
        "spec.target.parallelism.expert", "only results of the formats Megatron and TorchDist hold a mixture of experts",
    ),
    "mindformers-into-0.6": (
        [("spec.source.format", "MindFormers")], "spec.target.format", "of a MindFormers checkpoint results of the formats",
    ),
    "a-model-into-mindspore": (
        [("spec.source.format", "HuggingFace"), ("spec.target", {"path": "out", "format": "MindSpore"})],
        "spec.target.format", "of a model for transformers results of the formats",
    ),
    "what-mindformers-does-not-tell": (
        [("spec.source.format", "Ckpt"), ("spec.source.mindformers", {"config": "train.yaml"})],
        "spec.source.mindformers", "it is about a checkpoint of MindFormers",
    ),
    "transformers-with-a-layout": (
        [("spec.target", {"path": "out", "format": "Safetensors", "parallelism": {"tensor": 2}})],
        "spec.target.parallelism", "weights for Hugging Face transformers have no layout of their own",
    ),
    "tokens-of-another-format": (
        [("spec.target", {"path": "out", "huggingface": {"vocabSize": 101}})],
        "spec.target.huggingface", "set target.format to Safetensors, or leave it out",
    ),
    "no-tokens": (
        [("spec.target", {"path": "out", "format": "Safetensors", "huggingface": {"vocabSize": 0}})],
        "spec.target.huggingface.vocabSize", "greater than or equal to 1",
    ),
    "tokenizer-outside-the-volume": (
        [("spec.target", {"path": "out", "format": "Safetensors", "huggingface": {"tokenizerPath": "../t"}})],
        "spec.target.huggingface.tokenizerPath", "write the path relative to the root of its volume, as run7/tokenizer",
    ),
    "yaml-outside-the-volume": (
        [("spec.source.mindformers", {"config": "../train.yaml"})],
        "spec.source.mindformers.config", "write the path relative to the root of its volume, as run7/train.yaml",
    ),
    "follow-megatron": (
        [("spec.follow", {}), ("spec.source.format", "Megatron")], "spec.follow", "leave follow out; trainings of MindSpore alone",
    ),
    "files-of-another-format": (
        [("spec.target", {"path": "out", "mindspore": {"prefix": "x"}})], "spec.target.mindspore", "set target.format to MindSpore",
    ),
    "a-path-for-a-name-of-files": (
        [("spec.target", {"path": "out", "format": "MindSpore", "mindspore": {"prefix": "a/b"}})],
        "spec.target.mindspore.prefix", "should match",
    ),
    "no-iteration": ([("spec.source.iteration", 0)], "spec.source.iteration", "greater than or equal to 1"),
}  # fmt: skip
LONG_NAME = {"x" * 318: "1"}
CSI = {"csi": {"driver": "nfs.csi.k8s.io", "volumeAttributes": LONG_NAME}}
LONG_NAMES: dict[str, list[tuple[str, object]]] = {
    **{field: [(field, LONG_NAME)] for field in ("spec.model.rules.layerModules", "spec.model.rules.modules",
       "spec.workers.resources.requests", "spec.workers.resources.limits", "spec.workers.nodeSelector", "spec.workers.labels",
       "spec.workers.annotations", "spec.workers.podOverrides.metadata.labels", "spec.workers.podOverrides.metadata.annotations")},
    **{f"spec.{side}.volume.csi.volumeAttributes": [(f"spec.{side}.volume", CSI)] for side in ("source", "metadata", "target")},
}  # fmt: skip
REFUSED |= {
    f"name-too-long-in-{field}": (changes, field, "keep each name to at most 317 characters")
    for field, changes in LONG_NAMES.items()
}


@pytest.mark.parametrize(("changes", "field", "advice"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_document_is_refused_with_advice(
    conversions: Kubectl, changes: list[tuple[str, object]], field: str, advice: str
) -> None:
    said = to_error(conversions, "create", changed(*changes))
    assert field in said
    assert advice in said
    assert f"<nil>: Invalid value: {advice}" not in said, "every rule names its field"


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_name_that_no_object_can_have_is_refused(conversions: Kubectl, name: str) -> None:
    """In each field that names an object, all at once: startAfter and follow, and two kinds of volume, exclude each other."""
    apart = ("spec.startAfter.name", "spec.target.volume.csi.nodePublishSecretRef.name")
    first = [field for field in NAMED_FIELDS if field not in apart]
    for fields in (first, apart):
        said = to_error(conversions, "create", changed(*(NAMED_FIELDS[field](name) for field in fields)))
        assert [field for field in fields if f"{field}: Invalid value" not in said] == []
        assert "should match" in said


def test_an_override_of_a_pods_metadata_holds_labels_and_annotations_alone(conversions: Kubectl) -> None:
    """A pod with a finalizer would stay for ever."""
    metadata = {"labels": {"a": "b"}, "finalizers": ["example.com/never"]}
    said = to_error(conversions, "create", changed(("spec.workers.podOverrides.metadata", metadata)))
    assert 'unknown field "spec.workers.podOverrides.metadata.finalizers"' in said


# --------------------------------------------------------------------------------------------------------------- fixed

CONTAINERS = [{"name": "b", "stdin": True}]
FULL: dict[str, Any] = changed(
    ("metadata.name", "fixed"),
    ("spec.suspend", True),
    ("spec.cancel", True),
    ("spec.startAfter", AFTER),
    ("spec.activeDeadlineSeconds", 100),
    ("spec.ttlSecondsAfterFinished", 100),
    ("spec.workers", {
        "processes": 2, "rankTimeoutSeconds": 9, "image": "a:1", "imagePullPolicy": "Always",
        "imagePullSecrets": [{"name": "a"}], "resources": {"limits": {"memory": "1Gi"}}, "nodeSelector": {"a": "b"},
        "tolerations": [{"key": "a"}], "affinity": {"nodeAffinity": {"x": 1}}, "schedulerName": "a",
        "priorityClassName": "a", "runtimeClassName": "a", "queueName": "a", "queueKind": "Kueue",
        "security": {"runAsUser": 1}, "labels": {"a": "b"}, "annotations": {"a": "b"},
        "podOverrides": {"spec": {"hostNetwork": True, "containers": CONTAINERS}}, "coSchedule": True, "maxParallelStages": 1,
    }),
)  # fmt: skip

#    field -> another value of it
OTHERS: dict[str, object] = {
    "spec.mode": "ParamsOnly",
    "spec.dryRun": True,
    "spec.model": {"numLayers": 8},
    "spec.parallelism": {"tensor": 2},
    "spec.source": {"volume": claim("training"), "path": "other"},
    "spec.metadata": {"path": "other"},
    "spec.target": {"path": "other"},
    "spec.verify": "Full",
    "spec.startAfter": {"apiVersion": "batch/v1", "kind": "Job", "name": "other"},
    "spec.follow": {"keep": 1},
    "spec.readiness": {"timeoutSeconds": 7},
    "spec.retries": {"perStage": 1},
    "spec.pendingDeadlineSeconds": 7,
    "spec.activeDeadlineSeconds": 7,
    "spec.cancel": False,
    "spec.workers.processes": 3,
    "spec.workers.rankTimeoutSeconds": 7,
    "spec.workers.image": "b:1",
    "spec.workers.imagePullPolicy": "Never",
    "spec.workers.imagePullSecrets": [{"name": "b"}],
    "spec.workers.resources": {"limits": {"memory": "2Gi"}},
    "spec.workers.nodeSelector": {"a": "c"},
    "spec.workers.tolerations": [{"key": "b"}],
    "spec.workers.affinity": {"nodeAffinity": {"x": 2}},
    "spec.workers.schedulerName": "b",
    "spec.workers.priorityClassName": "b",
    "spec.workers.runtimeClassName": "b",
    "spec.workers.queueName": "b",
    "spec.workers.queueKind": "Volcano",
    "spec.workers.security": {"runAsUser": 2},
    "spec.workers.labels": {"a": "c"},
    "spec.workers.annotations": {"a": "c"},
    "spec.workers.podOverrides": {"spec": {"hostNetwork": False}},
    "spec.workers.coSchedule": False,
}
REQUIRED = {"spec.model", "spec.source", "spec.metadata", "spec.target"}
DEFAULTED = {
    "spec.mode", "spec.dryRun", "spec.verify", "spec.readiness", "spec.retries", "spec.pendingDeadlineSeconds", "spec.parallelism",
    "spec.workers.processes", "spec.workers.queueKind", "spec.workers.resources", "spec.workers.security",
}  # fmt: skip
#     what is renamed or nested deeper, and escapes a comparison that looks at values alone
NESTED: dict[str, tuple[str, object]] = {
    "a-key-renamed-in-an-override": ("spec.workers.podOverrides", {"spec": {"hostPID": True, "containers": CONTAINERS}}),
    "a-key-added-to-an-override": ("spec.workers.podOverrides", {"spec": {"hostNetwork": True, "hostPID": True, "containers": CONTAINERS}}),
    "an-override-of-the-metadata": ("spec.workers.podOverrides", {"spec": {"hostNetwork": True, "containers": CONTAINERS}, "metadata": {"labels": {}}}),
    "a-key-renamed-in-an-affinity": ("spec.workers.affinity", {"nodeAffinity": {"y": 1}}),
    "an-affinity-of-another-kind": ("spec.workers.affinity", {"podAffinity": {"x": 1}}),
    "a-key-renamed-deep-in-an-override": ("spec.workers.podOverrides", {"spec": {"hostNetwork": True, "containers": [{"name": "b", "tty": True}]}}),
    "a-label-renamed": ("spec.workers.labels", {"b": "b"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def fixed(conversions: Kubectl) -> dict[str, Any]:
    """An object with every field given."""
    return conversions.create(FULL)


def put(document: dict[str, Any], field: str, value: object) -> dict[str, Any]:
    found = deepcopy(document)
    *parents, leaf = field.split(".")
    node = found
    for name in parents:
        node = node[name]
    if value is ABSENT:
        del node[leaf]
    else:
        node[leaf] = value
    return found


def message_of(field: str) -> str:
    return next(message for path, message, old in RULES if old and path == field)


@pytest.mark.parametrize("field", OTHERS)
def test_a_field_is_fixed(conversions: Kubectl, fixed: dict[str, Any], field: str) -> None:
    said = to_error(conversions, "replace", put(fixed, field, OTHERS[field]))
    assert field in said
    assert message_of(field) in said


@pytest.mark.parametrize("value", [ABSENT, {"keep": 2}, {"keep": 1, "until": AFTER}], ids=["absent", "another", "more"])
def test_how_a_training_is_followed_is_fixed(conversions: Kubectl, value: object) -> None:
    # Of one that begins after a training nothing is followed, so this is an object of its own.
    given = json.dumps(changed(("metadata.name", "follows"), ("spec.suspend", True), ("spec.follow", {"keep": 1})))
    conversions("apply", "--filename", "-", stdin=given)
    found = conversions.get("ckc", "follows")
    assert found["spec"]["follow"] == {"keep": 1, "intervalSeconds": 30}
    assert message_of("spec.follow") in to_error(conversions, "replace", put(found, "spec.follow", value))


@pytest.mark.parametrize(
    "field", [field for field in OTHERS if field not in REQUIRED | DEFAULTED | {"spec.cancel", "spec.follow"}]
)
def test_a_field_that_was_given_cannot_be_taken_away(conversions: Kubectl, fixed: dict[str, Any], field: str) -> None:
    assert message_of(field) in to_error(conversions, "replace", put(fixed, field, ABSENT))


@pytest.mark.parametrize(("field", "value"), NESTED.values(), ids=NESTED)
def test_nothing_deeper_down_escapes(conversions: Kubectl, fixed: dict[str, Any], field: str, value: object) -> None:
    assert message_of(field) in to_error(conversions, "replace", put(fixed, field, value))


@pytest.fixture(scope="module")
def bare(conversions: Kubectl) -> dict[str, Any]:
    """An object with no field that could be left out."""
    return conversions.create(changed(("metadata.name", "bare"), ("spec.suspend", True)))


@pytest.mark.parametrize("field", [field for field in OTHERS if field not in REQUIRED | DEFAULTED | {"spec.cancel"}])
def test_a_field_that_was_not_given_cannot_be_added(conversions: Kubectl, bare: dict[str, Any], field: str) -> None:
    assert message_of(field) in to_error(conversions, "replace", put(bare, field, OTHERS[field]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("spec.suspend", False), ("spec.workers.maxParallelStages", 2), ("spec.workers.maxParallelStages", ABSENT),
        ("spec.ttlSecondsAfterFinished", 0), ("spec.ttlSecondsAfterFinished", ABSENT),
    ],
)  # fmt: skip
def test_what_may_change_does(conversions: Kubectl, fixed: dict[str, Any], field: str, value: object) -> None:
    document = json.dumps(put(fixed, field, value))
    assert "replaced" in conversions("replace", "--dry-run=server", "--filename", "-", stdin=document)


def test_a_conversion_can_be_cancelled(conversions: Kubectl, bare: dict[str, Any]) -> None:
    document = json.dumps(put(bare, "spec.cancel", True))
    assert "replaced" in conversions("replace", "--dry-run=server", "--filename", "-", stdin=document)


# ------------------------------------------------------------------------------------------------------------ accepted

ACCEPTED: dict[str, list[tuple[str, object]]] = {
    "weights-for-transformers": [
        (
            "spec.target",
            {
                "path": "out",
                "format": "Safetensors",
                "huggingface": {"vocabSize": 101, "ropeScalingFactor": 8, "tokenizerPath": "t"},
            },
        ),
    ],
    "minimal": [],
    "longest-name": [("metadata.name", "a" * 45)],
    "the-root-of-the-volume": [("spec.source.path", ".")],
    "uneven": [("spec.parallelism", {"pipeline": 3}), ("spec.model.layersPerStage", [2, 1, 1])],
    "another-layout": [
        ("spec.parallelism", {"pipeline": 3}),
        ("spec.target", {"path": "out", "parallelism": {"tensor": 4, "pipeline": 2}}),
    ],
    "shards-to-whole-files": [
        ("spec.source.format", "Ckpt"),
        ("spec.metadata", ABSENT),
        ("spec.target", {"path": "out", "format": "MindSpore"}),
    ],
    "mindformers": [
        ("spec.source.format", "MindFormers"),
        ("spec.source.mindformers", {"config": "run7/train.yaml", "useContiguousWeightLayoutAttention": False}),
        ("spec.metadata", ABSENT),
        ("spec.target", {"path": "out", "format": "TorchDist"}),
    ],
    "uneven-in-the-result": [
        ("spec.model.layersPerStage", [3, 1]),
        ("spec.target", {"path": "out", "parallelism": {"pipeline": 2}}),
    ],
    "chunks": [("spec.parallelism", {"pipeline": 2, "virtualPipeline": 2}), ("spec.model.noopLayers", [3])],
    "noop-beyond-the-model": [("spec.model.noopLayers", [3, 62, 63])],
    "one-path-on-two-volumes": [("spec.target", {"path": "ms", "volume": HOST})],
    "nfs": [("spec.source.volume", {"nfs": {"server": "s", "path": "/export"}})],
    "csi": [("spec.source.volume", {"csi": {"driver": "d", "volumeAttributes": {"a": "b"}}})],
    "empty-dir": [("spec.target", {"path": "out", "volume": {"emptyDir": {"sizeLimit": "2Gi"}}})],
    "dry-run": [("spec.dryRun", True)],
    "follow": [("spec.follow", {"until": AFTER, "keep": 2, "intervalSeconds": 5})],
    "to-mindformers": [
        ("spec.metadata", ABSENT),
        ("spec.source.mindformers", {"useInterleavedWeightLayoutMlp": True}),
        ("spec.target", {"path": "out", "format": "MindFormers", "trainer": "Graph"}),
    ],
    "follow-mindformers": [
        ("spec.follow", {"until": AFTER, "keep": 2}),
        ("spec.source.format", "MindFormers"),
        ("spec.metadata", ABSENT),
        ("spec.target", {"path": "out", "format": "TorchDist"}),
    ],
    "rules": [("spec.model.rules", {"ignore": ["x.*"], "layerModules": {"mlp.a": "mlp.b"}})],
    "null-for-absent": [("spec.verify", None), ("spec.source.iteration", None)],
    "overrides": [("spec.workers", {"podOverrides": {"spec": {"dnsPolicy": "None", "anything": [{"deep": 1}]}}})],
    "volcano": [("spec.workers", {"queueName": "q", "queueKind": "Volcano"})],
    "memory": [("spec.retries", {"maxMemory": "2Gi", "memoryGrowthPercent": 100})],
}


@pytest.mark.parametrize("changes", ACCEPTED.values(), ids=ACCEPTED)
def test_a_right_document_is_accepted(conversions: Kubectl, changes: list[tuple[str, object]]) -> None:
    made = conversions(
        "create", "--dry-run=server", "--validate=strict", "--filename", "-", stdin=json.dumps(changed(*changes))
    )
    assert "created" in made


def test_the_example_is_accepted_and_kubectl_explains_its_fields(conversions: Kubectl) -> None:
    for path in (EXAMPLE_PATH, EXAMPLE_PATH.with_name("import.yaml")):
        assert "created" in conversions("create", "--dry-run=server", "--validate=strict", "--filename", path)
    explained = conversions("explain", "checkpointconversion.spec.retries.memoryGrowthPercent")
    assert "How much more memory a stage gets" in explained


def test_the_server_puts_the_defaults_in(conversions: Kubectl, bare: dict[str, Any]) -> None:
    spec = bare["spec"]
    assert (spec["mode"], spec["verify"], spec["dryRun"]) == ("Full", "Digest", False)
    assert spec["retries"] == {}
    assert "pendingDeadlineSeconds" not in spec, "those of the chart's worker.defaults count where it is absent"
    assert spec["parallelism"] == dict.fromkeys(("tensor", "pipeline", "virtualPipeline", "data", "context"), 1)


def test_what_no_operator_has_looked_at_is_ready_for_nobody(conversions: Kubectl, bare: dict[str, Any]) -> None:
    """A status that is not of this generation: kstatus, and so helm and Flux, wait for it."""
    assert bare["status"] == {"observedGeneration": -1}
    assert bare["metadata"]["generation"] == 1
    assert kstatus(bare["status"], 1) == "InProgress"


def test_status_is_written_apart_from_the_rest(conversions: Kubectl, bare: dict[str, Any]) -> None:
    patch = json.dumps({"status": {"phase": "Running", "unknownField": 1}, "spec": {"suspend": False}})
    conversions("patch", "ckc", "bare", "--subresource=status", "--type=merge", "--patch", patch)
    found = conversions.get("ckc", "bare")
    assert found["status"] == {"observedGeneration": -1, "phase": "Running"}, (
        "a field that the schema does not know is dropped"
    )
    assert found["spec"]["suspend"] is True


def test_plain_kubectl_apply_works_twice(kubectl: Kubectl, conversions: Kubectl) -> None:
    del conversions
    assert "checkpointconversions.ckpt2pt.dev" in kubectl("apply", "--filename", CRD_PATH)


# ------------------------------------------------------------------------------------------------------------ coverage


@pytest.mark.parametrize(("field", "message"), [(field, message) for field, message, old in RULES if not old])
def test_every_rule_has_a_document_that_breaks_it(field: str, message: str) -> None:
    assert any(reported == field and advice in message for _, reported, advice in REFUSED.values())


@pytest.mark.parametrize("field", [field for field, _, old in RULES if old])
def test_every_field_that_is_fixed_is_tried(field: str) -> None:
    assert field in OTHERS
