"""Who may do what, as the API server's own authorizer answers it; and that what is allowed is enough."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from harness.checkpoints import Unfinished
from harness.golden import document, owner_of, reach, status
from harness.kubectl import Kubectl
from harness.machine import ClusterError, wait_until
from harness.pods import processes_of
from harness.release import Release

Rights = set[str]
"""``verb resource.group[/name]`` each."""

SERVED = {
    "checkpointconversions.ckpt2pt.dev": "get list watch delete",
    "checkpointconversions/status.ckpt2pt.dev": "update",
    "jobs.batch": "get list watch create patch delete",
    "pods": "list watch",
    "events": "list create patch",
    "persistentvolumeclaims": "get",
}
"""All that the operator may do in a namespace that it serves."""

CLUSTER = {"customresourcedefinitions.apiextensions.k8s.io/checkpointconversions.ckpt2pt.dev": "list watch"}
"""And besides, where it serves all of them."""

FINISHED = {"checkpointconversions.ckpt2pt.dev": "delete"}
"""Withdrawn by operator.deleteFinished."""

LEASE = {"leases.coordination.k8s.io": "create", "leases.coordination.k8s.io/ckpt2pt-operator": "get update"}

TRIGGER = {"checkpointconversions.ckpt2pt.dev": "create", "configmaps": "get"}

TEMPTING = """
get secrets                     list secrets                    create pods
delete pods                     get pods                        patch pods
create pods/exec                get pods/log                    create pods/eviction
create pods/ephemeralcontainers create serviceaccounts/token    impersonate serviceaccounts
create checkpointconversions.ckpt2pt.dev                        patch checkpointconversions.ckpt2pt.dev
deletecollection checkpointconversions.ckpt2pt.dev              patch checkpointconversions/status.ckpt2pt.dev
update jobs.batch               deletecollection jobs.batch     patch jobs/status.batch
create persistentvolumeclaims   list persistentvolumeclaims     delete events
get configmaps                  create configmaps               create deployments.apps
create cronjobs.batch           list nodes                      get nodes/proxy
list namespaces                 list persistentvolumes          create customresourcedefinitions.apiextensions.k8s.io
update customresourcedefinitions.apiextensions.k8s.io           create roles.rbac.authorization.k8s.io
bind clusterroles.rbac.authorization.k8s.io                     escalate roles.rbac.authorization.k8s.io
create clusterrolebindings.rbac.authorization.k8s.io            get leases.coordination.k8s.io
"""
"""What whoever takes the operator over would want: two words each."""


def flat(*tables: dict[str, str]) -> Rights:
    return {f"{verb} {thing}" for table in tables for thing, verbs in table.items() for verb in verbs.split()}


def review(kubectl: Kubectl, kind: str, *specs: dict[str, Any], user: str = "") -> list[dict[str, Any]]:
    """Ask the authorizer; its answers."""
    asked = [{"apiVersion": "authorization.k8s.io/v1", "kind": kind, "spec": spec} for spec in specs]
    words = ("--validate=false", "--filename=-", "--output=json", *([f"--as={user}"] if user else []))
    text = kubectl("create", *words, stdin="\n".join(map(json.dumps, asked)))
    found: list[dict[str, Any]] = []
    while text := text.lstrip():
        answer, end = json.JSONDecoder().raw_decode(text)
        found.append(answer["status"])
        text = text[end:]
    assert len(found) == len(specs)
    return found


def rights(kubectl: Kubectl, user: str) -> Rights:
    """Everything that an account may do in the namespace, but for what every account may."""
    [reported] = review(kubectl, "SelfSubjectRulesReview", {"namespace": kubectl.namespace}, user=user)
    assert not reported.get("incomplete"), reported
    found: Rights = set()
    for rule in reported["resourceRules"]:
        for group in rule.get("apiGroups", ()):
            for resource in rule.get("resources", ()):
                thing = f"{resource}.{group}" if group else resource
                names = [f"/{name}" for name in rule.get("resourceNames", ())] or [""]
                found |= {f"{verb} {thing}{name}" for verb in rule["verbs"] for name in names}
    every = {"authentication.k8s.io", "authorization.k8s.io"}
    return {right for right in found if not any(right.endswith(f"reviews.{group}") for group in every)}


def allowed(kubectl: Kubectl, user: str, *asked: str) -> Rights:
    """What of the rights that are asked for an account has there."""

    def attributes(right: str) -> dict[str, Any]:
        verb, thing = right.split()
        whole, _, group = thing.partition(".")
        resource, _, sub = whole.partition("/")
        return {"namespace": kubectl.namespace, "verb": verb, "group": group, "resource": resource, "subresource": sub}

    specs = [{"user": user, "resourceAttributes": attributes(right)} for right in asked]
    answers = review(kubectl, "SubjectAccessReview", *specs)
    return {right for right, answer in zip(asked, answers, strict=True) if answer["allowed"]}


# ------------------------------------------------------------------------------------------------------- the operator


def test_the_operator_may_do_just_this(operator: Release, namespace: Kubectl) -> None:
    assert rights(namespace, operator.account) == flat(SERVED, CLUSTER)
    assert rights(operator.kubectl, operator.account) == flat(SERVED, CLUSTER), "no more at home"


def test_and_is_refused_what_one_would_want_who_takes_it_over(operator: Release, namespace: Kubectl) -> None:
    words = TEMPTING.split()
    tempting = [" ".join(pair) for pair in zip(words[::2], words[1::2], strict=True)]
    control = "create jobs.batch"
    assert allowed(namespace, operator.account, control, *tempting) == {control}


def test_what_it_may_is_enough(operator: Release, golden: Path, namespace: Kubectl, volume: Path) -> None:
    """The API server has refused it nothing in a whole conversion."""
    folder = golden / "megatron06" / "b_tp2pp2"
    os.chown(volume, owner_of(folder), -1)
    before, forbidden = counted(operator, "api_requests"), counted(operator, "api_forbidden")
    namespace.apply(document(folder, volume, full=False))
    reach(namespace, "Succeeded")
    assert counted(operator, "api_forbidden") == forbidden
    asked = {(of["verb"], of["resource"]) for of in map(dict, counted(operator, "api_requests") - before)}
    assert asked >= {("post", "jobs"), ("post", "events"), ("put", "checkpointconversions/status")}


def counted(release: Release, name: str) -> Counter[tuple[tuple[str, str], ...]]:
    """One of the operator's counters, by its labels."""
    found = re.findall(rf"^ckpt2pt_operator_{name}_total{{(.*)}} (.*)$", release.metrics(), re.MULTILINE)
    return Counter({tuple(re.findall(r'(\w+)="([^"]*)"', labels)): int(float(number)) for labels, number in found})


