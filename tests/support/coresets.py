"""Checkpoints of Megatron-LM 0.8 to 0.19 in the ``torch`` format (golden ``mcore/``)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from goldens import golden_root
from results import edit_tree


def core_sets(*, experts: bool = False) -> list[Path]:
    """Sets of dense models, or those of mixtures of experts."""
    found = sorted(path.parent for path in (golden_root() / "mcore").glob("*/*/expected"))
    return [path for path in found if any(path.glob("iter_*/mp_rank_*")) and path.name.startswith("moe") == experts]


def set_name(folder: Path) -> str:
    """``0.19.0-odd_dp2``."""
    return f"{folder.parent.name}-{folder.name}"


def renamed(folder: Path, target: Path, rename: Callable[[str], str]) -> Path:
    """A copy of a set with other names of parameters in its first rank."""
    shutil.copytree(folder, target)

    def change(tree: Any) -> None:
        tree["model"].pairs = [(rename(name), value) for name, value in tree["model"].pairs]

    edit_tree(next(target.rglob("model_optim_rng.pt")), change)
    return target


ODD = next(folder for folder in core_sets() if folder.name == "odd_dp2")
"""The set that is committed."""
