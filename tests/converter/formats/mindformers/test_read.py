"""Every parameter of a MindFormers checkpoint, of either trainer and however it is sharded, is the array that Megatron has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import ckpt2pt
from ckpt2pt.errors import Ckpt2ptError, CoverageError, FormatError, MissingInputError, TopologyError, UsageError
from ckpt2pt.formats.mindformers.flags import Flags
from ckpt2pt.formats.registry import detect, read
from mindformers_made import Model, save, save_sharded, write_safetensors

FLAGS: dict[str, Any] = {"use_interleaved_weight_layout_mlp": True, "use_contiguous_weight_layout_attention": False}
CUTS = {
    "mlp.linear_fc1.weight": (2, 1), "mlp.linear_fc2.weight": (1, 2), "linear_qkv.weight": (2, 1), "linear_proj.weight": (1, 2),
    "embedding.word_embeddings.weight": (4, 1), "output_layer.weight": (4, 1), "input_layernorm.weight": (2,),
    "mlp.shared_experts.linear_fc1.weight": (4, 1),
}  # fmt: skip
"""Over tensor parallel ranks, and some once more over data parallel ones (optimizer parallel)."""


def widened(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The bits of bfloat16 as float32, which the library gives."""
    return (array.astype("u4") << 16).view("f4") if array.dtype == np.uint16 else array


def check(path: Path, model: Model, **flags: Any) -> None:
    with ckpt2pt.open(path, **flags) as checkpoint:
        names = {("param", name) for name in checkpoint.keys()}  # noqa: SIM118 - a method of ours
        assert names == {key for key in model.expected if key[0] == "param"}
        for (role, name), wanted in model.expected.items():
            found = checkpoint.get(name, role)  # type: ignore[arg-type]
            assert np.array_equal(found, widened(wanted)), (role, name)


@pytest.mark.parametrize("pynative", [False, True], ids=["static graph", "pynative"])
@pytest.mark.parametrize(
    "kind", [{}, {"experts": 4}, {"latent": True, "experts": 4, "mtp": True}, {"latent": True}], ids=str
)
def test_one_rank_without_metadata(tmp_path: Path, kind: dict[str, Any], pynative: bool) -> None:
    model = Model(pynative=pynative, **kind)
    save(tmp_path, model.arrays)
    assert detect(tmp_path) == "mindformers"
    given = {} if pynative else {"use_interleaved_weight_layout_mlp": True}
    check(
        tmp_path,
        model,
        **given,
        **({} if pynative or kind.get("latent") else {"use_contiguous_weight_layout_attention": False}),
    )


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
def test_either_order_of_rows(tmp_path: Path, interleaved: bool, contiguous: bool) -> None:
    model = Model(interleaved=interleaved, contiguous=contiguous)
    save(tmp_path, model.arrays)
    check(
        tmp_path,
        model,
        use_interleaved_weight_layout_mlp=interleaved,
        use_contiguous_weight_layout_attention=contiguous,
    )


@pytest.mark.parametrize("redundant", [True, False])
@pytest.mark.parametrize(("contiguous", "pynative"), [(True, False), (False, False), (False, True)])
def test_any_sharding(tmp_path: Path, redundant: bool, contiguous: bool, pynative: bool) -> None:
    model = Model(experts=4, contiguous=contiguous, pynative=pynative)
    fragments: dict[str, tuple[int, ...]] = {}
    for name, array in model.arrays.items():
        cut = next((cut for end, cut in CUTS.items() if name.endswith(end)), None)
        if "experts.weight" in name:  # over expert parallel ranks, and over tensor parallel ones
            cut = (4, *(1,) * (array.ndim - 2), 2)
        if cut and not name.startswith(("adam_", "main_")):
            fragments[name] = cut
    save_sharded(tmp_path, model.arrays, fragments, ranks=8, redundant=redundant)
    check(
        tmp_path,
        model,
        use_interleaved_weight_layout_mlp=True,
        use_contiguous_weight_layout_attention=contiguous,
    )
    found = read(tmp_path / "iteration_00000003", mindformers=None) if pynative else None
    assert found is None or bool(any(one.replicas for one in found.index.values())) == redundant
    assert found is None or (found.tensor, found.iteration, found.samples) == (2, 3, 24)


