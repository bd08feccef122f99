"""Checkpoints of Megatron-LM 0.8 to 0.19 in the ``torch`` format (golden ``mcore/``)."""

from __future__ import annotations

from pathlib import Path

from goldens import golden_root


def core_sets(*, experts: bool = False) -> list[Path]:
    """Sets of dense models, or those of mixtures of experts."""
    found = sorted(path.parent for path in (golden_root() / "mcore").glob("*/*/expected"))
    return [path for path in found if any(path.glob("iter_*/mp_rank_*")) and path.name.startswith("moe") == experts]


def set_name(folder: Path) -> str:
    """``0.19.0-odd_dp2``."""
    return f"{folder.parent.name}-{folder.name}"
