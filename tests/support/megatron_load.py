"""Run with a release of megatron-core on PYTHONPATH: load checkpoints with Megatron's own code and keep what it then holds.

One case is one line of JSON on stdin: ``checkpoint``, ``out`` (a new folder), ``args`` (of the training, without sizes), ``tp``, ``pp``, ``dp``, ``ep``
and ``pretrain`` (the real ``load_checkpoint``, which wheels from 0.17 on hold).  A folder ``out`` that has files of all ranks was loaded;
a rank that was refused leaves its traceback.  With ``save``, a form of the optimizer's state or ``torch``, Megatron saves what it loaded
into ``out/saved``.  Megatron is imported once, and the ranks of each case are forked.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
import traceback
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import SerializationFormat

from mcore import canonical
from megatron_cpu import Norm, OnCpu, with_fused_adam, with_fused_norms, without_gpu

SECONDS = 100
KINDS = ("exp_avg", "exp_avg_sq")
GROUP = ("wd_mult", "weight_decay", "step", "betas", "eps")


@cache
def core(name: str = "") -> Any:
    """A module of megatron-core."""
    return import_module(f"megatron.core{name and '.' + name}")


@cache
def release() -> tuple[int, int]:
    """As the package says."""
    major, minor, *_ = core().__version__.split(".")
    return int(major), int(minor)


# ------------------------------------------------------------------------------------- megatron-core alone: 0.8 to 0.16


def parsed(words: list[str]) -> Any:
    """Those arguments of a training that decide its model and optimizer."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("num-experts", "moe-router-topk", "moe-shared-expert-intermediate-size"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--moe-layer-freq", type=listed, default=1)
    for name in ("vocab-size", "max-position-embeddings", "make-vocab-size-divisible-by", "ddp-bucket-size"):
        parser.add_argument(f"--{name}", type=int)
    for name, default in {
        "lr": 0.0,
        "min-lr": 0.0,
        "weight-decay": 0.01,
        "adam-beta2": 0.999,
        "adam-eps": 1e-8,
    }.items():
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--transformer-impl", default="local")
    parser.add_argument("--normalization", default="LayerNorm")
    parser.add_argument("--position-embedding-type", default="learned_absolute")
    parser.add_argument("--initial-loss-scale", type=float, default=2.0**32)
    for name in ("swiglu", "disable-bias-linear", "add-qkv-bias", "qk-layernorm", "overlap-grad-reduce", "fp16"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--untie-embeddings-and-output-weights", action="store_true")
    return parser.parse_known_args(words)[0]


def listed(pattern: str) -> int | list[int]:
    """``2``, or ``([0]+[1]*2)``: which layers have experts."""
    found: int | list[int] = eval(pattern, {"__builtins__": {}})  # as Megatron does
    return found


def of_experts(args: Any, ep: int) -> dict[str, Any]:
    """What the configuration says of experts."""
    if not args.num_experts:
        return {}
    more: dict[str, Any] = {}
    if args.moe_shared_expert_intermediate_size:
        more["moe_shared_expert_intermediate_size"] = args.moe_shared_expert_intermediate_size
    if release() >= (0, 9):
        more["moe_layer_freq"] = args.moe_layer_freq
    return more | {
        "num_moe_experts": args.num_experts,
        "moe_router_topk": args.moe_router_topk,
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": ep,
    }


def build(args: Any, tp: int, pp: int, ep: int) -> tuple[Any, Any]:
    """The model of this rank and its optimizer."""
    states = core("parallel_state")
    states.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep)
    core("tensor_parallel.random").model_parallel_cuda_manual_seed(1)
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    precision = {"fp16": args.fp16, "bf16": not args.fp16, "params_dtype": dtype}
    config = core("transformer").TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        normalization=args.normalization,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu if args.swiglu else torch.nn.functional.gelu,
        add_bias_linear=not args.disable_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        **of_experts(args, ep),
        **precision,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
    )
    layers = core("models.gpt.gpt_layer_specs")
    if release() < (0, 9):
        layers.LNImpl = core("transformer.transformer_block").LayerNormImpl = Norm
        spec = layers.get_gpt_layer_local_spec(args.num_experts, qk_layernorm=args.qk_layernorm)
    elif args.num_experts:
        spec = layers.get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    else:
        spec = layers.get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization)
    if args.transformer_impl == "transformer_engine":
        with_fused_norms(
            spec.submodules, core("tensor_parallel").ColumnParallelLinear, core("transformer.identity_op").IdentityOp
        )
    multiple = args.make_vocab_size_divisible_by * tp
    model = core("models.gpt").GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=-(-(args.vocab_size + 1) // multiple) * multiple,
        max_sequence_length=args.max_position_embeddings,
        pre_process=states.is_pipeline_first_stage(),
        post_process=states.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
    )
    buckets = core("distributed").DistributedDataParallelConfig(
        grad_reduce_in_fp32=not args.fp16,
        use_distributed_optimizer=True,
        overlap_grad_reduce=args.overlap_grad_reduce,
        bucket_size=args.ddp_bucket_size if args.overlap_grad_reduce else None,
    )
    whole = core("distributed").DistributedDataParallel(
        config=config, ddp_config=buckets, module=core("transformer.module").Float16Module(config, model)
    )
    wanted = core("optimizer").OptimizerConfig(
        optimizer="adam",
        lr=args.lr,
        min_lr=args.min_lr,
        weight_decay=args.weight_decay,
        adam_beta2=args.adam_beta2,
        adam_eps=args.adam_eps,
        **precision,
        initial_loss_scale=args.initial_loss_scale,
        use_distributed_optimizer=True,
    )
    return model, core("optimizer").get_megatron_optimizer(wanted, [whole])


