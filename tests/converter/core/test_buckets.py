"""Param maps: proved, or refused with what is wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt2pt.core.buckets import expected_shape, parse_param_map, stated_shape
from ckpt2pt.errors import FormatError


def entry(start: int, stop: int, bucket: int = 0) -> list[Any]:
    return ["torch.bfloat16", [stop - start], start, stop, bucket]


GOOD: dict[str, Any] = {"module.b": entry(0, 5), "module.a": entry(5, 8), "module.c": entry(9, 13, 1)}


def test_padding_is_true_for_the_group_that_shares_the_buffer() -> None:
    buffer = parse_param_map(GOOD, where="map", divisor=3)
    assert [(b.start, b.numel, b.numel_unpadded) for b in buffer.buckets] == [(0, 9, 8), (9, 6, 4)]
    assert [p.name for p in buffer.placements] == ["b", "a", "c"]
    assert (buffer.dtype, buffer.numel) == ("bfloat16", 15)


def test_an_unknown_group_pads_only_what_the_map_shows() -> None:
    buffer = parse_param_map(GOOD, where="map", divisor=None)
    assert [(b.numel, b.numel_unpadded) for b in buffer.buckets] == [(9, 8), (4, 4)]


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "gap": ({"module.a": entry(6, 9)}, "starts at element 6"),
    "overlap": ({"module.a": entry(4, 8)}, "starts at element 4"),
    "bucket-skipped": ({"module.c": entry(9, 13, 2)}, r"bucket numbers run \[0, 2\]"),
    "bucket-returns": ({"module.d": entry(13, 14, 0)}, r"bucket numbers run \[0, 1, 0\]"),
    "shape": ({"module.a": ["torch.bfloat16", [2], 5, 8, 0]}, "shape .2. has 2 elements"),
    "two-types": ({"module.a": ["torch.float32", [3], 5, 8, 0]}, "bfloat16, float32"),
    "not-a-list": ({"module.a": {"start": 5}}, "must be a list"),
    "text": ({"module.a": ["torch.bfloat16", [3], "5", 8, 0]}, "must be integers"),
    "true": ({"module.a": ["torch.bfloat16", [3], 5, 8, False]}, "must be integers"),
    "negative": ({"module.a": ["torch.bfloat16", [3], -5, -2, 0]}, "must be integers"),
    "absurd": ({"module.a": ["torch.bfloat16", [1 << 60], 5, 5 + (1 << 60), 0]}, "must be integers"),
    "wrong-padding": ({"module.c": entry(10, 14, 1)}, "the next one begins at 10"),
    "same-name-twice": ({"a": entry(8, 9)}, "a appears twice"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_map_is_refused(case: str) -> None:
    changes, message = BROKEN[case]
    with pytest.raises(FormatError, match=message) as caught:
        parse_param_map(copy.deepcopy(GOOD) | changes, where="map.json", divisor=3)
    assert "map.json" in caught.value.where


@pytest.mark.parametrize("document", [None, [], {}, 3, "x"])
def test_a_map_must_be_an_object(document: object) -> None:
    with pytest.raises(FormatError):
        parse_param_map(document, where="map.json", divisor=None)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda c: st.lists(c, max_size=5) | st.dictionaries(st.text(max_size=5), c, max_size=4),
    )
)
def test_any_json_is_parsed_or_refused(document: object) -> None:
    try:
        parse_param_map(document, where="map.json", divisor=2)
    except FormatError:
        return
    assert isinstance(document, dict)


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), min_size=1, max_size=5), st.integers(1, 6))
def test_buckets_made_as_megatron_makes_them_are_accepted(sizes: list[list[int]], divisor: int) -> None:
    document: dict[str, Any] = {}
    position = 0
    for bucket, numels in enumerate(sizes):
        for number, numel in enumerate(numels):
            document[f"module.p{bucket}_{number}"] = entry(position, position + numel, bucket)
            position += numel
        position = -(-position // divisor) * divisor
    buffer = parse_param_map(document, where="map", divisor=divisor)
    assert buffer.numel == position
    assert all(bucket.numel % divisor == 0 for bucket in buffer.buckets)


def test_every_golden_map_is_accepted(golden_set: Path) -> None:
    maps = sorted(golden_set.glob("pt_meta/param_map_buffer0_dp0*.json"))
    assert maps
    for path in maps:
        assert parse_param_map(json.loads(path.read_text()), where=str(path), divisor=None).numel > 0


SIZES = {
    "hidden_size": 64, "num_attention_heads": 8, "kv_channels": 8, "num_query_groups": 4, "group_query_attention": True,
    "ffn_hidden_size": 96, "swiglu": True, "padded_vocab_size": 256, "max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "shape"),
    [
        ("l.query_key_value.weight", {}, (64, 64)),
        ("l.query_key_value.weight", {"group_query_attention": False}, (96, 64)),
        ("l.query_key_value.bias", {}, (64,)),
        ("l.dense.weight", {}, (64, 32)),
        ("l.dense.bias", {}, (64,)),
        ("l.dense_h_to_4h.weight", {}, (96, 64)),
        ("l.dense_h_to_4h.weight", {"swiglu": False}, (48, 64)),
        ("l.dense_4h_to_h.weight", {}, (64, 48)),
        ("language_model.output_layer.weight", {}, (128, 64)),
        ("word_embeddings.weight", {}, (128, 64)),
        ("language_model.embedding.position_embeddings.weight", {}, (16, 64)),
        ("l.input_norm.weight", {}, (64,)),
        ("l.something_else.weight", {}, None),
    ],
)
def test_shapes_follow_from_the_arguments(name: str, changes: dict[str, Any], shape: tuple[int, ...] | None) -> None:
    assert expected_shape(name, SIZES | changes, 2) == shape


def test_an_argument_that_is_not_there_determines_nothing() -> None:
    assert expected_shape("l.query_key_value.weight", {"hidden_size": 64}, 1) is None


def test_another_data_parallel_size_is_answered_with_the_way_to_it() -> None:
    document = {"a": ["torch.bfloat16", [4], 0, 4, 0], "b": ["torch.bfloat16", [4], 4, 8, 1]}
    with pytest.raises(FormatError, match="a data-parallel group of 3 pads it to 6") as reported:
        parse_param_map(document, where="map.json", divisor=3)
    assert "pt-meta --target-dp-size 3" in reported.value.hint
    assert reported.value.where == "map.json: b"


def test_a_setting_that_is_left_out_tells_no_shape() -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 16}
    qkv, gate = (
        f"language_model.encoder.layers.0.{module}.weight"
        for module in ("self_attention.query_key_value", "mlp.dense_h_to_4h")
    )
    assert [stated_shape(name, sizes, 1) for name in (qkv, gate)] == [None, None]
    reported = sizes | {"group_query_attention": False, "swiglu": True}
    assert [stated_shape(name, reported, 1) for name in (qkv, gate)] == [(24, 8), (32, 8)]
