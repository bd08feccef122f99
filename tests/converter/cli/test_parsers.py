"""Help that can be copied, and shells that complete it."""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import build_alone, build_parser
from ckpt2pt.cli.parsers import PROGRAMS, SHELLS
from ckpt2pt.cli.programs.kubectl import build_kubectl_parser

BIN = Path(sys.executable).parent
ALONE = {
    "convert_ckpt2pt.py": "convert",
    "convert_pt2ckpt.py": "import",
    "combine_ckpt_dp_zero.py": "combine",
}


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    [found] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found.choices)


@cache
def programs() -> dict[str, tuple[argparse.ArgumentParser, argparse.ArgumentParser]]:
    """Each program and command: the parser whose help it is, and the one that reads its whole command line."""
    found = {"ckpt2pt": (build_parser(), build_parser())}
    for root in (build_parser(), build_kubectl_parser()):
        found |= {parser.prog: (parser, root) for parser in commands_of(root).values()}
    return found | {program: (build_alone(name, program),) * 2 for program, name in ALONE.items()}


def examples_in(text: str, program: str) -> list[list[str]]:
    joined = re.sub(r" \\\n +", " ", text.partition("\nexamples:\n")[2])
    return [shlex.split(line) for line in joined.splitlines() if line.startswith(f"  {program} ")]


@pytest.mark.parametrize("program", programs())
def test_every_example_in_help_is_a_command_line_that_is_understood(program: str) -> None:
    shown, reads = programs()[program]
    found = examples_in(shown.format_help(), program)
    assert 2 <= len(found) <= 4
    for words in found:
        reads.parse_args(words[len(reads.prog.split()) :])


@pytest.mark.parametrize("program", programs())
def test_help_fits_into_eighty_columns_but_for_its_first_line(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = programs()[program][0].format_help().partition("exit codes:")[0].splitlines()
    assert [line for line in lines[1:] if len(line) > 80] == []


@pytest.mark.parametrize(
    ("command", "lacks"),
    [
        ("watch", ("--stage", "--iteration")),
        ("verify", ("--overwrite", "--process-limit")),
        ("inspect", ("--progress",)),
        ("plan", ("--progress", "--verify")),
    ],
)
def test_a_command_takes_only_options_that_it_heeds(command: str, lacks: tuple[str, ...]) -> None:
    assert not set(lacks) & set(commands_of(build_parser())[command]._option_string_actions)


@pytest.mark.parametrize("command", ["convert", "watch", "verify", "import", "combine", "pt-meta", "run"])
def test_what_may_take_its_time_shows_how_far_it_is(command: str) -> None:
    assert "--progress" in commands_of(build_parser())[command]._option_string_actions


@pytest.mark.parametrize("command", ["convert", "plan", "verify"])
def test_paths_come_first_and_what_a_pod_sets_comes_late(command: str) -> None:
    text = commands_of(build_parser())[command].format_help()
    wanted = ["where:", "what:", "model and parallel layout:", "how:", "when:", "in a pod:", "output:", "examples:"]
    there = [name for name in wanted if f"\n{name}\n" in text]
    assert there[:3] == wanted[:3]
    assert there == sorted(there, key=lambda name: text.index(f"\n{name}\n"))


class Shell:
    """An interactive shell on a terminal of its own."""

    def __init__(self, words: list[str], folder: Path) -> None:
        self._master, slave = pty.openpty()
        env = {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(folder),
            "TERM": "xterm",
            "PS1": "$ ",
            "LANG": "C.UTF-8",
        }
        self._process = subprocess.Popen(
            words, stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=env, start_new_session=True
        )
        os.close(slave)

    def type(self, text: str, until: str, seconds: float = 40.0) -> str:
        """Send keys, and wait until the screen shows something."""
        os.write(self._master, text.encode())
        shown, late = "", time.monotonic() + seconds
        while until not in shown and time.monotonic() < late:
            if select.select([self._master], [], [], 0.2)[0]:
                shown += os.read(self._master, 65536).decode(errors="replace")
        return shown

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_commands_options_choices_and_paths(shell: str, tmp_path: Path) -> None:
    if not shutil.which(shell):
        assert shell != "bash", "every machine that runs these tests has bash"
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "ms_ckpt").mkdir()
    bare = {"bash": ["--norc", "--noprofile", "-i"], "zsh": ["-f", "-i"]}[shell]
    screen = Shell([shell, *bare], tmp_path)
    ready = "autoload -U compinit && compinit -u; " if shell == "zsh" else ""
    try:
        assert "ready\r" in screen.type(f'{ready}eval "$(ckpt2pt completion {shell})"; echo re""ady\n', "ready\r")
        for typed, completed in (
            ("ckpt2pt conv\t", "convert "),
            ("--tp\t", "--tp-size "),
            ("2 --verify fu\t", "full "),
            ("--ms-path ms\t", "ms_ckpt/"),
        ):
            rest = completed[len(typed.split()[-1]) :].rstrip()
            assert rest in screen.type(typed, rest)
    finally:
        screen.close()


def test_fish_completes_as_well(tmp_path: Path) -> None:
    if not shutil.which("fish"):
        pytest.skip("fish is not installed")
    script = 'ckpt2pt completion fish | source; complete -C "ckpt2pt convert --tp"'
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    found = subprocess.run(["fish", "-c", script], capture_output=True, text=True, check=True, env=env).stdout
    assert [line.split("\t")[0].strip() for line in found.splitlines()] == ["--tp-size"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_code_of_a_shell_is_for_every_program(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    from ckpt2pt.cli.commands import main

    assert main(["completion", shell]) == 0
    shown = capsys.readouterr().out
    assert all(program in shown for program in PROGRAMS)


def test_help_does_not_load_what_completes_or_draws() -> None:
    code = (
        "import sys; from ckpt2pt.cli.commands import build_parser; build_parser().format_help(); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"argcomplete", "rich", "numpy", "yaml", "kubernetes"} & set(loaded)
