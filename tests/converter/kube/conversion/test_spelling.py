"""Each edge names an option as its user knows it."""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import ckpt2pt
from ckpt2pt.cli.commands import build_parser, main
from ckpt2pt.cli.programs.kubectl import build_kubectl_parser
from ckpt2pt.errors import FIELDS, FLAG_ONLY, FormatError, UsageError, aside, field_of, printable, ref, refs, rendered
from ckpt2pt.io.lines import Spelling
from ckpt2pt.kube.conversion.spelling import (
    ARGUMENTS,
    FLAGS,
    in_document,
    in_python,
    of_call,
    of_command,
    of_function,
    spelled_document,
)
from ckpt2pt.kube.worker.account import Account
from ckpt2pt.kube.worker.termination import message_of
from ckpt2pt.library.commands import Asked
from documents import changed, claim, write
from goldens import REPOSITORY
from markers import marked

SPEC: dict[str, Any] = yaml.safe_load((REPOSITORY / "crds/checkpointconversions.yaml").read_text(encoding="utf-8"))[
    "spec"
]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
TENSOR = f"set {ref('parallelism.tensor')}{aside('source.iteration')}"


def flags_of(command: str) -> set[str]:
    [found] = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    parser = found.choices[command]
    return {name for action in parser._actions for name in (*action.option_strings, action.metavar) if name}


@pytest.mark.parametrize("call", FLAGS)
def test_the_command_has_every_flag_that_it_is_said_to_have(call: str) -> None:
    known = flags_of(call.split(maxsplit=1)[0]) | {"PATH"}
    assert {flag for flags in FLAGS[call].values() for flag in flags.split()} <= known


@pytest.mark.parametrize("call", FLAGS)
@pytest.mark.parametrize("path", [*FIELDS, *FLAG_ONLY])
def test_no_command_is_reported_a_flag_that_it_lacks(call: str, path: str) -> None:
    shown = rendered(f"check {ref(path)}{aside(path)}", of_command(call))
    assert shown == printable(shown)
    assert {word.strip("()") for word in shown.split() if word.strip("(").startswith("--")} <= flags_of(
        call.split(maxsplit=1)[0]
    )


@pytest.mark.parametrize("path", FIELDS)
def test_a_field_is_one_of_the_document(path: str) -> None:
    found = SPEC
    for name in path.split("."):
        found = found["properties"][name] if "properties" in found else pytest.fail(f"nothing is below {name}")
    assert str(in_document(path)).startswith(f"spec.{path}")


@pytest.mark.parametrize("path", FLAG_ONLY)
def test_what_is_a_flag_alone_is_no_field_of_the_document(path: str) -> None:
    assert path == "spec" or in_document(path) is None


@pytest.mark.parametrize("named", [ref, aside, refs])
def test_an_unknown_field_fails_at_once(named: Any) -> None:
    with pytest.raises(LookupError, match="no field 'parallelism\\.tensors'"):
        named("parallelism.tensors")


def test_an_error_names_no_field_that_is_unknown() -> None:
    with pytest.raises(LookupError, match="no field 'model\\.layers'"):
        UsageError("wrong", where="here", hint="correct it", field="model.layers")


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        pytest.param("convert", "set --tp-size (--iteration)", id="convert"),
        pytest.param("plan", "set --tp-size (--iteration)", id="plan"),
        pytest.param("watch", "set --tp-size", id="watch"),
        pytest.param("import", "set --tp-size (--iteration)", id="import"),
        pytest.param("combine", "set the tensor parallel size", id="combine"),
        pytest.param("inspect", "set the tensor parallel size", id="inspect"),
        pytest.param("run", "set spec.parallelism.tensor (spec.source.iteration)", id="run"),
    ],
)
def test_a_text_names_options_as_the_command_called_has_them(call: str, shown: str) -> None:
    assert rendered(TENSOR, of_command(call)) == shown


def test_without_an_edge_a_text_names_the_bare_field() -> None:
    error = UsageError("wrong", where=ref("spec"), hint=TENSOR)
    assert str(error) == "wrong\n  where: spec\n  hint:  set parallelism.tensor (source.iteration)"


def test_fields_are_listed_as_a_sentence_has_them() -> None:
    assert (
        rendered(refs("parallelism.tensor", "parallelism.data", "mode"))
        == "parallelism.tensor, parallelism.data and mode"
    )
    assert rendered(refs("mode")) == "mode"


@pytest.mark.parametrize("text", ["\x02no.field\x03", "\x02mode", "\x02(mode", "mode\x03"])
def test_a_name_out_of_a_file_is_no_marker(text: str) -> None:
    assert rendered(text) == text
    assert "\x02" not in printable(text)