def load(folder: Path, model: Any, optimizer: Any, pp: int, ep: int) -> None:
    """What ``load_checkpoint`` does with the model and the optimizer, strictly."""
    states, dist = core("parallel_state"), core("dist_checkpointing")
    distributed = (folder / "metadata.json").exists()
    if distributed:
        metadata = dist.load_content_metadata(preloaded_state_dict=dist.load_common_state_dict(str(folder)))
        wanted: dict[str, Any] = {"model": model.sharded_state_dict(metadata=metadata)}
        wanted["optimizer"] = optimizer.sharded_state_dict(wanted, metadata=metadata, is_loading=True)
        found = dist.load(wanted, str(folder))
    else:
        stage = f"_{states.get_pipeline_model_parallel_rank():03d}" if pp > 1 else ""
        experts = f"_{states.get_expert_model_parallel_rank():03d}" if ep > 1 else ""
        folder /= f"mp_rank_{states.get_tensor_model_parallel_rank():02d}{stage}{experts}"
        found = torch.load(folder / "model_optim_rng.pt", weights_only=False)
    model.load_state_dict(found["model"], strict=True)
    optimizer.load_state_dict(found["optimizer"])
    if not distributed:  # where experts have ranks of their own, not each of them has a file
        optimizer.load_parameter_state(str(folder / "distrib_optim.pt"))


