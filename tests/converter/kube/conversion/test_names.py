"""Which texts are names of objects, and what becomes of one in a URL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ckpt2pt.errors import UsageError
from ckpt2pt.kube.conversion.names import (
    DRIVER,
    FILE_STEM,
    GROUP_VERSION,
    HINTS,
    HOST,
    KIND_WORD,
    NAME,
    fits,
    is_name,
    request_path,
)
from documents import root_schema

HOSTILE = (
    "", ".", "..", "a/b", "/a", "a/", "../../other/persistentvolumeclaims/x", "..%2f..%2fother", "%2e%2e", "a%2Fstatus", "%",
)  # fmt: skip
"""What an API server would not take for one segment of a path, encoded or not."""


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("place", ["namespace", "name"])
def test_what_could_become_another_path_is_refused(place: str, name: str) -> None:
    if (place, name) == ("namespace", ""):
        return  # all namespaces
    words = {"namespace": "team", "name": "a", place: name}
    with pytest.raises(UsageError, match="is not the name of an object"):
        request_path("api/v1", words["namespace"], "persistentvolumeclaims", words["name"])


@pytest.mark.parametrize(
    ("name", "sent"), [("a?limit=1", "a%3Flimit%3D1"), ("a#b", "a%23b"), ("a b;c", "a%20b%3Bc"), ("ü\n", "%C3%BC%0A")]
)
def test_everything_else_stays_one_segment(name: str, sent: str) -> None:
    assert request_path("apis/batch/v1", "team", "jobs", name) == f"/apis/batch/v1/namespaces/team/jobs/{sent}"


def test_collections_and_subresources() -> None:
    assert request_path("api/v1", "", "pods") == "/api/v1/pods"
    assert request_path("api/v1", "team", "pods", "a", "log") == "/api/v1/namespaces/team/pods/a/log"
    assert request_path("version", "", "") == "/version"


@pytest.mark.parametrize(
    ("text", "right"),
    [("a", True), ("step.500-b", True), ("a" * 253, True), ("a" * 254, False), ("A", False), ("-a", False), ("a.", False),
     ("a..b", False), ("a_b", False), ("a\n", False), ("", False), ("../x", False)],
)  # fmt: skip
def test_names(text: str, right: bool) -> None:
    assert is_name(text) == right


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        (GROUP_VERSION, ("v1", "batch/v1", "mindxdl.gitee.com/v1", "kubeflow.org/v2beta1"), ("", "1", "batch/", "../v1", "a/b/v1")),
        (KIND_WORD, ("Job", "PyTorchJob"), ("", "Job/", "Jo b", "1")),
        (DRIVER, ("nfs.csi.k8s.io", "Driver.example"), ("", "a/b", "a b")),
        (HOST, ("nas", "10.0.0.1", "fd00::1", "[fe80::1%eth0]", "nas.example.com"), ("", "-osync", "a b", "a/b", "a,b")),
    ],
)  # fmt: skip
def test_other_words(pattern: str, right: tuple[str, ...], wrong: tuple[str, ...]) -> None:
    assert [text for text in right if not fits(pattern, text)] == []
    assert [text for text in wrong if fits(pattern, text)] == []


NAMED = {
    "claimName": NAME, "name": NAME, "schedulerName": NAME, "priorityClassName": NAME, "runtimeClassName": NAME,
    "queueName": NAME, "apiVersion": GROUP_VERSION, "kind": KIND_WORD, "driver": DRIVER, "server": HOST, "prefix": FILE_STEM,
}  # fmt: skip


def texts(schema: Any, path: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name, inner in schema.get("properties", {}).items():
        if inner.get("type") == "string":
            yield f"{path}.{name}", name, inner
        yield from texts(inner, f"{path}.{name}")
    if isinstance(schema.get("items"), dict):
        yield from texts(schema["items"], f"{path}[]")


def test_every_name_of_the_crd_has_its_pattern() -> None:
    """A new field that ends in ``Name`` has to be put into the table too."""
    found = list(texts(root_schema()["properties"]["spec"], "spec"))
    named = [(path, name, inner) for path, name, inner in found if name in NAMED or name.lower().endswith("name")]
    assert len(named) > 15
    assert [(path, inner.get("pattern")) for path, name, inner in named if inner.get("pattern") != NAMED[name]] == []
    assert all(inner.get("maxLength") for _, _, inner in named)
    assert set(NAMED.values()) == set(HINTS), "and each says what to write instead"
