"""What `run.py` measures of an export: weights of a Megatron checkpoint made into a model for transformers, against cp of that model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from measure import run
from roads import Words, copied, measure, ours

if TYPE_CHECKING:
    from run import Case


def exports(work: Path, case: Case, rounds: int, say: Callable[[str], None]) -> dict[str, object]:
    """The export without and with its default proof, and cp of what it writes; queries, keys, values, gate and up are taken apart."""
    source, out, made = work / "source", work / "out", work / "made"
    case.build()
    run(case.convert(source, "--target-format", "megatron", "--convert-param-only"))
    shutil.rmtree(case.folder / "ms")
    described: Words = ["--param-map-path", case.folder / "pt_meta"]

    def convert(target: Path, *more: str) -> Words:
        return ours(
            "convert", "--source", source, "--target", target, "--target-format", "safetensors", *described, *more
        )

    run(convert(made))
    files = sorted(made.glob("*.safetensors"))
    methods: dict[str, Words] = {
        "cp": copied(files, out),
        "export": convert(out),
        "export digest": convert(out, "--verify", "digest"),
    }
    say("\nexport of weights for transformers")
    medians = measure(methods, [*files, *source.rglob("*.pt")], out, rounds, say)
    found = {
        f"{name} / cp, {key}": round(float(str(medians[name][key])) / float(str(medians["cp"][key])), 2)
        for name in methods
        if name != "cp"
        for key in ("wall", "cpu")
    }
    nbytes = sum(path.stat().st_size for path in files)
    shutil.rmtree(source)
    shutil.rmtree(made)
    shutil.rmtree(case.folder)
    return {"written_bytes": nbytes, "medians": medians, "ratios": found}
