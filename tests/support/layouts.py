"""Layouts without golden data, for :class:`handmade.Handmade`."""

from __future__ import annotations

from typing import Any

from ckpt2pt.core.topology import Topology


def topology(**more: Any) -> Topology:
    return Topology(**({"num_layers": 4} | more))


LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {"topology": topology()},
    "tensor-parallel": {"topology": topology(tensor=3, pipeline=2)},
    "several-buckets": {"topology": topology(), "bucket_numel": 60, "data": 2},
    "virtual-several-buckets-dp2": {"topology": topology(pipeline=2, virtual=2), "bucket_numel": 50, "data": 2},
    "virtual-several-buckets-dp3": {"topology": topology(pipeline=2, virtual=2), "bucket_numel": 50, "data": 3},
    "virtual-several-buckets-dp64": {"topology": topology(pipeline=2, virtual=2), "bucket_numel": 1, "data": 64},
    "noop-in-the-middle-of-a-chunk": {
        "topology": topology(num_layers=12, pipeline=2, virtual=2, noop=frozenset({1, 7})),
        "data": 2,
    },
    "noop-at-both-ends": {"topology": topology(num_layers=6, noop=frozenset({0, 5}))},
    "chunk-of-noops-alone": {
        "topology": topology(num_layers=12, pipeline=2, virtual=3, noop=frozenset({4, 5})),
        "bucket_numel": 40,
        "data": 3,
    },
    "chunk-of-noops-before-the-head": {
        "topology": topology(num_layers=8, pipeline=2, virtual=2, noop=frozenset({2, 3, 6, 7}))
    },
    "stage-of-noops-alone": {"topology": topology(num_layers=6, pipeline=3, noop=frozenset({4, 5}))},
    "uneven-stages": {"topology": topology(num_layers=5, pipeline=3, layers_per_stage=(1, 3, 1)), "data": 2},
    "uneven-chunks": {"topology": topology(num_layers=7, pipeline=2, virtual=2, layers_per_stage=(1, 3, 2, 1))},
    "uneven-with-noop": {"topology": topology(num_layers=6, pipeline=2, layers_per_stage=(4, 2), noop=frozenset({2}))},
    "stage-without-layers": {"topology": topology(num_layers=2, pipeline=2, layers_per_stage=(0, 2))},
    "biases": {"topology": topology(pipeline=2), "bias": True, "data": 2},
    "gamma-and-beta": {"topology": topology(pipeline=2), "bias": True, "gamma": True},
    "gamma-alone": {"topology": topology(), "gamma": True},
    "float16": {"topology": topology(), "params_dtype": "float16"},
    "float16-gradients": {"topology": topology(), "params_dtype": "float16", "grads_dtype": "float16", "data": 2},
    "float32": {"topology": topology(), "params_dtype": "float32"},
    "tied-one-stage": {"topology": topology(), "tied": True},
    "tied-two-stages": {"topology": topology(pipeline=2), "tied": True, "data": 3},
    "tied-virtual": {"topology": topology(pipeline=2, virtual=2), "tied": True, "bucket_numel": 50, "data": 2},
    "source-data-and-context-parallel": {"topology": topology(tensor=2, pipeline=2, data=3, context=2)},
}
