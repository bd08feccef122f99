"""Every way in which an import can be wrong is seen and named; a right one passes."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from ckpt2pt.core.tensor import Role
from ckpt2pt.discover import discover
from ckpt2pt.discover.request import MindSporeFiles, Request
from ckpt2pt.errors import FormatError, VerificationError
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.verification.imported import prove_import
from ckptfiles import Tensor, ckpt
from imports import import_request, run_all
from layouts import topology
from relaid import Relaid
from results import flip

ROLES: tuple[Role, ...] = ("main_param", "exp_avg", "exp_avg_sq")
NORM = "language_model.encoder.layers.0.input_norm.weight"
LAYOUTS = pytest.mark.parametrize("relaid", [False, True], ids=["same-layout", "another-layout"])


class Imported(NamedTuple):
    request: Request

    @property
    def path(self) -> Path:
        return self.request.target / "rank_0" / "network.ckpt"

    def tensors(self) -> dict[str, Tensor]:
        data = self.path.read_bytes()
        return {
            name: Tensor(
                name, ref.dtype, ref.shape, b"".join(data[e.offset : e.offset + e.nbytes] for e in ref.extents)
            )
            for name, ref in index_file(self.path).items()
        }

    def change(self, edit: Callable[[dict[str, Tensor]], object]) -> None:
        tensors = self.tensors()
        edit(tensors)
        self.path.write_bytes(ckpt(tensors.values()))

    def prove(self, **partials: Path) -> None:
        paths = partials or {"network.ckpt": self.path}
        prove_import(self.request, discover(self.request), (0, 0), paths, heed=lambda: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two tensor-parallel ranks, imported as it is and into four."""
    folder = tmp_path_factory.mktemp("finished")
    Relaid(topology=topology(tensor=2), bias=True).convert(folder)
    for relaid in (False, True):
        assert run_all(importing(folder, relaid)).published
    return folder


def importing(folder: Path, relaid: bool) -> Request:
    return import_request(
        source=folder / "out",
        target=folder / ("relaid" if relaid else "alike"),
        target_tensor=4 if relaid else None,
    )


@pytest.fixture
def result(finished: Path, relaid: bool, tmp_path: Path) -> Imported:
    """A copy to damage."""
    return Imported(importing(shutil.copytree(finished, tmp_path / "copy"), relaid))


def _flip(name: str, element: int) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        data = bytearray(tensors[name].data)
        data[4 * element] ^= 1
        tensors[name] = replace(tensors[name], data=bytes(data))

    return edit


def _swap(one: str, other: str) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[one], tensors[other] = (
            replace(tensors[one], data=tensors[other].data),
            replace(tensors[other], data=tensors[one].data),
        )

    return edit


def _number(name: str, code: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name] = replace(tensors[name], data=struct.pack(code, value))

    return edit


def _add(tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({tensor.name: tensor})


DAMAGE = [
    pytest.param(_flip(NORM, 3), f"{NORM}: 1 of .* elements differ from the source .*first at element 3", id="a-bit"),
    pytest.param(_flip(f"exp_avg_sq.{NORM}", 0), f"exp_avg_sq.{NORM}: 1 of", id="a-bit-of-a-moment"),
    pytest.param(
        _swap(f"exp_avg.{NORM}", f"exp_avg_sq.{NORM}"), "2 differences", id="moments-that-changed-places"
    ),
    pytest.param(
        _swap("language_model.encoder.layers.0.attention.out_proj.weight",
              "language_model.encoder.layers.1.attention.out_proj.weight"), "2 differences", id="layers-that-changed-places",
    ),
    pytest.param(lambda tensors: tensors.pop(NORM), "main_param of decoder.layers.0.input_layernorm.weight: is in the source, and not in the result", id="lost"),
    pytest.param(lambda tensors: tensors.pop(f"exp_avg.{NORM}"), "exp_avg of decoder.layers.0.*: is in the source, and not in the result", id="lost-moment"),
    pytest.param(
        _add(Tensor("language_model.encoder.layers.9.input_norm.weight", "float32", (1,), bytes(4))),
        "main_param of decoder.layers.9.input_layernorm.weight: is not in the source", id="too-many",
    ),
    pytest.param(
        lambda tensors: tensors.update({NORM: replace(tensors[NORM], shape=(*tensors[NORM].shape, 1))}),
        f"{NORM}: has another type or shape", id="another-shape",
    ),
    pytest.param(_number("step_num", "<q", 13), "step_num: has another value: expected 12, found 13", id="iteration"),
    pytest.param(lambda tensors: tensors.pop("step_num"), "step_num: has another value.*found nothing", id="no-iteration"),
    pytest.param(_number("learning_rate_group_0", "<f", 9.0), "learning_rate_group_0: has another", id="learning-rate"),
    pytest.param(_add(Tensor("mine", "float32", (), bytes(4))), "mine", id="a-number-more"),
]  # fmt: skip


@LAYOUTS
def test_a_right_import_passes(result: Imported) -> None:
    result.prove()
    result.change(len)
    result.prove()


@LAYOUTS
@pytest.mark.parametrize(("damage", "reported"), DAMAGE)
def test_what_is_wrong_is_named(result: Imported, damage: Callable[[dict[str, Tensor]], object], reported: str) -> None:
    result.change(damage)
    with pytest.raises((VerificationError, FormatError), match=reported):
        result.prove()


@LAYOUTS
def test_the_file_of_a_data_parallel_rank_must_be_the_same(result: Imported, tmp_path: Path) -> None:
    other = tmp_path / "other.ckpt"
    other.write_bytes(result.path.read_bytes())
    result.prove(one=result.path, other=other)
    last = other.read_bytes()[-1]
    other.write_bytes(other.read_bytes()[:-1] + bytes([last ^ 1]))
    with pytest.raises(VerificationError, match="other: file: is not that of one"):
        result.prove(one=result.path, other=other)


@LAYOUTS
def test_a_weight_that_is_not_its_float32_copy_is_a_wrong_source(result: Imported) -> None:
    [model] = result.request.source.glob("mp_rank_00/model_optim_rng.pt")
    flip(model, "/model/language_model/embedding/word_embeddings/weight", 0)
    with pytest.raises(FormatError, match="is not what the optimizer holds of it"):
        result.prove()


def test_groups_come_with_moments_that_are_imported_alone(tmp_path: Path) -> None:
    made = Relaid(topology=topology(tensor=2))
    made.convert(tmp_path)
    request = import_request(
        source=tmp_path / "out",
        target=tmp_path / "back",
        target_tensor=1,
        contents=("exp_avg", "exp_avg_sq"),
        verify="full",
    )
    run_all(request)
    assert "learning_rate_group_1" in index_file(tmp_path / "back" / "rank_0" / "network.ckpt")
    weights = replace(request, target=tmp_path / "whole", files=MindSporeFiles(contents=("param",)))
    assert run_all(weights).published
