"""What `run.py` measures of a repair: files as MSAdapter writes them, made into files of torch, against cp of the same bytes.

repairs.py build FOLDER NBYTES    one rank of about NBYTES: weights in bfloat16, buckets in float32, values made up
"""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from measure import run
from roads import Words, copied, measure, ours

HERE = Path(__file__)
BLOCK = 8 << 20
PLACE = "iter_0000001/mp_rank_00"


def repairs(work: Path, nbytes: float, rounds: int, say: Callable[[str], None]) -> dict[str, object]:
    """The repair without and with its default proof, and cp of what it reads."""
    source, out = work / "source", work / "out"
    run([sys.executable, HERE, "build", source, str(int(nbytes))])
    files = sorted((source / PLACE).iterdir())
    words = ours("convert", "--source", source, "--target", out, "--target-format", "torch")
    methods: dict[str, Words] = {
        "cp": copied(files, out),
        "repair": words,
        "repair digest": [*words, "--verify", "digest"],
    }
    say("\nrepair of what MSAdapter wrote")
    medians = measure(methods, files, out, rounds, say)
    shutil.rmtree(source)
    found = {
        f"{name} / cp, {key}": round(float(str(medians[name][key])) / float(str(medians["cp"][key])), 2)
        for name in methods
        if name != "cp"
        for key in ("wall", "cpu")
    }
    return {"written_bytes": int(nbytes), "medians": medians, "ratios": found}


# ------------------------------------------------------------------------------------------------- a process of its own


def build(folder: Path, nbytes: int) -> None:
    """One seventh of it weights, the rest main parameters and moments."""
    from ckpt2pt.formats.torchfile.trees import Call, Global, Value, namespace, ordered_dict  # noqa: PLC0415

    count = max(1, nbytes // 7 // BLOCK)
    types = {
        name: Call(Global("mindspore._c_expression.typing", name), (), True, (bits,))
        for name, bits in (("Float", 32), ("BFloat", 16))
    }
    weights = [
        (f"layers.{number}.weight", _tensor(str(number), "BFloat16Storage", BLOCK // 2)) for number in range(count)
    ]
    tree: dict[Value, Value] = {
        "args": namespace({"num_layers": count, "params_dtype": types["BFloat"]}),
        "iteration": 1,
        "model": ordered_dict(weights),
    }
    _write(folder / PLACE / "model_optim_rng.pt", tree, [1] * count)
    kinds: dict[Value, Value] = {
        kind: _tensor(str(number), "FloatStorage", 2 * count * BLOCK // 4)
        for number, kind in enumerate(("param", "exp_avg", "exp_avg_sq"))
    }
    state: dict[Value, Value] = {"buckets_coalesced": True, 0: {(types["BFloat"], types["Float"]): kinds}}
    _write(folder / PLACE / "distrib_optim.pt", state, [2 * count] * 3)
    (folder / "latest_checkpointed_iteration.txt").write_text("1")


def _tensor(key: str, kind: str, numel: int):  # type: ignore[no-untyped-def]  # noqa: ANN202 - a node of a pickle
    from ckpt2pt.formats.torchfile.trees import Call, Global, Persistent  # noqa: PLC0415

    view = (Persistent(("storage", kind, key, "cpu", numel)), 0, (numel,), [1], False, None, None)
    rebuild, tensor = Global("torch._utils", "_rebuild_tensor_v2"), Global("mindspore.common.tensor", "Tensor")
    return Call(Global("torch._tensor", "_rebuild_from_type_v2"), (rebuild, tensor, view, None))


def _write(path: Path, tree: object, blocks: Sequence[int]) -> None:
    from ckpt2pt.formats.torchfile.pickles import write_pickle  # noqa: PLC0415

    path.parent.mkdir(parents=True, exist_ok=True)
    block = os.urandom(BLOCK)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", write_pickle(tree, check=False))  # type: ignore[arg-type]
        for key, many in sorted((str(number), many) for number, many in enumerate(blocks)):
            with file.open(f"archive/data/{key}", "w", force_zip64=True) as record:
                for _ in range(many):
                    record.write(block)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["build", folder, nbytes]:
            build(Path(folder), int(nbytes))
        case _:
            raise SystemExit(__doc__)