def refused(path: Path, kind: type[Ckpt2ptError], match: str, **flags: Any) -> Ckpt2ptError:
    with pytest.raises(kind, match=match) as caught:
        ckpt2pt.open(path, **flags)
    return caught.value


def test_what_nothing_tells_is_asked_for_by_name(tmp_path: Path) -> None:
    save(tmp_path, Model().arrays)
    error = refused(tmp_path, UsageError, "nothing in the checkpoint says how the rows of .*linear_fc1")
    assert "use_interleaved_weight_layout_mlp" in str(error)
    assert "mindformers_config" in error.hint
    error = refused(tmp_path, UsageError, "the rows of .*linear_qkv", use_interleaved_weight_layout_mlp=True)
    assert "use_contiguous_weight_layout_attention" in str(error)


def test_precision_proves_a_training_in_pynative_mode(tmp_path: Path) -> None:
    save(tmp_path, Model(pynative=True).arrays)
    assert any("PyNative mode" in one for one in read(tmp_path).warnings)
    refused(tmp_path, UsageError, "is False .*PyNative mode", use_interleaved_weight_layout_mlp=False)
    refused(tmp_path, UsageError, "is True .*PyNative mode", use_contiguous_weight_layout_attention=True)


def test_with_one_group_of_queries_both_orders_are_the_same(tmp_path: Path) -> None:
    arrays = {name: a for name, a in Model().arrays.items() if "linear_qkv" not in name}
    for layer in range(2):
        for prefix in ("", "adam_m.", "adam_v."):
            arrays[f"{prefix}decoder.layers.{layer}.self_attention.linear_qkv.weight"] = np.ones((24, 8), "f4")
    save(tmp_path, arrays)
    assert len(read(tmp_path, mindformers=Flags(interleaved=True)).index) == len(arrays)


def test_main_parameters_that_do_not_round_to_the_weights_are_a_warning(tmp_path: Path) -> None:
    model = Model(pynative=True)
    model.arrays["main_param.output_layer.weight"] = -model.arrays["main_param.output_layer.weight"]
    save(tmp_path, model.arrays)
    found = read(tmp_path)
    assert not found.rounds
    assert any("do not round to the weights" in one for one in found.warnings)


def test_weights_alone_need_no_file_of_the_optimizer(tmp_path: Path) -> None:
    model = Model(pynative=True)
    folder = save_sharded(tmp_path, model.arrays, {"output_layer.weight": (2, 1)}, ranks=2)
    for file in folder.glob("*-opt-*"):
        file.unlink()
    assert all(key.role == "param" for key in read(tmp_path, weights_alone=True).index)
    refused(tmp_path, MissingInputError, "qwen3-opt-0000000-0000002.safetensors is not there")


@pytest.mark.parametrize(
    ("lost", "match"),
    [
        ("main_param.output_layer.weight", "1 of .* have no main_param"),
        ("adam_v.output_layer.weight", "1 of .* have no exp_avg_sq"),
    ],
)
def test_an_optimizer_that_lacks_a_tensor_is_refused(tmp_path: Path, lost: str, match: str) -> None:
    arrays = Model(pynative=True).arrays
    del arrays[lost]
    save(tmp_path, arrays)
    refused(tmp_path, CoverageError, match)


def test_state_of_another_optimizer_is_refused_by_name(tmp_path: Path) -> None:
    arrays = Model(pynative=True).arrays | {"muon_m.output_layer.weight": np.ones((16, 8), "f4")}
    save(tmp_path, arrays)
    refused(
        tmp_path, FormatError, "muon_m.output_layer.weight is neither a parameter of a GPT model nor state of AdamW"
    )


def test_sizes_that_are_said_have_to_be_those_of_the_files(tmp_path: Path) -> None:
    save(tmp_path, Model(pynative=True).arrays)
    refused(tmp_path, TopologyError, "the tensor parallel size is 1, not 2", tp=2)


