"""ckpt2pt.open: tensors as numpy, whatever their layout; slices, roles, and errors in the user's words."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckpt2pt
from ckpt2pt.errors import Ckpt2ptError, MissingInputError, UsageError
from ckpt2pt.library.checkpoint import Part
from cutting import EMBEDDING, core_name, model, write_mindspore
from goldens import REPOSITORY

FC1 = "decoder.layers.1.mlp.linear_fc1.weight"
FC2 = "decoder.layers.1.mlp.linear_fc2.weight"
NAMES = ("mlp.mapping.weight", "mlp.projection.weight", "attention.qkv_proj.weight", "input_norm.weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mindspore(tmp_path_factory.mktemp("ms"), model(), tp=4, pp=2)


class Opened:
    """A checkpoint and its arrays, with a short ``repr`` for hypothesis."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint, self.arrays = ckpt2pt.open(folder), model()

    def __repr__(self) -> str:
        return "opened"


@pytest.fixture(scope="module")
def opened(folder: Path) -> Iterator[Opened]:
    found = Opened(folder)
    yield found
    found.checkpoint.close()


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray[Any, Any]]:
    return model()


def test_the_example_of_the_package_reads_a_whole_weight(folder: Path, arrays: dict[str, Any]) -> None:
    with ckpt2pt.open(folder, tp=4, pp=2) as checkpoint:
        found = checkpoint[FC1]
        assert np.array_equal(found, arrays["language_model.encoder.layers.1.mlp.mapping.weight"])
        assert (checkpoint.format, checkpoint.iteration, checkpoint.tp, checkpoint.pp) == ("mindspore", 12, 4, 2)
        assert checkpoint.path == folder


def test_it_behaves_as_a_mapping(folder: Path) -> None:
    with ckpt2pt.open(str(folder)) as checkpoint:
        names = list(checkpoint)
        assert len(names) == len(checkpoint) == 27
        assert tuple(names) == checkpoint.keys() == checkpoint.keys("exp_avg")
        assert FC1 in checkpoint
        assert "language_model.embedding.word_embeddings.weight" not in checkpoint
        assert 3 not in checkpoint
        assert {name: array.shape for name, array in ((name, checkpoint[name]) for name in checkpoint)}[FC2] == (6, 8)


def ranges(length: int) -> st.SearchStrategy[slice]:
    edge = st.none() | st.integers(-length - 2, length + 2)
    return st.builds(slice, edge, edge)


@given(name=st.sampled_from(NAMES), rows=ranges(24), columns=ranges(8), moment=st.booleans())
def test_a_slice_is_numpys(opened: Opened, name: str, rows: slice, columns: slice, moment: bool) -> None:
    checkpoint, whole = opened.checkpoint, opened.arrays
    full = f"language_model.encoder.layers.1.{name}"
    wanted, role = whole[f"exp_avg.{full}" if moment else full], "exp_avg" if moment else "param"
    asked = (rows, columns)[: wanted.ndim]
    found = checkpoint.get(core_name(full), role, slice=asked)  # type: ignore[arg-type]
    assert found.shape == wanted[asked].shape
    assert np.array_equal(found, wanted[asked])
    assert np.array_equal(checkpoint.get(core_name(full), role, slice=rows), wanted[rows])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        pytest.param(np.s_[::2], "another step than 1", id="step"),
        pytest.param(np.s_[::-1], "another step than 1", id="backwards"),
        pytest.param(np.s_[0:1, 0:1, 0:1], "is not a slice for each of 2 axes", id="too-many"),
        pytest.param(3, "is not a slice for each of 2 axes", id="a-number"),
        pytest.param(np.s_[..., 0:1], "is not a slice for each of 2 axes", id="ellipsis"),
    ],
)
def test_what_is_no_slice_is_refused(folder: Path, asked: Any, what: str) -> None:
    with ckpt2pt.open(folder) as checkpoint, pytest.raises(UsageError, match=what) as caught:
        checkpoint.get(FC1, slice=asked)
    assert caught.value.where == FC1


def test_info_tells_where_it_lies(folder: Path) -> None:
    with ckpt2pt.open(folder) as checkpoint:
        info = checkpoint.info(FC1, "exp_avg")
        assert (info.name, info.role, info.dtype) == (FC1, "exp_avg", "float32")
        assert (info.shape, info.axes, info.replicas) == ((16, 6), (2, 8, 6), 0)
        assert [(part.origin, part.shape) for part in info.parts] == [((0, 2 * tp, 0), (2, 2, 6)) for tp in range(4)]
        for tp, part in enumerate(info.parts):
            assert isinstance(part, Part)
            assert sum(extent.nbytes for extent in part.extents) == 2 * 2 * 6 * 4
            assert {Path(extent.path).parent.name for extent in part.extents} == {f"rank_{tp}"}
        assert checkpoint.info("decoder.layers.1.input_layernorm.weight").replicas == 3


