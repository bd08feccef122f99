"""A model of every class is the arrays that Megatron core has, its way there and back is exact, and what is wrong is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckpt2pt
from ckpt2pt.cli.commands import main
from ckpt2pt.core.params import EMBEDDING, HEAD
from ckpt2pt.errors import Ckpt2ptError, CoverageError, FormatError, MissingInputError, UnsupportedFormatError
from ckpt2pt.formats.registry import detect, read
from goldens import golden_root
from models_made import CONFIGS, Arrays, arrays_of, config_of, save, shapes_of

HF = golden_root() / "hf"


def widened(array: Any) -> Any:
    return (array.astype("u4") << 16).view("f4") if array.dtype == np.uint16 else array


@pytest.mark.parametrize("name", sorted(path.name for path in HF.iterdir() if path.is_dir()))
def test_the_tensors_are_those_that_megatron_computed_with(name: str) -> None:
    wanted = np.load(HF / name / "mcore.npz")
    with ckpt2pt.open(HF / name / "hf") as checkpoint:
        assert set(checkpoint.keys()) == set(wanted.files)
        for key in wanted.files:
            rows = checkpoint[key].shape[0]  # without the padding of the vocabulary
            assert np.array_equal(checkpoint[key], widened(wanted[key])[:rows]), key
            assert rows == len(wanted[key]) or key in {EMBEDDING, HEAD}


def joined(arrays: Arrays, layer: str, groups: int) -> Any:
    """queries, key and value of each group, by numpy alone."""
    parts = [arrays[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv"]
    return np.concatenate([part.reshape(groups, -1, part.shape[1]) for part in parts], axis=1).reshape(
        -1, parts[0].shape[1]
    )


def test_fused_weights_are_joined_as_megatron_has_them(tmp_path: Path) -> None:
    config = config_of("qwen3_moe")
    arrays = arrays_of(config)
    with ckpt2pt.open(save(tmp_path, config, arrays, shards=3)) as found:
        at = "model.layers.1."
        assert np.array_equal(
            found["decoder.layers.1.self_attention.linear_qkv.weight"], widened(joined(arrays, at, 2))
        )
        both = [arrays[f"{at}mlp.experts.3.{name}_proj.weight"] for name in ("gate", "up")]
        wanted = widened(np.concatenate(both))
        assert np.array_equal(found["decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"], wanted)


def test_the_matrices_of_gpt2_are_turned(tmp_path: Path) -> None:
    config = config_of("gpt2")
    arrays = arrays_of(config)
    wide = arrays["transformer.h.0.attn.c_attn.weight"]
    wanted = wide.T.reshape(3, 4, 4, 16).transpose(1, 0, 2, 3).reshape(48, 16)
    with ckpt2pt.open(save(tmp_path, config, arrays)) as found:
        assert np.array_equal(found["decoder.layers.0.self_attention.linear_qkv.weight"], widened(wanted))
        fc1 = arrays["transformer.h.1.mlp.c_fc.weight"]
        assert np.array_equal(found["decoder.layers.1.mlp.linear_fc1.weight"], widened(fc1.T))


@pytest.mark.parametrize(
    ("name", "through"), [*zip(CONFIGS, itertools.cycle(["megatron", "torch_dist"]), strict=False)]
)
def test_there_and_back_every_bit_and_every_field_is_the_same(name: str, through: str, tmp_path: Path) -> None:
    config = config_of(name)
    arrays = arrays_of(config)
    source = save(tmp_path / "model", config, arrays, shards=1 + len(name) % 3)
    words = ["--progress", "none", "--multiprocess-off"]
    sizes = [] if "deepseek" in name else ["--target-tp-size", "2", "--target-pp-size", "2"]
    assert (
        main(
            [
                "convert",
                "--source",
                str(source),
                "--target",
                str(tmp_path / "mid"),
                "--target-format",
                through,
                *sizes,
                *words,
            ]
        )
        == 0
    )
    assert main(["verify", str(source), str(tmp_path / "mid"), "--ignore-padding", "--progress", "none"]) == 0
    back = [
        "convert",
        "--source",
        str(tmp_path / "mid"),
        "--target",
        str(tmp_path / "back"),
        "--target-format",
        "safetensors",
    ]
    assert main([*back, "--vocab-size", "40", *words]) == 0
    assert main(["verify", str(source), str(tmp_path / "back"), "--progress", "none"]) == 0
    found = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: found[key] for key in config} == config
    header, data = raw(tmp_path / "back" / "model.safetensors")
    assert {key: tuple(value["shape"]) for key, value in header.items()} == shapes_of(config)
    for key, value in header.items():
        assert data[slice(*value["data_offsets"])] == arrays[key].tobytes(), key


def raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data, by nothing of ours."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__")
    return header, content[8 + length :]


def test_experts_in_one_tensor_are_the_same(tmp_path: Path) -> None:
    """As transformers 5 holds them in memory."""
    config = config_of("qwen2_moe")
    arrays = arrays_of(config)
    fused = dict(arrays)
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts."
        both = [[fused.pop(f"{at}{e}.{name}_proj.weight") for name in ("gate", "up")] for e in range(4)]
        fused[f"{at}gate_up_proj"] = np.stack([np.concatenate(pair) for pair in both])
        fused[f"{at}down_proj"] = np.stack([fused.pop(f"{at}{e}.down_proj.weight") for e in range(4)])
    one, other = save(tmp_path / "a", config, arrays), save(tmp_path / "b", config, fused)
    assert ckpt2pt.verify(one, other).same


def test_names_of_the_base_model_are_the_same(tmp_path: Path) -> None:
    config = config_of("gpt2")
    arrays = arrays_of(config)
    bare = {name.removeprefix("transformer."): array for name, array in arrays.items()}
    bare["h.0.attn.bias"] = np.zeros((1, 1, 4, 4), np.uint16)  # the mask that older releases saved
    assert ckpt2pt.verify(save(tmp_path / "a", config, arrays), save(tmp_path / "b", config, bare)).same


def test_layers_that_predict_are_left_out_and_said(tmp_path: Path) -> None:
    config = {**config_of("deepseek_v3"), "num_nextn_predict_layers": 1}
    arrays = arrays_of(config)
    arrays["model.layers.2.enorm.weight"] = np.zeros(16, np.uint16)
    found = read(save(tmp_path, config, arrays))
    assert "layer 2 and on predict further tokens (MTP): they are left out" in found.warnings
    arrays["model.layers.3.enorm.weight"] = np.zeros(16, np.uint16)
    with pytest.raises(CoverageError, match=r"model\.layers\.3"):
        read(save(tmp_path, config, arrays))


def test_a_tied_head_has_to_equal_the_embedding(tmp_path: Path) -> None:
    config = config_of("llama_biased")
    arrays = arrays_of(config)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    words = [
        "convert",
        "--target",
        str(tmp_path / "out"),
        "--target-format",
        "torch_dist",
        "--progress",
        "none",
        "--multiprocess-off",
    ]
    assert main([*words, "--source", str(save(tmp_path / "a", config, arrays))]) == 0
    arrays["lm_head.weight"][3, 3] ^= 1
    assert main([*words, "--overwrite", "--source", str(save(tmp_path / "b", config, arrays))]) in {65, 76}


Change = Callable[[Path, dict[str, Any], Arrays], None]


def without(name: str) -> Change:
    def change(_: Path, __: dict[str, Any], arrays: Arrays) -> None:
        del arrays[name]

    return change


def stated(**fields: Any) -> Change:
    return lambda _, config, __: config.update(fields)


CASES: dict[str, tuple[str, Change, type[Ckpt2ptError], str]] = {
    "no weight": ("llama", without("model.layers.1.mlp.down_proj.weight"), CoverageError, "linear_fc2"),
    "half a gate": ("llama", without("model.layers.0.mlp.up_proj.weight"), CoverageError, "linear_fc1"),
    "no values": ("llama", without("model.layers.0.self_attn.v_proj.weight"), CoverageError, "linear_qkv"),
    "no norm of queries": ("qwen3", without("model.layers.0.self_attn.q_norm.weight"), CoverageError, "q_layernorm"),
    "no head": ("llama", without("lm_head.weight"), CoverageError, "output_layer"),
    "no expert": ("mixtral", without("model.layers.0.block_sparse_moe.experts.3.w2.weight"), CoverageError, "local_experts.3"),
    "no router": ("mixtral", without("model.layers.0.block_sparse_moe.gate.weight"), CoverageError, r"mlp\.router"),
    "no correction": ("deepseek_v3", without("model.layers.1.mlp.gate.e_score_correction_bias"), CoverageError, "expert_bias"),
    "another expert": ("qwen3_moe", stated(num_experts=5), CoverageError, "local_experts.4"),
    "a layer more": ("llama", stated(num_hidden_layers=1), CoverageError, "layer 1"),
    "a layer less": ("llama", stated(num_hidden_layers=3), CoverageError, "layers.2"),
    "absurdly many layers": ("llama", stated(num_hidden_layers=1 << 30), CoverageError, "layers"),
    "absurdly many heads": ("llama", stated(num_attention_heads=1 << 30), FormatError, "536870912 heads"),
    "no layers": ("llama", stated(num_hidden_layers=0), FormatError, "num_hidden_layers is 0"),
    "a count in words": ("llama", stated(hidden_size="16"), FormatError, "hidden_size"),
    "other heads": ("llama", stated(num_key_value_heads=4), FormatError, "rows"),
    "a tensor too many": (
        "llama", lambda _, __, arrays: arrays.update({"model.layers.0.self_attn.gate.weight": np.zeros(4, np.uint16)}), CoverageError, "has not",
    ),
    "integers": (
        "llama", lambda _, __, arrays: arrays.update({"model.norm.weight": np.zeros(16, np.int32)}), FormatError, "int32",
    ),
    "mixed types": (
        "llama", lambda _, __, arrays: arrays.update({"model.layers.0.self_attn.k_proj.weight": np.zeros((8, 16), np.float32)}), CoverageError, "float32",
    ),
    "another class": ("llama", stated(model_type="gemma"), FormatError, "gemma"),
    "another head": ("llama", stated(architectures=["LlamaForSequenceClassification"]), FormatError, "LlamaForSequenceClassification"),
    "a sliding window": ("mixtral", stated(sliding_window=4096), FormatError, "sliding_window"),
    "a part rotated": ("llama", stated(partial_rotary_factor=0.5), FormatError, "partial_rotary_factor"),
    "dynamic positions": ("llama", stated(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), FormatError, "dynamic"),
    "positions of another length": (
        "llama_scaled",
        stated(rope_scaling={**CONFIGS["llama_scaled"]["rope_scaling"], "original_max_position_embeddings": 4096}),
        FormatError, "4096",
    ),
    "another activation": ("llama", stated(hidden_act="gelu"), FormatError, "hidden_act"),
    "more tokens than rows": ("llama", stated(vocab_size=41), FormatError, "vocab_size"),
    "other groups of experts": ("deepseek_v3", stated(num_experts_per_tok=3), FormatError, "topk_group"),
    "some biases": (
        "llama",
        lambda _, __, arrays: arrays.update({f"model.layers.{layer}.self_attn.o_proj.bias": np.zeros(16, np.uint16) for layer in range(2)}),
        FormatError, "alone have a bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "change", "error", "says"), CASES.values(), ids=CASES)
def test_what_is_wrong_is_refused(
    name: str, change: Change, error: type[Ckpt2ptError], says: str, tmp_path: Path
) -> None:
    config = config_of(name)
    arrays = arrays_of(config)
    change(tmp_path, config, arrays)
    with pytest.raises(error, match=says) as caught:
        read(save(tmp_path / "model", config, arrays))
    assert caught.value.exit_code in {65, 66}


def change_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return changed


FILES: dict[str, tuple[Callable[[Path], object], type[Ckpt2ptError], str]] = {
    "a file that would win": (lambda at: (at / "model.safetensors").write_bytes(b""), FormatError, "transformers loads that file"),
    "a lost file": (lambda at: (at / "model-00002-of-00003.safetensors").unlink(), MissingInputError, "00002"),
    "no config": (lambda at: (at / "config.json").unlink(), MissingInputError, "config.json"),
    "config is no JSON": (lambda at: (at / "config.json").write_text("{"), FormatError, "JSON"),
    "config is a list": (lambda at: (at / "config.json").write_text("[]"), FormatError, "object"),
    "a name that leads out": (
        change_index(lambda index: index["weight_map"].update({"model.norm.weight": "../model.safetensors"})), FormatError, "in this folder",
    ),
    "an absolute name": (
        change_index(lambda index: index["weight_map"].update({"model.norm.weight": "/etc/passwd.safetensors"})), FormatError, "in this folder",
    ),
    "no map": (change_index(lambda index: index.pop("weight_map")), FormatError, "weight_map"),
    "a tensor in another file": (
        change_index(lambda index: index["weight_map"].update(dict.fromkeys(index["weight_map"], "model-00001-of-00003.safetensors"))),
        CoverageError, "not in it",
    ),
    "a tensor that the index has not": (
        change_index(lambda index: index["weight_map"].pop("model.norm.weight")), CoverageError, "does not say",
    ),
    "a file cut short": (
        lambda at: (at / "model-00002-of-00003.safetensors").write_bytes((at / "model-00002-of-00003.safetensors").read_bytes()[:-2]),
        FormatError, "bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "says"), FILES.values(), ids=FILES)
def test_files_that_do_not_belong_together_are_refused(
    change: Callable[[Path], object], error: type[Ckpt2ptError], says: str, tmp_path: Path
) -> None:
    config = config_of("llama")
    change(save(tmp_path, config, arrays_of(config), shards=3))
    with pytest.raises(error, match=says):
        read(tmp_path, source_format="huggingface")


def test_another_file_beside_is_reported(tmp_path: Path) -> None:
    config = config_of("llama")
    save(tmp_path, config, arrays_of(config))
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    assert "consolidated.safetensors hold no part of the model" in read(tmp_path).warnings


def test_pickles_are_named_with_the_next_step(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedFormatError, match="in pickles"):
        detect(tmp_path)


def test_both_spellings_of_positions_are_read(tmp_path: Path) -> None:
    config = config_of("llama_scaled")
    arrays = arrays_of(config)
    new = {name: value for name, value in config.items() if name not in {"rope_theta", "rope_scaling"}}
    new["rope_parameters"] = {**config["rope_scaling"], "rope_theta": config["rope_theta"]}
    found = [read(save(tmp_path / str(place), one, arrays)) for place, one in enumerate((config, new))]
    args = [one.template.args for one in found if one.template]
    assert args[0] == args[1]
    assert args[0]["rotary_base"] == 5000


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_config_ends_in_a_checkpoint_or_an_error_of_ours(data: st.DataObject, tmp_path: Path) -> None:
    name = data.draw(st.sampled_from(sorted(CONFIGS)))
    config = config_of(name)
    field = data.draw(st.sampled_from([*sorted(config), "rope_parameters", "rope_scaling", "q_lora_rank"]))
    wild = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["factor", "rope_type", "rope_theta", "x"]), inner, max_size=3),
        max_leaves=4,
    )  # fmt: skip
    config[field] = data.draw(wild)
    with suppress(FormatError, CoverageError, MissingInputError):
        read(save(tmp_path, config, arrays_of(config_of(name))), source_format="huggingface")


@pytest.mark.parametrize("through", ["megatron", "torch_dist"])
def test_the_vocabulary_is_filled_up_with_zeros(through: str, tmp_path: Path) -> None:
    config = config_of("llama")
    source = save(tmp_path / "model", config, arrays_of(config))
    words = ["convert", "--source", str(source), "--target", str(tmp_path / "out"), "--target-format", through]
    assert main([*words, "--target-tp-size", "2", "--progress", "none", "--multiprocess-off"]) == 0
    with ckpt2pt.open(tmp_path / "out") as checkpoint:
        for name in (EMBEDDING, HEAD):
            assert checkpoint[name].shape == (256, 16)
            assert not checkpoint[name][40:].any()
            assert checkpoint[name][:40].any()
