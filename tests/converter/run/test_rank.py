"""A rank of a result: what is proved before a name appears, what appears in which order, and what its manifest says."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from ckpt2pt.core.extents import Extent, TensorRef
from ckpt2pt.engine.write import ReadPieces, Stop
from ckpt2pt.errors import Ckpt2ptError, FormatError, InterruptedRunError, VerificationError
from ckpt2pt.formats.mindspore.entries import number_entry
from ckpt2pt.formats.mindspore.writer import mindspore_file
from ckpt2pt.io.inputs import InputFile
from ckpt2pt.publish import MINDSPORE, STATE, Target
from ckpt2pt.run.rank import RankTask
from entries import entry_of, moves_into

VALUES = struct.pack("<4f", 1, 2, 3, 4)


@dataclass
class Reading:
    """A source that notes what it is asked, and fails where it is reported to."""

    fails: str = ""
    asked: list[str] = field(default_factory=list[str])
    seen: set[str] = field(default_factory=set[str])

    def _ask(self, name: str, error: Ckpt2ptError) -> None:
        self.asked.append(name)
        if self.fails == name:
            raise error

    def prove_unchanged(self) -> None:
        self._ask("unchanged", InterruptedRunError("written meanwhile", where="source", hint="again"))

    def prove_read(self, read: ReadPieces) -> Mapping[str, int]:
        self._ask("read", FormatError("another checksum", where="source", hint="copy it again"))
        return {"verified": len(read), "notChecked": 0, "none": 0}

    def prove_result(self, partials: Mapping[str, Path], heed: Callable[[], None]) -> Mapping[str, int]:
        heed()
        self.seen = {path.name for path in partials.values()}
        self._ask("result", VerificationError("differs", where="result", hint="report it"))
        crcs: dict[str, int] = {}
        for name, path in partials.items():
            with InputFile(path) as file:
                crcs[name] = file.crc32(0, file.size)
        return crcs


def task_in(folder: Path, reading: Reading, **more: object) -> RankTask:
    source = folder / "source"
    source.write_bytes(VALUES)
    target = Target(root=folder / "out", iteration=5, identity="a" * 64, stages=1, tensor=1, kind=MINDSPORE)
    target.claim({}, overwrite=False)
    ref = TensorRef("w", "float32", (4,), (Extent(str(source), 0, 16),))
    file = mindspore_file("ckpt", "rank_0/network.ckpt", [entry_of(ref), number_entry("step_num", 5, "int64")])
    task = RankTask(
        rank=(0, 0),
        target=target,
        reading=reading,
        verify="digest",
        repair=False,
        files=(file,),
        moves=lambda: moves_into(file, [ref]),
        source_bytes=16,
        metadata={"pt_meta/args.json": b"{}"},
        facts={"source": "here"},
    )
    return replace(task, **more)  # type: ignore[arg-type]


def names(folder: Path) -> set[str]:
    found = (path.relative_to(folder / "out") for path in (folder / "out").rglob("*") if path.is_file())
    return {str(path) for path in found if STATE not in path.parts}


def run(task: RankTask) -> list[int]:
    reported: list[int] = []
    task.run(Stop(), reported.append)
    return reported


@pytest.mark.parametrize("level", ["none", "digest", "full"])
def test_files_then_metadata_then_the_manifest(level: str, tmp_path: Path) -> None:
    reading = Reading()
    task = task_in(tmp_path, reading, verify=level)
    assert task.paths == ["rank_0/network.ckpt", "pt_meta/args.json"]
    assert sum(run(task)) == 16
    assert names(tmp_path) == {*task.paths}
    assert task.nbytes == sum((tmp_path / "out" / path).stat().st_size for path in task.paths)
    assert reading.asked == ["unchanged", "read", *(["result"] if level == "full" else []), "unchanged"]
    assert not reading.seen & {"network.ckpt"}, "what is proved has no final name yet"
    manifest = task.target.rank_manifest(0, 0) or {}
    assert [file["path"] for file in manifest["files"]] == task.paths  # type: ignore[attr-defined]
    assert (manifest["source"], manifest["verified"]) == ("here", level)
    assert manifest["sourceChecksums"] == {"verified": 1, "notChecked": 0, "none": 0}
    assert list(manifest["tensors"]) == ["param:w"]  # type: ignore[call-overload]


@pytest.mark.parametrize("fails", ["unchanged", "read", "result"])
def test_what_is_not_proved_gets_no_name(fails: str, tmp_path: Path) -> None:
    task = task_in(tmp_path, Reading(fails=fails), verify="full")
    with pytest.raises(Ckpt2ptError):
        run(task)
    assert names(tmp_path) == set()
    assert task.target.rank_manifest(0, 0) is None


def test_copies_that_differ_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(VALUES[:-1] + b"\0")
    task = task_in(tmp_path, Reading())
    pair = tuple(TensorRef("w", "float32", (4,), (Extent(str(path), 0, 16),)) for path in (tmp_path / "source", other))
    with pytest.raises(Ckpt2ptError):
        run(replace(task, copies=(pair,)))  # type: ignore[arg-type]
    assert not (tmp_path / "out" / "rank_0").exists()
    run(replace(task, copies=((pair[0], pair[0]),)))
    assert names(tmp_path) == {*task.paths}