def test_a_text_tells_its_field_only_if_it_is_one() -> None:
    assert field_of(ref("source.path")) == "source.path"
    assert field_of(f"{ref('source.path')} or so") is None
    assert field_of("PATH") is None


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        pytest.param("convert --ms-path a --param-map-path b --megatron-path c", "--ms-path", id="convert"),
        pytest.param(
            "convert --ms-path a --param-map-path b --megatron-path c --termination-log d",
            "spec.source.path",
            id="worker",
        ),
        pytest.param("watch -f a.yaml", "spec.source.path", id="watch a document"),
        pytest.param("watch --ms-path a --param-map-path b --megatron-path c", "--ms-path", id="watch"),
        pytest.param("run -f a.yaml", "spec.source.path", id="run"),
        pytest.param("import --ms-path a --megatron-path c", "--megatron-path", id="import"),
        pytest.param("combine", "--checkpoint-dir", id="combine"),
        pytest.param("verify --ms-path a --param-map-path b --megatron-path c", "--ms-path", id="verify"),
        pytest.param("verify a b", "PATH", id="verify two"),
        pytest.param("inspect a", "PATH", id="inspect"),
        pytest.param("pt-meta --param-map-path b --megatron-path a", "--megatron-path", id="pt-meta of a checkpoint"),
        pytest.param("pt-meta --param-map-path b --description a", "--ms-path", id="pt-meta of a description"),
        pytest.param("pt-meta --param-map-path b --from-pt-meta a", "--from-pt-meta", id="pt-meta of pt_meta"),
        pytest.param("submit -f a.yaml", "--ready-in", id="submit"),
    ],
)
def test_the_source_is_named_as_in_the_call(words: str, shown: str) -> None:
    assert of_call(build_parser().parse_args(words.split()))("source.path") == shown


def test_a_document_is_spelled_to_its_leaves() -> None:
    document = {"notes": [ref("mode"), 3], "more": {"path": ref("source.path")}, "none": None}
    expected = {"notes": ["--convert-param-only", 3], "more": {"path": "--ms-path"}, "none": None}
    assert spelled_document(document, of_command("convert")) == expected


def test_a_log_line_names_options_as_the_command_called_has_them() -> None:
    error = UsageError("wrong", where="here", hint=ref("source.path"))
    record = logging.LogRecord("ckpt2pt", logging.ERROR, "", 1, f"{ref('mode')}: %s", (error,), None)
    assert Spelling(of_command("convert")).filter(record)
    assert record.getMessage() == "--convert-param-only: wrong\n  where: here\n  hint:  --ms-path"


def test_a_termination_message_speaks_of_the_document() -> None:
    assert message_of(UsageError("wrong", where="here", hint=TENSOR)) == (
        "wrong; here; set spec.parallelism.tensor (spec.source.iteration)"
    )


def test_an_error_as_json_names_its_field_by_its_path(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["convert", "--ms-path", "a", "--megatron-path", "b", "--param-map-path", str(tmp_path / "c")]
    assert main([*words, "--rules", "no.yaml", "--log-format", "json"]) == 66
    reported = json.loads(capfd.readouterr().err.splitlines()[-1])
    assert (reported["field"], reported["hint"]) == ("model.rules", "check --rules")


# -------------------------------------------------------------------------------------------------- errors of each command

SPELLED = re.compile(r"(?<![\w-])--[a-z][a-z-]*|(?<![\w.])spec\b[\w.]*")
PLACES = "--ms-path {set}/ms --param-map-path {set}/pt_meta --megatron-path {new}"
LAYERS = {"--num-layers", "--stage-list"}
WRONG = [
    pytest.param(f"convert {PLACES} --num-layers 5 --pp-size 2", 64, LAYERS, id="convert"),
    pytest.param(f"convert {PLACES} --stage 7", 64, {"--stage", "--pp-size"}, id="convert-a-stage"),
    pytest.param(f"plan {PLACES} --noop -1", 64, {"--noop"}, id="plan"),
    pytest.param(f"watch --once {PLACES} --num-layers 5 --pp-size 2", 64, LAYERS, id="watch"),
    pytest.param(f"verify {PLACES}", 66, {"--megatron-path"}, id="verify"),
    pytest.param(f"verify {PLACES} --num-layers 5 --pp-size 2", 64, LAYERS, id="verify-layers"),
    pytest.param("verify {set}/A {other}", 76, {"--ignore"}, id="verify-two"),
    pytest.param("inspect {set}/none", 66, set(), id="inspect"),
    pytest.param("import --megatron-path {set}/A --ms-path {new} --noop -1", 64, {"--noop"}, id="import"),
    pytest.param(
        "import --megatron-path {set}/A --ms-path {new} --num-layers 5", 65,
        {"--num-layers", "--target-tp-size", "--target-pp-size", "--target-vpp-size"}, id="import-layers",
    ),
    pytest.param(
        "combine --checkpoint-dir {set}/ms --strategy-dir {set}/none --output-dir {new}", 66, {"--strategy-dir"}, id="combine"
    ),
    pytest.param("pt-meta --param-map-path {new} --megatron-path {set}/none", 66, {"--megatron-path"}, id="pt-meta"),
    pytest.param("pt-meta --param-map-path {new} --from-pt-meta {set}/ms", 64, {"--from-pt-meta"}, id="pt-meta-anew"),
    pytest.param(
        "pt-meta --param-map-path {new} --ms-path {set}/ms --description {set}/none", 66, {"--description"}, id="pt-meta-described"
    ),
    pytest.param(
        "submit -f {document} --ready-in {set}/none --readiness-timeout 0.1 --step 2 --epoch 0", 66, {"--ready-in"}, id="submit"
    ),
    pytest.param("run -f {document} {volumes}", 65, {"spec.parallelism", "spec.model"}, id="run"),
    pytest.param("run -f {layers} {volumes}", 64, {"spec.model", "spec.model.numLayers", "spec.model.layersPerStage"}, id="run-layers"),
    pytest.param("watch --once -f {document} {volumes}", 65, {"spec.parallelism", "spec.model"}, id="watch-a-document"),
]  # fmt: skip


@pytest.fixture
def places(golden: Path, tmp_path: Path) -> dict[str, str]:
    """A golden set, another one, and documents that do not fit the set."""
    sets = golden / "megatron06"
    both = {"parallelism": {"tensor": 1, "pipeline": 2}, "target": {"path": "new", "volume": claim("new")}}
    wrong = [(f"spec.{field}", value) for field, value in both.items()]
    document = write(tmp_path / "document.yaml", changed(*wrong, ("spec.retries", {"perStage": 0})))
    layers = write(tmp_path / "layers.yaml", changed(*wrong, ("spec.model.numLayers", 5)))
    return {
        "set": str(sets / "b_tp2pp2"),
        "other": str(sets / "e_tp1pp2vpp2_noop_tail" / "A"),
        "new": str(tmp_path / "new"),
        "document": str(document),
        "layers": str(layers),
        "volumes": f"--volume training={sets / 'b_tp2pp2'} --volume new={tmp_path}",
    }


@pytest.mark.parametrize(("words", "code", "named"), WRONG)
def test_an_error_speaks_of_options_of_the_command_called(
    words: str, code: int, named: set[str], places: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*words.format(**places).split(), "--log-format", "text"]) == code
    reported = capfd.readouterr().err
    for place in places.values():
        reported = reported.replace(place, "")
    reported = re.sub(r"ckpt2pt pt-meta .*", "", reported)  # a whole command line
    assert {word.rstrip(".") for word in SPELLED.findall(reported)} == named, reported


