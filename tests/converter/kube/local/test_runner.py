"""``ckpt2pt run -f``: the embedded default, with real workers on real checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import MissingInputError, UsageError
from ckpt2pt.kube.conversion.job import mounts_of
from ckpt2pt.kube.conversion.spec import parse
from ckpt2pt.kube.conversion.status import Ending
from ckpt2pt.kube.local.runner import exit_code, map_volumes
from ckpt2pt.run.conversion import run
from conversions import Quiet, request_for, topology_of
from documents import changed, claim, minimal, write
from synthetic import Model, build
from torchload import differences
from workers import alive, children, wait_for

SETS = ("b_tp2pp2", "b_st_tp2pp2_safetensors", "e_tp1pp2vpp2_noop_tail", "j_tp1pp2dp2")


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "ckpt2pt", "run", *map(str, words)]


def call(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=60, check=False)


def status_in(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout)["status"]


def document_of(folder: Path, *, full: bool = True) -> dict[str, Any]:
    """A golden set as a document; its target is the claim ``results``."""
    cut = topology_of(folder)
    suffix = "" if full else "_params"
    return changed(
        ("spec.mode", "Full" if full else "ParamsOnly"),
        ("spec.model", {"numLayers": cut.num_layers, "noopLayers": sorted(cut.noop)}),
        ("spec.parallelism", {"tensor": cut.tensor, "pipeline": cut.pipeline, "virtualPipeline": cut.virtual, "data": cut.data}),
        ("spec.source.path", f"ms{suffix}"),
        ("spec.metadata.path", f"pt_meta{suffix}"),
        ("spec.target", {"path": "out", "volume": claim("results")}),
    )  # fmt: skip


@pytest.fixture
def golden_copy(golden: Path, tmp_path: Path) -> Path:
    """A set of two stages that may be damaged."""
    found = next(golden / "megatron06" / name for name in SETS if (golden / "megatron06" / name).is_dir())
    return Path(shutil.copytree(found, tmp_path / found.name))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    return folder


@pytest.fixture
def large(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A checkpoint that takes a worker a moment, and its document, all on one volume; stages go one by one."""
    build(tmp_path / "data", Model(topology=Topology(num_layers=4, pipeline=2), hidden=256, heads=4, groups=2, ffn=768))
    document = changed(("spec.parallelism", {"pipeline": 2}), ("spec.workers", {"maxParallelStages": 1}))
    yield write(tmp_path / "a.yaml", document), tmp_path / "data"
    shutil.rmtree(tmp_path / "data")