def test_an_unknown_name_is_reported_with_the_nearest(folder: Path) -> None:
    with ckpt2pt.open(folder) as checkpoint:
        with pytest.raises(MissingInputError, match=r"there is no decoder\.layers\.1\.mlp\.linear_fc3") as caught:
            checkpoint["decoder.layers.1.mlp.linear_fc3.weight"]
        assert "the nearest is decoder.layers.1.mlp.linear_fc" in caught.value.what
        assert caught.value.hint == "keys('param') lists what is there"
        with pytest.raises(UsageError, match="no role momentum") as wrong:
            checkpoint.get(FC1, "momentum")  # type: ignore[arg-type]
        assert wrong.value.hint == "give one of param, main_param, exp_avg, exp_avg_sq"


def test_a_role_that_is_not_there_says_so(tmp_path: Path) -> None:
    with ckpt2pt.open(write_mindspore(tmp_path, model(moments=False))) as checkpoint:
        assert checkpoint.keys("exp_avg") == ()
        with pytest.raises(MissingInputError, match="there is no exp_avg of decoder") as caught:
            checkpoint.get(FC1, "exp_avg")
        assert caught.value.hint == "the checkpoint holds no exp_avg at all"


def test_a_float32_weight_is_its_own_main_parameter(folder: Path) -> None:
    with ckpt2pt.open(folder) as checkpoint:
        assert checkpoint.keys("main_param") == checkpoint.keys()
        assert np.array_equal(checkpoint.get(FC1, "main_param"), checkpoint[FC1])


def test_bfloat16_comes_as_the_float32_that_equals_it(golden: Path) -> None:
    with ckpt2pt.open(golden / "megatron06" / "b_tp2pp2" / "A") as checkpoint:
        weight, main = checkpoint[FC1], checkpoint.get(FC1, "main_param")
        assert checkpoint.info(FC1).dtype == "bfloat16"
        assert weight.dtype == main.dtype == np.float32
        assert not (weight.view("<u4") & 0xFFFF).any()
        bits = main.view("<u4").astype("<u8")
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        assert np.array_equal(weight.view("<u4") >> 16, nearest)


def test_a_closed_checkpoint_keeps_its_headers(folder: Path) -> None:
    checkpoint = ckpt2pt.open(folder)
    checkpoint[FC1]
    checkpoint.close()
    checkpoint.close()
    assert checkpoint.info(FC1).shape == (16, 6)
    with pytest.raises(UsageError, match="the checkpoint is closed"):
        checkpoint[FC1]


def test_a_file_that_changed_its_size_is_an_error_with_its_path(tmp_path: Path) -> None:
    write_mindspore(tmp_path, model())
    file = next(tmp_path.rglob("*.ckpt"))
    with ckpt2pt.open(tmp_path) as checkpoint:
        file.write_bytes(file.read_bytes()[:200])
        with pytest.raises(Ckpt2ptError) as caught:
            checkpoint["output_layer.weight"]
    assert str(file) in caught.value.where


@pytest.mark.parametrize("document", ["README.md", "docs/library.md"])
def test_the_examples_of_the_documents_run(folder: Path, monkeypatch: pytest.MonkeyPatch, document: str) -> None:
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import ckpt2pt\n.*?)```", text, re.DOTALL)
    place = folder.with_name("documents")
    place.mkdir(exist_ok=True)
    monkeypatch.chdir(place)
    if not Path("ms_ckpt").exists():
        Path("ms_ckpt").symlink_to(folder)
    done = subprocess.run(
        [sys.executable, "-c", code + "print(weight.shape, moment.shape)"], capture_output=True, text=True, check=True
    )
    assert "(16, 6)" in done.stdout.splitlines()[-1]


def test_the_example_summarises_and_compares(folder: Path, tmp_path: Path) -> None:
    other = write_mindspore(tmp_path, {name: 2 * array for name, array in model().items()}, tp=2)
    script = str(REPOSITORY / "examples" / "read_checkpoint.py")
    one, two = (
        subprocess.run([sys.executable, script, *map(str, paths)], capture_output=True, text=True, check=True).stdout
        for paths in ([folder], [folder, other])
    )
    assert one.startswith("mindspore, iteration 12, tp 4, pp 2\n")
    assert len(one.splitlines()) == 28
    assert {line.split()[-1] for line in two.splitlines()[1:]} == {"1.000e+00"}


def test_the_embedding_of_all_ranks_is_one_array(folder: Path, arrays: dict[str, Any]) -> None:
    with ckpt2pt.open(folder) as checkpoint:
        assert np.array_equal(checkpoint[core_name(EMBEDDING)], arrays[EMBEDDING])


def test_opening_loads_no_torch_and_importing_loads_no_numpy(folder: Path) -> None:
    code = (
        "import sys, ckpt2pt; assert 'numpy' not in sys.modules; "
        f"c = ckpt2pt.open({str(folder)!r}); c[{FC1!r}]; "
        "assert not {'torch', 'mindspore', 'yaml'} & set(sys.modules); print(len(c))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "27\n"


def test_an_attribute_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ckpt2pt' has no attribute 'load'"):
        ckpt2pt.load  # noqa: B018
