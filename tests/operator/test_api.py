"""What the operator's client sends, and what it makes of refusals, silence and nonsense."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from apiserver import Answer
from ckpt2pt_operator.api import CLAIMS, CONVERSIONS, EVENTS, JOBS, PODS, Api, ApiError, Bucket
from talking import api_of, talk

CONVERSION_PATH = "/apis/ckpt2pt.dev/v1alpha1/namespaces/team/checkpointconversions/a"
Use = Callable[[Api], Awaitable[object]]


@pytest.mark.parametrize(
    ("use", "method", "path", "body"),
    [
        (lambda api: api.get(CLAIMS, "team", "a"), "GET", "/api/v1/namespaces/team/persistentvolumeclaims/a", None),
        (lambda api: api.list(PODS, "", str, limit="5"), "GET", "/api/v1/pods?limit=5", None),
        (lambda api: api.create_object(JOBS, "team", {"a": 1}), "POST", "/apis/batch/v1/namespaces/team/jobs", {"a": 1}),
        (lambda api: api.patch(EVENTS, "team", "e", {"count": 2}), "PATCH", "/api/v1/namespaces/team/events/e", {"count": 2}),
        (lambda api: api.put_status(CONVERSIONS, "team", "a", {"b": 1}), "PUT", f"{CONVERSION_PATH}/status", {"b": 1}),
        (
            lambda api: api.delete(JOBS, "team", "a", uid="u"), "DELETE", "/apis/batch/v1/namespaces/team/jobs/a",
            {"propagationPolicy": "Background", "preconditions": {"uid": "u"}},
        ),
        (lambda api: api.version(), "GET", "/version", None),
    ],
    ids=["get", "list", "create", "patch", "status", "delete", "version"],
)  # fmt: skip
def test_each_request(use: Use, method: str, path: str, body: object) -> None:
    _, asked = talk(lambda *_: (200, {"gitVersion": "v1"}), use)
    assert [one[:3] for one in asked] == [(method, path, body)]


@pytest.mark.parametrize(
    "name", ["..", ".", "", "../../other/persistentvolumeclaims/x", "a/b", "..%2f..%2fother", "a%2Fstatus", "%2e%2e"]
)
def test_a_name_that_could_become_another_path_is_never_asked_for(name: str) -> None:
    async def use(api: Api) -> list[int]:
        codes: list[int] = []
        for ask in (
            api.get(CLAIMS, "team", name),
            api.put_status(JOBS, "team", name, {}),
            api.get(JOBS, name or "..", "a"),
        ):
            with pytest.raises(ApiError, match="is not the name of an object") as caught:
                await ask
            codes.append(caught.value.code)
            assert not caught.value.passing
        return codes

    codes, asked = talk(lambda *_: (200, {}), use)
    assert (codes, asked) == ([400, 400, 400], [])


@pytest.mark.parametrize("name", ["a?b=c", "a#b", "a;b c", "a&b", "a\\b"])
def test_the_http_library_leaves_an_encoded_name_one_segment(name: str) -> None:
    """It normalises paths and decodes what it thinks needs no encoding: what arrives is looked at on a socket."""
    _, [(_, path, *_)] = talk(lambda *_: (200, {}), lambda api: api.get(CLAIMS, "team", name))
    folder, _, last = path.rpartition("/")
    assert folder == "/api/v1/namespaces/team/persistentvolumeclaims"
    assert not {"?", "#"} & set(last)
    assert unquote(last) == name


@pytest.mark.parametrize("value", ["a=b,c&watch=true", "a=b#c", "a=%26b", "a=b+c d", "a=b;c"])
def test_a_selector_stays_one_parameter(value: str) -> None:
    _, [(_, path, *_)] = talk(
        lambda *_: (200, {}), lambda api: api.list(PODS, "team", str, labelSelector=value, limit="5")
    )
    assert parse_qs(urlsplit(path).query, separator="&") == {"labelSelector": [value], "limit": ["5"]}


REFUSED = {"kind": "Status", "reason": "Forbidden", "message": "exceeded quota: none"}


def refused(answer: Answer, **headers: str) -> ApiError:
    async def use(api: Api) -> ApiError:
        with pytest.raises(ApiError) as caught:
            await api.create_object(JOBS, "team", {})
        return caught.value

    return talk(lambda *_: answer, use, **headers)[0]


def test_a_refusal_is_reported_in_the_servers_words() -> None:
    error = refused((403, REFUSED))
    assert (error.code, error.reason, error.message, error.passing) == (403, "Forbidden", "exceeded quota: none", False)


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_what_may_pass_says_so(code: int) -> None:
    assert refused((code, "a proxy says no")).passing


def test_a_server_that_is_busy_says_how_long_to_wait() -> None:
    assert refused((429, {}), Retry_After="7").pause == 7
    assert refused((429, {"details": {"retryAfterSeconds": 3}})).pause == 3
    assert refused((429, {}), Retry_After="86400").pause == 300, "but nobody holds us up for a day"


@pytest.mark.parametrize("text", ["<html>please sign in</html>", "[1]", '"a"'])
def test_an_answer_that_is_no_object_is_an_error(text: str) -> None:
    error = refused((200, text))
    assert (error.code, error.reason, error.passing) == (0, "NotJson", True)


def test_a_server_that_is_not_there_is_an_error_that_passes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"

    async def use() -> ApiError:
        api = api_of(url)
        try:
            with pytest.raises(ApiError) as caught:
                await api.get(JOBS, "team", "a")
        finally:
            await api.close()
        return caught.value

    error = asyncio.run(use())
    assert (error.code, error.passing) == (0, True)


# --------------------------------------------------------------------------------------------------------------- watches


def watched(text: str, status: int = 200) -> tuple[list[Any], ApiError | None]:
    """The events of a watch whose stream is ``text``, and what ended it."""

    async def use(api: Api) -> tuple[list[Any], ApiError | None]:
        found: list[Any] = []
        try:
            async for event in api.watch(PODS, "", labelSelector="a=b"):
                found.append(event)  # noqa: PERF401 - what came before it broke counts
        except ApiError as error:
            return found, error
        return found, None

    found, asked = talk(lambda *_: (status, text), use)
    assert asked[0][1].startswith("/api/v1/pods?")
    assert "watch=true" in asked[0][1]
    return found


def line(number: int, *, length: int = 0) -> str:
    return json.dumps({"type": "ADDED", "object": {"number": number, "text": "x" * length}}) + "\n"


def test_a_watch_gives_each_line_and_ends_with_the_server() -> None:
    events, error = watched(line(1) + line(2))
    assert [event["object"]["number"] for event in events] == [1, 2]
    assert error is None


def test_an_object_of_a_megabyte_does_not_end_a_watch() -> None:
    events, error = watched(line(1, length=1 << 20) + line(2))
    assert [event["object"]["number"] for event in events] == [1, 2]
    assert error is None


@pytest.mark.parametrize("text", [line(1) + line(2)[:-9], line(1) + "<html>\n", line(1) + "[]\n"])
def test_a_watch_that_breaks_off_is_an_error_after_what_was_whole(text: str) -> None:
    events, error = watched(text)
    assert [event["object"]["number"] for event in events] == [1]
    assert error
    assert (error.code, error.passing) == (0, True)


def test_a_line_without_end_is_refused() -> None:
    events, error = watched("x" * (17 << 20))
    assert not events
    assert error
    assert "more than" in error.message


def test_a_watch_that_is_refused_says_why() -> None:
    _, error = watched(json.dumps({"reason": "Expired", "message": "too old"}), 410)
    assert error
    assert (error.code, error.reason) == (410, "Expired")


def test_a_watch_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt2pt_operator.api.SILENCE", 0.2)

    async def use(api: Api) -> ApiError:
        with pytest.raises(ApiError) as caught:
            await anext(api.watch(PODS, ""))
        return caught.value

    def say_nothing(*_: object) -> Answer:
        time.sleep(1.0)
        raise ConnectionResetError

    error, _ = talk(say_nothing, use)
    assert (error.code, error.passing) == (0, True)


def test_requests_are_counted_by_verb_resource_and_code() -> None:
    async def use(api: Api) -> float | None:
        await api.list(PODS, "", str)
        return api._metrics.registry.get_sample_value(
            "ckpt2pt_operator_api_requests_total", {"verb": "list", "resource": "pods", "code": "200"}
        )

    assert talk(lambda *_: (200, {}), use)[0] == 1


ENDING = "unable to create new content in namespace team because it is being terminated"


@pytest.mark.parametrize(("message", "counted"), [("exceeded quota: none", 1), (ENDING, None)])
def test_what_is_forbidden_is_counted_but_not_that_a_namespace_goes(message: str, counted: float | None) -> None:
    async def use(api: Api) -> list[float | None]:
        with pytest.raises(ApiError):
            await api.create_object(JOBS, "team", {})
        with pytest.raises(ApiError):
            async for _ in api.watch(PODS, ""):
                pass
        found = api._metrics.registry.get_sample_value
        name = "ckpt2pt_operator_api_forbidden_total"
        return [found(name, {"verb": verb, "resource": of}) for verb, of in (("post", "jobs"), ("watch", "pods"))]

    assert talk(lambda *_: (403, REFUSED | {"message": message}), use)[0] == [counted, counted]


def test_writes_are_held_back_but_for_a_burst() -> None:
    async def use() -> float:
        bucket, began = Bucket(50.0, 5), time.monotonic()
        for _ in range(15):
            await bucket.take()
        return time.monotonic() - began

    assert asyncio.run(use()) >= 0.15


def test_one_write_of_a_namespace_does_not_wait_for_all_of_another() -> None:
    async def use() -> list[str]:
        bucket, order = Bucket(200.0, 1), list[str]()

        async def write(namespace: str) -> None:
            await bucket.take(namespace)
            order.append(namespace)

        async with asyncio.TaskGroup() as group:
            for _ in range(50):
                group.create_task(write("many"))
            await asyncio.sleep(0)
            given_up = group.create_task(write("gone"))
            group.create_task(write("one"))
            await asyncio.sleep(0)
            given_up.cancel()
        return order

    order = asyncio.run(use())
    assert len(order) == 51
    assert order.index("one") <= 2