def by_core(case: dict[str, Any]) -> tuple[list[Any], Any, dict[str, Any]]:
    """Model chunks, optimizer and what is known of the run."""
    source = Path(case["checkpoint"])
    iteration = int((source / "latest_checkpointed_iteration.txt").read_text())
    model, optimizer = build(parsed(case["args"]), case["tp"], case["pp"], case["ep"])
    load(source / f"iter_{iteration:07d}", model, optimizer, case["pp"], case["ep"])
    if case["save"]:
        folder = Path(case["out"]) / "saved" / f"iter_{iteration:07d}"
        save(case, folder, model, optimizer)
        (folder.parent / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return [model], optimizer, {}


def save(case: dict[str, Any], folder: Path, model: Any, optimizer: Any) -> None:
    """What ``save_checkpoint`` does, with the arguments that a reader needs."""
    np.product = np.prod  # type: ignore[attr-defined]  # as numpy 1 and torch 2.5 have them
    writer = core("dist_checkpointing.strategies.filesystem_async")
    if release() < (0, 14):
        writer._write_item = partial(writer._write_item, serialization_format=SerializationFormat.TORCH_SAVE)
    args = parsed(case["args"])
    args.tensor_model_parallel_size, args.pipeline_model_parallel_size = case["tp"], case["pp"]
    common = {"args": args, "checkpoint_version": 3.0, "iteration": int(folder.name[5:])}
    kind = case["save"]
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    model_state = {"model": model.sharded_state_dict()}
    options = {"metadata": {"distrib_optim_sharding_type": kind}} if release() >= (0, 14) else {"sharding_type": kind}
    optimizer_state = optimizer.sharded_state_dict(model_state, is_loading=False, **options)
    core("dist_checkpointing").save(common | model_state | {"optimizer": optimizer_state}, str(folder))


# ---------------------------------------------------------------------- megatron.training, as pretrain_gpt.py uses it


def by_pretrain(case: dict[str, Any]) -> tuple[list[Any], Any, dict[str, Any]]:
    """The same by the real ``load_checkpoint``, which reads arguments, scheduler and random states as well."""
    training = import_module("megatron.training.training")
    arguments = import_module("megatron.training.arguments")
    start: Any = import_module("megatron.training.initialize")
    start._compile_dependencies = lambda: None  # of data sets
    distributed = any(Path(case["checkpoint"]).glob("iter_*/metadata.json"))
    more = {
        "--load": case["checkpoint"],
        "--ckpt-format": "torch_dist" if distributed else "torch",
        "--tensor-model-parallel-size": case["tp"],
        "--pipeline-model-parallel-size": case["pp"],
        "--expert-model-parallel-size": case["ep"],
    }
    words = [str(word) for pair in more.items() for word in pair]
    sys.argv = ["pretrain", *case["args"], *words, "--use-cpu-initialization", "--exit-on-missing-checkpoint"]
    strictly = torch.nn.Module.load_state_dict

    def only_strictly(self: Any, state: Any, strict: bool = True, **options: Any) -> Any:
        if not strict:
            raise RuntimeError("load_checkpoint fell back to a load that is not strict")
        return strictly(self, state, strict=True, **options)

    torch.nn.Module.load_state_dict = only_strictly
    args = arguments.parse_and_validate_args()
    start.initialize_megatron()
    kind = core("enums").ModelType.encoder_or_decoder
    if release() >= (0, 19):
        made = import_module("megatron.training.argument_utils")
        container = made.pretrain_cfg_container_from_args(args, made.gpt_config_from_args(args))
        groups = core("process_groups_config").ProcessGroupCollection.use_mpu_process_groups()
        found = training.setup_model_and_optimizer(
            kind, checkpointing_context={}, cfg_container=container, pg_collection=groups
        )
    else:

        def provider(pre_process: bool = True, post_process: bool = True, **_: Any) -> Any:
            layers, config = core("models.gpt.gpt_layer_specs"), arguments.core_transformer_config_from_args(args)
            return core("models.gpt").GPTModel(
                config=config,
                transformer_layer_spec=layers.get_gpt_decoder_block_spec(config, use_transformer_engine=False)
                if args.num_experts
                else layers.get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization),
                vocab_size=args.padded_vocab_size,
                max_sequence_length=args.max_position_embeddings,
                pre_process=pre_process,
                post_process=post_process,
                share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
                position_embedding_type=args.position_embedding_type,
            )

        found = training.setup_model_and_optimizer(provider, kind, checkpointing_context={})
    chunks, optimizer, scheduler = found
    if case["save"]:
        args.save, args.ckpt_format = f"{case['out']}/saved", "torch" if case["save"] == "torch" else "torch_dist"
        args.use_dist_ckpt = args.ckpt_format == "torch_dist"
        args.dist_ckpt_optim_fully_reshardable = case["save"] == "fully_reshardable"
        import_module("megatron.training.checkpointing").save_checkpoint(
            args.iteration, chunks, optimizer, scheduler, 0, checkpointing_context={}
        )
    run = {"iteration": args.iteration, "consumed_train_samples": args.consumed_train_samples}
    return core("utils").unwrap_model(chunks), optimizer, {**run, "scheduler": scheduler.state_dict()}


