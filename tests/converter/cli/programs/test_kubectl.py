"""The plugin of kubectl; its commands are tested with the API server they speak to (cluster/)."""

from __future__ import annotations

import pytest

from ckpt2pt.cli.programs.kubectl import kubectl


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        kubectl(["--help"])
    assert left.value.code == 0
    reported = capsys.readouterr().out
    assert "usage: kubectl ckpt2pt" in reported
    assert all(command in reported for command in ("submit", "watch", "retry", "cancel", "logs"))


def test_an_unknown_command_is_wrong_usage() -> None:
    assert kubectl(["transmogrify"]) == 64
