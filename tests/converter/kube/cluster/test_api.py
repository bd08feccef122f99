"""The client: patient where it helps, plain where it does not, and never longer than it was reported."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest

from apiserver import Answer, Server
from ckpt2pt.errors import Ckpt2ptError, MissingInputError, TryAgainError, UsageError
from ckpt2pt.kube.cluster import api as module
from ckpt2pt.kube.cluster.api import Api, ApiError, Connection, explained, in_cluster


def api_at(url: str, seconds: float = 10) -> Api:
    found = Connection(server=url, context=None, token=lambda: "secret", namespace="ml", direct=True)
    return Api(found, seconds=seconds)


def test_what_is_sent_and_what_comes_back() -> None:
    server = Server(lambda method, path, body: (200, {"method": method, "body": body}))
    with server.running():
        api = api_at(server.url)
        assert api.json("POST", "/x", {"a": "é"}, fieldValidation="Strict") == {"method": "POST", "body": {"a": "é"}}
        api.json("PATCH", "/y", {})
    assert [asked[:2] for asked in server.asked] == [("POST", "/x?fieldValidation=Strict"), ("PATCH", "/y")]
    assert {asked[3] for asked in server.asked} == {"Bearer secret"}


def test_what_may_pass_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    answers: list[Answer] = [(429, "slow"), (503, "later"), (200, {"ok": True})]
    server = Server(lambda *_: answers.pop(0))
    server.headers = {"Retry-After": "3"}
    with server.running():
        assert api_at(server.url, 60).json("GET", "/x") == {"ok": True}
    assert pauses == [3.0, 6.0]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422])
def test_what_is_refused_is_not_tried_again(status: int) -> None:
    server = Server(lambda *_: (status, {"kind": "Status", "message": "no"}))
    with server.running(), pytest.raises(ApiError) as caught:
        api_at(server.url).json("GET", "/x")
    assert (caught.value.status, caught.value.message, len(server.asked)) == (status, "no", 1)


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(lambda *_: (503, "no"))
    began = time.monotonic()
    with server.running(), pytest.raises(ApiError):
        api_at(server.url, 2).json("GET", "/x")
    assert time.monotonic() - began < 6
    assert len(server.asked) >= 2


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(TryAgainError, match="cannot be reached"):
        api_at(f"http://127.0.0.1:{port}", 0.5).json("GET", "/x")


def test_one_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ONE_TRY_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TryAgainError):
        api_at(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.5).json("GET", "/x")


def test_one_that_speaks_no_http() -> None:
    def nonsense(listening: socket.socket) -> None:
        with listening.accept()[0] as connection:
            connection.recv(1000)
            connection.sendall(b"\x00\x01\x02\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=nonsense, args=(listening,))
        thread.start()
        with pytest.raises(TryAgainError):
            api_at(f"http://127.0.0.1:{listening.getsockname()[1]}", 0.5).json("GET", "/x")
        thread.join()


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, UsageError),
        (422, UsageError),
        (401, UsageError),
        (403, UsageError),
        (404, MissingInputError),
        (500, TryAgainError),
    ],
)
def test_a_refusal_in_words(status: int, kind: type[Ckpt2ptError]) -> None:
    found = explained(ApiError(status, "why"), "creating it", "x")
    assert isinstance(found, kind)
    assert found.what == f"creating it was refused ({status}): why"


# ------------------------------------------------------------------------------------------------------------- in a pod


def account(tmp_path: Path) -> Path:
    import ssl

    bundle = ssl.get_default_verify_paths().cafile or ssl.get_default_verify_paths().openssl_cafile
    if not Path(bundle).is_file():
        pytest.skip("this machine has no bundle of certificates")
    for name, text in {"token": "one\n", "namespace": "ml\n", "ca.crt": Path(bundle).read_text()}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_pod_finds_its_api_server_and_reads_its_token_anew(tmp_path: Path) -> None:
    given = {"KUBERNETES_SERVICE_HOST": "fd00::1", "CKPT2PT_SERVICE_ACCOUNT": str(account(tmp_path))}
    found = in_cluster(given)
    assert found
    assert (found.server, found.namespace, found.token(), found.direct) == ("https://[fd00::1]:443", "ml", "one", True)
    (tmp_path / "token").write_text("two")
    assert found.token() == "two"


def test_elsewhere_there_is_none(tmp_path: Path) -> None:
    assert in_cluster({}) is None
    assert in_cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "CKPT2PT_SERVICE_ACCOUNT": str(tmp_path)}) is None


def test_half_a_service_account_is_reported(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("x")
    given = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "CKPT2PT_SERVICE_ACCOUNT": str(tmp_path)}
    with pytest.raises(MissingInputError, match="cannot be read"):
        in_cluster(given)
