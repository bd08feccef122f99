"""Records grow with the number of ranks, not with its square, and the last worker needs no more memory than was promised."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.core.topology import Topology
from ckpt2pt.discover.request import Request
from ckpt2pt.io.records import seal
from ckpt2pt.publish import read_record
from ckpt2pt.run.conversion import run
from ckpt2pt.show.preview import WORKER_BYTES
from ckpt2pt.verification.manifests import published, recorded
from conversions import Quiet
from handmade import Handmade


def made(folder: Path, tensor: int, pipeline: int) -> Request:
    topology = Topology(num_layers=pipeline, tensor=tensor, pipeline=pipeline)
    return replace(Handmade(topology=topology).write(folder), in_process=True, verify="none")


def records_of(request: Request, *stages: int) -> tuple[Path, list[Any]]:
    outcome = run(request, stages or range(request.topology.pipeline), Quiet())
    state = outcome.target.state
    return state, [json.loads(path.read_text()) for path in sorted(state.glob("stage-*.json"))]


def sources(manifest: Any) -> set[str]:
    return {one["source"] for one in manifest["inputs"] if "source" in one}


def test_a_stage_lists_the_inputs_of_its_own_ranks(tmp_path: Path) -> None:
    request = made(tmp_path, 2, 3)
    _, stages = records_of(request)
    for stage in stages:
        ranks = [request.topology.source_rank(tp, stage["stage"]) for tp in range(2)]
        assert sources(stage) == {f"rank_{rank}/network_rank_{rank}-0_12.ckpt" for rank in ranks}
        assert len(stage["inputs"]) == 6, "a source, the arguments and a param map for each of two ranks"


def test_the_report_lists_each_input_once(tmp_path: Path) -> None:
    state, _ = records_of(made(tmp_path, 2, 3))
    report = read_record(state / "report.json")
    assert report is not None, "its seal is that of a record written at once"
    listed = [json.dumps(one) for stage in json.loads(json.dumps(report["stages"])) for one in stage["inputs"]]
    assert len(listed) == len(set(listed)) == 18


def test_records_of_the_former_shape_are_still_read_and_verified(tmp_path: Path) -> None:
    """Version 0.1.0 listed the inputs of all ranks with every stage, and wrote the report at once."""
    state, stages = records_of(made(tmp_path, 2, 2))
    every = [one for stage in stages for one in stage["inputs"]]
    former = [{key: value for key, value in stage.items() if key != "seal"} | {"inputs": every} for stage in stages]
    for stage in former:
        (state / f"stage-{stage['stage']:03d}.json").write_bytes(seal(stage))
    found = recorded(state.parent)[0]
    (state / "report.json").write_bytes(seal(found.target.report(former)))
    found = recorded(state.parent)[0]
    assert len(found.ranks) == 4
    assert not list(published(found.target, range(2)))


def test_a_worker_that_is_not_the_last_reads_no_record_of_another_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = made(tmp_path, 1, 8)
    records_of(request, 0, 1, 2, 3)
    read: list[str] = []
    real = os.open

    def opened(path: Any, *args: Any, **more: Any) -> int:
        read.append(Path(path).name)
        return real(path, *args, **more)

    monkeypatch.setattr(os, "open", opened)
    records_of(request, 5)
    assert not [
        name for name in read if name.endswith(".json") and name[:5] in {"stage", "rank-"} and "005" not in name
    ]


COMPILE = """
import importlib, pkgutil, ckpt2pt, numpy
from contextlib import suppress
for module in pkgutil.walk_packages(ckpt2pt.__path__, "ckpt2pt."):
    if not module.name.endswith("__main__"):
        with suppress(ImportError):  # a package that is not installed
            importlib.import_module(module.name)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_ranks_take_the_memory_that_the_plan_promises(tmp_path: Path) -> None:
    """A worker of its own converts the last of 64 stages of 16 ranks, and writes the report of all.

    It has the bytecode that an image has: to compile modules takes some MiB more.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)
    request = replace(made(tmp_path, 16, 64), full=False)
    gc.collect()
    gc.freeze()  # a collection after each rank would look at all that the tests before have left
    _, stages = records_of(request, *range(63))
    assert max(len(json.dumps(stage)) for stage in stages) < 16 * 4096
    script = """
import sys
from pathlib import Path
from ckpt2pt.cli.commands import main
code = main(sys.argv[1:])
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(code, peak.split()[1])
"""
    flags = ["--num-layers", 64, "--tp-size", 16, "--pp-size", 64, "--stage", 63, "--convert-param-only", "--verify"]
    flags += ["none", "--multiprocess-off", "--ms-path", request.source, "--param-map-path", request.metadata]
    words = [sys.executable, "-c", script, "convert", *map(str, flags), "--megatron-path", str(request.target)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    code, peak = done.stdout.splitlines()[-1].split()
    report = next(request.target.glob("*/.ckpt2pt/report.json"))
    print(f"peak {int(peak) >> 10} MiB, report {report.stat().st_size} bytes")  # noqa: T201 - shown with -rP
    assert code == "0", done.stderr
    assert int(peak) << 10 <= request.workers * WORKER_BYTES
    assert report.stat().st_size <= 1024 * 4096
    assert read_record(report) is not None
