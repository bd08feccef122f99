"""The node: containerd and a kubelet, with everything they keep below one folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from harness.binaries import PAUSE_IMAGE, pause_image
from harness.daemons import Daemon
from harness.machine import run, succeeds, wait_until
from harness.network import Network

NAME = "ckpt2pt-node"

_CGROUPS = Path("/sys/fs/cgroup")

# restrict_oom_score_adj: root without CAP_SYS_RESOURCE cannot lower the score, and every sandbox would die of it.
_CONTAINERD = """\
version = 2
root = "{state}/containerd"
state = "{state}/run/containerd"
[grpc]
  address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{state}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
"""


@dataclass(frozen=True, slots=True)
class Node:
    """The one node of a cluster."""

    state: Path
    network: Network
    kubernetes: Path

    @property
    def containerd(self) -> Daemon:
        """The container runtime."""
        return Daemon("containerd", self.state, ("containerd", "--config", str(self.state / "containerd.toml")))

    @property
    def kubelet(self) -> Daemon:
        """The kubelet."""
        command = (
            str(self.kubernetes), "kubelet", f"--config={self.state}/kubelet.json", f"--kubeconfig={self.state}/kubelet.kubeconfig",
            f"--root-dir={self.state}/kubelet", f"--hostname-override={NAME}", f"--node-ip={self.network.node_address}",
        )  # fmt: skip
        return Daemon("kubelet", self.state, command)

    def up(self) -> None:
        """Start both; the kubelet's kubeconfig is there already."""
        self._make_cgroup()
        self.network.write_cni(self.state / "cni", self.state / "addresses")
        text = _CONTAINERD.format(state=self.state, socket=self._socket, pause=PAUSE_IMAGE)
        (self.state / "containerd.toml").write_text(text)
        (self.state / "kubelet.json").write_text(json.dumps(self._kubelet_configuration(), indent=1))
        self.containerd.start()
        wait_until(f"containerd; its log is {self.containerd.log}", lambda: succeeds(*self._ctr("version")), seconds=30)
        if not self.has_image(PAUSE_IMAGE):
            self.import_image(pause_image())
        self.kubelet.start()

    def down(self) -> None:
        """Stop both, and every pod; unmount what they mounted."""
        self.kubelet.stop()
        if self.containerd.pid is not None:
            for container in run(*self._ctr("containers", "list", "--quiet")).split():
                succeeds(*self._ctr("tasks", "delete", "--force", container))
        self.containerd.stop()
        self._kill_shims()
        self._unmount()
        self._remove_cgroup()
        for link in Path("/var/log/containers").glob("*.log"):
            if link.is_symlink() and os.readlink(link).startswith(str(self.state)):
                link.unlink()

    def import_image(self, archive: Path) -> None:
        """Give the node the images of an archive, as the registry would."""
        run(*self._ctr("images", "import", archive))

    def has_image(self, reference: str) -> bool:
        """Whether the node has an image."""
        return reference in run(*self._ctr("images", "list", "--quiet")).split()

    @property
    def _socket(self) -> Path:
        return self.state / "containerd.sock"

    def _ctr(self, *words: str | Path) -> list[str]:
        return ["ctr", "--address", str(self._socket), "--namespace", "k8s.io", *map(str, words)]

    @property
    def _cgroup(self) -> str:
        return f"ckpt2pt-{self.network.index}"

    def _kubelet_configuration(self) -> dict[str, object]:
        certificates = self.state / "certificates"
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.network.node_address,
            "healthzBindAddress": self.network.node_address,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(certificates / "ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(certificates / "kubelet.crt"),
            "tlsPrivateKeyFile": str(certificates / "kubelet.key"),
            "containerRuntimeEndpoint": f"unix://{self._socket}",
            "podLogsDir": str(self.state / "logs"),
            "failCgroupV1": False,
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self._cgroup}",
            "enforceNodeAllocatable": [],
            "failSwapOn": False,
            "oomScoreAdj": 0,
            "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            # An image that was imported cannot be pulled again.
            "imageMinimumGCAge": "720h",
            "imageGCHighThresholdPercent": 100,
            # Nor where the kubelet has pulled the same image by another name, as test_install.py lets it.
            "imagePullCredentialsVerificationPolicy": "NeverVerify",
            # Nothing listens there, so a name that is looked up is refused at once.
            "clusterDNS": [self.network.node_address],
            "clusterDomain": "cluster.local",
            "serializeImagePulls": False,
            "registerNode": True,
            "nodeStatusUpdateFrequency": "5s",
        }

    def _make_cgroup(self) -> None:
        for hierarchy in self._hierarchies():
            folder = hierarchy / self._cgroup
            folder.mkdir(exist_ok=True)
            for name in ("cpuset.cpus", "cpuset.mems"):
                file = folder / name
                if file.exists() and not file.read_text().strip():
                    file.write_text((hierarchy / name).read_text())

    def _remove_cgroup(self) -> None:
        for hierarchy in self._hierarchies():
            for folder, _, _ in os.walk(hierarchy / self._cgroup, topdown=False):
                for _ in range(20):
                    try:
                        os.rmdir(folder)
                    except OSError:
                        time.sleep(0.1)
                    else:
                        break

    @staticmethod
    def _hierarchies() -> list[Path]:
        """The unified tree, or each controller's."""
        if (_CGROUPS / "cgroup.controllers").exists():
            return [_CGROUPS]
        return [folder for folder in _CGROUPS.iterdir() if folder.is_dir() and not folder.is_symlink()]

    def _kill_shims(self) -> None:
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    words = (folder / "cmdline").read_text(errors="replace").split("\0")
                except OSError:
                    continue
                if "containerd-shim" in words[0] and str(self._socket) in words:
                    os.kill(int(folder.name), signal.SIGKILL)

    def _unmount(self) -> None:
        mounts = [
            line.split()[1].encode().decode("unicode_escape") for line in Path("/proc/mounts").read_text().splitlines()
        ]
        for mount in reversed(mounts):
            if mount.startswith(f"{self.state}/"):
                run("umount", "--lazy", mount)
        for folder in ("containerd", "kubelet"):
            shutil.rmtree(self.state / folder, ignore_errors=True)
