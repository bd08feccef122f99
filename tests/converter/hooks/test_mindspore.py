"""Where the hook stands in the list of callbacks, and that nothing it does is felt by the training.

The training is played by a stand-in here; tests/e2e/test_hook.py has the real one.
"""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ckpt2pt.hooks import moment_of, rank_of_environment, submit_conversion

STAND_IN = (
    "mindspore",
    "mindspore.train",
    "mindspore.communication",
    "mindformers",
    "mindformers.tools",
    "mindformers.tools.register",
)


class Callback:
    """As mindspore's: nothing happens unless it is overridden."""


class Saving(Callback):
    """ModelCheckpoint as far as the hook looks at it."""

    def __init__(self, latest: str) -> None:
        self._latest = latest

    @property
    def latest_ckpt_file_name(self) -> str:
        return self._latest


class Registry:
    found: dict[str, type] = {}  # noqa: RUF012 - as in mindformers

    @classmethod
    def register(cls, kind: str) -> Any:
        return lambda item: cls.found.setdefault(f"{kind}.{item.__name__}", item)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    made = {name: ModuleType(name) for name in STAND_IN}
    made["mindspore.train"].Callback = Callback  # type: ignore[attr-defined]
    made["mindspore.communication"].get_rank = _no_group  # type: ignore[attr-defined]
    made["mindformers.tools.register"].MindFormerRegister = Registry  # type: ignore[attr-defined]
    made["mindformers.tools.register"].MindFormerModuleType = SimpleNamespace(CALLBACK="callback")  # type: ignore[attr-defined]
    for name, each in made.items():
        monkeypatch.setitem(sys.modules, name, each)
    for name in ("RANK_ID", "OMPI_COMM_WORLD_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name in ("mindspore", "mindformers"):
        sys.modules.pop(f"ckpt2pt.hooks.{name}", None)
    yield importlib.import_module("ckpt2pt.hooks.mindspore")
    for name in ("mindspore", "mindformers"):
        sys.modules.pop(f"ckpt2pt.hooks.{name}", None)


def _no_group() -> int:
    raise RuntimeError("not initialised")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would be run; it says the name of a conversion."""
    found: list[list[str]] = []

    def run(words: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        found.append(words)
        assert more["timeout"] > 0
        return subprocess.CompletedProcess(words, 0, "run-0-4-abc\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    return found


@pytest.fixture
def template(tmp_path: Path) -> str:
    (tmp_path / "t.yaml").touch()
    return str(tmp_path / "t.yaml")


def context(*callbacks: object, **more: object) -> Any:
    parameters = SimpleNamespace(list_callback=list(callbacks), cur_step_num=4, **more)
    return SimpleNamespace(original_args=lambda: parameters)


LATEST = "/out/rank_0/network_rank_0-1_4.ckpt"


def test_the_last_file_is_submitted(module: Any, calls: list[list[str]], template: str) -> None:
    hook = module.ConversionHook(template, run="r", set_fields={"spec.dryRun": "true"}, namespace="ml")
    hook.on_train_begin(context(Saving(LATEST), hook))
    hook.on_train_end(context(Saving(LATEST), hook))
    [words] = calls
    assert words[1:6] == ["-m", "ckpt2pt", "submit", "-f", template]
    pairs = dict(pairwise(words))
    assert (pairs["--epoch"], pairs["--step"], pairs["--iteration"], pairs["--run"]) == ("1", "4", "4", "r")
    assert (pairs["--ready-in"], pairs["--set"], pairs["--namespace"]) == ("/out", "spec.dryRun=true", "ml")


def test_a_hook_before_the_last_save_submits_nothing_and_says_so_at_the_beginning(
    module: Any, calls: list[list[str]], template: str, caplog: pytest.LogCaptureFixture
) -> None:
    hook = module.ConversionHook(template)
    hook.on_train_begin(context(hook, Saving(LATEST)))
    assert "list it last" in caplog.text
    hook.on_train_end(context(hook, Saving(LATEST)))
    assert calls == []
    assert "no ModelCheckpoint before ConversionHook" in caplog.text


def test_a_template_that_is_missing_is_reported_at_the_beginning(module: Any, caplog: pytest.LogCaptureFixture) -> None:
    hook = module.ConversionHook("/none.yaml")
    hook.on_train_begin(context(hook))
    assert "/none.yaml is not there" in caplog.text


@pytest.mark.parametrize(
    "strange", [None, SimpleNamespace(), SimpleNamespace(original_args=lambda: None), context(), context(5, None)]
)
def test_nothing_is_raised_whatever_the_training_says(
    module: Any, strange: Any, calls: list[list[str]], template: str
) -> None:
    hook = module.ConversionHook(template)
    hook.on_train_begin(strange)
    hook.on_train_end(strange)
    assert calls == []


def test_numbers_in_quotes_are_numbers_and_what_is_none_is_reported_before_the_training(
    module: Any, calls: list[list[str]], template: str
) -> None:
    hook = module.ConversionHook(template, ready_seconds="300", request_seconds="5")
    hook.on_train_end(context(Saving(LATEST), hook))
    assert dict(pairwise(calls[0]))["--readiness-timeout"] == "300.0"
    with pytest.raises(ValueError, match="soon"):
        module.ConversionHook(template, ready_seconds="soon")
    with pytest.raises(ValueError, match="sequence"):
        module.ConversionHook(template, set_fields=["spec.dryRun=true"])


def test_other_ranks_submit_nothing(
    module: Any, calls: list[list[str]], template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["mindspore.communication"], "get_rank", lambda: 3)
    hook = module.ConversionHook(template)
    hook.on_train_end(context(Saving(LATEST), hook))
    assert calls == []
    monkeypatch.setattr(sys.modules["mindspore.communication"], "get_rank", _no_group)
    monkeypatch.setenv("RANK_ID", "2")
    hook.on_train_end(context(Saving(LATEST), hook))
    assert calls == []


@pytest.fixture
def of_mindformers(module: Any) -> Any:
    return importlib.import_module("ckpt2pt.hooks.mindformers")


def test_mindformers_finds_it_by_its_name(module: Any, of_mindformers: Any) -> None:
    found = Registry.found["callback.ConversionHook"]
    assert found.__module__ == "ckpt2pt.hooks.mindformers"
    assert issubclass(found, module.ConversionHook)


def test_a_static_graph_that_writes_iterations_submits_the_last(
    of_mindformers: Any, calls: list[list[str]], template: str
) -> None:
    monitor = SimpleNamespace(use_legacy_format=False, directory="/out/checkpoint", _append_step_num=100)
    hook = of_mindformers.ConversionHook(template, run="r")
    hook.on_train_begin(context(monitor, hook))
    hook.on_train_end(context(monitor, hook))
    pairs = dict(pairwise(calls[0]))
    assert (pairs["--step"], pairs["--iteration"], pairs["--ready-in"]) == ("104", "104", "/out/checkpoint")
    assert "--epoch" not in pairs


def test_a_static_graph_that_writes_ranks_submits_its_latest_file(
    of_mindformers: Any, calls: list[list[str]], template: str
) -> None:
    saving = Saving(LATEST)
    saving.use_legacy_format = True  # type: ignore[attr-defined]
    of_mindformers.ConversionHook(template).on_train_end(context(saving))
    assert dict(pairwise(calls[0]))["--step"] == "4"


def test_pynative_mode_calls_it_with_its_own_state(
    of_mindformers: Any, calls: list[list[str]], template: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = SimpleNamespace(checkpoint=SimpleNamespace(save_path="/out/checkpoint"))
    state = SimpleNamespace(global_step=7)
    hook = of_mindformers.ConversionHook(template)
    events = ("begin", "train_begin", "epoch_begin", "step_begin", "step_end", "epoch_end", "train_end", "end")
    for event in events:  # pynative/callback/callback.py, CallbackHandler.call_event
        getattr(hook, f"on_{event}")(config, state, model=None, optimizer=None)
    [words] = calls
    pairs = dict(pairwise(words))
    assert (pairs["--step"], pairs["--iteration"], pairs["--ready-in"]) == ("7", "7", "/out/checkpoint")
    of_mindformers.ConversionHook(template, output_dir="/mnt").on_train_end(None, state)
    assert dict(pairwise(calls[1]))["--ready-in"] == "/mnt"
    assert "give output_dir" not in caplog.text
    hook.on_train_end(None, state)
    hook.on_train_end(config, SimpleNamespace(global_step=None))
    assert len(calls) == 2
    assert caplog.text.count("give output_dir") == 2
    of_mindformers.ConversionHook("/none.yaml").on_train_begin(config, state)
    assert "/none.yaml is not there" in caplog.text


# ----------------------------------------------------------------------------------------------------------- any loop


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/network_rank_0-2_500.ckpt", (2, 500)), ("x-0_1.safetensors", (0, 1)), ("network_rank_3_700.ckpt", (0, 700)),
        ("network.ckpt", None), ("", None),
    ],
)  # fmt: skip
def test_the_moment_of_a_file(name: str, expected: tuple[int, int] | None) -> None:
    assert moment_of(name) == expected


def test_the_rank_of_a_launcher() -> None:
    assert rank_of_environment({}) == 0
    assert rank_of_environment({"RANK": "1", "RANK_ID": "7"}) == 7
    assert rank_of_environment({"RANK_ID": "x", "RANK": "1"}) == 1


def test_a_file_without_a_step_and_a_folder(calls: list[list[str]], caplog: pytest.LogCaptureFixture) -> None:
    assert submit_conversion("t", latest="/out/rank_0/network.ckpt", rank=0) is None
    assert "no epoch and step" in caplog.text
    assert submit_conversion("t", output_dir="/out", rank=0, uid="u") == "run-0-4-abc"
    assert "--step" not in calls[0]
    assert "--ready-in" in calls[0]


@pytest.mark.parametrize("wrong", [{"ready_seconds": "soon"}, {"set_fields": ["a=b"]}, {"output_dir": 5, "latest": 7}])
def test_wrong_arguments_are_logged_and_never_raised(
    wrong: dict[str, Any], calls: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    assert submit_conversion("t", **{"output_dir": "/out", "rank": 0, **wrong}) is None
    assert "no conversion is submitted" in caplog.text
    assert calls == []


@pytest.mark.parametrize(
    "error", [OSError("no memory"), subprocess.TimeoutExpired("x", 1), ValueError("embedded null byte")]
)
def test_what_goes_wrong_is_logged(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    assert submit_conversion("t", latest=LATEST, rank=0) is None
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_a_real_process_that_fails_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert submit_conversion(tmp_path / "none.yaml", rank=0) is None
    assert "exit code 66" in caplog.text
