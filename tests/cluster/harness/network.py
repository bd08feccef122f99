"""Addresses of one cluster, and the bridges and rules that make them work."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from harness.machine import run, succeeds

SERVICE_ADDRESS = "10.96.0.1"
"""The ``kubernetes`` service: what a pod's in-cluster configuration names."""

APISERVER_PORT = 6443


@dataclass(frozen=True, slots=True)
class Network:
    """The network of cluster ``index``; two clusters on one machine share nothing.

    There is no kube-proxy.  A node's address must not be loopback, so an empty bridge carries it, and one rule sends
    what pods say to the ``kubernetes`` service on to the API server.
    """

    index: int

    @property
    def node_bridge(self) -> str:
        """The bridge that carries the node's address."""
        return f"ckpt2pt-n{self.index}"

    @property
    def pod_bridge(self) -> str:
        """The bridge that pods are plugged into."""
        return f"ckpt2pt-p{self.index}"

    @property
    def node_address(self) -> str:
        """Where etcd, the API server and the kubelet listen."""
        return f"10.213.{2 * self.index + 1}.1"

    @property
    def pods(self) -> str:
        """The addresses of pods."""
        return f"10.213.{2 * self.index}.0/24"

    def up(self) -> None:
        """Make the node's bridge and the rules; what is there is left alone."""
        if not succeeds("ip", "link", "show", self.node_bridge):
            run("ip", "link", "add", self.node_bridge, "type", "bridge")
            run("ip", "address", "add", f"{self.node_address}/32", "dev", self.node_bridge)
        run("ip", "link", "set", self.node_bridge, "up")
        run("sysctl", "--quiet", "--write", "net.ipv4.ip_forward=1")
        for table, chain, rule in self._rules():
            if not succeeds("iptables", "-w", "-t", table, "-C", chain, *rule):
                run("iptables", "-w", "-t", table, "-I", chain, *rule)

    def down(self) -> None:
        """Take away the rules and both bridges, if they are there."""
        for table, chain, rule in self._rules():
            while succeeds("iptables", "-w", "-t", table, "-D", chain, *rule):
                pass
        for bridge in (self.node_bridge, self.pod_bridge):
            if succeeds("ip", "link", "show", bridge):
                run("ip", "link", "delete", bridge)

    def write_cni(self, folder: Path, state: Path) -> None:
        """Write the pod network's configuration for containerd: a bridge, addresses given out from ``state``."""
        folder.mkdir(parents=True, exist_ok=True)
        bridge = {
            "type": "bridge",
            "bridge": self.pod_bridge,
            "isDefaultGateway": True,
            "hairpinMode": True,
            "ipMasq": False,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": self.pods}]], "dataDir": str(state)},
        }
        network = {"cniVersion": "0.4.0", "name": f"ckpt2pt-{self.index}", "plugins": [bridge]}
        (folder / "10-ckpt2pt.conflist").write_text(json.dumps(network, indent=1))

    def _rules(self) -> list[tuple[str, str, list[str]]]:
        mark = ["-m", "comment", "--comment", f"ckpt2pt-{self.index}"]
        service = ["-s", self.pods, "-d", f"{SERVICE_ADDRESS}/32", "-p", "tcp", "--dport", "443"]
        return [
            (
                "nat",
                "PREROUTING",
                [*service, *mark, "-j", "DNAT", "--to-destination", f"{self.node_address}:{APISERVER_PORT}"],
            ),
            # Where something else, as Docker, drops what it does not know.
            ("filter", "FORWARD", ["-s", self.pods, *mark, "-j", "ACCEPT"]),
            ("filter", "FORWARD", ["-d", self.pods, *mark, "-j", "ACCEPT"]),
        ]
