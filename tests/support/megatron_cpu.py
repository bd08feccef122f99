"""What megatron-core asks of a GPU when a model is built and a checkpoint loaded, on a machine that has none.

Nothing here computes a step.  The ranks are processes that talk by gloo.
"""

from __future__ import annotations

import os
import sys
import typing
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import packaging.version
import torch
import torch._dynamo  # before anything of torch is replaced
import typing_extensions
from torch.overrides import TorchFunctionMode


class OnCpu(TorchFunctionMode):  # type: ignore[misc]
    """While it is entered, a tensor that is asked for on a GPU is made on the CPU and says that it is on a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not named:
            return str(func(*args)).replace("torch.", "torch.cuda.", 1)  # how Megatron sorts parameters by type
        if str(named.get("device", "")).startswith("cuda"):
            named["device"] = "cpu"
        return func(*args, **named)


class Adam(torch.optim.Optimizer):  # type: ignore[misc]
    """Has the keys of Transformer Engine's and Apex's FusedAdam, ``step`` in the group; Megatron fills in the moments."""

    def __init__(self, params: Any, lr: float = 1e-3, **given: Any) -> None:
        defaults = {"bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        super().__init__(params, {"lr": lr} | {key: given.get(key, value) for key, value in defaults.items()})


class Norm:
    """The norm that its config names: Megatron 0.8 has no RMSNorm without Apex or Transformer Engine."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        return kind(hidden_size, eps=eps)


def with_fused_norms(layer: Any, linear: Any, identity: Any) -> None:
    """Turn a local layer spec into that of Transformer Engine, which needs a GPU to be imported: a stand-in fuses norms into linear layers.

    Its names and its order are Transformer Engine's (module/layernorm_linear.py); those of the layer are Megatron's own.

    Args:
        layer: The submodules of a layer.
        linear: The class ``ColumnParallelLinear``.
        identity: What stands where a norm was.
    """

    class FusedNormLinear(linear):  # type: ignore[misc]
        def __init__(self, input_size: int, output_size: int, *, config: Any, **more: Any) -> None:
            super().__init__(input_size, output_size, config=config, **more)
            kinds = ("weight", "bias") if config.normalization == "LayerNorm" else ("weight",)
            made = {
                f"layer_norm_{kind}": torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
                for kind in kinds
            }
            own: dict[str, Any] = vars(self)["_parameters"]
            self._parameters = {**made, **own}

    layer.input_layernorm = layer.pre_mlp_layernorm = identity
    mlp = (
        layer.mlp.keywords if isinstance(layer.mlp, partial) else vars(layer.mlp)
    )  # 0.18 has a function in place of a spec
    layer.self_attention.submodules.linear_qkv = mlp["submodules"].linear_fc1 = FusedNormLinear


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator, with or without arguments, that compiles nothing."""
    return function if callable(function) else lambda wrapped: wrapped


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def without_gpu() -> None:
    """Before Megatron is imported."""
    typing.override = typing_extensions.override  # type: ignore[attr-defined,unused-ignore]  # Python 3.11 has none
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron asks for it where tensors are split
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.compile = torch.jit.script = _unchanged
    # The locked torch comes without triton, and two releases import it for kernels that no load runs.
    triton: Any = MagicMock(jit=_unchanged, __version__="3.4.0", __spec__=None)
    sys.modules["triton"] = sys.modules["triton.language"] = triton
    sys.modules["pkg_resources"] = SimpleNamespace(packaging=packaging)  # type: ignore[assignment]  # 0.8; newer setuptools has none
    # Saving asks it for a number that is only printed.
    process = SimpleNamespace(memory_info=_returning(SimpleNamespace(rss=0)))
    sys.modules["psutil"] = SimpleNamespace(Process=_returning(process))  # type: ignore[assignment]
    of_device = SimpleNamespace(name="none", major=9, minor=0, multi_processor_count=1, total_memory=80 << 30)
    nothing = MagicMock()
    replaced = {
        "current_device": torch.device("cpu"),
        "device_count": 1,
        "is_available": True,
        "get_device_capability": (9, 0),
        "get_device_properties": of_device,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "mem_get_info": (60 << 30, 80 << 30),
        **dict.fromkeys(("set_device", "set_rng_state", "synchronize", "empty_cache")),
        **dict.fromkeys(("Stream", "Event", "stream", "current_stream", "default_stream"), nothing),
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, _returning(value))


def with_fused_adam(optimizer: Any, distributed: Any) -> None:
    """Make it Megatron's Adam.

    Args:
        optimizer: The module ``megatron.core.optimizer``.
        distributed: The module ``megatron.core.optimizer.distrib_optimizer``.
    """
    optimizer.Adam = distributed.Adam = Adam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True