def test_in_some_namespaces_it_may_do_nothing_in_others(
    releases: Callable[..., Release], namespace: Kubectl, kubectl: Kubectl
) -> None:
    release = releases()
    try:
        release.install(
            watchNamespaces=[namespace.namespace],
            operator={"replicas": 0, "leaderElection": {"enabled": True}, "deleteFinished": False},
            trainingTrigger={"enabled": True},
            crds={"enabled": False},
        )
        assert rights(namespace, release.account) == flat(SERVED, TRIGGER) - flat(FINISHED)
        assert rights(release.kubectl, release.account) == flat(LEASE)
        assert rights(kubectl.within("kube-system"), release.account) == set()
    finally:
        release.uninstall()


# ------------------------------------------------------------------------------------------------- people and trainings


@pytest.fixture
def bound(operator: Release, namespace: Kubectl) -> Callable[[str], str]:
    """Give a new user one of the cluster's roles in the namespace; the user's name."""

    def bind(role: str) -> str:
        user = f"{role}-of-{namespace.namespace}"
        namespace("create", "rolebinding", role, f"--clusterrole={role}", f"--user={user}")
        right = "get checkpointconversions.ckpt2pt.dev"
        # Aggregated roles are written by a controller.
        wait_until(f"{role} to be aggregated", lambda: allowed(namespace, user, right) != set())
        return user

    return bind


def test_the_roles_that_people_have_already_cover_conversions(
    bound: Callable[[str], str], namespace: Kubectl, golden: Path, tmp_path: Path
) -> None:
    viewer, editor = bound("view"), bound("edit")
    conversion = json.dumps(document(golden / "megatron06" / "b_tp2pp2", tmp_path, suspend=True))
    with pytest.raises(ClusterError, match=r'cannot create resource "checkpointconversions"'):
        namespace("create", f"--as={viewer}", "--filename=-", stdin=conversion)
    namespace("create", f"--as={editor}", "--filename=-", stdin=conversion)
    wait_until("the operator to have seen it", lambda: "phase" in status(namespace))
    assert "golden" in namespace("get", "ckc", f"--as={viewer}")
    patch = ("--subresource=status", "--type=merge", '--patch={"status":{"phase":"Succeeded"}}')
    with pytest.raises(ClusterError, match="checkpointconversions/status"):
        namespace("patch", "ckc", "golden", f"--as={editor}", *patch)
    namespace("delete", "ckc", "golden", f"--as={editor}")


# ---------------------------------------------------------------------------------------------------------- the workers


def test_a_worker_has_no_token_no_rights_and_no_privileges(
    operator: Release, golden: Path, namespace: Kubectl, volume: Path
) -> None:
    unfinished = Unfinished(golden / "megatron06" / "b_tp2pp2", volume)
    namespace.apply(unfinished.document())
    reach(namespace, "Running")
    wait_until("a worker", lambda: _running(namespace) != [])
    pod = _running(namespace)[0]
    account = f"system:serviceaccount:{namespace.namespace}:{pod['spec']['serviceAccountName']}"
    assert rights(namespace, account) == set()
    assert [next(iter(set(found) - {"name"})) for found in pod["spec"]["volumes"]] == ["hostPath"]

    worker = processes_of(pod, "ckpt2pt")[0]
    root = Path(f"/proc/{worker}/root")
    assert (root / "etc" / "passwd").exists(), "this is the file system that the worker sees"
    for folder in ("run/secrets", "var/run/secrets"):
        assert not (root / folder).exists()
    mounts = Path(f"/proc/{worker}/mounts").read_text()
    assert "serviceaccount" not in mounts
    assert re.search(r"^\S+ / \S+ ro[, ]", mounts, re.MULTILINE), "a read-only root file system"
    reported = dict(re.findall(r"^(\w+):\s+(\S+)", Path(f"/proc/{worker}/status").read_text(), re.MULTILINE))
    assert int(reported["CapEff"], 16) == int(reported["CapBnd"], 16) == 0
    assert (reported["NoNewPrivs"], reported["Seccomp"]) == ("1", "2")
    assert int(reported["Uid"]) == owner_of(unfinished.folder)
    unfinished.finish()
    reach(namespace, "Succeeded")


def _running(namespace: Kubectl) -> list[dict[str, Any]]:
    found: Iterable[dict[str, Any]] = namespace.get("pods", "--field-selector=status.phase=Running")["items"]
    return list(found)
