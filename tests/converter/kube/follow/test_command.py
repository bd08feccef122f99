"""The command that watches is tested with what it follows, in test_watch.py; here, what it makes of its options."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import build_parser
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import UsageError
from ckpt2pt.kube.follow import command
from ckpt2pt.kube.follow.watch import Following
from ckpt2pt.kube.worker.account import Account
from documents import changed, write

FLAGS = ["--num-layers", "4", "--ms-path", "a", "--param-map-path", "b", "--megatron-path", "c"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Following]:
    """How it would follow."""
    found: list[Following] = []

    def watch(_: Request, how: Following, **__: object) -> int:
        found.append(how)
        return 0

    monkeypatch.setattr(command, "watch", watch)
    return found


def follow(*words: str) -> Account:
    options = build_parser().parse_args(["watch", *words], argparse.Namespace(account=Account()))
    assert command.watch_command(options, lambda *_: None) == 0
    account: Account = options.account
    return account


def test_the_defaults(asked: list[Following]) -> None:
    account = follow(*FLAGS, "--pp-size", "2")
    assert asked == [Following(keep=0, interval=30.0, settle=10.0)]
    assert (account.following, account.stages) == (True, range(2))


def test_a_document_decides_over_the_defaults_and_a_flag_over_the_document(
    asked: list[Following], tmp_path: Path
) -> None:
    document = changed(
        ("spec.follow", {"keep": 3, "intervalSeconds": 5}),
        ("spec.readiness", {"settleSeconds": 7, "timeoutSeconds": 0}),
    )
    words = ["-f", str(write(tmp_path / "a.yaml", document)), "--volume", f"training={tmp_path}"]
    follow(*words)
    follow(*words, "--keep", "0", "--interval", "0.5", "--settle", "0")
    assert asked == [Following(keep=3, interval=5, settle=7), Following(keep=0, interval=0.5, settle=0)]


def test_looking_again_without_a_pause_is_refused(asked: list[Following]) -> None:
    with pytest.raises(UsageError, match="--interval is 0"):
        follow(*FLAGS, "--interval", "0")
    assert asked == []


def test_a_document_without_follow_can_be_followed(asked: list[Following], tmp_path: Path) -> None:
    follow("-f", str(write(tmp_path / "a.yaml", changed())), "--volume", f"training={tmp_path}")
    assert asked == [Following(keep=0, interval=30.0, settle=10.0)]
