"""Arguments of another model are refused, by each size that both sides tell."""

from __future__ import annotations

from typing import cast

import pytest

from ckpt2pt.errors import FormatError
from ckpt2pt.formats.architecture import check_architecture
from ckpt2pt.formats.registry import read
from dist import CUT


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_layers": 3}, "num_layers is 3, and the checkpoint has 4 layers"),
        ({"hidden_size": 128}, "hidden_size is 128, and the checkpoint has 64 columns"),
        ({"num_attention_heads": 16}, "num_attention_heads is 16, with 4 query groups of 8 channels"),
        ({"group_query_attention": False}, "num_attention_heads is 8, with 8 query groups"),
        ({"num_query_groups": 2}, "with 2 query groups of 8 channels, and the checkpoint has 128 rows"),
        ({"ffn_hidden_size": 256}, "ffn_hidden_size is 256 and swiglu True, and the checkpoint has 192 rows"),
        ({"swiglu": False, "ffn_hidden_size": 64}, "ffn_hidden_size is 64 and swiglu False"),
        ({"position_embedding_type": "learned_absolute"}, "has no embedding.position_embeddings.weight"),
        (
            {"add_bias_linear": True},
            "add_bias_linear is True, and the checkpoint has no self_attention.linear_proj.bias",
        ),
    ],
)
def test_arguments_of_another_model_are_refused(changes: dict[str, object], expected: str) -> None:
    found = read(CUT / "A")
    assert found.template
    args = cast("dict[str, object]", {**found.template.args})
    check_architecture(args, found.index, where="pt_meta", source="ms")
    with pytest.raises(FormatError) as caught:
        check_architecture({**args, **changes}, found.index, where="pt_meta", source="ms")
    assert expected in caught.value.what
    assert caught.value.field == "metadata.path"


@pytest.mark.parametrize("changes", [{"num_layers": 8}, {"multi_latent_attention": True, "num_attention_heads": 16}])
def test_no_op_layers_and_other_kinds_of_attention_are_not_compared(changes: dict[str, object]) -> None:
    found = read(CUT / "A")
    assert found.template
    check_architecture({**found.template.args, **changes}, found.index, where="pt_meta", source="ms")


def test_what_is_not_stated_is_not_compared() -> None:
    check_architecture({}, read(CUT / "A").index, where="pt_meta", source="ms")
