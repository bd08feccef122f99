"""A CheckpointConversion becomes one frozen value, or is refused by the rules that an API server applies too."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.cli.commands import build_parser
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import UsageError
from ckpt2pt.kube.asked import spec_of, stages_of
from ckpt2pt.kube.conversion.document import validate
from ckpt2pt.kube.conversion.job import mounts_of
from ckpt2pt.kube.conversion.schema import Follow
from ckpt2pt.kube.conversion.spec import ROLES, Conversion, parse, worker_words
from conversions import request_of
from documents import ABSENT, EXAMPLE_PATH, HOSTILE_NAMES, NAMED_FIELDS, changed, claim, minimal

MOUNTS = {role: f"/volumes/{role}" for role in ROLES}


def test_defaults_are_those_of_the_schema() -> None:
    """An API server applies the CRD's defaults, ``parse`` its own: both must give the same conversion."""
    assert parse(minimal()) == parse(validate(minimal(), where="demo"))


def test_nulls_are_absent_fields() -> None:
    nulls = changed(
        ("spec.model.layersPerStage", None), ("spec.source.iteration", None), ("spec.workers", None), ("spec.verify", None)
    )  # fmt: skip
    assert parse(nulls) == parse(minimal())


def test_metadata_and_target_lie_on_the_volume_of_the_source_unless_they_name_their_own() -> None:
    conversion = parse(changed(("spec.target.volume", claim("results"))))
    assert conversion.spec.source.volume == conversion.spec.metadata.volume == claim("training")
    assert conversion.spec.target.volume == claim("results")


def test_a_source_of_megatron_needs_no_metadata() -> None:
    conversion = parse(
        validate(changed(("spec.source.format", "Megatron"), ("spec.metadata", ABSENT)), where="demo"),
    )
    assert [mount.roles for mount in mounts_of(conversion)] == [("source", "target")]
    [found] = [word for word in worker_words(conversion, MOUNTS) if word.startswith("{")]
    assert json.loads(found)["metadata"] == {}
    assert json.loads(found)["source"]["format"] == "Megatron"


def test_a_worker_is_reported_the_expert_parallel_size() -> None:
    target = {"path": "out", "format": "TorchDist", "parallelism": {"expert": 4}}
    [found] = [word for word in worker_words(parse(changed(("spec.target", target))), MOUNTS) if word.startswith("{")]
    assert json.loads(found)["target"]["parallelism"] == {"expert": 4}


def test_topology_comes_from_model_and_parallelism() -> None:
    conversion = parse(
        changed(
            ("spec.model", {"numLayers": 8, "noopLayers": [7], "layersPerStage": [1, 2, 2, 3]}),
            ("spec.parallelism", {"tensor": 2, "pipeline": 2, "virtualPipeline": 2, "data": 3, "context": 5}),
        )
    )
    assert conversion.topology == Topology(
        num_layers=8, tensor=2, pipeline=2, virtual=2, data=3, context=5, noop=frozenset({7}), layers_per_stage=(1, 2, 2, 3)
    )  # fmt: skip


