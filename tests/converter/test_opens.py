"""How often a run opens the files that it reads: on network storage each time is a round trip."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt2pt.errors import MissingInputError
from ckpt2pt.io.inputs import InputFile, read_whole, sha256

SCRIPT = """
import json, os, sys
from collections import Counter
found, source = Counter(), sys.argv[1]
def seen(event, args):
    if event == "open" and isinstance(args[0], (str, os.PathLike)) and os.fspath(args[0]).startswith(source):
        if os.path.isfile(args[0]):
            found[os.path.relpath(args[0], source)] += 1
sys.addaudithook(seen)
from ckpt2pt.cli.commands import main
code = main(sys.argv[2:])
print(json.dumps([code, found]))
"""


def opens(source: Path, target: Path, *more: str) -> dict[str, int]:
    flags = [
        "--tp-size",
        "2",
        "--pp-size",
        "2",
        "--num-layers",
        "4",
        "--multiprocess-off",
        "--megatron-path",
        str(target),
    ]
    flags += ["--ms-path", str(source / "ms"), "--param-map-path", str(source / "pt_meta"), *more]
    words = [sys.executable, "-c", SCRIPT, str(source), "convert", *flags]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    code, found = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    return dict(found)


def test_a_conversion_opens_each_source_once_for_its_header_and_once_for_its_payload(
    golden: Path, tmp_path: Path
) -> None:
    changed = max(path.stat().st_ctime for path in (golden / "megatron06" / "b_tp2pp2" / "pt_meta").iterdir())
    time.sleep(max(0.0, changed + 2.1 - time.time()))  # where the set has been unpacked just now
    found = opens(golden / "megatron06" / "b_tp2pp2", tmp_path)
    assert sum(name.startswith("ms/") for name in found) == 4
    assert sum(name.startswith("pt_meta/") for name in found) == 8
    assert {name: count for name, count in found.items() if count > (2 if name.startswith("ms/") else 1)} == {}


@pytest.mark.parametrize(
    ("words", "model", "optim"),
    [
        (["import"], 4, 3),
        (["convert"], 5, 3),
        (["convert", "--target-tp-size", "1"], 5, 4),
        (["convert", "--target-format", "megatron"], 9, 9),
        (["convert", "--target-format", "torch_dist"], 7, 7),
    ],
    ids=["import", "the same layout", "another layout", "megatron", "torch_dist"],
)
def test_a_megatron_source_is_opened_a_few_times_however_many_tensors_it_holds(
    words: list[str], model: int, optim: int, golden: Path, tmp_path: Path
) -> None:
    """For its header, its proof, its payload, its archive's checksums, and once to compare what several ranks hold.

    The first rank's model file is opened once more, to tell what wrote it.

    29 times before headers were kept, and once for each tensor that several ranks hold.
    """
    source = golden / "megatron06" / "b_tp2pp2" / "A"
    words = [*words, "--source", str(source), "--target", str(tmp_path), "--multiprocess-off", "--progress", "none"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(source), *words], capture_output=True, text=True, check=True
    )
    code, found = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    counts = {name: count for name, count in found.items() if name.endswith(".pt")}
    assert len(counts) == 8
    most = {"model_optim_rng.pt": model, "distrib_optim.pt": optim}
    assert {name: count for name, count in counts.items() if count > most[Path(name).name]} == {}


@pytest.mark.parametrize("read", [lambda path: read_whole(path, "it"), lambda path: sha256(path, "it")])
def test_a_small_file_that_was_written_since_is_read_again(
    tmp_path: Path, read: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    answers = list[object]()
    for text in ("one", "two", "longer"):
        path.write_text(text)
        answers.append(read(path))  # too fresh to be kept
        with monkeypatch.context() as later:
            later.setattr("ckpt2pt.io.inputs._AT_REST", -10.0)
            answers += [read(path), read(path)]
        time.sleep(0.02)
    assert answers[::3] == answers[1::3] == answers[2::3]
    answers = answers[::3]
    assert len(set(answers)) == 3
    other = tmp_path / "y.json"
    other.write_text("LONGER")
    other.rename(path)
    assert read(path) not in answers


def test_a_large_file_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt2pt.io.inputs._AT_REST", -10.0)
    path = tmp_path / "x"
    path.write_bytes(bytes(1 << 20))
    with InputFile(path, keep=True) as one, InputFile(path, keep=True) as other:
        path.unlink()
        assert one.read(1 << 19, 4) == other.read(1 << 19, 4) == bytes(4)
    with pytest.raises(MissingInputError, match="not there"):
        InputFile(path, keep=True)


@pytest.mark.parametrize("target_format", ["megatron", "torch_dist"])
def test_a_source_is_opened_no_more_often_where_its_parallel_sizes_are_not_given(
    target_format: str, golden: Path, tmp_path: Path
) -> None:
    source = golden / "megatron06" / "b_tp2pp2" / "A"
    words = ["convert", "--source", str(source), "--target-format", target_format, "--progress", "none"]
    counts: list[dict[str, int]] = []
    for name, sizes in {"found": [], "given": ["--target-tp-size", "2", "--target-pp-size", "2"]}.items():
        asked = [*words, *sizes, "--target", str(tmp_path / name), "--multiprocess-off"]
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(source), *asked], capture_output=True, text=True, check=True
        )
        code, found = json.loads(done.stdout.splitlines()[-1])
        assert code == 0, done.stderr
        counts.append(found)
    assert counts[0] == counts[1]
