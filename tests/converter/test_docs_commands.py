"""The pages on today's Megatron-LM, as a reader would try them: every command of their blocks is run, in order, on real checkpoints."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from descriptions import said_of
from goldens import REPOSITORY, golden_root
from torchdist import gpt, write_gpt

DOCS = REPOSITORY / "docs"
CUT = golden_root() / "megatron06" / "b_tp2pp2"


def old(place: Path) -> None:
    """A checkpoint whose optimizer is flattened, as 0.8 to 0.14 save it."""
    (place / "torch_dist_old").mkdir()
    write_gpt(place / "torch_dist_old" / "iter_0000003", gpt(), flat=True)
    (place / "torch_dist_old" / "latest_checkpointed_iteration.txt").write_text("3")


def of_mindspore(place: Path) -> None:
    (place / "ms_ckpt").symlink_to(CUT / "ms")
    (place / "pt_meta").symlink_to(CUT / "pt_meta")
    (place / "megatron_old").symlink_to(CUT / "A")
    said = {name: value for name, value in said_of(CUT).items() if not isinstance(value, bool)}
    flags = [word for name, value in said.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    (place / "moe_ep2").symlink_to(golden_root() / "mcore" / "0.19.0" / "moe_ep2")
    (place / "pretrain.sh").write_text(f"torchrun pretrain_gpt.py {shlex.join([*flags, *SWITCHES])}\n")


SWITCHES = (
    "--bf16", "--swiglu", "--group-query-attention", "--untie-embeddings-and-output-weights", "--disable-bias-linear", "--use-distributed-optimizer",
)  # fmt: skip
"""Of the run behind the set."""


def of_megatron(place: Path) -> None:
    (place / "megatron_06").symlink_to(CUT / "A")


PAGES: dict[str, Callable[[Path], None]] = {
    "from-0.6.md": of_megatron,
    "megatron.md": of_mindspore,
    "rescue.md": old,
    "torch-dist.md": of_mindspore,
}
"""Page -> what makes the folders and files that it names."""


def commands_of(page: str) -> list[str]:
    """The commands of the blocks of a page, each on a line."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_ends_well(page: str, tmp_path: Path) -> None:
    PAGES[page](tmp_path)
    commands = commands_of(page)
    assert len(commands) >= 2
    written: set[str] = set()
    for number, command in enumerate(commands):
        assert command.startswith("ckpt2pt "), command
        target = re.search(r" convert .*--target (\S+)", command)
        if target and target[1] in written:  # another way to the same result
            command = command.replace(f"--target {target[1]}", f"--target {target[1]}_{number}")
        written |= {target[1]} if target else set()
        program = command.replace("ckpt2pt", f"{sys.executable} -m ckpt2pt", 1)
        done = subprocess.run(
            ["bash", "-c", program],
            cwd=tmp_path,
            env=os.environ | {"CI": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
