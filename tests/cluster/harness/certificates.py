"""The keys and certificates of one cluster, made by openssl."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from harness.machine import run

_EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30")


class Authority:
    """The certificate authority in ``folder``, made when it is not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not self.certificate("ca").exists():
            run("openssl", "req", "-x509", *_EC, "-subj", "/CN=ckpt2pt-test-ca", *self._files("ca"))
            run("openssl", "genrsa", "-out", self.key("service-accounts"), "2048")

    def certificate(self, name: str) -> Path:
        """The file of a certificate."""
        return self.folder / f"{name}.crt"

    def key(self, name: str) -> Path:
        """The file of a private key."""
        return self.folder / f"{name}.key"

    def issue(self, name: str, subject: str, *alternatives: str) -> None:
        """Key and certificate for ``subject`` (``/O=group/CN=user``), good for servers and clients."""
        extensions = [
            "-addext",
            "extendedKeyUsage=serverAuth,clientAuth",
            "-addext",
            "basicConstraints=critical,CA:FALSE",
        ]
        if alternatives:
            extensions += ["-addext", f"subjectAltName={','.join(alternatives)}"]
        run("openssl", "req", "-x509", *_EC, "-CA", self.certificate("ca"), "-CAkey", self.key("ca"),
            "-subj", subject, *extensions, *self._files(name))  # fmt: skip

    def kubeconfig(self, target: Path, *, user: str, server: str) -> None:
        """Write a kubeconfig with everything inside, for a certificate that was issued."""
        target.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [
                        {
                            "name": "ckpt2pt",
                            "cluster": {
                                "server": server,
                                "certificate-authority-data": _base64(self.certificate("ca")),
                            },
                        }
                    ],
                    "users": [
                        {
                            "name": user,
                            "user": {
                                "client-certificate-data": _base64(self.certificate(user)),
                                "client-key-data": _base64(self.key(user)),
                            },
                        }
                    ],
                    "contexts": [{"name": "ckpt2pt", "context": {"cluster": "ckpt2pt", "user": user}}],
                    "current-context": "ckpt2pt",
                },
                indent=1,
            )
        )
        target.chmod(0o600)

    def _files(self, name: str) -> tuple[str | Path, ...]:
        return "-keyout", self.key(name), "-out", self.certificate(name)


def _base64(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()