def test_parallel_sizes_are_seen_in_the_layouts(tmp_path: Path) -> None:
    """Two stages of four ranks each; a mesh of experts names fewer of them."""
    model = Model(pynative=True)
    folder = save_sharded(tmp_path, model.arrays, {}, ranks=1)
    path = folder / "metadata.json"
    metadata = json.loads(path.read_text())
    for name, entry in metadata["state_dict_metadata"].items():
        first = 4 if "layers.1." in name or "output" in name or "final" in name else 0
        ranks = list(range(first, first + 4))
        entry["layout"] = {
            "device_matrix": [2, 2], "tensor_map": [-1], "interleaved_parallel": False, "alias_name": ["ep", "tp"],
            "rank_list": ranks[:2] if "mlp" in name else ranks,
        }  # fmt: skip
    path.write_text(json.dumps(metadata))
    found = read(tmp_path)
    assert (found.tensor, found.pipeline, found.expert) == (1, 2, 2)


def test_a_checkpoint_that_the_training_marked_as_unhealthy_is_a_warning(tmp_path: Path) -> None:
    save(tmp_path, Model(pynative=True).arrays, common={"ckpt_status": 1, "consumed_samples": 77})
    found = read(tmp_path)
    assert any("unhealthy" in one for one in found.warnings)
    assert found.samples == 77


def test_an_adapter_alone_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, Model(pynative=True).arrays)
    (folder / "mindformers_adapter_config.json").write_text("{}")
    with pytest.raises(FormatError, match="LoRA"):
        read(folder, source_format="mindformers")


def test_files_of_several_ranks_need_metadata(tmp_path: Path) -> None:
    folder = save_sharded(tmp_path, Model(pynative=True).arrays, {"output_layer.weight": (2, 1)}, ranks=2)
    (folder / "metadata.json").unlink()
    refused(tmp_path, MissingInputError, "metadata.json is not there")


def test_a_file_of_another_save_is_refused(tmp_path: Path) -> None:
    model = Model(pynative=True)
    folder = save_sharded(tmp_path, model.arrays, {"output_layer.weight": (2, 1)}, ranks=2)
    file = folder / "qwen3-model-0000001-0000002.safetensors"
    held = {name: array for name, array in model.arrays.items() if "adam" not in name and "main" not in name}
    write_safetensors(file, held | {"output_layer.weight": np.ones((8, 8), "f4")})
    refused(tmp_path, CoverageError, r"output_layer.weight is float32\[8, 8\], and metadata.json says bfloat16")
    del held["output_layer.weight"]
    write_safetensors(file, held)
    refused(tmp_path, CoverageError, "output_layer.weight is not there, and metadata.json says")


def test_a_file_that_metadata_does_not_name_is_a_warning(tmp_path: Path) -> None:
    folder = save_sharded(tmp_path, Model(pynative=True).arrays, {"output_layer.weight": (2, 1)}, ranks=2)
    write_safetensors(folder / "old-model-0000007-0000008.safetensors", {"output_layer.weight": np.ones((8, 8), "u2")})
    assert any("old-model-0000007" in one for one in read(tmp_path).warnings)


def test_a_tensor_that_metadata_does_not_name_is_refused(tmp_path: Path) -> None:
    model = Model(pynative=True)
    folder = save_sharded(tmp_path, model.arrays, {}, ranks=1)
    metadata = json.loads((folder / "metadata.json").read_text())
    for section, key in (
        ("state_dict_metadata", "output_layer.weight"),
        ("storage_data", "('output_layer.weight', (0,))"),
    ):
        del metadata[section][key]
    (folder / "metadata.json").write_text(json.dumps(metadata))
    refused(tmp_path, CoverageError, "output_layer.weight.*which metadata.json does not name")


def test_the_yaml_of_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path, Model().arrays)
    config = tmp_path / "train.yaml"
    config.write_text("model: {model_config: {num_hidden_layers: 3, hidden_size: 8}}")
    error = refused(tmp_path, FormatError, "num_layers is 3, and the checkpoint has 2", mindformers_config=config)
    assert error.exit_code == 65
    config.write_text("model: {model_config: {num_hidden_layers: 2, num_key_value_heads: 4}}")
    refused(tmp_path, FormatError, "num_query_groups is 4, and the checkpoint has 2", mindformers_config=config)
    config.write_text("model: {model_config: {num_hidden_layers: 2, num_key_value_heads: 2, intermediate_size: 12}}")
    check(tmp_path, Model(), mindformers_config=config)
