"""What a user would say of the run behind a golden set: the arguments that are not Megatron's defaults, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ckpt2pt.formats.folders import iteration_folder
from ckpt2pt.formats.megatron.headers import rank_folders, read_rank
from ckpt2pt.formats.ptmeta.describe import known
from ckpt2pt.formats.ptmeta.synthesize import Wanted
from conversions import topology_of

# What Megatron works out itself, so that nobody passes it.
WORKED_OUT = {
    "rank", "world_size", "params_dtype", "consumed_train_samples", "model_type", "iteration", "padded_vocab_size",
    "transformer_pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "encoder_num_layers",
    "start_weight_decay", "end_weight_decay", "encoder_seq_length", "accumulate_allreduce_grads_in_fp32", "local_rank",
    "data_parallel_size",
}  # fmt: skip


def said_of(folder: Path) -> dict[str, Any]:
    """The arguments of the run that wrote ``folder``/A, as far as they had to be given."""
    args = read_rank(rank_folders(iteration_folder(folder / "A"))[0, 0], optimizer=False).template.args
    defaults = known().arguments
    return {
        name: value for name, value in args.items() if name not in WORKED_OUT and (name, value) not in defaults.items()
    }


def write_description(folder: Path, path: Path) -> Path:
    path.write_text(yaml.safe_dump({name.replace("_", "-"): value for name, value in said_of(folder).items()}))
    return path


def wanted_for(folder: Path) -> Wanted:
    """The rest of what a user has to know; the run with several buckets had a Megatron with smaller ones."""
    cut = topology_of(folder)
    size = 20_000 if "buckets" in folder.name else None
    return Wanted(source=folder / "ms", data=cut.data, noop=cut.noop, bucket_size=size)
