"""Entry point: says which packages are missing before anything that needs them is imported."""

from __future__ import annotations

import importlib.util
import sys

_NEEDED = ("kopf", "kubernetes", "prometheus_client")
_USAGE = 64


def main() -> int:
    """Serve until a signal comes; the exit codes of :func:`ckpt2pt_operator.main.main`, 64 where a package is missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"ckpt2pt-operator: {', '.join(missing)} not installed; "
            "install ckpt2pt with the extra operator ('.[operator]' in a checkout)\n"
        )
        return _USAGE
    from ckpt2pt_operator.main import main as serve  # noqa: PLC0415 - it imports those packages

    return serve()


if __name__ == "__main__":
    sys.exit(main())
