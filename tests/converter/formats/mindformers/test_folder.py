"""Which folder holds an iteration, and what its files are called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ckpt2pt.errors import FormatError, InputError, MissingInputError
from ckpt2pt.formats.mindformers.folder import file_kind, holds_iteration, iteration_folder, read_common
from mindformers_made import save

ARRAYS = {"output_layer.weight": np.ones((2, 2), "f4")}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model-0000000-0000001.safetensors", "model"),
        ("my-opt-7b-model-0000002-0000008.safetensors", "model"),
        ("qwen3-opt-0000003-0000016.safetensors", "opt"),
        ("../model-0000000-0000001.safetensors", None),
        ("a/model-0000000-0000001.safetensors", None),
        ("model-0-1.safetensors", None),
        ("model-00001-of-00002.safetensors", None),
    ],
)
def test_names_of_files(name: str, kind: str | None) -> None:
    assert file_kind(name) == kind


def test_the_tracker_names_the_iteration_and_another_may_be_asked_for(tmp_path: Path) -> None:
    first, second = (save(tmp_path, ARRAYS, iteration=number) for number in (3, 5))
    assert iteration_folder(tmp_path, None) == second
    assert iteration_folder(tmp_path, 3) == first
    assert iteration_folder(first, None) == first
    for path, number in ((tmp_path, 4), (first, 5)):
        with pytest.raises(MissingInputError, match=rf"no iteration {number}; there (is|are) 3"):
            iteration_folder(path, number)


def test_without_a_tracker_one_iteration_is_clear_and_two_are_not(tmp_path: Path) -> None:
    first = save(tmp_path, ARRAYS)
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    assert iteration_folder(tmp_path, None) == first
    save(tmp_path, ARRAYS, iteration=5)
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(InputError, match="2 iterations and no latest"):
        iteration_folder(tmp_path, None)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("soon")
    with pytest.raises(InputError, match="soon, which is no iteration"):
        iteration_folder(tmp_path, None)


def test_a_tracker_of_what_is_not_there_is_refused(tmp_path: Path) -> None:
    save(tmp_path, ARRAYS)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("9")
    with pytest.raises(MissingInputError, match="no iteration 9; there is 3"):
        iteration_folder(tmp_path, None)
    (tmp_path / "iteration_00000009").mkdir()
    assert not holds_iteration(tmp_path / "iteration_00000009")


def test_numbers_of_the_training(tmp_path: Path) -> None:
    common = read_common(save(tmp_path, ARRAYS))
    assert (common.iteration, common.samples, common.unhealthy) == (3, 24, False)
    assert read_common(tmp_path).iteration is None
    for text, what in (("{", "not a JSON document"), ("[]", "not a JSON object")):
        (tmp_path / "common.json").write_text(text)
        with pytest.raises(FormatError, match=what):
            read_common(tmp_path)
    (tmp_path / "common.json").write_text('{"global_step": -1, "global_batch_size": true}')
    assert read_common(tmp_path).numbers == {}
