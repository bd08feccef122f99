"""The arguments of a model are those of the training that it was exported from, and compute what its class computes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ckpt2pt.core.state import State
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.huggingface.arguments import Fields, arguments_of, family_of, heads_of, is_tied
from ckpt2pt.formats.huggingface.config import Choices, config_of
from ckpt2pt.formats.huggingface.families import model_of
from ckpt2pt.formats.registry import read
from goldens import golden_root
from models_made import CONFIGS, arrays_of, save
from models_made import config_of as made

HF = golden_root() / "hf"


@pytest.mark.parametrize("name", sorted(path.name for path in HF.iterdir() if path.is_dir()))
def test_the_arguments_are_those_of_the_training(name: str) -> None:
    """But for what only experts and latent attention have, where there are none."""
    wanted = json.loads((HF / name / "args.json").read_text())
    template = read(HF / name / "hf").template
    assert template
    found = template.args
    other = {"vocab_size", "make_vocab_size_divisible_by"}  # of the tokenizer, and of the run
    differ = {
        key: (found[key], wanted[key]) for key in found.keys() & wanted.keys() - other if found[key] != wanted[key]
    }
    assert differ.keys() <= {"moe_layer_freq", "moe_ffn_hidden_size", "moe_aux_loss_coeff"}
    assert {
        "rotary_base",
        "kv_channels",
        "swiglu",
        "layernorm_epsilon",
        "num_query_groups",
    } <= found.keys() & wanted.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_they_give_the_same_configuration_again(name: str, tmp_path: Any) -> None:
    config = made(name)
    found = read(save(tmp_path, config, arrays_of(config)))
    assert found.template
    names = {key.name: None for key in found.index}
    args = {key: value for key, value in found.template.args.items() if key != "params_dtype"}
    state = State(where="args", iteration=1, samples=0, step=1, args=args)
    layers = config.get("num_hidden_layers") or config["n_layer"]
    model = model_of(state, names, layers=layers, experts=args.get("num_experts", 0))  # type: ignore[arg-type]
    again = config_of(model, 40, "bfloat16", Choices()).fields
    assert {key: again[key] for key in config} == config


def test_a_factor_of_its_own_is_said() -> None:
    config = made("llama_scaled")
    config["rope_scaling"]["factor"] = 32.0
    fields = Fields(config, "config.json")
    found, remarks = arguments_of(fields, family_of(fields), biases=(), sparse=(), tokens=40)
    assert found["rope_scaling_factor"] == 32.0
    assert "the factor of rope_scaling is 32.0: pretrain_gpt.py of Megatron-LM computes 8.0" in remarks[0]


def test_the_norms_of_latent_vectors_are_said() -> None:
    fields = Fields({**made("deepseek_v3"), "rms_norm_eps": 1e-5}, "config.json")
    remarks = arguments_of(fields, family_of(fields), biases=(), sparse=(1,), tokens=40)[1]
    assert "transformers has 1e-06 in the norms of latent vectors" in remarks[0]


def test_what_is_left_out_is_the_default_of_the_class() -> None:
    config = made("mixtral")
    del config["rope_theta"], config["rms_norm_eps"], config["tie_word_embeddings"]
    fields = Fields(config, "config.json")
    found, _ = arguments_of(fields, family_of(fields), biases=(), sparse=(0, 1), tokens=40)
    assert (found["rotary_base"], found["norm_epsilon"], found["untie_embeddings_and_output_weights"]) == (
        1000000,
        1e-5,
        True,
    )
    gpt2 = Fields({name: value for name, value in made("gpt2").items() if name != "tie_word_embeddings"}, "config.json")
    assert is_tied(gpt2, family_of(gpt2))


@pytest.mark.parametrize("kind", ["bamba", None, 7, ["llama"]])
def test_a_class_that_is_not_read_is_named(kind: object) -> None:
    with pytest.raises(FormatError, match="which is not read") as caught:
        family_of(Fields({"model_type": kind}, "config.json"))
    assert "deepseek_v3" in caught.value.hint


def test_heads_that_do_not_divide_are_refused() -> None:
    fields = Fields({**made("llama"), "num_key_value_heads": 3}, "config.json")
    with pytest.raises(FormatError, match="num_key_value_heads 3"):
        heads_of(fields, family_of(fields))
