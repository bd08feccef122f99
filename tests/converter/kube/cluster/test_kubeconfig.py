"""A kubeconfig is read by the package kubernetes, and becomes a connection of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ckpt2pt.errors import UsageError
from ckpt2pt.kube.cluster.kubeconfig import connect


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    document: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "one",
        "clusters": [{"name": name, "cluster": {"server": f"http://{name}:1/"}} for name in ("one", "two")],
        "users": [{"name": "me", "user": {"token": "secret"}}],
        "contexts": [
            {"name": "one", "context": {"cluster": "one", "user": "me", "namespace": "ml"}},
            {"name": "two", "context": {"cluster": "two", "user": "me"}},
        ],
    }
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(document))
    return path


def test_the_current_context_and_another(config: Path) -> None:
    one, two = connect(config, None), connect(config, "two")
    assert (one.server, one.namespace, one.token(), one.direct) == ("http://one:1", "ml", "secret", False)
    assert (two.server, two.namespace, two.token()) == ("http://two:1", "default", "secret")


@pytest.mark.parametrize(("name", "context"), [("none", None), ("config", "three")])
def test_no_connection(config: Path, name: str, context: str | None) -> None:
    with pytest.raises(UsageError, match="no connection"):
        connect(config.with_name(name), context)


def test_without_the_package_it_says_which_extra(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(UsageError) as caught:
        connect(config, None)
    assert "the extra submit" in caught.value.hint
