"""The installed program ``ckpt2pt-operator``: what it says where the operator's packages are missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

from ckpt2pt_operator.__main__ import main


def test_without_its_packages_it_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        return None if name in {"kopf", "kubernetes"} else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert main() == 64
    assert capsys.readouterr().err == (
        "ckpt2pt-operator: kopf, kubernetes not installed; install ckpt2pt with the extra operator "
        "('.[operator]' in a checkout)\n"
    )


def test_with_them_it_is_the_operator() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "ckpt2pt_operator", "--version"], capture_output=True, text=True, check=True
    )
    assert "ckpt2pt" in found.stdout
