"""Every kind of system call fails once: the error has words and a path, nothing of an older result is lost, the next run is whole."""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main
from failing import Failing

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

_NAMES = re.compile(r"\.\d+-[0-9a-f]{8}|[0-9a-f]{8}(?=\.removed)")
"""What is another in each run: temporary files, and folders that are being removed."""

_PASSING = re.compile(r"\.partial$|\.lock$|\.removed/")
"""What could not be removed stays hidden, and is removed by the next run that writes there."""


def convert(work: Path, *more: str) -> list[str]:
    places = {"--ms-path": "ms", "--param-map-path": "pt_meta", "--megatron-path": "out"}
    return ["convert", *(word for flag, name in places.items() for word in (flag, str(work / name))), *more]


def import_back(work: Path, *more: str) -> list[str]:
    return ["import", "--megatron-path", str(work / "A"), "--ms-path", str(work / "out"), *more]


def make_meta(work: Path, *more: str) -> list[str]:
    return ["pt-meta", "--megatron-path", str(work / "A"), "--param-map-path", str(work / "out"), *more]


def merge(work: Path, *more: str) -> list[str]:
    flags = {"--checkpoint-dir": "zero", "--strategy-dir": "zero/opt_shard_info", "--output-dir": "out"}
    words = [word for flag, name in flags.items() for word in (flag, str(work / name))]
    return ["combine", *words, "--rank-section", "0", "1", "--max-proccess-limit", "1", *more]


ROADS: dict[str, tuple[Callable[..., list[str]], tuple[str, ...], tuple[str, ...]]] = {
    "convert": (convert, (), ()),
    "convert over another result": (convert, ("--convert-param-only",), ()),
    "import": (import_back, (), ()),
    "import over another result": (import_back, ("--convert-param-only",), ("--overwrite",)),
    "pt-meta": (make_meta, (), ()),
    "combine": (merge, (), ()),
}
"""A command, what an older result was made with, and what it is replaced with."""


def results(folder: Path) -> dict[str, str]:
    """What is there by its digest, but for records and locks of ours."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and ".ckpt2pt" not in str(path)]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def records(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix != ".lock" and "-probe" not in path.name
    )


@pytest.mark.parametrize(("road", "number"), [*((road, errno.EIO) for road in ROADS), ("convert", errno.ESTALE)])
def test_a_call_that_fails_loses_nothing_and_is_reported_with_its_path(
    road: str, number: int, golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, older, flags = ROADS[road]
    work, saved = tmp_path / "work", tmp_path / "saved"
    for name in ("ms", "pt_meta", "A"):
        shutil.copytree(golden / "megatron06" / "a2_tp1pp1_tied_bias" / name, work / name)
    shutil.copytree(golden / "megatron06" / "j_tp1pp2dp2" / "ms_zero_src", work / "zero")
    if older:
        assert main(command(work, *older)) == 0
    before = results(work / "out")
    (work / "out").mkdir(exist_ok=True)
    shutil.copytree(work / "out", saved)
    words = command(work, *flags)

    def whole(*states: dict[str, str]) -> bool:
        """The old or the new; files that are replaced one by one (docs/adr/0009) are each the one or the other."""
        found, old, new = states
        by_file = road == "import over another result"
        return found in (old, new) or (by_file and all(found[name] in {old[name], new[name]} for name in old))

    def attempt(fails: int) -> tuple[int, str, list[tuple[str, str]]]:
        shutil.rmtree(work / "out")
        shutil.copytree(saved, work / "out")
        failing = Failing(work, fails, number)
        with failing.at_work():
            code = main(words)
        return code, capsys.readouterr().err, failing.calls

    code, _, calls = attempt(0)
    assert code == 0
    after, listed = results(work / "out"), records(work / "out")
    first = {(name, _NAMES.sub("", path)): at for at, (name, path) in reversed([*enumerate(calls, 1)])}
    assert len(first) > 60
    wrong: list[str] = []
    for (name, path), at in sorted(first.items(), key=lambda item: item[1]):
        code, reported, _ = attempt(at)
        found = {file: digest for file, digest in results(work / "out").items() if not _PASSING.search(file)}
        final = {file: digest for file, digest in found.items() if file in before}
        faults = {
            "another exit code": code not in {0, 64, 65, 66, 74, 75, 76},
            "a traceback": "Traceback" in reported,
            "no path": code and f"where: {tmp_path}" not in reported,
            "not what was to be written": not code and found != after,
            "neither old nor new": code
            and not whole(final, before, {file: after[file] for file in before if file in after}),
        }
        if path.startswith("out"):
            again, why = main(words), capsys.readouterr().err
            faults[f"the next run ends with {again}: {why}"] = again != 0
            faults["the next run leaves something else"] = (results(work / "out"), records(work / "out")) != (
                after,
                listed,
            )
        wrong += [
            f"{name} {path}, call {at}: {what}; {code} {reported[-600:]}" for what, is_so in faults.items() if is_so
        ]
    assert not wrong, "\n".join(wrong)
