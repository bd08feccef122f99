"""Entries of an imported file: slices, names, scalars; what does not fit is refused."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from ckpt2pt.core.extents import Extent, TensorRef
from ckpt2pt.core.layout import Parameter, lay_out
from ckpt2pt.core.moves import OPTIM_KINDS
from ckpt2pt.core.names import NameTable
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import CoverageError, InputError, TopologyError
from ckpt2pt.formats.mindspore.entries import Entry
from ckpt2pt.formats.mindspore.imported import (
    ImportedChunk,
    missing_layers,
    payload_bytes,
    scalar_entries,
    tensor_entries,
)

FIRST, SECOND = (
    "language_model.encoder.layers.0.input_norm.weight",
    "language_model.encoder.layers.1.mlp.dense_4h_to_h.weight",
)
CUT = Topology(num_layers=4, pipeline=2)


def weight(name: str, shape: tuple[int, ...], dtype: str = "bfloat16") -> tuple[str, TensorRef]:
    return name, TensorRef(name, dtype, shape, (Extent("model", 0, 4),))


WEIGHTS = (weight(FIRST, (2,)), weight(SECOND, (2, 3)))


def chunk(*, limit: int | None = None, weights: Any = WEIGHTS, vpp: int = 0) -> ImportedChunk:
    parameters = [Parameter(name=name, shape=ref.shape, dtype="bfloat16") for name, ref in WEIGHTS]
    buffers = lay_out(parameters, divisor=4, bucket_numel=limit)
    buckets = tuple(
        {
            kind: TensorRef(kind, "float32", (b.numel,), (Extent(f"{kind}{b.index}", 100, 4 * b.numel),))
            for kind in OPTIM_KINDS
        }
        for b in buffers[0].buckets
    )
    return ImportedChunk(vpp=vpp, weights=weights, buffers=buffers, buckets=(buckets,))


def entries(*chunks: ImportedChunk, **more: Any) -> tuple[Entry, ...]:
    options: dict[str, Any] = {"pp": 1, "kinds": OPTIM_KINDS, "full": True, "sizes": {}, "where": "here"}
    return tensor_entries(chunks, CUT, NameTable(), **(options | more))


def places(found: tuple[Entry, ...]) -> list[tuple[str, tuple[Extent, ...]]]:
    return [(entry.name, entry.source.extents) for entry in found if isinstance(entry.source, TensorRef)]


def test_each_parameter_is_a_slice_of_its_bucket_under_its_global_name() -> None:
    # 6 elements end the first bucket at a multiple of 4: 8; the second begins anew.
    assert places(entries(chunk(limit=5), kinds=("param", "exp_avg"))) == [
        ("language_model.encoder.layers.3.mlp.projection.weight", (Extent("param0", 100, 24),)),
        ("exp_avg.language_model.encoder.layers.3.mlp.projection.weight", (Extent("exp_avg0", 100, 24),)),
        ("language_model.encoder.layers.2.input_norm.weight", (Extent("param1", 100, 8),)),
        ("exp_avg.language_model.encoder.layers.2.input_norm.weight", (Extent("exp_avg1", 100, 8),)),
    ]


def test_in_one_bucket_slices_follow_each_other() -> None:
    found = places(entries(chunk(), kinds=("exp_avg_sq",)))
    assert [extents for _, extents in found] == [(Extent("exp_avg_sq0", 100, 24),), (Extent("exp_avg_sq0", 124, 8),)]


def test_parameters_alone_come_in_order_of_registration_as_float32() -> None:
    found = entries(chunk(), full=False)
    assert [(entry.name.split(".", 3)[3], entry.dtype, entry.shape) for entry in found] == [
        ("2.input_norm.weight", "float32", (2,)), ("3.mlp.projection.weight", "float32", (2, 3)),
    ]  # fmt: skip
    assert payload_bytes(found) == 2 * 2 + 6 * 2


@pytest.mark.parametrize(
    ("weights", "error", "what"),
    [
        (WEIGHTS[:1], TopologyError, r"has layers \[0\], by the options it has \[0, 1\]"),
        ((*WEIGHTS, weight("language_model.encoder.final_norm.weight", (2,))), CoverageError, "only in the model file"),
        ((WEIGHTS[0], weight(SECOND, (3, 2))), TopologyError, r"\[2, 3\] in the param map"),
        ((WEIGHTS[0], weight(SECOND, (2, 3), "int8")), InputError, "of type int8"),
    ],
)
def test_weights_and_buffers_must_be_of_one_model(weights: Any, error: Any, what: str) -> None:
    with pytest.raises(error, match=what):
        entries(chunk(weights=weights))


def test_a_parameter_of_the_buffer_alone_is_named() -> None:
    held = (WEIGHTS[0], weight("language_model.encoder.layers.1.mlp.dense_4h_to_h.bias", (2,)))
    with pytest.raises(CoverageError, match=r"dense_4h_to_h\.bias is only in the model file"):
        entries(chunk(weights=held))


def test_shapes_are_those_of_the_arguments() -> None:
    with pytest.raises(TopologyError, match=r"input_norm\.weight has shape \[2\], the arguments give \[5\]"):
        entries(chunk(), sizes={"hidden_size": 5})


def test_layers_without_parameters_are_noop_layers() -> None:
    assert missing_layers({0: [FIRST]}, CUT, pp=1, where="here") == {3}
    with pytest.raises(TopologyError, match="holds a layer 1, by the options it has 1"):
        missing_layers({0: [SECOND]}, Topology(num_layers=2, pipeline=2), pp=0, where="here")


def scalars(
    groups: Any = (), scheduler: Any = None, iteration: int = 7
) -> dict[str, tuple[str, tuple[int, ...], object]]:
    found = scalar_entries(iteration, groups, scheduler or {}, where="here")
    codes = {"int64": "<q", "int32": "<i", "float32": "<f", "float64": "<d"}
    return {
        e.name: (e.dtype, e.shape, struct.unpack(codes[e.dtype], e.source)[0])
        for e in found
        if isinstance(e.source, bytes)
    }


def test_time_comes_first() -> None:
    assert list(scalars().items()) == [("step_num", ("int64", (), 7)), ("epoch_num", ("int64", (), 0))]


def test_groups_are_numbered_and_the_step_is_one_for_all() -> None:
    group = {"wd_mult": 1.0, "is_expert_parallel": False, "betas": (0.9, 0.95), "lr": 0.5, "step": 3}
    found = scalars([group, group | {"step": 4}])
    assert list(found)[2:] == [
        "wd_mult_group_0", "is_expert_parallel_group_0", "learning_rate_group_0", "state_step", "wd_mult_group_1",
        "is_expert_parallel_group_1", "learning_rate_group_1",
    ]  # fmt: skip
    assert found["state_step"] == ("float32", (1,), 4.0)
    assert found["is_expert_parallel_group_0"] == ("float32", (), 0.0)


def test_the_scheduler_has_the_types_of_the_reference() -> None:
    found = scalars(scheduler={"max_lr": 0.1, "lr_warmup_steps": 20.5, "num_steps": 2**31, "lr_decay_style": "cosine",
                               "wd_incr_style": "constant", "none": None, "other": 2})  # fmt: skip
    assert list(found.values())[2:] == [
        ("float64", (), 0.1), ("int32", (), 20), ("int64", (), 2**31), ("int32", (), 3), ("int32", (), 0), ("float32", (), 2.0),
    ]  # fmt: skip


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(InputError, match="lr_decay_style is 'steps'"):
        scalars(scheduler={"lr_decay_style": "steps"})