# ------------------------------------------------------------------------------------------------------- what it holds


def as_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Its bits; those of bfloat16 as uint16."""
    plain = tensor.detach().contiguous()
    found: np.ndarray[Any, Any] = (plain.view(torch.int16) if plain.dtype is torch.bfloat16 else plain).numpy()
    return found.view("<u2") if plain.dtype is torch.bfloat16 else found


def local_experts(chunk: Any) -> int:
    """How many experts of a layer this rank has."""
    found = (re.search(r"\.local_experts\.(\d+)\.", name) for name, _ in chunk.named_parameters())
    return 1 + max((int(one[1]) for one in found if one), default=-1)


def keep(out: Path, rank: int, chunks: list[Any], optimizer: Any, run: dict[str, Any]) -> None:
    """Write weights, and this rank's slices of the optimizer's state by its own maps, under names with global layers."""
    names: dict[Any, str] = {}
    first = core("parallel_state").get_expert_model_parallel_rank() * max(map(local_experts, chunks))
    for chunk in chunks:
        numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for name, parameter in chunk.named_parameters():
            local = re.sub(r"(?<=\.local_experts\.)\d+", lambda found: str(int(found[0]) + first), canonical(name))
            names[parameter] = re.sub(r"(?<=^decoder\.layers\.)\d+", lambda found: str(numbers[int(found[0])]), local)  # noqa: B023
    arrays = {f"param/{name}": as_numpy(parameter) for parameter, name in names.items()}
    held: dict[str, Any] = {}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for parameter, (group, order) in part.model_param_group_index_map.items():
            options, name = part.optimizer.param_groups[group], names[parameter]
            main, place = options["params"][order], part._get_model_param_range_map(parameter)["param"]
            arrays[f"main_param/{name}"] = as_numpy(main)
            arrays |= {f"{kind}/{name}": as_numpy(part.optimizer.state[main][kind]) for kind in KINDS}
            held[name] = {
                "place": [place.start, place.end],
                "group": {key: options[key] for key in GROUP},
            }
        if part.grad_scaler:
            run |= {"scaler": {name: float(value) for name, value in part.grad_scaler.state_dict().items()}}
    tensor = core("parallel_state").get_tensor_model_parallel_rank()
    np.savez(out / f"{rank}.npz", **arrays)  # type: ignore[arg-type]
    (out / f"{rank}.json").write_text(json.dumps({"tp": tensor, "held": held, "run": run}, default=float))


def run_rank(rank: int, world: int, case: dict[str, Any]) -> None:
    """In a process of its own."""
    out = Path(case["out"])
    try:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        # Megatron prints its arguments.
        with OnCpu(), (out / f"{rank}.log").open("w") as log, contextlib.redirect_stdout(log):
            torch.distributed.init_process_group("gloo", init_method=f"file://{out}/ranks", rank=rank, world_size=world)
            keep(out, rank, *(by_pretrain if case["pretrain"] else by_core)(case))
            torch.distributed.barrier()
    except BaseException:  # SystemExit as well: so does Megatron end when it refuses
        (out / f"{rank}.refused").write_text(traceback.format_exc())
        raise


def run_case(case: dict[str, Any]) -> None:
    """Fork the ranks; the first that ends badly ends the others."""
    world = case["tp"] * case["pp"] * case["dp"]
    Path(case["out"]).mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(rank, world, case)) for rank in range(world)]
    for process in ranks:
        process.start()
    waiting = list(ranks)
    while waiting and not any(process.exitcode for process in ranks):
        if not multiprocessing.connection.wait([process.sentinel for process in waiting], timeout=SECONDS):
            break
        waiting = [process for process in waiting if process.is_alive()]
    for process in waiting:
        process.kill()
    for process in ranks:
        process.join()


if __name__ == "__main__":
    without_gpu()
    with_fused_adam(core("optimizer"), core("optimizer.distrib_optimizer"))
    logging.disable(logging.WARNING)
    gc.freeze()  # the ranks share these pages
    for line in sys.stdin:
        run_case(json.loads(line))
