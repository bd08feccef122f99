"""``python -m harness up|down|images``: the cluster of ``make cluster`` and the images of ``make images``."""

from __future__ import annotations

import argparse
import sys
import time

from harness.cluster import LEFT_RUNNING, Cluster
from harness.images import TARGETS, archive, reference
from harness.machine import ClusterError, UnavailableError
from harness.sharing import take_down_unused


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
    Cluster(LEFT_RUNNING).down()
    take_down_unused()


def images() -> None:
    """Build both images and give them to the cluster, if it runs."""
    cluster = Cluster(LEFT_RUNNING)
    for target in TARGETS:
        kept = archive(target)
        if cluster.is_running:
            cluster.node.import_image(kept)
        print(f"{reference(target)}  {kept}")


COMMANDS = {"up": up, "down": down, "images": images}


def main() -> int:
    """Run one command; 69 (unavailable) when the machine cannot run a cluster."""
    parser = argparse.ArgumentParser(prog="harness", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    try:
        COMMANDS[parser.parse_args().command]()
    except (UnavailableError, ClusterError) as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 69 if isinstance(error, UnavailableError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
