"""Megatron 0.6's layout of a buffer, against a second writing of the rule and against its own limits."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt2pt.core.buckets import parse_param_map
from ckpt2pt.core.layout import BUCKET_NUMEL, Parameter, bucket_numel, find_bucket_numel, lay_out, param_map
from ckpt2pt.errors import InputError


def parameters(*numels: int, shared: tuple[int, ...] = (), dtype: str = "bfloat16") -> list[Parameter]:
    return [Parameter(name=f"p{n}", shape=(numel,), dtype=dtype, shared=n in shared) for n, numel in enumerate(numels)]


def sizes(*numels: int, divisor: int = 1, limit: int | None = None, shared: tuple[int, ...] = ()) -> list[list[int]]:
    (buffer,) = lay_out(parameters(*numels, shared=shared), divisor=divisor, bucket_numel=limit)
    return [[bucket.start, bucket.numel_unpadded, bucket.numel] for bucket in buffer.buckets]


def test_one_bucket_holds_all_in_reverse_order() -> None:
    (buffer,) = lay_out(parameters(5, 3, 2), divisor=1, bucket_numel=None)
    assert [(p.name, p.start, p.stop) for p in buffer.placements] == [("p2", 0, 2), ("p1", 2, 5), ("p0", 5, 10)]


def test_a_bucket_ends_when_it_is_full_and_is_padded_to_the_group() -> None:
    # 2 + 3 reach 5; padded to 6 for a group of 3; then 5 reach 5 again.
    assert sizes(5, 3, 2, divisor=3, limit=5) == [[0, 5, 6], [6, 5, 6]]
    assert sizes(5, 3, 2, limit=6) == [[0, 10, 10]]


def test_a_shared_embedding_has_a_bucket_of_its_own() -> None:
    assert sizes(4, 2, 6, shared=(0, 2), divisor=2) == [[0, 6, 6], [6, 2, 2], [8, 4, 4]]


def test_a_shared_embedding_behind_a_bucket_that_does_not_divide_stops_megatron_and_us() -> None:
    with pytest.raises(InputError, match="data-parallel group of 2"):
        sizes(4, 3, shared=(0,), divisor=2)


@pytest.mark.parametrize(("overlap", "pp", "chunk", "limit"), [
    (True, 0, 0, BUCKET_NUMEL), (False, 0, 0, None), (True, 1, 0, None), (True, 0, 1, None),
])  # fmt: skip
def test_buckets_end_by_size_only_where_the_gradients_are_awaited(
    overlap: bool, pp: int, chunk: int, limit: int | None
) -> None:
    assert bucket_numel(overlap=overlap, pp=pp, chunk=chunk) == limit


def test_each_type_has_a_buffer_of_its_own_in_order_of_its_first_parameter() -> None:
    mixed = [*parameters(2), *parameters(3, dtype="float32"), Parameter(name="last", shape=(4,), dtype="bfloat16")]
    buffers = lay_out(mixed, divisor=1, bucket_numel=None)
    assert [(buffer.dtype, buffer.numel) for buffer in buffers] == [("bfloat16", 6), ("float32", 3)]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.sampled_from([1, 2, 3, 8]),
    st.one_of(st.none(), st.integers(1, 60)),
)
def test_the_map_written_is_the_buffer_read(numels: list[int], divisor: int, limit: int | None) -> None:
    (buffer,) = lay_out(parameters(*numels), divisor=divisor, bucket_numel=limit)
    document = json.loads(json.dumps(param_map(buffer)))
    assert next(iter(document)) == f"module.p{len(numels) - 1}"
    assert parse_param_map(document, where="here", divisor=divisor) == buffer


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.sampled_from([1, 2, 3]), st.integers(1, 90))
def test_a_size_that_gives_the_same_buckets_is_found(numels: list[int], divisor: int, limit: int) -> None:
    (buffer,) = lay_out(parameters(*numels), divisor=divisor, bucket_numel=limit)
    seen = [[bucket.numel_unpadded for bucket in buffer.buckets]]
    found = find_bucket_numel(parameters(*numels), divisor=divisor, unpadded=seen)
    assert found is not None
    assert lay_out(parameters(*numels), divisor=divisor, bucket_numel=found)[0] == buffer


def test_sizes_that_no_rule_gives_are_not_explained() -> None:
    assert find_bucket_numel(parameters(5, 3, 2), divisor=1, unpadded=[[4, 6]]) is None


def test_a_pure_float32_model_has_no_wrapper_in_its_names() -> None:
    (buffer,) = lay_out(parameters(2, dtype="float32"), divisor=1, bucket_numel=None)
    assert list(param_map(buffer)) == ["p0"]
