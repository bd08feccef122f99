"""What real helm, 3 and 4, makes of the chart.  Part of `make e2e`: a first build of helm takes minutes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from charts import (
    CASES,
    CHART,
    DEPLOY,
    KUBERNETES,
    Object,
    Rendered,
    case_file,
    images,
    rendered_case,
    run,
    template,
    template_of,
)
from ckpt2pt import __version__
from ckpt2pt_operator import access, settings
from ckpt2pt_operator.rules.permissions import PERMISSIONS
from documents import crd
from goldens import COMMITTED
from helm import VERSIONS, MissingError, helm, helm_docs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]  # the first test may build helm

CLUSTER_KINDS = {"ClusterRole", "ClusterRoleBinding"}
each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(params=VERSIONS, scope="module")
def major(request: pytest.FixtureRequest) -> str:
    """Helm 3 and helm 4."""
    try:
        helm(request.param)
    except MissingError as reason:
        pytest.skip(str(reason))
    return str(request.param)


def name_of(found: Object) -> tuple[str, str, str]:
    return found["kind"], found["metadata"].get("namespace", ""), found["metadata"]["name"]


# ------------------------------------------------------------------------------------------------------------ as a whole


@each_case
def test_helm_lint_has_nothing_to_say(major: str, case: str) -> None:
    cluster = ["--kube-version", KUBERNETES, "--strict", "--quiet"]
    found = run(major, "lint", CHART, *cluster, "--values", case_file(case))
    said = found.stdout + found.stderr
    if "monitoring.coreos.com/v1 is not in this cluster" in said:  # `lint` cannot be determined further APIs
        assert case == "full"
        return
    assert found.code == 0, said
    assert not re.search(r"\[(WARNING|ERROR)\]", said), said


@each_case
def test_what_is_rendered_is_as_it_was(major: str, case: str, assert_golden: Callable[[str, Path], None]) -> None:
    objects = sorted(rendered_case(major, case).objects, key=name_of)
    for found in objects:
        if found["kind"] == "CustomResourceDefinition":
            found["spec"] = "as in crds/"
    text = yaml.safe_dump_all(objects, sort_keys=True, width=120, allow_unicode=True)
    assert_golden(text, COMMITTED / "charts" / f"{case}.yaml")


def test_the_readme_is_what_helm_docs_writes(tmp_path: Path) -> None:
    try:
        program = helm_docs()
    except MissingError as reason:
        pytest.skip(str(reason))
    written = subprocess.run(
        [program, "--chart-search-root", CHART, "--dry-run", "--log-level", "error"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert written.stdout.rstrip() == (CHART / "README.md").read_text().rstrip(), "make chart"


def test_a_package_holds_what_is_needed_and_nothing_else(major: str, tmp_path: Path) -> None:
    assert run(major, "package", CHART, "--destination", tmp_path).code == 0
    [package] = tmp_path.glob("ckpt2pt-*.tgz")
    with tarfile.open(package) as tar:
        names = {name.removeprefix("ckpt2pt/") for name in tar.getnames()}
    assert {
        "Chart.yaml",
        "values.yaml",
        "values.schema.json",
        "README.md",
        "files/crds/checkpointconversions.yaml",
    } <= names
    assert not [name for name in names if name.startswith(("ci/", "tests/")) or name.endswith(".gotmpl")]


# --------------------------------------------------------------------------------------------------------------- images


DIGEST = f"sha256:{'1' * 64}"
IMAGES = {
    "one value for both": ("image.registry=r.io/t/", "r.io/t/ckpt2pt-operator:0.1.0", "r.io/t/ckpt2pt:0.1.0"),
    "one for each": (
        "image.registry=r.io,worker.image.registry=w.io",
        "r.io/ckpt2pt-operator:0.1.0",
        "w.io/ckpt2pt:0.1.0",
    ),
    "by digest": (
        f"image.registry=r.io,image.digest={DIGEST},worker.image.digest={DIGEST}",
        f"r.io/ckpt2pt-operator@{DIGEST}",
        f"r.io/ckpt2pt@{DIGEST}",
    ),
    "within the repositories": (
        "image.registry=,image.repository=o.io/a/b,worker.image.repository=w.io/c",
        "o.io/a/b:0.1.0",
        "w.io/c:0.1.0",
    ),
    "a repository of another registry": (
        "image.registry=r.io,worker.image.repository=w.io/c",
        "r.io/ckpt2pt-operator:0.1.0",
        "w.io/c:0.1.0",
    ),
    "a path of the node's own registry": (
        "image.registry=,image.repository=a/b,worker.image.repository=a/c",
        "a/b:0.1.0",
        "a/c:0.1.0",
    ),
}


@pytest.mark.parametrize(("flags", "operator", "worker"), IMAGES.values(), ids=IMAGES)
def test_where_the_images_are(major: str, flags: str, operator: str, worker: str) -> None:
    assert images(template(major, "--set", flags)) == [operator, worker]


@pytest.mark.parametrize("flags", ["image.registry=", "image.registry=,image.repository=r.io/a/b"])
def test_without_a_registry_nothing_is_installed_and_what_to_do_is_said(major: str, flags: str) -> None:
    found = template(major, "--set", flags)
    assert found.code
    assert "build and push both images (README.md, Install it on a cluster)" in found.stderr


def test_static_manifests_are_what_the_chart_renders(assert_golden: Callable[[str, Path], None]) -> None:
    try:
        flags = ("--namespace", "ckpt2pt", "--no-hooks", "--set", "crds.enabled=false")
        found = template("v4", *flags)
    except MissingError as reason:
        pytest.skip(str(reason))
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ckpt2pt"}}
    assert_golden(yaml.safe_dump_all([namespace, *found.objects], width=120), DEPLOY / "ckpt2pt.yaml")


# ------------------------------------------------------------------------------------------------------------------ CRD


def test_the_crd_is_rendered_whole_and_kept(major: str) -> None:
    [found] = rendered_case(major, "default").of("CustomResourceDefinition")
    assert found["spec"] == crd()["spec"]
    assert found["metadata"]["name"] == crd()["metadata"]["name"]
    assert found["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


@pytest.mark.parametrize(("flag", "left"), [("crds.enabled=false", None), ("crds.keep=false", {})])
def test_the_crd_may_be_left_out_or_go_with_the_chart(major: str, flag: str, left: object) -> None:
    found = template(major, "--set", flag).of("CustomResourceDefinition")
    assert [document["metadata"].get("annotations", {}) for document in found] == ([] if left is None else [left])


# ----------------------------------------------------------------------------------------------------------- Pod Security


def restricted(pod: Object) -> list[str]:
    """What the restricted Pod Security Standard has against a pod's spec."""
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    whole = pod.get("securityContext", {})
    found = [key for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
    found += [f"volume {v['name']}" for v in pod.get("volumes", []) if not set(v) - {"name"} <= allowed]
    for container in [*pod["containers"], *pod.get("initContainers", []), *pod.get("ephemeralContainers", [])]:
        own = container.get("securityContext", {})
        merged = {**whole, **own}
        capabilities = own.get("capabilities", {})
        checks = {
            "privileged": own.get("privileged"),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is not False,
            "runAsNonRoot": merged.get("runAsNonRoot") is not True,
            "runAsUser": merged.get("runAsUser") == 0,
            "seccompProfile": merged.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"},
            "capabilities": "ALL" not in capabilities.get("drop", [])
            or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"},
            "hostPort": any(port.get("hostPort") for port in container.get("ports", [])),
            "procMount": own.get("procMount", "Default") != "Default",
        }
        found += [f"{container['name']}: {name}" for name, wrong in checks.items() if wrong]
    return found


def pods_of(rendered: Rendered) -> list[Object]:
    pods = [found["spec"] for found in rendered.of("Pod")]
    return pods + [
        found["spec"]["template"]["spec"] for found in rendered.of("Deployment", "Job", "StatefulSet", "DaemonSet")
    ]


@each_case
def test_every_pod_fulfils_the_restricted_standard_and_more(major: str, case: str) -> None:
    pods = pods_of(rendered_case(major, case))
    assert len(pods) == 2  # the operator, and helm test
    for pod in pods:
        assert restricted(pod) == []
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert {"requests", "limits"} == set(container["resources"])


def test_the_check_of_the_standard_sees_what_is_wrong() -> None:
    bad = {"hostNetwork": True, "volumes": [{"name": "h", "hostPath": {}}], "containers": [{"name": "c"}]}
    assert restricted(bad) == [
        "hostNetwork", "volume h", "c: allowPrivilegeEscalation", "c: runAsNonRoot", "c: seccompProfile", "c: capabilities",
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- rights

SERVED: dict[tuple[str, ...], set[str]] = {}
for group, resource, sub, verbs in access.NEEDED + access.CLAIMS + access.DELETES:
    SERVED.setdefault((group, f"{resource}/{sub}" if sub else resource), set()).update(verbs)
"""What the operator asks for at its start; without one of them it does not begin."""
CRD_ONLY = {
    ("apiextensions.k8s.io", "customresourcedefinitions", "checkpointconversions.ckpt2pt.dev"): {"list", "watch"}
}
ASCEND = {("mindxdl.gitee.com", "ascendjobs"): {"get", "list", "watch"}}
LEASE = {
    ("coordination.k8s.io", "leases"): {"create"},
    ("coordination.k8s.io", "leases", "ckpt2pt-operator"): {"get", "update"},
}


def rights(role: Object) -> dict[tuple[str, ...], set[str]]:
    """(group, resource[, name]) -> verbs."""
    found: dict[tuple[str, ...], set[str]] = {}
    for rule in role["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                for name in rule.get("resourceNames", [None]):
                    key = (group, resource) if name is None else (group, resource, name)
                    found.setdefault(key, set()).update(rule["verbs"])
    return found


def bound(rendered: Rendered) -> dict[tuple[str, str, str], dict[tuple[str, ...], set[str]]]:
    """What the operator's account is bound to: (kind, namespace, name) -> rights."""
    [account] = [a for a in rendered.of("ServiceAccount") if "test" not in a["metadata"]["name"]]
    roles = {name_of(role): role for role in rendered.of("Role", "ClusterRole")}
    found = {}
    for binding in rendered.of("RoleBinding", "ClusterRoleBinding"):
        subjects = [(s["kind"], s["namespace"], s["name"]) for s in binding["subjects"]]
        if ("ServiceAccount", "ops", account["metadata"]["name"]) in subjects:
            key = (binding["roleRef"]["kind"], binding["metadata"].get("namespace", ""), binding["roleRef"]["name"])
            found[key] = rights(roles[key])
    return found


def test_the_rights_in_the_whole_cluster(major: str) -> None:
    assert bound(rendered_case(major, "default")) == {("ClusterRole", "", "ckpt2pt-operator"): SERVED | CRD_ONLY}


def test_the_rights_in_two_namespaces_and_no_cluster_role_at_all(major: str) -> None:
    rendered = rendered_case(major, "namespaced")
    assert not rendered.of(*CLUSTER_KINDS)
    assert bound(rendered) == {
        ("Role", "team-a", "ckpt2pt-operator"): SERVED | ASCEND,
        ("Role", "team-b", "ckpt2pt-operator"): SERVED | ASCEND,
        ("Role", "ops", "ckpt2pt-leader-election"): LEASE,
    }
    assert {found["kind"] for found in rendered.objects if "namespace" not in found["metadata"]} == {
        "CustomResourceDefinition"
    }


def test_further_rights_come_with_what_needs_them_and_no_others(major: str) -> None:
    found = bound(rendered_case(major, "full"))[("ClusterRole", "", "converter-operator")]
    read = {"get", "list", "watch"}
    wanted = SERVED | CRD_ONLY | ASCEND | {
        ("batch.volcano.sh", "jobs"): read,
        ("trainer.kubeflow.org", "trainjobs"): read,
        ("kubeflow.org", "pytorchjobs"): read,
        ("kubeflow.org", "mpijobs"): read,
        ("example.com", "trainings"): read,
        ("ckpt2pt.dev", "checkpointconversions"): read | {"create", "delete"},
        ("", "configmaps"): {"get"},
    }  # fmt: skip
    del wanted[("", "persistentvolumeclaims")]
    assert found == wanted


@each_case
def test_no_role_has_a_wildcard_or_reads_secrets(major: str, case: str) -> None:
    for role in rendered_case(major, case).of("Role", "ClusterRole"):
        words = {word for key, verbs in rights(role).items() for word in (*key, *verbs)}
        assert not {"*", "secrets", "pods/exec", "pods/log", "impersonate", "escalate", "bind"} & words
        assert "nonResourceURLs" not in json.dumps(role)


def test_roles_of_people_and_of_the_submitter(major: str) -> None:
    roles = {role["metadata"]["name"]: role for role in rendered_case(major, "full").of("ClusterRole")}
    assert rights(roles["converter-submit"]) == {("ckpt2pt.dev", "checkpointconversions"): {"create"}}
    labels = {
        name: {k.rpartition("-")[2] for k in role["metadata"]["labels"] if "aggregate-to" in k}
        for name, role in roles.items()
    }
    assert labels == {
        "converter-operator": set(), "converter-submit": set(),
        "converter-view": {"view", "edit", "admin"}, "converter-edit": {"edit", "admin"},
    }  # fmt: skip
    assert "update" not in rights(roles["converter-edit"])[("ckpt2pt.dev", "checkpointconversions/status")]


def test_without_rbac_there_are_none_but_those_of_helm_test(major: str) -> None:
    rendered = template(major, "--set", "rbac.create=false,rbac.userRoles.enabled=false")
    assert {found["metadata"]["name"] for found in rendered.of("Role", "RoleBinding", *CLUSTER_KINDS)} == {
        "ckpt2pt-test"
    }


# --------------------------------------------------------------------------------------------------------------- wiring


def test_service_policies_and_monitors_find_the_pods_they_mean(major: str) -> None:
    rendered = rendered_case(major, "full")
    [deployment] = rendered.of("Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    selectors = [deployment["spec"]["selector"]["matchLabels"]]
    selectors += [found["spec"]["selector"] for found in rendered.of("Service")]
    selectors += [found["spec"]["selector"]["matchLabels"] for found in rendered.of("PodDisruptionBudget")]
    selectors += [
        f["spec"]["podSelector"]["matchLabels"]
        for f in rendered.of("NetworkPolicy")
        if f["metadata"]["namespace"] == "ops"
    ]
    assert len(selectors) == 4
    assert all(selector and selector.items() <= labels for selector in selectors)
    [monitor] = rendered.of("ServiceMonitor")
    [service] = rendered.of("Service")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()


def test_workers_are_found_by_the_labels_that_they_are_given(major: str) -> None:
    from ckpt2pt.kube.conversion.job import build_job
    from ckpt2pt.kube.conversion.spec import parse

    conversion = parse(yaml.safe_load((CHART / "files" / "first-conversion.yaml").read_text()))
    job: Any = build_job(conversion, image="worker:1")
    labels = job["spec"]["template"]["metadata"]["labels"].items()
    rendered = rendered_case(major, "full")
    [monitor] = rendered.of("PodMonitor")
    [workers] = [f for f in rendered.of("NetworkPolicy") if f["metadata"]["namespace"] == "team-a"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels
    assert workers["spec"]["podSelector"]["matchLabels"].items() <= labels


def test_the_operator_reads_its_flags_and_the_configuration_that_is_mounted(major: str, tmp_path: Path) -> None:
    rendered = rendered_case(major, "full")
    [config] = [found for found in rendered.of("ConfigMap") if found["metadata"]["name"] == "converter-operator"]
    [container] = rendered.of("Deployment")[0]["spec"]["template"]["spec"]["containers"]
    files = {flag.partition("=")[2] for flag in container["args"] if "=/etc/ckpt2pt/" in flag}
    assert files == {f"/etc/ckpt2pt/{name}" for name in config["data"]}
    for name, text in config["data"].items():
        (tmp_path / name).write_text(text)
    given = settings.read([flag.replace("/etc/ckpt2pt", str(tmp_path)) for flag in container["args"]], {})
    assert given.namespaces == ()
    assert given.worker_image == "registry.example.com/tools/ckpt2pt:9"
    assert given.worker_defaults["nodeSelector"] == {"kubernetes.io/arch": "arm64"}
    assert len(given.training_kinds) == 7
    assert (given.metrics_port, given.leader_elect, given.lease_name, given.lease_namespace) == (
        9090,
        True,
        "converter-operator",
        "ops",
    )
    assert (given.check_volumes, given.log_format, given.log_level) == (False, "text", "debug")


def test_the_defaults_of_the_chart_are_those_of_the_operator(major: str) -> None:
    [container] = rendered_case(major, "default").of("Deployment")[0]["spec"]["template"]["spec"]["containers"]
    flags = [flag for flag in container["args"] if "=/etc/ckpt2pt/" not in flag]
    image = f"--worker-image=registry.example.com/team/ckpt2pt:{__version__}"
    assert settings.read(flags, {}) == settings.read([image], {})


def test_a_changed_configuration_restarts_the_operator(major: str) -> None:
    def checksum(*flags: str) -> str:
        [deployment] = template(major, *flags).of("Deployment")
        return str(deployment["spec"]["template"]["metadata"]["annotations"]["checksum/config"])

    assert checksum() == checksum()
    assert checksum() != checksum("--set", "worker.defaults.schedulerName=volcano")


def test_only_a_lease_lets_two_operators_overlap(major: str) -> None:
    strategies = [
        rendered_case(major, case).of("Deployment")[0]["spec"]["strategy"]["type"] for case in ("default", "full")
    ]
    assert strategies == ["Recreate", "RollingUpdate"]


def test_monitoring_objects_carry_the_files(major: str) -> None:
    rendered = rendered_case(major, "full")
    [rule] = rendered.of("PrometheusRule")
    [group] = rule["spec"]["groups"]
    source = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    assert [alert["expr"] for alert in group["rules"]] == [a["expr"].replace("HOME", 'namespace="ops"') for a in source]
    for alert in group["rules"]:
        anchor = alert["annotations"]["runbook_url"].partition("#")[2]
        assert anchor == alert["alert"].lower()
        assert alert["labels"]["team"] == "platform"
        assert alert["labels"]["severity"] in {"info", "warning", "critical"}
    [dashboard] = [found for found in rendered.of("ConfigMap") if found["metadata"]["name"] == "converter-dashboard"]
    assert json.loads(dashboard["data"]["ckpt2pt.json"]) == json.loads(
        (CHART / "files" / "dashboards" / "ckpt2pt.json").read_text()
    )


def test_an_alert_may_be_left_out(major: str) -> None:
    flags = ["--set", "metrics.prometheusRule.enabled=true,metrics.prometheusRule.disabled={Ckpt2ptStageOutOfMemory}"]
    [rule] = template(major, *flags).of("PrometheusRule")
    assert "Ckpt2ptStageOutOfMemory" not in str(rule)
    assert len(rule["spec"]["groups"][0]["rules"]) == 8


@each_case
def test_names_are_unique_and_short_enough(major: str, case: str) -> None:
    names = [name_of(found) for found in rendered_case(major, case).objects]
    assert len(names) == len(set(names))
    long = template(major, "--set", f"fullnameOverride={'n' * 40}", "--set", "rbac.submitter.enabled=true").objects
    assert all(len(found["metadata"]["name"]) <= 63 for found in long if found["kind"] != "CustomResourceDefinition")


# ------------------------------------------------------------------------------------------------------ admission policy

POLICY = ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
ON_ADMISSION = set(PERMISSIONS) - {"serviceAccountName"}
"""Permissions that fields of a conversion need; the others are asked for inside of podOverrides, where the operator looks."""


def refused_by(rendered: Rendered) -> set[str]:
    """Permissions that the policy asks for."""
    [policy, binding] = rendered.of(*POLICY)
    assert binding["spec"] == {"policyName": policy["metadata"]["name"], "validationActions": ["Deny"]}
    assert policy["spec"]["failurePolicy"] == "Fail"
    return {
        name for rule in policy["spec"]["validations"] for name in re.findall(r"worker\.allow\.(\w+)", rule["message"])
    }


def flags_of(rendered: Rendered) -> list[str]:
    [found] = rendered.of("Deployment")
    return [word for word in found["spec"]["template"]["spec"]["containers"][0]["args"] if word.startswith("--allow")]


def test_policy_and_operator_refuse_what_the_values_do_not_allow(major: str) -> None:
    found = template(major)
    assert (refused_by(found), flags_of(found)) == (ON_ADMISSION, ["--allow="])
    some = template(major, "--set", "worker.allow.root=true,worker.allow.hostPath=true")
    assert (refused_by(some), flags_of(some)) == (ON_ADMISSION - {"root", "hostPath"}, ["--allow=hostPath,root"])
    everything = template(major, "--set", ",".join(f"worker.allow.{name}=true" for name in PERMISSIONS))
    assert not everything.of(*POLICY), "there is nothing to refuse"
    assert settings.read(["--worker-image=i", *flags_of(everything)], {}).allow == tuple(sorted(PERMISSIONS))


@pytest.mark.parametrize(
    ("flags", "made"),
    [
        ([], True),
        (["--set", "admissionPolicy.enabled=false"], False),
        (["--kube-version", "1.29.0"], False),
        (["--kube-version", "1.30.0"], True),
        (["--set", "watchNamespaces={team-a}"], False),
        (["--set", "watchNamespaces={team-a},admissionPolicy.enabled=true"], True),
    ],
)
def test_there_is_a_policy_where_there_can_be_one(major: str, flags: list[str], made: bool) -> None:
    found = template(major, *flags).of(*POLICY)
    assert len(found) == (2 if made else 0)
    if made:
        selector = found[0]["spec"]["matchConstraints"].get("namespaceSelector", {}).get("matchExpressions", [])
        assert [each["values"] for each in selector] == ([["team-a"]] if "watchNamespaces" in str(flags) else [])


# -------------------------------------------------------------------------------------------------------------- refusals

BAD = [
    ("operator.replicas=2", "set operator.leaderElection.enabled to true"),
    ("serviceAccount.create=false", "give the name of an existing ServiceAccount in serviceAccount.name"),
    ("podDisruptionBudget.enabled=true,podDisruptionBudget.minAvailable=1", "make it less than operator.replicas"),
    ("networkPolicy.workers.enabled=true", "networkPolicy.workers.enabled needs networkPolicy.enabled"),
    (
        "networkPolicy.enabled=true,networkPolicy.workers.enabled=true",
        "name the namespaces in networkPolicy.workers.namespaces",
    ),
    ("operator.replica=2", "additional properties 'replica' not allowed"),
    ("operator.logLevel=loud", "value must be one of 'debug', 'info', 'warning', 'error'"),
    ("watchNamespaces=team-a", "got string, want array"),
    ("image.digest=abc", "does not match pattern"),
    (
        "podDisruptionBudget.enabled=true,podDisruptionBudget.minAvailable=100%",
        "minAvailable keeps every operator",
    ),
    (
        "operator.deleteFinished=false,worker.defaults.timeToLiveSeconds=60",
        "set operator.deleteFinished to true, or nothing is deleted",
    ),
    ("worker.defaults.resource=1", "additional properties 'resource' not allowed"),
]


@pytest.mark.parametrize(("flags", "words"), BAD, ids=[flags for flags, _ in BAD])
def test_a_bad_combination_or_value_is_refused_in_clear_words(major: str, flags: str, words: str) -> None:
    found = template(major, "--set", flags)
    assert found.code != 0
    assert words in found.stderr


@pytest.mark.parametrize("name", ["serviceMonitor", "podMonitor", "prometheusRule"])
def test_monitoring_objects_need_the_api_they_are_of(major: str, name: str) -> None:
    flags = ("--set", f"image.registry=r.io,metrics.{name}.enabled=true")
    found = run(major, "template", "x", CHART, "--kube-version", KUBERNETES, *flags)
    assert found.code != 0
    assert f"metrics.{name}.enabled needs the Prometheus Operator" in found.stderr


def test_finished_conversions_are_deleted_only_by_an_operator_that_has_the_right_to(major: str) -> None:
    kind = ("ckpt2pt.dev", "checkpointconversions")
    for wanted in ("true", "false"):
        found = template(major, "--set", f"operator.deleteFinished={wanted}")
        [role] = [role for role in found.of("ClusterRole") if kind in rights(role) and "list" in rights(role)[kind]][:1]
        [container] = found.of("Deployment")[0]["spec"]["template"]["spec"]["containers"]
        assert ("delete" in rights(role)[kind]) == (wanted == "true")
        assert ("--delete-finished" in container["args"]) == (wanted == "true")


@pytest.mark.parametrize(("version", "has"), [("1.29.0", False), ("1.30.4", False), ("1.31.0", True), ("1.36.3", True)])
def test_fields_to_select_by_are_left_out_where_an_api_server_knows_none(major: str, version: str, has: bool) -> None:
    found = run(major, "template", "x", CHART, "--kube-version", version, "--set", "image.registry=r.io")
    [crd] = found.of("CustomResourceDefinition")
    assert all(("selectableFields" in served) == has for served in crd["spec"]["versions"])


def test_what_workers_tell_carries_their_conversion(major: str) -> None:
    [monitor] = rendered_case(major, "full").of("PodMonitor")
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert {found["targetLabel"] for found in endpoint["relabelings"]} == {"conversion", "attempt"}


def test_an_old_cluster_is_refused(major: str) -> None:
    found = run(major, "template", "x", CHART, "--kube-version", "1.28.9")
    assert found.code != 0
    assert ">=1.29.0-0" in found.stderr


# ---------------------------------------------------------------------------------------------------------------- notes


@each_case
def test_the_notes_lead_to_a_first_conversion(major: str, case: str, tmp_path: Path) -> None:
    # `helm template` shows no notes, and `helm install --dry-run` of helm 3 wants a cluster: render them as an object.
    copy = tmp_path / "ckpt2pt"
    shutil.copytree(CHART, copy)
    (copy / "templates" / "NOTES.txt").rename(copy / "files" / "notes.txt")
    (copy / "templates" / "notes.yaml").write_text('notes: {{ tpl (.Files.Get "files/notes.txt") . | toJson }}\n')
    found = template_of(copy, major, "--values", case_file(case), "--show-only", "templates/notes.yaml")
    notes = yaml.safe_load(found.stdout)["notes"]
    assert f"-n {'team-a' if case == 'namespaced' else 'default'} apply -f first-conversion.yaml" in notes
    document = re.search(r"<<'END'\n(.*?)\n +END", notes, re.DOTALL)
    assert document
    assert yaml.safe_load(document[1]) == yaml.safe_load((CHART / "files" / "first-conversion.yaml").read_text())
    assert "helm uninstall leaves it" in notes
