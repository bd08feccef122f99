"""The hook in the registry of real mindformers, built from the YAML of its documentation, as a callback of real mindspore and of PyNative mode."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
import yaml

from goldens import REPOSITORY

pytestmark = [pytest.mark.mindspore, pytest.mark.timeout(300)]

PYTHON = REPOSITORY / ".venv-mindspore" / "bin" / "python"
PAGE = REPOSITORY / "docs" / "automation" / "training-process.md"
# Importing the whole of mindformers needs transformers, datasets and an accelerator's libraries.  Its registry and what
# builds callbacks are its own files; what these import besides is put in their place.
PROGRAM = """
import importlib.util, json, logging, sys, types

found = importlib.util.find_spec("mindformers")
root = found.submodule_search_locations[0]
for name in ("", ".tools", ".tools.hub", ".core", ".core.callback"):
    package = sys.modules["mindformers" + name] = types.ModuleType("mindformers" + name)
    package.__path__ = [root + name.replace(".", "/")]
sys.modules["mindformers.tools"].logger = logging.getLogger("mindformers")
for name, thing in (
    ("core.context", "is_legacy_model"),
    ("tools.hub.dynamic_module_utils", "get_class_from_dynamic_module"),
    ("tools.check_rules", "check_yaml_depth_before_loading"),
):
    module = sys.modules["mindformers." + name] = types.ModuleType(name)
    setattr(module, thing, lambda *_: True)

import ckpt2pt.hooks.mindformers
from mindformers.core.callback.build_callback import build_callback
from mindspore.train import Callback

sys.modules["mindformers.pynative"] = types.ModuleType("mindformers.pynative")
logger = sys.modules["mindformers.tools.logger"] = types.ModuleType("logger")
logger.logger = logging.getLogger("mindformers")
spec = importlib.util.spec_from_file_location("handler", root + "/pynative/callback/callback.py")
handlers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(handlers)

[hook] = build_callback(json.loads(sys.argv[1]))
assert isinstance(hook, Callback)
handler = handlers.CallbackHandler(callbacks=[hook])
for event in [name for name in dir(handlers.TrainerCallback) if name.startswith("on_")]:
    if event != "on_train_end":  # which submits
        getattr(handler, event)(types.SimpleNamespace(), types.SimpleNamespace(global_step=3))
hook._submit = lambda *said: print(json.dumps(said))
handler.on_train_end(types.SimpleNamespace(checkpoint=types.SimpleNamespace(save_path="/out")), types.SimpleNamespace(global_step=3))
print(json.dumps([type(hook).__name__, hook._template, hook._options["run"]]))
"""


def test_the_yaml_of_the_documentation_builds_the_hook() -> None:
    if not PYTHON.exists():
        pytest.skip("mindspore is not there: make mindspore")
    [block] = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    hooks = [item for item in yaml.safe_load(block)["callbacks"] if item["type"] == "ConversionHook"]
    done = subprocess.run(
        [PYTHON, "-c", PROGRAM, json.dumps(hooks)], env={"PYTHONPATH": str(REPOSITORY / "converter")},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-2]) == ["/out", 3]
    assert json.loads(done.stdout.splitlines()[-1]) == ["ConversionHook", "conversion.yaml", "run7"]