AFTER = {"apiVersion": "batch/v1", "kind": "Job", "name": "pretrain"}
NFS = {"nfs": {"server": "s", "path": "/e"}}
#     what is changed -> the field that the refusal names, and a word of its advice
REFUSED = {
    "no-name": ([("metadata.name", ABSENT)], "metadata.name", "lower-case"),
    "name-too-long": ([("metadata.name", "a" * 46)], "metadata.name", "at most 45"),
    "name-with-a-dot": ([("metadata.name", "step.500")], "metadata.name", "lower-case"),
    "another-kind": ([("kind", "Job")], "kind", "CheckpointConversion"),
    "another-version": ([("apiVersion", "v1")], "apiVersion", "v1alpha1"),
    "no-layers": ([("spec.model.numLayers", ABSENT)], "spec.model.numLayers", "no-op layers included"),
    "layers-do-not-divide": ([("spec.parallelism", {"pipeline": 3})], "spec.model", "layersPerStage"),
    "one-count-too-many": ([("spec.model.layersPerStage", [2, 2])], "spec.model", "one count per stage"),
    "counts-do-not-add-up": ([("spec.model.layersPerStage", [3])], "spec.model", "add up"),
    "every-layer-a-no-op": ([("spec.model.noopLayers", [0, 1, 2, 3, 62])], "spec.model", "fewer layers"),
    "degree-of-zero": ([("spec.parallelism", {"tensor": 0})], "spec.parallelism.tensor", "at least 1"),
    "degree-as-text": ([("spec.parallelism", {"tensor": "2"})], "spec.parallelism.tensor", "whole number"),
    "no-volume": ([("spec.source.volume", {})], "spec.source.volume", "exactly one"),
    "two-volumes": ([("spec.source.volume", claim("a") | NFS)], "spec.source.volume", "exactly one"),
    "no-claim-name": ([("spec.source.volume", {"persistentVolumeClaim": {}})], "claimName", "give it"),
    "relative-host-path": ([("spec.target.volume", {"hostPath": {"path": "data"}})], "hostPath.path", "absolute"),
    "export-with-dots": ([("spec.target.volume", {"nfs": {"server": "s", "path": "/a/../b"}})], "nfs.path", "absolute"),
    "absolute-path": ([("spec.source.path", "/ms")], "spec.source.path", "relative"),
    "path-with-dots": ([("spec.metadata.path", "a/../b")], "spec.metadata.path", "relative"),
    "path-with-a-slash-at-the-end": ([("spec.target.path", "out/")], "spec.target.path", "relative"),
    "no-metadata": ([("spec.metadata", ABSENT)], "spec.metadata.path", "give the folder"),
    "no-metadata-path": ([("spec.source.format", "Megatron"), ("spec.metadata.path", ABSENT)], "spec.metadata.path", "give the folder"),
    "no-target-path": ([("spec.target.path", ABSENT)], "spec.target.path", "give the folder"),
    "target-is-the-source": ([("spec.target.path", "ms")], "spec.target.path", "another target.path"),
    "target-is-pt-meta": ([("spec.target.path", "pt_meta")], "spec.target.path", "another target.path"),
    "unknown-mode": ([("spec.mode", "Weights")], "spec.mode", "ParamsOnly"),
    "half-a-workload": ([("spec.startAfter", {"kind": "Job"})], "spec.startAfter", "name the workload"),
    "half-a-training": ([("spec.follow", {"until": {"kind": "Job"}})], "spec.follow.until", "name the workload"),
    "two-ways-to-begin": ([("spec.follow", {}), ("spec.startAfter", AFTER)], "spec.follow", "give one of them"),
    "follow-mindformers-into-nothing": (
        [("spec.follow", {}), ("spec.source.format", "MindFormers"), ("spec.target.format", "Safetensors")],
        "spec.follow", "one of MindFormers to Megatron or TorchDist",
    ),
    "follow-one-iteration": ([("spec.follow", {}), ("spec.source.iteration", 5)], "spec.follow", "leave the iteration out"),
    "rules-as-a-list": ([("spec.model.rules", {"modules": ["a"]})], "spec.model.rules.modules", "mapping"),
    "experts-in-megatron-06": (
        [("spec.target", {"path": "out", "parallelism": {"expert": 2}})], "spec.target.parallelism.expert", "leave it out",
    ),
    "a-rule-for-no-name": ([("spec.model.rules", {"ignore": [""]})], "spec.model.rules.ignore", "do not leave it empty"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "field", "advice"), REFUSED.values(), ids=REFUSED)
