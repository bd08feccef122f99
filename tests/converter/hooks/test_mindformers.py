"""The registration is tested with the hook itself, in test_mindspore.py, where the stand-ins are.

The real registry has its say in tests/judges/test_mindformers.py.
"""

from __future__ import annotations

import importlib.util


def test_it_is_a_module_of_its_own_because_importing_it_registers() -> None:
    found = importlib.util.find_spec("ckpt2pt.hooks")
    assert found is not None
    assert importlib.util.find_spec("ckpt2pt.hooks.mindformers") is not None
