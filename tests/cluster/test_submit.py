"""Submitting to a real API server: what is made, who may make it, and that a training makes it exactly once."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from ckpt2pt.kube.conversion.template import name_for
from documents import changed, crd, write
from goldens import REPOSITORY
from harness.kubectl import Kubectl

MINDSPORE = REPOSITORY / ".venv-mindspore" / "bin" / "python"
TRAINING = REPOSITORY / "examples" / "mindspore_train.py"
ROLE: dict[str, Any] = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "Role",
    "metadata": {"name": "submit"},
    "rules": [{"apiGroups": ["ckpt2pt.dev"], "resources": ["checkpointconversions"], "verbs": ["create"]}],
}
BINDING: dict[str, Any] = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "RoleBinding",
    "metadata": {"name": "submit"},
    "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "submit"},
    "subjects": [{"kind": "ServiceAccount", "name": "trainer"}],
}


@pytest.fixture
def there(namespace: Kubectl, kubectl: Kubectl) -> Kubectl:
    """A namespace on a server that knows the kind."""
    if not kubectl.exists("crd", "checkpointconversions.ckpt2pt.dev"):
        kubectl.apply(crd())
        kubectl("wait", "--for=condition=Established", "crd/checkpointconversions.ckpt2pt.dev", "--timeout=60s")
    return namespace


@pytest.fixture
def pod(there: Kubectl, tmp_path: Path) -> dict[str, str]:
    """The environment of a pod whose service account may create conversions, and nothing else."""
    there("create", "serviceaccount", "trainer")
    there.apply(ROLE)
    there.apply({**BINDING, "subjects": [{**BINDING["subjects"][0], "namespace": there.namespace}]})
    config = yaml.safe_load(there("config", "view", "--raw", "--minify"))["clusters"][0]["cluster"]
    account = tmp_path / "account"
    account.mkdir()
    (account / "ca.crt").write_bytes(base64.b64decode(config["certificate-authority-data"]))
    (account / "token").write_text(there("create", "token", "trainer"))
    (account / "namespace").write_text(str(there.namespace))
    server = urlsplit(config["server"])
    return {
        **{name: value for name, value in os.environ.items() if name not in {"KUBECONFIG", "RANK_ID", "RANK"}},
        "KUBERNETES_SERVICE_HOST": str(server.hostname),
        "KUBERNETES_SERVICE_PORT": str(server.port or 443),
        "CKPT2PT_SERVICE_ACCOUNT": str(account),
        "PYTHONPATH": str(REPOSITORY / "converter"),
    }


def submit(environment: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckpt2pt", "submit", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def conversions(there: Kubectl) -> dict[str, Any]:
    return {item["metadata"]["name"]: item for item in json.loads(there("get", "ckc", "-o", "json"))["items"]}


def test_a_training_pod_creates_one_and_may_do_nothing_else(
    there: Kubectl, pod: dict[str, str], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.yaml", changed(("spec.source.iteration", "${step}")))
    for _ in range(2):
        done = submit(pod, "-f", path, "--epoch", 0, "--step", 500, "--output", "name")
        assert (done.returncode, done.stdout.strip()) == (0, name_for("demo", 0, 500)), done.stderr
    assert "is there already" in done.stderr
    [made] = conversions(there).values()
    assert made["spec"]["source"]["iteration"] == 500
    assert made["spec"]["verify"] == "Digest", "the server put its defaults there"
    refused = submit(pod, "-f", path, "--epoch", 0, "--step", 501, "--wait")
    assert refused.returncode == 64
    assert "reading it was refused (403)" in refused.stderr


def test_what_the_server_refuses_is_reported_in_its_words(pod: dict[str, str], tmp_path: Path) -> None:
    unknown = submit(pod, "-f", write(tmp_path / "a.yaml", changed(("spec.sauce", 1))))
    assert unknown.returncode == 64
    assert 'unknown field "spec.sauce"' in unknown.stderr


def test_a_wait_ends_with_the_code_of_the_conversion(there: Kubectl, tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", changed(("metadata.namespace", there.namespace), ("spec.suspend", True)))
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(there("config", "view", "--raw", "--minify"))
    command = [sys.executable, "-m", "ckpt2pt", "submit", "-f", str(path), "--kubeconfig", str(kubeconfig), "--wait"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # The operator's part is played here: this is about the wait.
    there("wait", "--for=create", "ckc/demo", "--timeout=60s")
    status = {"phase": "Failed", "stageStatuses": [{"stage": 0, "state": "Failed", "reason": "InputMissing"}]}
    there("patch", "ckc", "demo", "--subresource=status", "--type=merge", "-p", json.dumps({"status": status}))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 66, err
    assert "demo: Failed" in out


# ----------------------------------------------------------------------------------------------------- real mindspore


@pytest.fixture
def training(tmp_path: Path) -> Any:
    """Four processes of a real training; gives their output."""
    if not MINDSPORE.exists():
        pytest.skip("mindspore is not there: make mindspore")

    def run(environment: dict[str, str], template: Path) -> list[str]:
        words = [str(MINDSPORE), str(TRAINING), str(tmp_path / "out"), str(template)]
        ranks = [
            subprocess.Popen(
                [*words, str(rank)], env={**environment, "RANK_ID": str(rank)},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(4)
        ]  # fmt: skip
        said = [process.communicate(timeout=240)[0] for process in ranks]
        assert [process.returncode for process in ranks] == [0] * 4, said
        return said

    return run


@pytest.fixture
def template(tmp_path: Path) -> Path:
    return write(
        tmp_path / "t.yaml", changed(("spec.parallelism", {"tensor": 4}), ("spec.source.iteration", "${iteration}"))
    )


def test_a_training_of_four_ranks_submits_its_last_checkpoint_once(
    there: Kubectl, pod: dict[str, str], training: Any, template: Path
) -> None:
    said = training(pod, template)
    assert list(conversions(there)) == [name_for("tiny-run", 1, 4)]
    assert conversions(there)[name_for("tiny-run", 1, 4)]["spec"]["source"]["iteration"] == 4
    assert ["is submitted" in text for text in said] == [True, False, False, False]
    training(pod, template)
    assert len(conversions(there)) == 1, "the same training, once more"


def test_a_broken_api_server_does_not_disturb_the_training(
    there: Kubectl, pod: dict[str, str], training: Any, template: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    broken = {
        **pod,
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT": str(port),
        "REQUEST_SECONDS": "2",
    }
    said = training(broken, template)
    assert "no conversion is submitted (exit code 75)" in said[0]
    assert all("the training has ended normally" in text for text in said)
    assert conversions(there) == {}
