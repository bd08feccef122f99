"""The files of a rank as slots: what is refused, and which release fills its buffers how."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from ckpt2pt.core.extents import Extent
from ckpt2pt.core.index import Collector, Index, Local
from ckpt2pt.core.state import State
from ckpt2pt.core.tensor import ROLES
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import CoverageError, MissingInputError, UsageError
from ckpt2pt.formats.megatron.order import Style
from ckpt2pt.formats.megatron.write import McoreLayout, policy_of

SHAPES: dict[str, tuple[int, ...]] = {
    "embedding.word_embeddings.weight": (16, 8),
    "decoder.layers.0.input_layernorm.weight": (8,),
    "decoder.layers.0.self_attention.linear_qkv.weight": (24, 8),
    "decoder.layers.0.self_attention.q_layernorm.weight": (4,),
    "decoder.layers.0.self_attention.linear_proj.weight": (8, 8),
    "decoder.layers.0.pre_mlp_layernorm.weight": (8,),
    "decoder.layers.0.mlp.linear_fc1.weight": (32, 8),
    "decoder.layers.0.mlp.linear_fc2.weight": (8, 16),
    "decoder.final_layernorm.weight": (8,),
    "output_layer.weight": (16, 8),
}
STATE = State(
    where="source", iteration=2, samples=12, step=2,
    args={"num_attention_heads": 2},
    groups=({"wd_mult": 1.0, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
            {"wd_mult": 0.0, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}),
    scheduler=dict.fromkeys(
        ("max_lr", "lr_warmup_steps", "num_steps", "lr_decay_style", "lr_decay_steps", "min_lr", "start_wd", "end_wd",
         "wd_incr_style", "wd_incr_steps"), 1),
)  # fmt: skip


def index(roles: Any = ROLES, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Index:
    collector = Collector(1, "source")
    for role in roles:
        for name, shape in shapes.items():
            extent = Extent(f"{role}:{name}", 0, 4 * math.prod(shape))
            collector.add(role, name, 0, Local("float32", shape, 0, (extent,)))
    return collector.index(partial=True)


def layout(**more: Any) -> McoreLayout:
    made = McoreLayout(
        index=index(), state=STATE, topology=Topology(num_layers=1), source_tensor=1, style=Style(), dtype="bfloat16",
        gradients="float32", rows=16, tied=False, full=True, data=1, expert=1, where="source",
    )  # fmt: skip
    return replace(made, **more)


def test_release_says_how_buffers_are_filled() -> None:
    found = [policy_of((0, release)).releases for release in (7, 8, 9, 12, 13, 19)]
    assert found == ["0.7", "0.8", "0.9 to 0.12", "0.9 to 0.12", "0.13 to 0.19", "0.13 to 0.19"]


def test_parameters_of_odd_sizes_lie_on_multiples_of_64() -> None:
    made = layout()
    made.check()
    _, (_, optimizer) = made.files((0, 0))
    assert {slot.start % 64 for slot in optimizer.slots} == {0}
    older = layout(style=Style(release=(0, 7)))
    older.check()
    [sizes, old_sizes] = [one.files((0, 0))[1][1].storages for one in (made, older)]
    assert old_sizes == (4 * sum(map(math.prod, SHAPES.values())),) * 3
    assert sizes[0] > old_sizes[0]


def test_source_without_moments_is_refused() -> None:
    with pytest.raises(MissingInputError, match="the source has no exp_avg of"):
        layout(index=index(("param", "main_param"))).check()
    layout(index=index(("param",)), full=False).check()


def test_legacy_models_without_a_module_are_refused() -> None:
    with pytest.raises(UsageError, match=r"legacy models of Megatron-LM have no .*q_layernorm"):
        layout(style=Style(names="legacy")).check()


def test_parameter_that_no_table_knows_is_refused() -> None:
    more = {**SHAPES, "decoder.layers.0.mlp.gate.weight": (4, 8)}
    with pytest.raises(CoverageError, match=r"mlp\.gate\.weight .* has no place in the result"):
        layout(index=index(shapes=more)).check()


def test_head_of_a_tied_model_is_compared_and_not_written() -> None:
    made = layout(tied=True)
    made.check()
    kept, copy = next(pair for pair in made.copies((0, 0)) if pair[1].name == "output_layer.weight")
    assert kept.paths == ("param:embedding.word_embeddings.weight",)
    assert copy.paths == ("param:output_layer.weight",)
    assert not any(slot.key.name == "output_layer.weight" for file in made.files((0, 0))[1] for slot in file.slots)
