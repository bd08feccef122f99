"""What is said of fused weights: by the YAML of the training, by flags, or by neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt2pt.errors import UsageError
from ckpt2pt.formats.mindformers.flags import CONTIGUOUS, INTERLEAVED, Flags, read_flags, refuse_flags


def said(tmp_path: Path, text: str, **flags: bool) -> dict[str, bool]:
    config = tmp_path / "train.yaml"
    config.write_text(text)
    return {name: value for name, (value, _) in read_flags(Flags(config=config, **flags)).flags.items()}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"model: {{model_config: {{num_layers: 2, {INTERLEAVED}: false}}}}", (False, False)),
        (f"model_config: {{{CONTIGUOUS}: true}}", (True, True)),
        ("model: {model_config: {compute_dtype: bfloat16}}", (True, False)),
        (f'{{"num_layers": 4, "{INTERLEAVED}": true}}', (True, False)),
    ],
)
def test_the_yaml_says_it_or_the_default_of_mindformers_holds(
    tmp_path: Path, text: str, wanted: tuple[bool, bool]
) -> None:
    assert said(tmp_path, text) == {INTERLEAVED: wanted[0], CONTIGUOUS: wanted[1]}


def test_where_it_is_from_is_reported(tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(f"model: {{model_config: {{{INTERLEAVED}: false}}}}")
    found = read_flags(Flags(config=config)).flags
    assert found[INTERLEAVED][1] == str(config)
    assert "the default of MindFormers" in found[CONTIGUOUS][1]
    assert read_flags(Flags(interleaved=True)).flags == {INTERLEAVED: (True, "as asked for")}


def test_a_flag_that_contradicts_the_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is True, and the YAML of the training says False") as caught:
        said(tmp_path, f"model_config: {{{INTERLEAVED}: false}}", interleaved=True)
    assert caught.value.exit_code == 64


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[1, 2]", "no mapping"),
        ("model: 3", "no mapping"),
        ("seed: 42", "says nothing of a model"),
        ("a: [", "not a YAML document"),
        ("!!python/object/apply:os.system [id]", "not a YAML document"),
        (f"model_config: {{{INTERLEAVED}: maybe}}", "neither true nor false"),
        ("\udcff", "not a YAML document"),
    ],
)
def test_what_is_no_yaml_of_a_training_is_refused(tmp_path: Path, text: str, what: str) -> None:
    config = tmp_path / "train.yaml"
    config.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=what):
        read_flags(Flags(config=config))


def test_a_yaml_that_is_not_there_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"none\.yaml"):
        read_flags(Flags(config=tmp_path / "none.yaml"))


def test_flags_for_another_format_are_refused(tmp_path: Path) -> None:
    refuse_flags(Flags(), tmp_path)
    with pytest.raises(UsageError, match="is no checkpoint of MindFormers"):
        refuse_flags(Flags(contiguous=False), tmp_path)
