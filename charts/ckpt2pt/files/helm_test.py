"""Run by `helm test` in a pod of the operator's image: standard library only."""

import copy
import json
import os
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def wait_until_ready(url, seconds=60):
    """True as soon as the operator answers 200; it may just have been installed, and the Service is a moment behind the pod."""
    deadline = time.monotonic() + seconds
    while True:
        ready, said = look(url)
        if ready or time.monotonic() > deadline:
            print(f"{'ok' if ready else 'FAILED'}: {said}")
            return ready
        time.sleep(1)


def look(url):
    """Whether it answers 200, and what it says; where the cluster has no DNS, what the kubelet found, by way of the API server."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return True, f"{url} answers {answer.status}"
    except OSError as error:
        if not isinstance(getattr(error, "reason", None), socket.gaierror):
            return False, f"{url} does not answer 200: {error}"
    namespace, name = os.environ["NAMESPACE"], os.environ["DEPLOYMENT"]
    code, deployment = ask(f"/apis/apps/v1/namespaces/{namespace}/deployments/{name}")
    ready = deployment.get("status", {}).get("readyReplicas", 0)
    why = f"{url} cannot be looked up, as if the cluster had no DNS"
    return bool(ready), f"{why}; deployment {name} gets {code} and has {ready} ready replicas"


def dry_run(conversion):
    """Let the API server check a conversion without keeping it: (status code, what it says)."""
    path = f"/apis/{conversion['apiVersion']}/namespaces/{os.environ['NAMESPACE']}/checkpointconversions"
    code, answer = ask(f"{path}?dryRun=All&fieldValidation=Strict", conversion)
    return code, answer.get("message", "accepted")


def ask(path, document=None):
    """One request to the API server: (status code, answer)."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    host = f"[{host}]" if ":" in host else host
    request = urllib.request.Request(
        f"https://{host}:{port}{path}",
        data=None if document is None else json.dumps(document).encode(),
        headers={
            "Authorization": f"Bearer {(ACCOUNT / 'token').read_text().strip()}",
            "Content-Type": "application/json",
        },
    )
    trust = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    try:
        with urllib.request.urlopen(request, timeout=30, context=trust) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def main():
    """Exit code 0 when all three hold."""
    good = json.loads(os.environ["CONVERSION"])
    good["metadata"]["name"] = "helm-test"
    wrong = copy.deepcopy(good)
    wrong["spec"]["model"]["numLayers"] = good["spec"]["parallelism"]["pipeline"] + 1
    passed = wait_until_ready(os.environ["READY_URL"])
    for name, conversion, wanted in (("right", good, 201), ("wrong", wrong, 422)):
        code, message = dry_run(conversion)
        print(f"{'ok' if code == wanted else 'FAILED'}: a {name} CheckpointConversion gets {code}: {message}")
        passed = passed and code == wanted
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