def test_every_command_is_among_them() -> None:
    [found] = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    assert {str(one.values[0]).split()[0] for one in WRONG} == {*found.choices} - {"completion"}


def test_the_plugin_of_kubectl_speaks_of_its_own_options(
    places: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    words = "submit -f {document} --ready-in {set}/none --readiness-timeout 0.1 --step 2 --epoch 0"
    assert main(words.format(**places).split(), build_kubectl_parser) == 66
    assert "check --ready-in: it is" in capfd.readouterr().err


# ----------------------------------------------------------------------------------------------------------- in Python


@pytest.mark.parametrize("function", ARGUMENTS)
def test_a_function_has_every_argument_that_it_is_said_to_have(function: str) -> None:
    found = {*inspect.signature(getattr(ckpt2pt, function)).parameters}
    known = {*Asked.__annotations__} if "asked" in found else found
    assert {name for names in ARGUMENTS[function].values() for name in names.split(", ")} <= known
    assert {*ARGUMENTS[function]} <= {*FIELDS, *FLAG_ONLY}


def test_an_error_of_the_library_speaks_of_its_arguments(golden: Path, tmp_path: Path) -> None:
    one = golden / "megatron06" / "b_tp2pp2"
    with pytest.raises(UsageError, match="layers do not divide") as caught:
        ckpt2pt.convert(source=one / "ms", metadata=one / "pt_meta", target=tmp_path / "new", num_layers=5, pp=2)
    error = caught.value
    assert (error.where, error.hint) == (
        "the call",
        "set num_layers to the count with no-op layers included, or give the split in layers_per_stage",
    )
    assert not marked(repr(error.__dict__))


def test_the_cause_of_an_error_of_the_library_stays() -> None:
    cause = ValueError("within")
    with pytest.raises(FormatError) as caught, in_python("open"):
        raise FormatError("wrong", where="here", hint=f"check {ref('source.path')}", field="source.path") from cause
    assert (caught.value.__cause__, caught.value.hint, caught.value.field) == (cause, "check path", "source.path")


def test_a_function_without_an_argument_for_it_says_what_it_is() -> None:
    assert rendered(TENSOR, of_function("inspect")) == "set the tensor parallel size"


# ------------------------------------------------------------------------------------------------ what no edge has spelled


def test_a_marker_that_no_edge_has_spelled_is_shown_as_its_field() -> None:
    assert printable(f"name: {ref('model.rules')}\x1b") == "name: model.rules\\x1b"


def test_progress_speaks_of_the_document() -> None:
    account = Account()
    account.wait(f"checkpoint cannot be read: {ref('source.path')}")
    assert account.progress()["message"] == "checkpoint cannot be read: spec.source.path"


@pytest.mark.parametrize("leak", [str, repr, json.dumps, lambda text: text.replace("\x02", "\\x02")])
@pytest.mark.parametrize("named", [ref, aside])
def test_a_marker_is_recognised_in_what_was_written(named: Any, leak: Any) -> None:
    assert marked(leak(f"check {named('source.path')}, please"))
    assert not marked(leak(f"check {rendered(named('source.path'))}, please"))
