"""Convert MindSpore training checkpoints into Megatron-LM checkpoints, one pipeline stage at a time.

    rank_3/*.ckpt --formats--> TensorRef  (file, dtype, shape, extents; payload unread)
                                  |
                       core       |  language_model.encoder.layers.7.attention.qkv_proj.weight
                                  v  language_model.encoder.layers.1.self_attention.query_key_value.weight  (stage 3)
    pt_meta/*.json  ---------> Slot  (which bytes land where; nothing read yet)
                                  |
                       engine     v  every byte read once, written once
                     iter_0000500/mp_rank_00_003/{model_optim_rng,distrib_optim}.pt
                                  |
                     verification v  a second, independent reading
                     latest_checkpointed_iteration.txt

Above ``Slot`` only headers are read; below it only bytes move.  Importing this package loads nothing else: no
numpy, no torch, no YAML.

    with ckpt2pt.open("ms_ckpt", tp=2, pp=4) as checkpoint:
        checkpoint["decoder.layers.7.mlp.linear_fc1.weight"]        # numpy, whole, whatever it was cut into
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckpt2pt.library.checkpoint import Checkpoint, TensorInfo
    from ckpt2pt.library.checkpoint import open_checkpoint as open  # noqa: A004 - as ckpt2pt.open
    from ckpt2pt.library.commands import convert, inspect, plan, verify

__all__ = ["Checkpoint", "TensorInfo", "__version__", "convert", "inspect", "open", "plan", "verify"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Load the library when it is first used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ckpt2pt.library import checkpoint, commands  # noqa: PLC0415

    return getattr(commands, name, None) or getattr(checkpoint, "open_checkpoint" if name == "open" else name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
