"""Names out of files that anybody wrote, on their way to a terminal: every command spells control characters out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt2pt.cli.commands import main
from ckpt2pt.core.topology import Topology
from ckptfiles import Tensor, ckpt, safe
from handmade import Handmade

EVIL = "language_model.\x1b[2J\x1b]0;owned\x07\nno difference\u202e"


def is_harmless(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text) and "\nno difference" not in text


def one(name: str) -> list[Tensor]:
    return [Tensor(name, "float32", (1,), bytes(4))]


@pytest.mark.parametrize("write", [ckpt, safe], ids=["ckpt", "safetensors"])
@pytest.mark.parametrize("details", [[], ["--details"]])
def test_inspect_spells_them_out(
    write: Any, details: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"x\x1b.{write.__name__.replace('safe', 'safetensors')}"
    path.write_bytes(write(one(EVIL)))
    assert main(["inspect", str(path), *details]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b[2J" in shown
    assert is_harmless(shown)
    assert main(["inspect", str(path), *details, "--output", "json"]) == 0
    assert json.dumps(EVIL) in capsys.readouterr().out


def test_an_archive_of_torch_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({EVIL: torch.zeros(1), "args": {EVIL: EVIL}, "b": {"a": EVIL}}, tmp_path / "x.pt")
    for details in ([], ["--details"]):
        assert main(["inspect", str(tmp_path / "x.pt"), *details]) == 0
        assert is_harmless(capsys.readouterr().out)


def test_a_comparison_does_so_in_its_table_and_in_its_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.ckpt").write_bytes(ckpt(one(EVIL)))
    (tmp_path / "b.ckpt").write_bytes(ckpt(one("x")))
    assert main(["verify", str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt")]) == 76
    found = capsys.readouterr()
    assert "\\x1b[2J" in found.out
    assert "\\x1b[2J" in found.err
    assert is_harmless(found.out)
    assert is_harmless(found.err)


@pytest.mark.parametrize("command", ["convert", "plan"])
def test_an_error_about_a_name_does_so(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Handmade(topology=Topology(num_layers=2))
    made.entries[0, 0][EVIL] = one(EVIL)[0]
    request = made.write(tmp_path)
    flags = ["--num-layers", "2", "--ms-path", str(request.source), "--param-map-path", str(request.metadata)]
    assert main([command, *flags, "--megatron-path", str(tmp_path / "out")]) == 65
    shown = capsys.readouterr().err
    assert "\\x1b[2J" in shown
    assert is_harmless(shown)


def test_a_result_and_its_warnings_do_so_wherever_they_name_a_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / EVIL.replace("/", "")
    folder.mkdir()
    request = Handmade(Topology(num_layers=4, tensor=2)).write(folder)
    [path] = (request.source / "rank_0").iterdir()
    [other] = (request.source / "rank_1").iterdir()
    other.write_bytes(path.read_bytes())
    places = ["--ms-path", str(request.source), "--param-map-path", str(request.metadata)]
    places += ["--megatron-path", str(request.target)]
    for command in (
        ["plan", *places],
        ["convert", *places, "--multiprocess-off"],
        ["verify", *places],
        ["verify", str(request.target)],
        ["pt-meta", "--megatron-path", str(request.target), "--param-map-path", str(folder / "again")],
        ["import", "--megatron-path", str(request.target), "--ms-path", str(folder / "back"), "--multiprocess-off"],
    ):
        assert main(command) == 0, capsys.readouterr().err
        found = capsys.readouterr()
        assert "\\x1b[2J" in found.out, command
        assert is_harmless(found.out), found.out
        assert is_harmless(found.err), found.err
