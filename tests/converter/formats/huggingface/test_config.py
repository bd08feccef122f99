"""config.json from arguments: the spelling of transformers 4 and 5, and what nobody says is asked for or said."""

from __future__ import annotations

from typing import Any

import pytest

from ckpt2pt.core.state import State
from ckpt2pt.errors import FormatError, MissingInputError
from ckpt2pt.formats.huggingface.config import Choices, Config, config_of
from ckpt2pt.formats.huggingface.families import Model
from ckpt2pt.formats.huggingface.names import DEEPSEEK_V3, GPT2, LLAMA, QWEN3_MOE, Family

ARGS = {
    "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "max_position_embeddings": 16,
    "norm_epsilon": 1e-5, "rotary_base": 500000, "group_query_attention": True, "num_query_groups": 2,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8, "moe_router_topk": 4,
    "moe_ffn_hidden_size": 24, "moe_shared_expert_intermediate_size": 48, "rotary_scaling_factor": 40.0,
}  # fmt: skip


def config(family: Family = LLAMA, choices: Choices | None = None, **args: Any) -> Config:
    state = State(where="args", iteration=1, samples=None, step=1, args={**ARGS, **args})
    experts = 4 if family in {QWEN3_MOE, DEEPSEEK_V3} else 0
    model = Model(family, state, 2, (0,), tied=False, biases=frozenset(), experts=experts)
    return config_of(model, 128, "bfloat16", choices or Choices())


def test_the_spelling_is_that_of_both_releases() -> None:
    fields = config().fields
    assert fields["rope_theta"] == 500000.0
    assert fields["torch_dtype"] == "bfloat16"
    assert fields["num_key_value_heads"] == 2
    assert fields["head_dim"] == 8
    assert "rope_scaling" not in fields
    assert fields["tie_word_embeddings"] is False


def test_scaling_of_llama3() -> None:
    scaling: Any = config(use_rope_scaling=True).fields["rope_scaling"]
    assert scaling["rope_type"] == "llama3"
    assert scaling["factor"] == 8.0
    with pytest.raises(MissingInputError, match=r"rope_scaling_factor is 32\.0"):
        config(use_rope_scaling=True, rope_scaling_factor=32.0)
    chosen: Any = config(choices=Choices(rope_scaling_factor=32.0), use_rope_scaling=True, rope_scaling_factor=32.0)
    assert chosen.fields["rope_scaling"]["factor"] == 32.0


def test_scaling_by_interpolation() -> None:
    assert config(rotary_seq_len_interpolation_factor=4).fields["rope_scaling"] == {
        "rope_type": "linear",
        "factor": 4.0,
    }
    with pytest.raises(FormatError, match="both given"):
        config(rotary_seq_len_interpolation_factor=4, use_rope_scaling=True)


@pytest.mark.parametrize(("args", "length"), [({}, 16), ({"rope_type": "yarn"}, 4096)])
def test_the_original_length_of_latent_attention_is_that_of_the_release(args: dict[str, Any], length: int) -> None:
    scaling: Any = config(DEEPSEEK_V3, **LATENT, **args).fields["rope_scaling"]
    assert scaling["original_max_position_embeddings"] == length
    assert "rope_scaling" not in config(DEEPSEEK_V3, **{**LATENT, "rope_type": "rope"}).fields


def test_shared_experts_are_counted_by_their_size() -> None:
    assert config(DEEPSEEK_V3, **LATENT).fields["n_shared_experts"] == 2
    with pytest.raises(FormatError, match="moe_shared_expert_intermediate_size is 49"):
        config(DEEPSEEK_V3, **{**LATENT, "moe_shared_expert_intermediate_size": 49})


def test_dense_layers_among_experts_are_listed() -> None:
    fields = config(QWEN3_MOE, moe_router_topk=2, moe_ffn_hidden_size=24).fields
    assert fields["mlp_only_layers"] == [0]
    assert fields["norm_topk_prob"] is True
    assert config(QWEN3_MOE, moe_router_topk=2, moe_router_pre_softmax=True).fields["norm_topk_prob"] is False


def test_the_activation_of_gpt2_is_that_of_the_kernel() -> None:
    plain: dict[str, Any] = {"group_query_attention": False}
    assert config(GPT2, **plain).fields["activation_function"] == "gelu"
    assert config(GPT2, **plain, bias_gelu_fusion=True).fields["activation_function"] == "gelu_pytorch_tanh"
    with pytest.raises(FormatError, match="kv_channels is 16"):
        config(GPT2, **plain, kv_channels=16)


def test_what_nobody_says() -> None:
    assert any("vocab_size is 128" in remark for remark in config(tokenizer_type="NullTokenizer").remarks)
    assert config(choices=Choices(vocabulary=101), tokenizer_type="NullTokenizer").vocabulary == 101
    for tokens in (129, 0, -1):
        with pytest.raises(FormatError, match="the embedding has 128 rows"):
            config(choices=Choices(vocabulary=tokens))
    with pytest.raises(MissingInputError, match="norm_epsilon"):
        config(norm_epsilon=None)
    with pytest.raises(FormatError, match="num_query_groups 3"):
        config(num_query_groups=3)
