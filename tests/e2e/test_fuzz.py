"""10,000 damaged inputs: documented exit codes, no traceback, no hang, bounded memory, nothing written."""

from __future__ import annotations

import random
import resource
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from ckpt2pt.cli import main
from conversions import flags_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ROUNDS = 2500
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
        assert code == 0 or ("where:" in said and "mend:" in said)
    assert codes[65] > ROUNDS // 4, codes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_KIB
    assert not (tmp_path / "out").exists()
