"""A real Kubernetes on this machine: etcd, the control plane and one node; or a cluster that is there already."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from harness.binaries import kubernetes
from harness.certificates import Authority
from harness.daemons import Daemon
from harness.kubectl import Kubectl
from harness.machine import ClusterError, require_node, wait_until
from harness.network import APISERVER_PORT, SERVICE_ADDRESS, Network
from harness.node import NAME, Node

LEFT_RUNNING, OF_THE_SUITE = int(os.environ.get("CKPT2PT_CLUSTER_INDEX", "0")), 1
"""Cluster 0 is that of ``make cluster``, another one for each checkout that wants its own; cluster 1 is the test suite's,
started and stopped by it."""


@dataclass(frozen=True)
class Cluster:
    """Cluster ``index`` of this machine.  Its folder, addresses, bridges, rules and cgroup are all named by the index."""

    index: int

    @property
    def state(self) -> Path:
        """Everything it keeps: logs, pid files, keys, data."""
        return Path(tempfile.gettempdir()) / f"ckpt2pt-cluster-{self.index}"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.state / "admin.kubeconfig"

    @property
    def kubectl(self) -> Kubectl:
        """kubectl as administrator."""
        return Kubectl(self.kubeconfig)

    @property
    def network(self) -> Network:
        """Its addresses."""
        return Network(self.index)

    @property
    def server(self) -> str:
        """The address of the API server, as a URL."""
        return f"https://{self.network.node_address}:{APISERVER_PORT}"

    @cached_property
    def node(self) -> Node:
        """Its one node."""
        return Node(self.state, self.network, self._binary)

    @property
    def is_running(self) -> bool:
        """Whether its API server runs; it may be paused."""
        return self.apiserver.pid is not None

    def up(self) -> None:
        """Start it, or what of it does not run, and wait until its node is ready."""
        require_node()
        kubernetes()
        self.state.mkdir(mode=0o755, exist_ok=True)
        self._write_certificates()
        self.network.up()
        try:
            self._start()
        except ClusterError as error:
            raise ClusterError(f"{error}\n{self.story()}") from error

    def story(self) -> str:
        """The end of every log."""
        return "\n".join(
            f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in self.state.glob("*.log")
        )

    def _start(self) -> None:
        self.etcd.start()
        self.apiserver.start()
        self.wait_ready()
        self.controllers.start()
        self.scheduler.start()
        self.node.up()
        wait_until("the node", lambda: self.kubectl.exists("node", NAME), seconds=60)
        self.kubectl.wait("node", NAME, "Ready", seconds=90)
        default = self.kubectl.within("default")
        wait_until("the default service account", lambda: default.exists("serviceaccount", "default"))

    def down(self) -> None:
        """End every process, unmount, take away bridges and rules, and remove the folder."""
        self.node.down()
        for daemon in (self.scheduler, self.controllers, self.apiserver, self.etcd):
            daemon.stop()
        self.network.down()
        shutil.rmtree(self.state, ignore_errors=True)

    def wait_ready(self) -> None:
        """Wait until the API server answers that it is ready."""
        wait_until("the API server", self._is_ready, seconds=60)

    def restart_apiserver(self) -> None:
        """Kill the API server, as a crash would, and start it again: every connection and every watch breaks."""
        self.apiserver.stop(kill=True)
        # A process that was killed is gone before its last thread is, and with that its port.
        wait_until("the port of the API server", self._port_is_free, seconds=30, every=0.1)
        self.apiserver.start()
        self.wait_ready()

    def _port_is_free(self) -> bool:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.network.node_address, APISERVER_PORT))
            except OSError:
                return False
        return True

    @property
    def etcd(self) -> Daemon:
        """The store."""
        at, peers = f"http://{self.network.node_address}:2379", f"http://{self.network.node_address}:2380"
        return self._daemon(
            "etcd", f"--data-dir={self.state}/etcd", "--unsafe-no-fsync", "--log-level=warn",
            f"--listen-client-urls={at}", f"--advertise-client-urls={at}",
            f"--listen-peer-urls={peers}", f"--initial-advertise-peer-urls={peers}", f"--initial-cluster=default={peers}",
        )  # fmt: skip

    @property
    def apiserver(self) -> Daemon:
        """The API server."""
        keys = self.state / "certificates"
        return self._daemon(
            "kube-apiserver",
            f"--bind-address={self.network.node_address}", f"--secure-port={APISERVER_PORT}", "--permit-address-sharing",
            f"--etcd-servers=http://{self.network.node_address}:2379",
            f"--tls-cert-file={keys}/apiserver.crt", f"--tls-private-key-file={keys}/apiserver.key",
            f"--client-ca-file={keys}/ca.crt", "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
            "--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={keys}/service-accounts.key",
            f"--service-account-signing-key-file={keys}/service-accounts.key", "--service-cluster-ip-range=10.96.0.0/16",
            "--endpoint-reconciler-type=none", "--kubelet-preferred-address-types=InternalIP",
            f"--kubelet-client-certificate={keys}/admin.crt", f"--kubelet-client-key={keys}/admin.key",
            f"--kubelet-certificate-authority={keys}/ca.crt", "--profiling=false",
        )  # fmt: skip

    @property
    def controllers(self) -> Daemon:
        """The controller manager."""
        keys, kubeconfig = self.state / "certificates", self.state / "controllers.kubeconfig"
        return self._daemon(
            "kube-controller-manager", f"--kubeconfig={kubeconfig}", "--leader-elect=false", "--use-service-account-credentials",
            f"--service-account-private-key-file={keys}/service-accounts.key", f"--root-ca-file={keys}/ca.crt",
            f"--bind-address={self.network.node_address}", "--node-monitor-grace-period=40s",
        )  # fmt: skip

    @property
    def scheduler(self) -> Daemon:
        """The scheduler."""
        kubeconfig = self.state / "scheduler.kubeconfig"
        return self._daemon(
            "kube-scheduler",
            f"--kubeconfig={kubeconfig}",
            "--leader-elect=false",
            f"--bind-address={self.network.node_address}",
        )

    def _daemon(self, name: str, *flags: str) -> Daemon:
        return Daemon(name, self.state, (str(self._binary), name, *flags))

    @property
    def _binary(self) -> Path:
        # A link, so that a running cluster is known by its folder alone.
        return self.state / "kubernetes"

    def _is_ready(self) -> bool:
        try:
            return self.kubectl("get", "--raw", "/readyz", seconds=10).strip() == "ok"
        except ClusterError:
            return False

    def _write_certificates(self) -> None:
        if not self._binary.exists():
            self._binary.symlink_to(kubernetes())
        if self.kubeconfig.exists():
            return
        address = f"IP:{self.network.node_address}"
        authority = Authority(self.state / "certificates")
        authority.issue(
            "apiserver", "/CN=kube-apiserver", address, f"IP:{SERVICE_ADDRESS}", "IP:127.0.0.1",
            "DNS:kubernetes", "DNS:kubernetes.default", "DNS:kubernetes.default.svc",
        )  # fmt: skip
        authority.issue("kubelet", f"/O=system:nodes/CN=system:node:{NAME}", address, f"DNS:{NAME}")
        authority.issue("controllers", "/CN=system:kube-controller-manager")
        authority.issue("scheduler", "/CN=system:kube-scheduler")
        authority.issue("admin", "/O=system:masters/CN=admin")
        for user in ("kubelet", "controllers", "scheduler", "admin"):
            authority.kubeconfig(self.state / f"{user}.kubeconfig", user=user, server=self.server)
