"""Shapes that do not go together are refused by name, and what they prove is taken from them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from ckpt2pt.errors import FormatError
from ckpt2pt.formats.mindformers.layouts import Layouts, gated, groups_of, same_in_both

P = "decoder.layers.0."
LATENT: dict[str, tuple[int, ...]] = {
    f"{P}self_attention.linear_qkv.weight": (12, 8),
    f"{P}self_attention.linear_kvb.weight": (32, 4),
    f"{P}self_attention.linear_proj.weight": (8, 16),
}


def layouts(shapes: Mapping[str, tuple[int, ...]], *, heads: int | None = None, gate: bool = True) -> Layouts:
    return Layouts(shapes=shapes, interleaved=True, contiguous=None, heads=heads, gated=gate, where="somewhere")


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        ({f"{P}mlp.linear_fc1.weight": (7, 4)}, f"{P}mlp.linear_fc1.weight"),
        ({f"{P}mlp.experts.weight1": (10, 6), f"{P}mlp.router.weight": (4, 5)}, f"{P}mlp.experts.weight1"),
        ({f"{P}mlp.experts.weight1": (4, 5, 7), f"{P}mlp.router.weight": (4, 5)}, f"{P}mlp.experts.weight1"),
        ({f"{P}mlp.experts.weight1": (4,)}, f"{P}mlp.experts.weight1"),
        (LATENT | {f"{P}self_attention.linear_qb.weight": (24, 9)}, f"{P}self_attention.linear_qkv.weight"),
        (LATENT | {f"{P}self_attention.linear_qb.weight": (24,)}, f"{P}self_attention.linear_qkv.weight"),
        (LATENT, f"{P}self_attention.linear_qkv.weight"),
    ],
    ids=str,
)
def test_shapes_that_do_not_go_together_are_refused(shapes: dict[str, tuple[int, ...]], name: str) -> None:
    with pytest.raises(FormatError, match="does not go with"):
        layouts(shapes).of(name)


def test_queries_without_a_low_rank_are_reported_by_the_number_of_heads() -> None:
    # 4 heads of 4 + 2 channels (keys, rope), values of 4: 24 rows of queries, 4 + 2 of the others.
    shapes = {
        f"{P}self_attention.linear_qkv.weight": (30, 8),
        f"{P}self_attention.linear_kvb.weight": (32, 4),
        f"{P}self_attention.linear_proj.weight": (8, 16),
    }
    found = layouts(shapes, heads=4).of(f"{P}self_attention.linear_qkv.weight")
    assert [(one.name.removeprefix(P), one.fused) for one in found] == [
        ("self_attention.linear_q_proj.weight", (24, 8)),
        ("self_attention.linear_kv_down_proj.weight", (6, 8)),
    ]


@pytest.mark.parametrize(("columns", "gate"), [(12, True), (6, False)])
def test_experts_tell_whether_there_is_a_gate(columns: int, gate: bool) -> None:
    for first, second in (((4, 5, columns), (4, 6, 5)), ((20, columns), (24, 5))):
        shapes = {f"{P}mlp.router.weight": (4, 5), f"{P}mlp.experts.weight1": first, f"{P}mlp.experts.weight2": second}
        assert gated(shapes, "") == gate
        (one, *_) = layouts(shapes, gate=gate).of(f"{P}mlp.experts.weight1")
        assert one.fused == (columns, 5)
    with pytest.raises(FormatError, match="and weight2"):
        gated({f"{P}mlp.experts.weight1": (4, 5, 7), f"{P}mlp.experts.weight2": (4, 6, 5)}, "")


def test_the_norm_of_queries_tells_heads_and_groups() -> None:
    shapes = {
        f"{P}self_attention.linear_qkv.weight": (32, 8),
        f"{P}self_attention.linear_proj.weight": (8, 16),
    }
    name = f"{P}self_attention.linear_qkv.weight"
    assert groups_of(shapes, {}) == (name, None)
    assert groups_of(shapes, {"num_attention_heads": 4}) == (name, (2, 4))
    assert groups_of(shapes | {f"{P}self_attention.q_layernorm.weight": (4,)}, {}) == (name, (2, 4))
    assert groups_of(shapes, {"kv_channels": 5}) == (name, None)
    assert groups_of(LATENT, {}) is None
    assert same_in_both((24, 8), (4, 4))
    assert not same_in_both((32, 8), (2, 4))
    assert not same_in_both((32, 8), None)
