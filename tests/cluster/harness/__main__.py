"""``python -m harness up|down``: the cluster of ``make cluster``."""

from __future__ import annotations

import argparse
import sys
import time

from harness.cluster import LEFT_RUNNING, OF_THE_SUITE, Cluster
from harness.machine import ClusterError, Unavailable


def up() -> None:
    """Bring the cluster up and leave it running."""
    cluster, began = Cluster(LEFT_RUNNING), time.monotonic()
    print("Kubernetes is built from source the first time: about ten minutes", file=sys.stderr)
    cluster.up()
    print(
        f"# ready after {time.monotonic() - began:.0f} s; logs and data in {cluster.state}; `make cluster-down` ends it"
    )
    print(f"export KUBECONFIG={cluster.kubeconfig}")


def down() -> None:
    """End it, and what an interrupted test run may have left."""
    for index in (LEFT_RUNNING, OF_THE_SUITE):
        Cluster(index).down()


COMMANDS = {"up": up, "down": down}


def main() -> int:
    """Run one command; 69 (unavailable) when the machine cannot run a cluster."""
    parser = argparse.ArgumentParser(prog="harness", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    try:
        COMMANDS[parser.parse_args().command]()
    except (Unavailable, ClusterError) as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 69 if isinstance(error, Unavailable) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
