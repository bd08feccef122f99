"""The hook in the registry of real mindformers, built from the YAML of its documentation, as a callback of real mindspore and of PyNative mode;
and weights that we write, loaded by the loader of real mindformers, whole and cut for two ranks."""

from __future__ import annotations

import json
import re
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

from ckpt2pt.cli.commands import main
from ckpt2pt.run.targets.request import MindFormersRequest
from goldens import REPOSITORY
from mindformers_made import LAUNCH, Model, save

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


LOADER = """
import importlib.util, logging, sys, types
import numpy as np

root = importlib.util.find_spec("mindformers").submodule_search_locations[0]

def package(name, **things):
    made = sys.modules["mindformers" + name] = types.ModuleType("mindformers" + name)
    made.__path__ = [root + name.replace(".", "/")]
    made.__dict__.update(things)

for name in ("", ".checkpoint", ".core", ".core.context"):
    package(name)
package(".tools", get_output_root_path=str)
package(".tools.logger", logger=logging.getLogger("mindformers"))
own = [0]
package(".tools.utils", get_real_rank=lambda: own[0], get_real_group_size=lambda: 1, set_safe_mode_for_file_or_dir=id)
package(".core.context.build_context", get_context=id)

import mindspore as ms
from mindspore.parallel import Layout
from mindformers.checkpoint.metadata import get_metadata_of_checkpoint
from mindformers.checkpoint.reshard import ReshardLoader
from mindformers.checkpoint.sharded_tensor import build_sharded_tensor
from mindformers.checkpoint.utils import verify_ckpt_valid

folder, out = sys.argv[1:]
verify_ckpt_valid(folder, require_optimizer=False)
source, files = get_metadata_of_checkpoint(folder)
for ranks in (1, 2):
    layout = Layout((ranks,), ("tp",), list(range(ranks)))
    for own[0] in range(ranks):
        rank, wanted = own[0], {}
        for name, [part] in source.items():
            shape = tuple(part.global_shape)
            cut = tuple(ranks if axis == len(shape) - 1 else 1 for axis in range(len(shape)))
            wanted[name] = build_sharded_tensor(
                param_name=name, param_dtype=part.dtype, global_shape=shape, global_offset=(rank,), axis_fragmentations=cut,
                local_shape=tuple(n // c for n, c in zip(shape, cut)), replica_id=None, allow_shape_mismatch=False,
                allow_to_save=True, layout=None if ranks == 1 else layout(*["None"] * (len(shape) - 1), "tp"),
            )
        loader = ReshardLoader(
            checkpoint_dir=folder, dst_sharded_tensor_metas=wanted, src_sharded_tensor_metas=source, param_file_mappings=files,
            reshard_worker_num=1, template=None,
        )
        found = loader.load()
        np.savez(f"{out}-{ranks}-{rank}.npz", **{n: p.astype(ms.float32).asnumpy() for n, p in found.items()})
"""


@pytest.mark.parametrize("limit", [5 * 10**9, 2000], ids=["one-file", "several-files"])
@pytest.mark.parametrize("trainer", ["pynative", "graph"])
def test_real_mindformers_loads_what_we_write(
    tmp_path: Path, trainer: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not PYTHON.exists():
        pytest.skip("mindspore is not there: make mindspore")
    monkeypatch.setattr("ckpt2pt.kube.tensors.MindFormersRequest", partial(MindFormersRequest, shard_bytes=limit))
    model = Model(experts=4, pynative=trainer == "pynative", optimizer=False)
    save(tmp_path / "in", model.arrays)
    (tmp_path / "launch.sh").write_text(f"{LAUNCH} --num-experts 4 --moe-ffn-hidden-size 12")
    said = ["--use-interleaved-weight-layout-mlp", "true", "--use-contiguous-weight-layout-attention", "false"]
    said = said if trainer == "graph" else []
    words = ["--param-map-path", str(tmp_path / "launch.sh"), "--convert-param-only", *said]
    for source, target, more in (
        ("in", "mid", ["--target-format", "torch_dist", *words]),
        ("mid", "out", ["--target-format", "mindformers", "--mindformers-trainer", trainer, *said]),
    ):
        places = ["--source", str(tmp_path / source), "--target", str(tmp_path / target)]
        assert main(["convert", *places, *more, "--progress", "none"]) == 0
    folder = tmp_path / "out" / "iteration_00000003"
    assert (folder / "metadata.json").exists() == (limit == 2000)
    done = subprocess.run(
        [PYTHON, "-c", LOADER, str(folder), str(tmp_path / "got")], env={"GLOG_v": "3"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    whole = np.load(tmp_path / "got-1-0.npz")
    halves = [np.load(tmp_path / f"got-2-{rank}.npz") for rank in range(2)]
    for name, array in model.arrays.items():
        if name.endswith(("fi_accu", "tokens_per_expert")):
            continue
        bits = array.view("u4").astype("u8") if array.dtype == np.float32 else array.astype("u8") << 16
        if not name.endswith("expert_bias"):
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
        expected = bits.astype("u4").view("f4")
        assert np.array_equal(whole[name], expected), name
        assert np.array_equal(np.concatenate([half[name] for half in halves], axis=-1), expected), name


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
