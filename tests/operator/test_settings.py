"""Flags, variables and files."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt2pt.errors import FileAccessError, UsageError
from ckpt2pt_operator.settings import read

IMAGE = ["--worker-image", "i:1"]


def test_defaults_are_those_of_the_chart() -> None:
    found = read(IMAGE, {})
    assert found.namespaces == ()
    assert (found.qps, found.burst, found.concurrency, found.resync_seconds) == (20.0, 40, 4, 300.0)
    assert (found.leader_elect, found.training_trigger, found.check_volumes) == (False, False, True)
    assert (found.log_format, found.log_level, found.metrics_port) == ("json", "info", 8080)


def test_each_flag_is_a_variable_and_the_flag_counts() -> None:
    environ = {
        "CKPT2PT_WORKER_IMAGE": "i:2",
        "CKPT2PT_QPS": "7",
        "CKPT2PT_LEADER_ELECT": "yes",
        "CKPT2PT_NAMESPACE": "a, b,a",
    }
    found = read([], environ)
    assert (found.worker_image, found.qps, found.leader_elect, found.namespaces) == ("i:2", 7.0, True, ("a", "b"))
    found = read([*IMAGE, "--qps", "3", "--no-leader-elect", "--namespace", "c"], environ)
    assert (found.worker_image, found.qps, found.leader_elect, found.namespaces) == ("i:1", 3.0, False, ("c",))


def test_what_conversions_may_ask_for_is_nothing_unless_it_is_said() -> None:
    assert read(IMAGE, {}).allow == ()
    assert read([*IMAGE, "--allow="], {"CKPT2PT_ALLOW": "root"}).allow == ()
    assert read([*IMAGE, "--allow", "hostPath, root,hostPath"], {}).allow == ("hostPath", "root")
    with pytest.raises(UsageError, match="everything is none of podOverrides, image, hostPath"):
        read([*IMAGE, "--allow", "everything"], {})


def test_files_are_read(tmp_path: Path) -> None:
    defaults, kinds = tmp_path / "defaults.yaml", tmp_path / "kinds.yaml"
    defaults.write_text("nodeSelector: {disk: fast}")
    kinds.write_text(
        "- {apiVersion: batch/v1, kind: Job, plural: jobs, succeeded: {conditions: [Complete]}, failed: {conditions: [Failed]}}"
    )
    found = read([*IMAGE, "--worker-defaults", str(defaults), "--training-kinds", str(kinds)], {})
    assert found.worker_defaults == {"nodeSelector": {"disk": "fast"}}
    assert [kind.plural for kind in found.training_kinds] == ["jobs"]


def test_without_an_image_nothing_begins() -> None:
    with pytest.raises(UsageError, match="no image is given") as caught:
        read([], {})
    assert "--worker-image" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "what"), [("[1]", "is not a mapping"), ("{", "is not YAML"), ("a: \x00", "is not YAML")]
)
def test_a_file_of_another_kind_is_refused(text: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / "defaults.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=what) as caught:
        read([*IMAGE, "--worker-defaults", str(file)], {})
    assert caught.value.where == str(file)


def test_a_file_that_is_not_there_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match="No such file"):
        read([*IMAGE, "--worker-defaults", str(tmp_path / "nowhere")], {})


WRONG = [
    ("--log-format", "xml", "invalid choice: 'xml'"),
    ("--log-level", "loud", "invalid choice: 'loud'"),
    ("--qps", "many", "invalid"),
    ("--qps", "0", "is not a number from 0.01 on"),
    ("--qps", "nan", "is not a number from 0.01 on"),
    ("--burst", "0", "is not a number from 1 on"),
    ("--concurrency", "0", "is not a number from 1 on"),
    ("--concurrency", "1.5", "invalid"),
    ("--resync-seconds", "-1", "is not a number from 1 on"),
    ("--metrics-port", "-1", "is not a number from 0 on"),
]


@pytest.mark.parametrize(("flag", "value", "words"), WRONG)
def test_a_wrong_flag_is_named(flag: str, value: str, words: str) -> None:
    with pytest.raises(UsageError, match=flag) as caught:
        read([*IMAGE, f"{flag}={value}"], {})
    assert words in caught.value.what


@pytest.mark.parametrize(
    ("flag", "value", "words"), [*WRONG, ("--leader-elect", "maybe", "'maybe' is neither true nor false")]
)
def test_a_wrong_variable_is_named(flag: str, value: str, words: str) -> None:
    name = f"CKPT2PT_{flag[2:].replace('-', '_').upper()}"
    with pytest.raises(UsageError) as caught:
        read(IMAGE, {name: value})
    assert words in caught.value.what
    assert caught.value.where == name


def test_a_flag_that_nobody_knows_is_named() -> None:
    with pytest.raises(UsageError, match="--worker-imag"):
        read(["--worker-imag=a"], {})


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("METRICS_PORT", "9", "metrics_port", 9),
        ("BURST", "3", "burst", 3),
        ("RESYNC_SECONDS", "60", "resync_seconds", 60.0),
        ("LEASE_NAME", "l", "lease_name", "l"),
        ("LEASE_NAMESPACE", "ops", "lease_namespace", "ops"),
        ("LOG_FORMAT", "text", "log_format", "text"),
        ("LOG_LEVEL", "debug", "log_level", "debug"),
        ("TRAINING_TRIGGER", "1", "training_trigger", True),
        ("CHECK_VOLUMES", "False", "check_volumes", False),
        ("CHECK_VOLUMES", "", "check_volumes", True),
    ],
)
def test_every_flag_has_its_variable(variable: str, text: str, name: str, value: object) -> None:
    assert getattr(read(IMAGE, {f"CKPT2PT_{variable}": text}), name) == value


def test_everything_is_reported_in_the_log() -> None:
    found = read(IMAGE, {})
    assert found.reported()["worker_image"] == "i:1"
    assert set(found.reported()) == {field for field in found.__slots__ if not field.startswith("_")}
