"""Run by `helm test` in a pod of the operator's image: standard library only."""

import copy
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def wait_until_ready(url, seconds=60):
    """True as soon as the operator answers 200; the Service may be a moment behind the pod."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                print(f"ready: {url} answers {answer.status}")
                return True
        except OSError as error:
            last = error
        if time.monotonic() > deadline:
            print(f"FAILED: {url} does not answer 200: {last}")
            return False
        time.sleep(1)


def dry_run(conversion):
    """Let the API server check a conversion without keeping it: (status code, what it says)."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    host = f"[{host}]" if ":" in host else host
    path = f"/apis/{conversion['apiVersion']}/namespaces/{os.environ['NAMESPACE']}/checkpointconversions"
    request = urllib.request.Request(
        f"https://{host}:{port}{path}?dryRun=All&fieldValidation=Strict",
        data=json.dumps(conversion).encode(),
        headers={
            "Authorization": f"Bearer {(ACCOUNT / 'token').read_text().strip()}",
            "Content-Type": "application/json",
        },
    )
    trust = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    try:
        with urllib.request.urlopen(request, timeout=30, context=trust) as answer:
            return answer.status, "accepted"
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()).get("message", "")


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