def test_refused(changes: list[tuple[str, object]], field: str, advice: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse(changed(*changes))
    assert field in refused.value.where + refused.value.what
    assert advice in refused.value.hint + refused.value.what


@pytest.mark.parametrize("name", HOSTILE_NAMES)
@pytest.mark.parametrize("field", NAMED_FIELDS)
def test_a_name_that_no_object_can_have_is_refused(field: str, name: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse(changed(NAMED_FIELDS[field](name)))
    assert field in refused.value.where
    assert "write the name of an object" in refused.value.hint


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (("spec.startAfter", AFTER | {"apiVersion": "../v1"}), "spec.startAfter.apiVersion"),
        (("spec.follow", {"until": AFTER | {"kind": "Job/../x"}}), "spec.follow.until.kind"),
        (("spec.source.volume", {"nfs": {"server": "-o suid", "path": "/e"}}), "spec.source.volume.nfs.server"),
        (("spec.source.volume", {"csi": {"driver": "a/b"}}), "spec.source.volume.csi.driver"),
        (("spec.workers.imagePullSecrets", "a"), "spec.workers.imagePullSecrets"),
    ],
)
def test_so_are_other_words_of_that_kind(change: tuple[str, object], field: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse(changed(change))
    assert field in refused.value.where


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param([("spec.target", {"path": "ms", "volume": claim("results")})], id="same-path-on-another-volume"),
        pytest.param([("spec.source.path", ".")], id="the-root-of-a-volume"),
        pytest.param([("spec.source.path", ABSENT)], id="no-source-path"),
        pytest.param([("metadata.name", "a" * 45)], id="longest-name"),
        pytest.param([("spec.source.volume", {"hostPath": {"path": "/data"}})], id="host-path"),
        pytest.param([("spec.source.volume", {"emptyDir": {}})], id="empty-dir"),
    ],
)
def test_accepted(changes: list[tuple[str, object]]) -> None:
    parse(changed(*changes))


def test_everything_that_is_wrong_is_reported_at_once() -> None:
    with pytest.raises(UsageError) as refused:
        parse(changed(("spec.mode", "x"), ("spec.verify", "y"), ("spec.source.path", "/ms")))
    assert "3 fields are wrong" in refused.value.what
    for field in ("spec.mode", "spec.verify", "spec.source.path"):
        assert field in refused.value.what


# ---------------------------------------------------------------------------------------------------- the command line


def options_of(conversion: Conversion) -> argparse.Namespace:
    return build_parser().parse_args(worker_words(conversion, MOUNTS))


def test_the_command_line_says_what_the_document_says() -> None:
    conversion = parse(
        changed(
            ("spec.mode", "ParamsOnly"),
            ("spec.verify", "Full"),
            ("spec.model", {"numLayers": 8, "noopLayers": [6, 7], "layersPerStage": [3, 5]}),
            ("spec.model.rules", {"layerModules": {"mlp.a": "mlp.b"}, "ignore": ["x.*"], "pickleGlobals": ["m.C"]}),
            ("spec.parallelism", {"tensor": 2, "pipeline": 2, "data": 3, "context": 5}),
            ("spec.source", {"volume": claim("t"), "path": ".", "format": "Safetensors", "iteration": 500}),
            ("spec.target", {"path": "out", "overwrite": True, "dataParallel": 4, "zeroConsumedSamples": True}),
            ("spec.workers", {"processes": 7, "rankTimeoutSeconds": 60}),
        )
    )
    request = request_of(options_of(conversion))
    assert request.topology == conversion.topology
    assert (request.source, request.metadata, request.target) == tuple(
        map(Path, ("/volumes/source", "/volumes/metadata/pt_meta", "/volumes/target/out"))
    )
    assert (request.full, request.verify, request.source_format) == (False, "full", "safetensors")
    assert (request.iteration, request.target_data, request.workers, request.timeout) == (500, 4, 7, 60)
    assert request.overwrite
    assert request.reference_samples
    assert dict(request.rules.layer_modules) == {"mlp.a": "mlp.b"}
    assert (request.rules.ignore, request.rules.pickle_globals) == (("x.*",), ("m.C",))