def worker_of(parent: int) -> int:
    """The first process of the pool, once it is there."""

    def workers() -> list[int]:
        found = children(parent)
        return [pid for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    return wait_for(workers)[0]


# ------------------------------------------------------------------------------------------------------ golden results


@pytest.mark.parametrize(
    ("name", "full"),
    [(name, True) for name in SETS] + [(SETS[1], False), (SETS[3], False)],
    ids=[f"{name}-full" for name in SETS] + [f"{SETS[1]}-params", f"{SETS[3]}-params"],
)
def test_a_document_gives_what_the_command_line_gives(
    golden: Path, tmp_path: Path, results: Path, name: str, full: bool
) -> None:
    source = golden / "megatron06" / name
    if not source.is_dir():
        pytest.skip(f"{name} is not among the golden data at hand")
    path = write(tmp_path / "a.yaml", document_of(source, full=full))
    volumes = ("--volume", f"training={source}", "--volume", f"results={results}")
    done = call("-f", path, *volumes, "--output", "json", "--progress", "json")
    assert done.returncode == 0, done.stderr
    status = status_in(done)
    assert (status["phase"], status["progress"], status["stageSummary"]) == ("Succeeded", "100%", "2/2")
    assert (status["iteration"], status["outputPath"]) == (2, "out/iter_0000002")
    assert (results / status["reportPath"]).is_file()
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert {line["pp"] for line in events if line["event"] == "rank"} == {0, 1}

    request = request_for(source, tmp_path / "direct", full=full)
    run(request, range(2), Quiet())
    ours, theirs = (sorted(folder.rglob("*.pt")) for folder in (results, tmp_path / "direct"))
    assert [path.relative_to(results / "out") for path in ours] == [p.relative_to(tmp_path / "direct") for p in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert differences(mine, other) == []
    tracker = "latest_checkpointed_iteration.txt"
    assert (results / "out" / tracker).read_text() == (tmp_path / "direct" / tracker).read_text()


def test_a_second_run_finds_everything_there(golden_copy: Path, tmp_path: Path, results: Path) -> None:
    path = write(tmp_path / "a.yaml", document_of(golden_copy))
    words = ("-f", path, "--volume", f"training={golden_copy}", "--volume", f"results={results}", "--output", "json")
    first = call(*words)
    assert first.returncode == 0, first.stderr
    before = {p: p.stat().st_mtime_ns for p in results.rglob("*.pt")}
    again = call(*words)
    assert again.returncode == 0, again.stderr
    assert [stage["reason"] for stage in status_in(again)["stageStatuses"]] == ["AlreadyThere"] * 2
    assert {p: p.stat().st_mtime_ns for p in results.rglob("*.pt")} == before


def test_a_dollar_in_a_path_is_one_here_too(golden_copy: Path, tmp_path: Path, results: Path) -> None:
    document = document_of(golden_copy)
    document["spec"]["target"]["path"] = "run$(HOME)/a$$b"
    path = write(tmp_path / "a.yaml", document)
    done = call("-f", path, "--volume", f"training={golden_copy}", "--volume", f"results={results}")
    assert done.returncode == 0, done.stderr
    assert (results / "run$(HOME)" / "a$$b" / "iter_0000002").is_dir()


def test_for_a_person_the_end_is_a_summary(golden_copy: Path, tmp_path: Path, results: Path) -> None:
    path = write(tmp_path / "a.yaml", document_of(golden_copy))
    done = call("-f", path, "--volume", f"source={golden_copy}", "--volume", f"target={results}", "--progress", "none")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Succeeded: 2/2 stages, iteration 2" in done.stdout
    assert f"output  {results}/out/iter_0000002" in done.stdout


def test_a_dry_run_plans_every_stage_and_writes_nothing(golden_copy: Path, tmp_path: Path, results: Path) -> None:
    document = document_of(golden_copy)
    document["spec"]["dryRun"] = True
    words = ("-f", write(tmp_path / "a.yaml", document), "--volume", f"training={golden_copy}")
    done = call(*words, "--volume", f"results={results}", "--output", "json")
    assert done.returncode == 0, done.stderr
    assert status_in(done)["phase"] == "Planned"
    assert {rank["stage"] for rank in json.loads(done.stdout)["plan"]["ranks"]} == {0, 1}
    assert list(results.iterdir()) == []
    text = call(*words, "--volume", f"results={results}")
    assert "distrib_optim.pt" in text.stdout
    assert "nothing was written" in text.stdout


# ------------------------------------------------------------------------------------------------------------ failures


def test_a_bad_stage_fails_and_the_other_is_finished(golden_copy: Path, tmp_path: Path, results: Path) -> None:
    cut = topology_of(golden_copy)
    last = next((golden_copy / "ms" / f"rank_{cut.source_rank(0, 1)}").iterdir())
    last.chmod(0o600)
    # The name keeps its length, so the file is whole; but stage 1 has lost a parameter.
    last.write_bytes(last.read_bytes().replace(b"encoder.final_norm", b"encoder.Final_norm"))
    last.chmod(0o400)  # nobody is writing it
    path = write(tmp_path / "a.yaml", document_of(golden_copy))
    words = ("-f", path, "--volume", f"training={golden_copy}", "--volume", f"results={results}")
    done = call(*words, "--output", "json", "--log-format", "json", "--progress", "none")
    assert done.returncode == 65, done.stderr
    status = status_in(done)
    good, bad = status["stageStatuses"]
    assert (status["phase"], good["state"], bad["state"], bad["reason"]) == (
        "Failed",
        "Succeeded",
        "Failed",
        "InputWrong",
    )
    assert "final_norm" in bad["message"]
    assert bad["attempts"] == 1
    [error] = [json.loads(line) for line in done.stderr.splitlines()]
    assert (error["stage"], error["exitCode"]) == (1, 65)
    assert len(list(results.rglob("mp_rank_*_000/*.pt"))) == 2 * cut.tensor
    assert not (results / "out" / "latest_checkpointed_iteration.txt").exists()


def test_a_target_of_another_conversion_fails_the_job(golden_copy: Path, tmp_path: Path, results: Path) -> None:
    words = ("--volume", f"training={golden_copy}", "--volume", f"results={results}", "--progress", "none")
    assert call("-f", write(tmp_path / "a.yaml", document_of(golden_copy)), *words).returncode == 0
    other = write(tmp_path / "b.yaml", document_of(golden_copy, full=False))
    done = call("-f", other, *words, "--output", "json")
    assert done.returncode == 64
    [failed] = [c for c in status_in(done)["conditions"] if c["type"] == "Failed"]
    assert (failed["status"], failed["reason"]) == ("True", "FailJob")
    assert "spec.target.overwrite" in done.stderr


def test_what_cannot_pass_is_tried_once_and_reported_by_its_name(
    golden_copy: Path, tmp_path: Path, results: Path
) -> None:
    document = write(tmp_path / "a.yaml", document_of(golden_copy))
    words = ("--volume", f"training={golden_copy}", "--volume", f"results={results}", "--progress", "none")
    limited = ["prlimit", "--fsize=65536", *command("-f", document, *words, "--output", "json")]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 64, done.stderr
    failed = [stage for stage in status_in(done)["stageStatuses"] if stage["state"] == "Failed"]
    assert [(stage["attempts"], stage["reason"]) for stage in failed] == [(1, "VolumeTooSmall")]
    assert "ulimit -f" in failed[0]["message"]


def test_a_worker_that_is_killed_is_tried_again(large: tuple[Path, Path]) -> None:
    document, data = large
    words = command("-f", document, "--volume", f"training={data}", "--output", "json", "--progress", "none")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        worker = worker_of(parent.pid)
        os.kill(worker, signal.SIGKILL)
        out, err = parent.communicate(timeout=60)
    assert parent.returncode == 0, err
    assert [stage["attempts"] for stage in json.loads(out)["status"]["stageStatuses"]] == [2, 1]
    assert "exit code -9" in err
    assert "tried again in 1 s, 3 of 3 retries left" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_workers_too_and_the_next_run_goes_on(
    large: tuple[Path, Path], number: signal.Signals
) -> None:
    document, data = large
    words = command("-f", document, "--volume", f"training={data}", "--output", "json", "--progress", "json")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        worker = worker_of(parent.pid)
        assert parent.stderr
        while '"begin"' not in parent.stderr.readline():
            pass
        parent.send_signal(number)
        out, err = parent.communicate(timeout=60)
    assert parent.returncode == 75, err
    status = json.loads(out)["status"]
    assert status["phase"] == "Failed"
    assert {c["reason"] for c in status["conditions"] if c["type"] == "Failed"} == {"Interrupted"}
    assert not alive(worker)
    assert not list(data.rglob("*.partial"))
    assert subprocess.run(words, capture_output=True, timeout=60, check=False).returncode == 0


def test_workers_do_not_outlive_a_parent_that_is_killed(large: tuple[Path, Path]) -> None:
    document, data = large
    words = command("-f", document, "--volume", f"training={data}", "--progress", "json")
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as parent:
        worker = worker_of(parent.pid)
        assert parent.stderr
        while '"begin"' not in parent.stderr.readline():
            pass
        below = children(worker)
        parent.kill()
        wait_for(lambda: not any(map(alive, (worker, *below))))
    assert subprocess.run(words, capture_output=True, timeout=60, check=False).returncode == 0


def test_a_workload_to_wait_for_is_not_waited_for_and_that_is_said(
    golden_copy: Path, tmp_path: Path, results: Path
) -> None:
    document = document_of(golden_copy)
    document["spec"]["startAfter"] = {"apiVersion": "batch/v1", "kind": "Job", "name": "pretrain"}
    path = write(tmp_path / "a.yaml", document)
    done = call(
        "-f", path, "--volume", f"training={golden_copy}", "--volume", f"results={results}", "--progress", "none"
    )
    assert done.returncode == 0, done.stderr
    assert "startAfter pretrain is not waited for" in done.stderr


@pytest.mark.parametrize("field", ["suspend", "cancel"])
def test_what_shall_not_run_is_not_run(tmp_path: Path, field: str) -> None:
    path = write(tmp_path / "a.yaml", changed((f"spec.{field}", True)))
    done = call("-f", path, "--volume", f"training={tmp_path}")
    assert done.returncode == 64
    assert f"set spec.{field} to false" in done.stderr


def test_one_that_follows_a_training_is_sent_to_watch(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", changed(("spec.follow", {"keep": 2})))
    done = call("-f", path)
    assert done.returncode == 64
    assert f"ckpt2pt watch -f {path}" in done.stderr
    assert "- watch" in call("-f", path, "--print-job").stdout


def test_an_unknown_field_is_refused_with_a_hint(tmp_path: Path) -> None:
    done = call("-f", write(tmp_path / "a.yaml", changed(("spec.parallelism.pipelin", 2))))
    assert done.returncode == 64
    assert "spec.parallelism.pipelin" in done.stderr
    assert "write pipeline" in done.stderr


def test_the_job_is_printed_as_yaml_or_json_and_not_run(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", minimal())
    as_yaml, as_json = call("-f", path, "--print-job"), call("-f", path, "--print-job", "--output", "json")
    assert (as_yaml.returncode, as_json.returncode) == (0, 0), as_yaml.stderr
    assert yaml.safe_load(as_yaml.stdout) == json.loads(as_json.stdout)
    assert json.loads(as_json.stdout)["kind"] == "Job"


# ------------------------------------------------------------------------------------------------------------- volumes


def folders(document: dict[str, Any], *given: str) -> dict[str, Path]:
    return map_volumes(mounts_of(parse(document)), given)


def with_target(volume: dict[str, Any]) -> dict[str, Any]:
    return changed(("spec.target", {"path": "out", "volume": volume}))


NFS: dict[str, Any] = {"nfs": {"server": "srv", "path": "/export"}}


@pytest.mark.parametrize(
    ("document", "names"),
    [
        pytest.param(minimal(), ["training"], id="claim"),
        pytest.param(minimal(), ["source"], id="role"),
        pytest.param(minimal(), ["target"], id="another-role-on-the-same-volume"),
        pytest.param(with_target(NFS), ["training", "srv:/export"], id="export"),
        pytest.param(with_target({"csi": {"driver": "d"}}), ["training", "target"], id="csi"),
        pytest.param(with_target({"emptyDir": {}}), ["metadata", "target"], id="empty-dir"),
        pytest.param(
            with_target({"hostPath": {"path": "/nowhere"}}), ["training", "/nowhere"], id="host-path-elsewhere"
        ),
    ],
)
def test_a_volume_goes_by_its_own_name_and_by_its_role(
    document: dict[str, Any], names: Sequence[str], tmp_path: Path
) -> None:
    found = folders(document, *(f"{name}={tmp_path}" for name in names))
    assert set(found.values()) == {tmp_path}
    assert len(found) == len(names)


def test_a_host_path_is_the_folder_itself(tmp_path: Path) -> None:
    document = changed(("spec.source.volume", {"hostPath": {"path": str(tmp_path)}}))
    assert folders(document) == {"source": tmp_path}


@pytest.mark.parametrize(
    ("given", "word"),
    [
        pytest.param([], "give --volume training=DIR", id="none"),
        pytest.param(["training"], "write --volume NAME=DIR", id="no-folder"),
        pytest.param(["=."], "write --volume NAME=DIR", id="no-name"),
        pytest.param(["training=.", "other=."], "the volumes of the document are training", id="a-stranger"),
        pytest.param(["training=.", "training=.."], "give it once", id="twice"),
        pytest.param(["source=.", "target=.."], "give it one folder", id="two-folders-for-one-volume"),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(given: list[str], word: str) -> None:
    with pytest.raises(UsageError) as refused:
        folders(minimal(), *given)
    assert word in refused.value.hint


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="training"):
        folders(minimal(), f"training={tmp_path / 'none'}")


# ---------------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("codes", "ended", "expected"),
    [
        pytest.param([0, 0], None, 0, id="done"),
        pytest.param([75, 65], None, 65, id="the-input-before-another-try"),
        pytest.param([66, 65, 76], None, 65, id="in-the-documented-order"),
        pytest.param([0, 1], None, 70, id="a-code-of-nobody"),
        pytest.param([64, 75], "FailJob", 64, id="wrong-usage"),
        pytest.param([65, 0], "Interrupted", 75, id="a-signal"),
        pytest.param([0, 75], "DeadlineExceeded", 75, id="the-deadline"),
    ],
)
def test_one_exit_code_for_all_stages(codes: list[int], ended: str | None, expected: int) -> None:
    assert exit_code(codes, Ending(reason=ended, message="") if ended else None) == expected
