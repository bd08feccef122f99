"""A worker's numbers by HTTP: right, harmless, and never a reason to fail."""

from __future__ import annotations

import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from ckpt2pt.kube.worker import endpoint
from ckpt2pt.kube.worker.account import Account
from ckpt2pt.kube.worker.endpoint import MAX_CONNECTIONS, metrics, served


@pytest.fixture
def account() -> Account:
    account = Account()
    account.stages = (3,)
    account.begin({(0, 3): 100}, 500)
    account.advance((0, 3), 40)
    return account


@pytest.fixture
def port(account: Account) -> Iterator[int]:
    with served(account, 0) as port:
        yield port


def get(port: int, path: str) -> tuple[str, str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def test_progress(port: int) -> None:
    kind, text = get(port, "/progress?x=1")
    document: Any = json.loads(text)
    assert kind == "application/json"
    assert document.pop("throughput") > 0
    assert document == {
        "version": 1, "stages": [3], "phase": "Converting", "bytes": 40, "bytesTotal": 100, "iteration": 500,
    }  # fmt: skip


def test_metrics_are_in_the_text_format(port: int) -> None:
    kind, text = get(port, "/metrics")
    assert kind.startswith("text/plain; version=0.0.4")
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r'ckpt2pt_worker_[a-z_]+\{(phase="\w+",)?stage="3"\} \d+', line) for line in samples)
    assert 'ckpt2pt_worker_bytes_total{stage="3"} 40' in samples
    assert 'ckpt2pt_worker_phase{phase="Converting",stage="3"} 1' in samples
    for line in samples:
        name = re.split(r"[{ ]", line)[0]
        assert f"# TYPE {name} " in text
        assert f"# HELP {name} " in text


def test_metrics_tell_the_stage_where_there_is_one() -> None:
    account = Account()
    account.stages = [3]
    text = metrics(account)
    assert 'ckpt2pt_worker_bytes_total{stage="3"} 0\n' in text
    assert 'ckpt2pt_worker_phase{phase="Planning",stage="3"} 1\n' in text
    account.stages = [0, 1]
    assert "stage=" not in metrics(account)


def test_metrics_of_an_account_that_knows_nothing_yet() -> None:
    assert 'ckpt2pt_worker_phase{phase="Planning"} 1' in metrics(Account())
    assert "iteration" not in metrics(Account())


def test_health_and_strangers(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert get(port, "/healthz")[1] == "ok\n"
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(port, "/etc/passwd")
    caught.value.close()
    assert caught.value.code == 404
    with socket.create_connection(("127.0.0.1", port), timeout=10) as nonsense:
        nonsense.sendall(b"\x00\xff\r\n\r\n")
        nonsense.recv(100)
    assert capfd.readouterr() == ("", "")


def test_idle_connections_are_bounded_and_end(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    idle = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(MAX_CONNECTIONS + 3)]
    try:
        # Those beyond the limit are closed at once, the others are still open.
        assert [connection.recv(1) for connection in idle[MAX_CONNECTIONS:]] == [b""] * 3
        idle[0].sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert idle[0].recv(100).startswith(b"HTTP/1.0 200")
    finally:
        for connection in idle:
            connection.close()


def test_it_listens_to_both_families(port: int) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has one family")
    with urllib.request.urlopen(f"http://[::1]:{port}/healthz", timeout=10) as answer:
        assert answer.status == 200


def test_a_port_in_use_is_a_warning(account: Account, port: int, caplog: pytest.LogCaptureFixture) -> None:
    with served(account, port) as none:
        assert none == 0
    assert f"progress is not served on port {port}" in caplog.text


def test_the_port_is_free_again_afterwards(account: Account) -> None:
    with served(account, 0) as port:
        pass
    with served(account, port) as again:
        assert again == port
    assert endpoint.TIMEOUT_SECONDS < 10