def test_the_result_may_have_another_layout() -> None:
    conversion = parse(
        changed(
            ("spec.parallelism", {"tensor": 2, "pipeline": 2, "virtualPipeline": 2, "data": 3}),
            ("spec.target", {"path": "out", "parallelism": {"tensor": 4, "virtualPipeline": 1}}),
        )
    )
    assert (conversion.topology.tensor, conversion.topology.pipeline, conversion.topology.virtual) == (4, 2, 1)
    request = request_of(options_of(conversion))
    assert request.topology == replace(conversion.topology, data=1)  # of a result nobody asks for it
    layout = request.source_layout
    assert (layout.tensor, layout.pipeline, layout.data, layout.context) == (2, 2, 3, 1)


def test_the_same_sizes_given_twice_are_one_layout() -> None:
    sizes = {"tensor": 2, "pipeline": 4, "virtualPipeline": 1}
    conversion = parse(changed(("spec.parallelism", sizes), ("spec.target", {"path": "out", "parallelism": sizes})))
    assert conversion.saved is None
    assert request_of(options_of(conversion)).source_topology is None


def test_a_size_that_is_none_is_reported_once() -> None:
    with pytest.raises(UsageError) as caught:
        parse(
            changed(
                ("spec.parallelism", {"tensor": 0}), ("spec.target", {"path": "out", "parallelism": {"pipeline": 0}})
            )
        )
    assert str(caught.value).count("whole number of at least 1") == 2


def test_the_shortest_document_makes_the_shortest_request() -> None:
    request = request_of(options_of(parse(minimal())))
    assert request.topology == Topology(num_layers=4)
    assert request.full
    assert (request.source_format, request.iteration, request.target_data, request.verify) == (
        None,
        None,
        None,
        "digest",
    )


def test_a_worker_does_the_stage_of_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(parse(changed(("spec.parallelism", {"pipeline": 4}))))
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    assert stages_of(options, request_of(options)) == (1,)
    monkeypatch.setenv("CKPT2PT_STAGES", "2,3")
    assert stages_of(options, request_of(options)) == (3,)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    with pytest.raises(UsageError, match="no stage for index 2"):
        stages_of(options, request_of(options))


def test_a_dry_run_plans_every_stage_in_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    conversion = parse(changed(("spec.dryRun", True), ("spec.parallelism", {"pipeline": 4})))
    options = options_of(conversion)
    assert options.command == "plan"
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    assert stages_of(options, request_of(options)) == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("ended", "forgiving"), [("", False), ("Succeeded", False), ("Failed", True), ("Deleted", True)]
)
def test_a_training_is_followed_by_one_worker(ended: str, forgiving: bool) -> None:
    follow = {"until": AFTER, "keep": 3, "intervalSeconds": 5}
    conversion = parse(changed(("spec.follow", follow), ("spec.parallelism", {"pipeline": 4})))
    assert conversion.one_worker
    options = build_parser().parse_args(worker_words(conversion, MOUNTS, ended=ended))
    spec = spec_of(options)
    assert spec.follow == Follow(keep=3, interval_seconds=5)
    assert (options.command, options.once, options.allow_incomplete) == ("watch", bool(ended), forgiving)
    assert request_of(options).topology.pipeline == 4


def test_a_dry_run_of_one_that_follows_is_a_dry_run() -> None:
    conversion = parse(changed(("spec.follow", {}), ("spec.dryRun", True)))
    assert options_of(conversion).command == "plan"


def test_parsing_touches_no_file_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Any:
        raise AssertionError("a file was touched")

    document = changed(("spec.model.noopLayers", [3]), ("spec.workers", {"nodeSelector": {"a": "b"}}))
    before = json.dumps(document)
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    parse(document)
    assert json.dumps(document) == before


def test_the_example_is_a_conversion() -> None:
    import yaml

    conversion = parse(yaml.safe_load(EXAMPLE_PATH.read_text()))
    assert conversion.topology.pipeline == 4
    assert conversion.topology.noop == {62, 63}
