"""10,000 damaged inputs, and records of ours that were forged: documented exit codes, no traceback, no hang, bounded memory."""

from __future__ import annotations

import json
import random
import resource
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.io.records import seal
from conversions import flags_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ROUNDS = 2500
RECORDS = 300
SECONDS_EACH = 5.0
MEMORY_KIB = 200 << 10
INTERESTING = (
    b"\0",
    b"\xff",
    b"\x80",
    b"\x0a",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",
)

KINDS = {
    "ckpt": ("j_tp1pp2dp2", "ms/rank_2/network.ckpt"),
    "safetensors": ("b_st_tp2pp2_safetensors", "ms/rank_1/network.safetensors"),
    "json": ("j_tp1pp2dp2", "pt_meta/param_map_buffer0_dp0tp0pp1vpp0.json"),
    "pt": ("j_tp1pp2dp2", "pt_meta/args_tp00_pp001.pt"),
}


def mutate(data: bytes, dice: random.Random, hot: int) -> bytes:
    """One to four small wounds, most of them where the structure is."""
    out = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(min(len(out), hot) if dice.random() < 0.7 else len(out)) if out else 0
        match dice.randrange(6):
            case 0:
                out[at : at + 1] = bytes([dice.randrange(256)])
            case 1 if out:
                out[at] ^= 1 << dice.randrange(8)
            case 2:
                del out[at : at + dice.choice((1, 2, 8, 100, 10_000))]
            case 3:
                piece = dice.choice(INTERESTING)
                out[at : at + len(piece)] = piece
            case 4:
                out[at:at] = dice.choice((dice.choice(INTERESTING), bytes(out[at : at + 50])))
            case _:
                del out[at:]
    return bytes(out)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_is_refused_in_words(
    golden: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, victim = KINDS[kind]
    folder = tmp_path / name
    for part in ("ms", "pt_meta"):
        shutil.copytree(golden / "megatron06" / name / part, folder / part)
    path = folder / victim
    path.chmod(0o600)
    original = path.read_bytes()
    argv = ["plan", *flags_for(folder, tmp_path / "out")]
    assert main(argv) == 0
    dice = random.Random(kind)
    codes: Counter[int] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(ROUNDS):
        path.write_bytes(mutate(original, dice, 4096))
        capsys.readouterr()
        began = time.process_time()  # of a busy machine the clock on the wall tells nothing
        code = main(argv)
        codes[code] += 1
        said = capsys.readouterr().err
        assert time.process_time() - began < SECONDS_EACH, f"round {number} took too long"
        assert code in {0, 65, 66}, f"round {number}: exit {code}: {said}"
        assert "Traceback" not in said
        assert code == 0 or ("where:" in said and "hint:" in said)
    assert codes[65] > ROUNDS // 4, codes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_KIB
    assert not (tmp_path / "out").exists()


WEIRD: tuple[Any, ...] = (
    None, -1, 2**63, 10**30, 1.5, True, "", "../../x", "/etc/passwd", "a\0b", "\x1b[31m", [], {}, [None], [[]], {"a": []},
    "a" * 5000, "rank_99999999999/x", ".", ["a"],
)  # fmt: skip
TRACKERS = (
    b"",
    b"\0",
    b"-1",
    b"release",
    b"9" * 5000,
    "\u0663".encode(),
    b"2\n3",
    b"\x1b[31m",
    b"00002",
    b"1e3",
    b"../x",
)


def places(value: object, here: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where something stands in a document."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*here, key)
            yield from places(value[key], (*here, key))


def forge(data: bytes, dice: random.Random) -> bytes:
    """A record with something else in one place, or without it, and with a seal that fits."""
    document = json.loads(data)
    document.pop("seal")
    *way, last = dice.choice([place for place in places(document) if len(place) < 4 or dice.random() < 0.2])
    inner = document
    for key in way:
        inner = inner[key]
    if dice.random() < 0.2:
        del inner[last]
    else:
        inner[last] = dice.choice(WEIRD)
    return seal(document)


def test_forged_records_are_refused_or_replaced_in_words(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, made, work = golden / "megatron06" / "j_tp1pp2dp2", tmp_path / "made", tmp_path / "work"
    back = ["import", "--megatron-path", str(made / "pt"), "--multiprocess-off", "--ms-path"]
    meta = ["pt-meta", "--megatron-path", str(folder / "A"), "--param-map-path"]

    def convert(root: Path) -> list[str]:
        return ["convert", *flags_for(folder, root / "pt"), "--multiprocess-off"]

    for command in (convert(made), [*back, str(made / "ms")], [*meta, str(made / "meta")]):
        assert main(command) == 0
    commands = {
        "pt": [["verify", str(work / "pt")], ["inspect", str(work / "pt")], convert(work), [*convert(work), "--overwrite"],
               [*convert(work), "--overwrite", "--convert-param-only"], ["verify", *flags_for(folder, work / "pt")]],
        "ms": [["verify", str(work / "ms")], [*back, str(work / "ms")], [*back, str(work / "ms"), "--overwrite"],
               [*back, str(work / "ms"), "--overwrite", "--convert-param-only"]],
        "meta": [[*meta, str(work / "meta")], [*meta, str(work / "meta"), "--overwrite"]],
    }  # fmt: skip
    records = [path.relative_to(made) for path in sorted(made.rglob("*.json")) if ".ckpt2pt" in path.parts]
    records.append(Path("pt", "latest_checkpointed_iteration.txt"))
    dice = random.Random(20261130)
    codes: Counter[int] = Counter()
    for number in range(RECORDS):
        record = dice.choice(records)
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(made / record.parts[0], work / record.parts[0])
        path = work / record
        data = path.read_bytes()
        if path.suffix == ".txt":
            path.write_bytes(dice.choice(TRACKERS))
        else:
            path.write_bytes(forge(data, dice) if dice.random() < 0.8 else mutate(data, dice, 4096))
        command = dice.choice(commands[record.parts[0]])
        capsys.readouterr()
        began = time.process_time()
        code = main(command)
        codes[code] += 1
        said = capsys.readouterr()
        what = f"round {number}: {command[0]} {command[-1]} after {record}: {path.read_bytes()[:300]!r}: {code}: {said.err}"
        assert time.process_time() - began < SECONDS_EACH, what
        assert code in {0, 64, 65, 66, 75, 76}, what
        assert "Traceback" not in said.err, what
        assert all(char.isprintable() or char in "\n\t" for char in said.out + said.err), what
        assert {found.name for found in tmp_path.iterdir()} == {"made", "work"}, what
    assert codes[0] > RECORDS // 10, codes
    assert codes[0] < RECORDS, codes
