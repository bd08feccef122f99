"""The Job that a conversion becomes: one manifest for the cluster and for this machine."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from ckpt2pt import errors
from ckpt2pt.cli.commands import build_parser
from ckpt2pt.kube.conversion.job import CONTAINER, STAGES_ANNOTATION, build_job, grown_memory, mounts_of, quantity
from ckpt2pt.kube.conversion.schema import from_json
from ckpt2pt.kube.conversion.spec import parse
from documents import changed, claim, minimal

SIDE = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
FOUR = ("spec.parallelism", {"pipeline": 4})


def job_of(*changes: tuple[str, object], **more: Any) -> Any:
    return build_job(parse(changed(FOUR, *changes)), image="worker:1", **more)


def container_of(job: Any) -> Any:
    [container] = job["spec"]["template"]["spec"]["containers"]
    return container


def test_one_index_for_each_pipeline_stage() -> None:
    spec = job_of()["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert (spec["backoffLimitPerIndex"], spec["podReplacementPolicy"]) == (3, "Failed")
    assert "maxFailedIndexes" not in spec, "the other stages finish"
    assert "ttlSecondsAfterFinished" not in job_of(("spec.ttlSecondsAfterFinished", 5))["spec"], "results first"


def test_a_dollar_in_a_path_or_a_rule_stays_one_after_the_kubelet() -> None:
    job = job_of(("spec.source.path", "run$(HOME)/a$$b$"), ("spec.model.rules", {"ignore": ["$(HOSTNAME).*"]}))
    words = container_of(job)["args"]
    assert not [word for word in words if "$" in word.replace("$$", "")]
    flags = dict(pairwise(word.replace("$$", "$") for word in words))
    spec = from_json(flags["--spec"], "test")
    assert spec.source.path == "/volumes/source/run$(HOME)/a$$b$"
    assert spec.model.rules.ignore == ("$(HOSTNAME).*",)


def test_limits_of_the_document_are_the_limits_of_the_job() -> None:
    spec = job_of(
        ("spec.workers", {"maxParallelStages": 2}),
        ("spec.retries", {"perStage": 0, "maxFailedStages": 1}),
        ("spec.activeDeadlineSeconds", 60),
        ("spec.suspend", True),
    )["spec"]
    assert (spec["parallelism"], spec["backoffLimitPerIndex"], spec["maxFailedIndexes"]) == (2, 0, 1)
    assert (spec["activeDeadlineSeconds"], spec["suspend"]) == (60, True)


def action_for(rules: list[Any], code: int) -> str:
    """What the policy does about an exit code; ``Count`` is one more try used up."""
    for rule in rules:
        exits = rule.get("onExitCodes")
        if exits and (code in exits["values"]) == (exits["operator"] == "In"):
            return str(rule["action"])
    return "Count"


def test_the_failure_policy_is_the_table_of_exit_codes() -> None:
    first, *rest = job_of()["spec"]["podFailurePolicy"]["rules"]
    assert first == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert {rule["onExitCodes"]["containerName"] for rule in rest} == {container_of(job_of())["name"]}
    fates = {code: action_for([first, *rest], code) for code in errors.EXIT_CODES if code}
    assert fates == {
        **dict.fromkeys(errors.FAILS_JOB, "FailJob"),
        **dict.fromkeys(errors.FAILS_STAGE, "FailIndex"),
        **dict.fromkeys(errors.RETRIED, "Count"),
    }
    assert action_for([first, *rest], 137) == "Count", "a kill is tried again"


def test_a_rerun_of_some_stages_tells_the_workers_which() -> None:
    again = job_of(attempt=2, stages=[3, 1])
    assert again["metadata"]["name"] == "demo-2"
    assert again["metadata"]["labels"]["ckpt2pt.dev/attempt"] == "2"
    assert again["spec"]["completions"] == 2
    assert container_of(again)["env"][1:] == [{"name": "CKPT2PT_STAGES", "value": "1,3"}]
    assert len(container_of(job_of(stages=[0, 1, 2, 3]))["env"]) == 1


def test_a_worker_reports_to_the_kubelet_and_to_whoever_asks_its_port() -> None:
    container = container_of(job_of())
    flags = dict(pairwise(container["args"]))
    assert flags["--termination-log"] == container["terminationMessagePath"] == "/dev/termination-log"
    assert container["ports"] == [{"name": "progress", "containerPort": 8080}]
    assert flags["--progress-port"] == "8080"
    [pod] = container["env"]
    assert pod == {"name": "CKPT2PT_POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    assert build_parser().parse_args(container["args"]).progress_port == 8080
    assert build_parser().parse_args(container_of(job_of(("spec.dryRun", True)))["args"]).progress_port == 8080


def test_a_dry_run_is_one_worker_that_cannot_write() -> None:
    job = job_of(("spec.dryRun", True), ("spec.target", {"path": "out", "volume": claim("results")}))
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 1
    assert container_of(job)["args"][0] == "plan"
    assert all(mount["readOnly"] for mount in container_of(job)["volumeMounts"])


def test_a_training_is_followed_by_one_worker_that_can_write() -> None:
    job = job_of(("spec.follow", {"keep": 2}))
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 1
    assert container_of(job)["args"][0] == "watch"
    last = container_of(job_of(("spec.follow", {}), ended="Failed"))["args"]
    assert {"--once", "--allow-incomplete"} <= {*last}, "what a failed training has left broken is no error"
    assert "--allow-incomplete" not in container_of(job_of(("spec.follow", {}), ended="Succeeded"))["args"]
    assert len(container_of(job)["env"]) == 1, "it does every stage"


def test_owner_and_namespace_come_from_the_cluster() -> None:
    owned = job_of(("metadata", {"name": "demo", "namespace": "ml", "uid": "u-1"}))["metadata"]
    assert owned["namespace"] == "ml"
    [owner] = owned["ownerReferences"]
    assert (owner["kind"], owner["uid"], owner["controller"]) == ("CheckpointConversion", "u-1", True)
    assert owner["blockOwnerDeletion"] is False
    assert not {"namespace", "ownerReferences"} & set(job_of()["metadata"])


# ------------------------------------------------------------------------------------------------------------- volumes


@pytest.mark.parametrize(
    ("volumes", "expected"),
    [
        pytest.param({}, {"source": ("source", "metadata", "target")}, id="one-for-all"),
        pytest.param({"target": "b"}, {"source": ("source", "metadata"), "target": ("target",)}, id="target-its-own"),
        pytest.param({"metadata": "b"}, {"source": ("source", "target"), "metadata": ("metadata",)}, id="metadata-its-own"),
        pytest.param(
            {"metadata": "b", "target": "b"}, {"source": ("source",), "metadata": ("metadata", "target")}, id="source-its-own"
        ),
        pytest.param({"target": "training"}, {"source": ("source", "metadata", "target")}, id="the-same-named-twice"),
    ],
)  # fmt: skip
def test_each_volume_is_mounted_once_and_read_only_unless_it_is_written(
    volumes: dict[str, str], expected: dict[str, tuple[str, ...]]
) -> None:
    conversion = parse(changed(*((f"spec.{role}.volume", claim(name)) for role, name in volumes.items())))
    mounts = mounts_of(conversion)
    assert {mount.name: mount.roles for mount in mounts} == expected
    assert {mount.name: mount.read_only for mount in mounts} == {
        name: "target" not in roles for name, roles in expected.items()
    }
    job: Any = build_job(conversion, image="i")
    pod = job["spec"]["template"]["spec"]
    assert [volume["name"] for volume in pod["volumes"]] == list(expected)
    arguments = container_of(job)["args"]
    for mount in container_of(job)["volumeMounts"]:
        assert f'"{mount["mountPath"]}/' in arguments[2]


def test_a_host_path_must_be_there() -> None:
    [volume] = job_of(("spec.source.volume", {"hostPath": {"path": "/data"}}))["spec"]["template"]["spec"]["volumes"]
    assert volume == {"name": "source", "hostPath": {"path": "/data", "type": "Directory"}}


# ------------------------------------------------------------------------------------------------------------ the pods


def test_pods_are_restricted_and_carry_no_token() -> None:
    job = job_of()
    pod, container = job["spec"]["template"]["spec"], container_of(job)
    assert (pod["restartPolicy"], pod["automountServiceAccountToken"], pod["enableServiceLinks"]) == (
        "Never",
        False,
        False,
    )
    assert pod["securityContext"] == {
        "runAsUser": 65532, "runAsGroup": 65532, "runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    security = container["securityContext"]
    assert (security["allowPrivilegeEscalation"], security["readOnlyRootFilesystem"]) == (False, True)
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_a_user_may_be_chosen_and_root_must_be_chosen() -> None:
    security = {"runAsUser": 0, "fsGroup": 7}
    context = job_of(("spec.workers", {"security": security}))["spec"]["template"]["spec"]["securityContext"]
    assert (context["runAsUser"], context["runAsNonRoot"]) == (0, False)
    assert (context["fsGroup"], context["fsGroupChangePolicy"]) == (7, "OnRootMismatch")


@pytest.mark.parametrize(
    ("security", "user", "group"),
    [
        ({}, 65532, 65532),
        ({"runAsUser": 1005}, 1005, 1005),
        ({"runAsUser": 1005, "runAsGroup": 7}, 1005, 7),
        ({"runAsGroup": 7}, 65532, 7),
    ],
)
def test_files_belong_to_no_group_that_nobody_chose(security: dict[str, int], user: int, group: int) -> None:
    """A kubelet passes the user of the image and not its group, which is then 0; a group without a user starts no container."""
    context = job_of(("spec.workers", {"security": security}))["spec"]["template"]["spec"]["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"]) == (user, group)


@pytest.mark.parametrize(("processes", "memory"), [(1, "192Mi"), (2, "256Mi"), (8, "640Mi")])
def test_a_worker_asks_for_what_its_processes_need_where_nobody_says(processes: int, memory: str) -> None:
    """A namespace with a quota of all four admits it, and memory can grow."""
    job = job_of(("spec.workers", {"processes": processes}))
    assert container_of(job)["resources"] == {
        "requests": {"cpu": f"{250 * processes}m", "memory": memory},
        "limits": {"cpu": str(processes), "memory": memory},
    }
    for given in ({"requests": {"cpu": "1"}}, {"limits": {"memory": "1Gi"}}):
        job = job_of(("spec.workers", {"processes": processes, "resources": given}))
        assert container_of(job)["resources"] == given


def test_fields_of_the_pods_are_passed_on() -> None:
    workers = {
        "image": "mine:2", "imagePullPolicy": "Always", "imagePullSecrets": [{"name": "s"}],
        "resources": {"limits": {"memory": "1Gi"}}, "nodeSelector": {"a": "b"}, "tolerations": [{"operator": "Exists"}],
        "affinity": {"nodeAffinity": {}}, "schedulerName": "x", "priorityClassName": "p", "runtimeClassName": "r",
        "labels": {"team": "ml", "app.kubernetes.io/name": "stolen"}, "annotations": {"note": "1"},
    }  # fmt: skip
    template = job_of(("spec.workers", workers))["spec"]["template"]
    pod = template["spec"]
    [container] = pod["containers"]
    assert {name: container[name] for name in ("image", "imagePullPolicy", "resources")} == {
        name: workers[name] for name in ("image", "imagePullPolicy", "resources")
    }
    for name in ("imagePullSecrets", "nodeSelector", "tolerations", "affinity", "schedulerName", "runtimeClassName"):
        assert pod[name] == workers[name]
    assert template["metadata"]["labels"]["team"] == "ml"
    assert template["metadata"]["labels"]["app.kubernetes.io/name"] == "ckpt2pt", "ours are what we look pods up by"
    assert template["metadata"]["annotations"] == {"note": "1"}


def test_queues() -> None:
    kueue = job_of(("spec.workers", {"queueName": "q"}))
    assert kueue["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    assert "kueue.x-k8s.io/queue-name" not in kueue["spec"]["template"]["metadata"]["labels"]
    volcano = job_of(("spec.workers", {"queueName": "q", "queueKind": "Volcano"}))
    assert "kueue.x-k8s.io/queue-name" not in volcano["metadata"]["labels"]
    assert volcano["spec"]["template"]["spec"]["schedulerName"] == "volcano"
    assert volcano["spec"]["template"]["metadata"]["annotations"] == {"scheduling.volcano.sh/queue-name": "q"}


def test_overrides_are_merged_last_and_containers_by_name() -> None:
    overrides: Any = {
        "metadata": {"labels": {"x": "y"}},
        "spec": {
            "hostNetwork": True,
            "containers": [{"name": "convert", "tty": True, "resources": {"limits": {"cpu": 1}}}, {"name": "side"}],
        },
    }
    template = job_of(("spec.workers", {"podOverrides": overrides}))["spec"]["template"]
    worker, side = template["spec"]["containers"]
    assert (worker["name"], worker["image"], worker["tty"], side) == (
        "convert",
        "worker:1",
        True,
        {"name": "side", "securityContext": SIDE},
    )
    assert worker["resources"]["limits"] == {"cpu": 1, "memory": "256Mi"}
    assert template["spec"]["hostNetwork"] is True
    assert template["metadata"]["labels"]["x"] == "y"
    assert template["metadata"]["labels"]["app.kubernetes.io/instance"] == "demo"


def test_an_override_adds_to_what_a_worker_needs_and_takes_nothing_from_it() -> None:
    """Without its environment a worker of a retry would do another stage, without its labels nobody would find it."""
    more = {
        "env": [{"name": "TZ", "value": "UTC"}],
        "volumeMounts": [{"name": "ca", "mountPath": "/etc/ssl"}],
    }
    overrides: Any = {
        "metadata": {"labels": {"app.kubernetes.io/instance": "other"}},
        "spec": {"containers": [{"name": "convert", **more}], "volumes": [{"name": "ca", "configMap": {"name": "ca"}}]},
    }
    change = ("spec.workers", {"podOverrides": overrides})
    job: Any = build_job(parse(changed(change)), image="worker:1", stages=[1])
    plain: Any = build_job(parse(changed()), image="worker:1", stages=[1])
    worker, before = container_of(job), container_of(plain)
    assert worker["env"] == [*before["env"], *more["env"]]
    assert worker["volumeMounts"] == [*before["volumeMounts"], *more["volumeMounts"]]
    template, unchanged = job["spec"]["template"], plain["spec"]["template"]
    assert template["spec"]["volumes"] == [*unchanged["spec"]["volumes"], *overrides["spec"]["volumes"]]
    assert template["metadata"]["labels"] == unchanged["metadata"]["labels"]


@pytest.mark.parametrize(
    "override",
    [{"metadata": {"labels": "none"}}, {"spec": {"containers": ["convert"]}}, {"spec": {"volumes": [None]}}, {"spec": {"containers": 1}}],
)  # fmt: skip
def test_an_override_of_a_wrong_type_is_left_to_the_api_server(override: dict[str, Any]) -> None:
    template = job_of(("spec.workers", {"podOverrides": override}))["spec"]["template"]
    assert template["metadata"]["labels"]["app.kubernetes.io/instance"] == "demo"


def test_building_a_job_twice_gives_the_same_and_leaves_the_conversion_alone() -> None:
    conversion = parse(changed(("spec.workers", {"annotations": {"a": "b"}, "podOverrides": {"spec": {"x": [1]}}})))
    first: Any = build_job(conversion, image="i")
    assert first == build_job(conversion, image="i")
    first["spec"]["template"]["metadata"]["labels"]["z"] = "z"
    assert "z" not in str(build_job(conversion, image="i")["metadata"])
    assert parse(minimal()).pod == {"resources": {}, "queueKind": "Kueue", "security": {}}


LIMITED = ("spec.workers", {"resources": {"requests": {"cpu": "1"}, "limits": {"memory": "256Mi"}}})


def memory_of(job: Any) -> tuple[Any, Any]:
    resources = container_of(job)["resources"]
    return resources["requests"].get("memory"), resources["limits"]["memory"]


def test_memory_grows_after_a_worker_ran_out_of_it() -> None:
    assert memory_of(job_of(LIMITED)) == (None, "256Mi")
    assert memory_of(job_of(LIMITED, memory_percent=150)) == (str(384 << 20),) * 2
    assert container_of(job_of(LIMITED, memory_percent=150))["resources"]["requests"]["cpu"] == "1"


def test_memory_grows_no_further_than_it_may() -> None:
    assert memory_of(job_of(LIMITED, memory_percent=900))[1] == str(1 << 30), "four times what it was"
    capped = job_of(LIMITED, ("spec.retries", {"maxMemory": "300Mi"}), memory_percent=150)
    assert memory_of(capped)[1] == str(300 << 20)


def test_memory_without_a_limit_cannot_grow() -> None:
    unlimited = ("spec.workers", {"resources": {"requests": {"cpu": "1"}}})
    assert grown_memory(parse(changed(FOUR, unlimited)), 150) is None
    assert container_of(job_of(unlimited, memory_percent=150))["resources"] == {"requests": {"cpu": "1"}}


def test_memory_that_nobody_gave_grows_too() -> None:
    assert memory_of(job_of(memory_percent=150)) == (str(384 << 20),) * 2


def test_memory_of_an_override_counts() -> None:
    override = {"spec": {"containers": [{"name": CONTAINER, "resources": {"limits": {"memory": "1G"}}}]}}
    overridden = ("spec.workers", {"podOverrides": override})
    assert grown_memory(parse(changed(FOUR, overridden)), 200) == 2_000_000_000
    assert container_of(job_of(overridden, memory_percent=200))["resources"]["limits"]["memory"] == "2000000000"


@pytest.mark.parametrize(
    ("text", "value"),
    [("256Mi", 256 << 20), ("1.5G", 1.5e9), ("128974848", 128974848), ("100m", 0.1), ("2e3", 2000), ("odd", 0)],
)
def test_quantities_are_numbers(text: str, value: float) -> None:
    assert quantity(text) == pytest.approx(value)


def test_workers_that_belong_together_share_a_node() -> None:
    given = {"coSchedule": True, "affinity": {"podAffinity": {}, "nodeAffinity": {"x": 1}}}
    affinity = job_of(("spec.workers", given))["spec"]["template"]["spec"]["affinity"]
    [term] = affinity["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    assert affinity["nodeAffinity"] == {"x": 1}


def test_a_job_of_some_stages_says_so() -> None:
    for made, reported in ((job_of(stages=[3, 1]), {STAGES_ANNOTATION: "1,3"}), (job_of(), {})):
        template = made["spec"]["template"]["metadata"]
        assert made["metadata"].get("annotations", {}) == template.get("annotations", {}) == reported


def test_its_pods_say_their_stages_whatever_an_override_makes_of_them() -> None:
    """They may outlive their Job, and what they report has to be of their stage."""
    stolen = {"metadata": {"annotations": {STAGES_ANNOTATION: "0", "note": "1"}}}
    for override in (stolen, {"metadata": {"annotations": "nonsense"}}):
        made = job_of(("spec.workers", {"podOverrides": override}), stages=[3, 1])
        assert made["spec"]["template"]["metadata"]["annotations"][STAGES_ANNOTATION] == "1,3"


def test_a_worker_is_reported_for_which_conversion_it_reports() -> None:
    document = changed()
    document["metadata"]["uid"] = "uid-1"
    made: Any = build_job(parse(document), image="i")
    [container] = made["spec"]["template"]["spec"]["containers"]
    assert {"name": "CKPT2PT_CONVERSION_UID", "value": "uid-1"} in container["env"]
    [container] = job_of()["spec"]["template"]["spec"]["containers"]
    assert "CKPT2PT_CONVERSION_UID" not in {item["name"] for item in container["env"]}, "a file has no uid"


@pytest.mark.parametrize("kind", ["containers", "initContainers"])
def test_a_container_that_an_override_adds_can_no_more_become_root_than_ours(kind: str) -> None:
    """By a program of its image that belongs to root and has the set-user-ID bit."""
    added = [{"name": "a"}, {"name": "b", "securityContext": {"capabilities": {"add": ["CHOWN"]}}},
             {"name": "c", "securityContext": {"privileged": True}}, {"name": "d", "securityContext": None}]  # fmt: skip
    made = build_job(parse(changed(("spec.workers.podOverrides.spec", {kind: added}))), image="i:1")
    template: Any = made["spec"]
    found = {
        each["name"]: each["securityContext"]
        for each in template["template"]["spec"][kind]
        if each["name"] != CONTAINER
    }
    asked = {"allowPrivilegeEscalation": False, "capabilities": {"add": ["CHOWN"]}}
    assert found == {"a": SIDE, "b": asked, "c": {"privileged": True}, "d": None}, "the operator refuses the last three"


@pytest.mark.parametrize("text", ["1e400", "1E999999999999999999", "5e-400"])
def test_a_quantity_of_any_exponent_is_a_number(text: str) -> None:
    assert 0 <= quantity(text) <= 1e40
