"""What a checkpoint holds, from headers alone: a file, a rank folder, a training output, pt_meta or a Megatron folder.

A document is plain JSON: facts, groups of facts, and tables (lists of rows).  :func:`render` turns any of them into text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.foldernames import TRACKER, expert_ranks, is_iteration, iterations, ranks_of, tracked_name
from ckpt2pt.core.names import EXPERTS_IN_MINDSPORE, SHARD, NameTable, has_experts
from ckpt2pt.core.training_step import STEP_ENTRIES, read_training_step
from ckpt2pt.discover.loading import verdicts
from ckpt2pt.errors import Ckpt2ptError, FormatError, InputError, MissingInputError, UsageError
from ckpt2pt.formats.families import Seen, kind_of_tensors, refuse_unsupported
from ckpt2pt.formats.folders import SUFFIXES, checkpoint_files, layout_of
from ckpt2pt.formats.megatron.headers import all_sizes
from ckpt2pt.formats.mindspore import index_file, read_scalar, states_checksum
from ckpt2pt.formats.mindspore.filenames import UNNAMED, when_of_name
from ckpt2pt.formats.mindspore.ranks import choose, find_sources, last_saved
from ckpt2pt.formats.ptmeta.metadata import ARGUMENTS, PARAM_MAP
from ckpt2pt.formats.torch_dist.metadata import is_distributed
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.msadapter import is_msadapter
from ckpt2pt.io.inputs import read_whole
from ckpt2pt.io.jsontext import parse_json
from ckpt2pt.io.paths import is_folder, is_there, listing, status
from ckpt2pt.io.records import Json
from ckpt2pt.io.text import conflicting, short, spans
from ckpt2pt.publish import PARTIAL, STATE, read_record, read_tracker
from ckpt2pt.show.distributed import inspect_distributed
from ckpt2pt.show.mindformers import inspect_mindformers
from ckpt2pt.show.model import inspect_model
from ckpt2pt.verification.leaves import CONTAINERS, Leaf, Leaves, TensorLeaf, is_archive, leaf_of, open_pt

_LAYER = re.compile(r"(?<=layers\.)\d+(?=[._])")
_NUMBER = re.compile(r"(?<=layers\.)\d+(?=[._])|(?<=_bucket_)\d+$")
_STAGE = re.compile(r"stage-(\d{3,6})\.json", re.ASCII)
_MAX_VALUES = 500
_LONG_LIST = 32
_TIMES = ("/num_steps", "/step")

_ROLES = {"param": "parameters", "exp_avg": "first moments", "exp_avg_sq": "second moments"}

_ARGUMENTS = {
    "parallelism": "tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size"
    " data_parallel_size context_parallel_size expert_model_parallel_size sequence_parallel use_distributed_optimizer"
    " overlap_grad_reduce",
    "model": "num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention num_query_groups kv_channels"
    " seq_length max_position_embeddings position_embedding_type padded_vocab_size swiglu normalization add_bias_linear"
    " add_qkv_bias untie_embeddings_and_output_weights params_dtype",
    "training": "iteration consumed_train_samples train_iters global_batch_size micro_batch_size optimizer lr min_lr"
    " lr_decay_style weight_decay adam_beta1 adam_beta2 adam_eps clip_grad seed",
}
"""What a reader of a checkpoint looks for first among Megatron's three hundred arguments."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor in a table."""

    name: str
    leaf: TensorLeaf

    def row(self) -> Json:
        extents = self.leaf.extents
        return {
            "name": self.name,
            "count": 1,
            "dtype": self.leaf.dtype,
            "shape": list(self.leaf.shape),
            "bytes": self.leaf.nbytes,
            "offset": extents[0].offset if extents else None,
            **({"slices": len(extents)} if len(extents) > 1 else {}),
        }


def inspect(path: Path, *, details: bool = False) -> Json:
    """Look at a file or a folder.  ``details`` lists every tensor and argument instead of what is usually asked for."""
    if not is_there(path, "the path"):
        raise MissingInputError("the file or folder is not there", where=path, hint="check the path")
    folder = is_folder(path, "the path")
    if folder or path.suffix == ".gguf":
        refuse_unsupported(path)
    if folder:
        return _folder(path, details=details)
    return _archive(path, details=details) if is_archive(path) else _mindspore(path, details=details)


def _mindspore(path: Path, *, details: bool) -> Json:
    index, names = index_file(path, partial=True), NameTable()
    kind = ".safetensors" if path.suffix == ".safetensors" else ".ckpt"
    totals: dict[str, list[TensorRef]] = {}
    layers: set[int] = set()
    for name, ref in index.items():
        what = names.classify(name)
        role = "shards of the distributed optimizer" if SHARD.fullmatch(name) else _ROLES.get(what.role, what.name)
        totals.setdefault(role, []).append(ref)
        layers |= {int(number) for number in _LAYER.findall(what.name if what.role != "ignored" else "")}
    scalars = {name: ref for name, ref in index.items() if _is_scalar(ref)}
    tensors = [_Entry(name, leaf_of(ref)) for name, ref in index.items() if details or name not in scalars]
    if not details:
        order = list(_ROLES)
        tensors.sort(key=lambda entry: order.index(role) if (role := names.classify(entry.name).role) in order else 9)
    return {
        "kind": f"{kind_of_tensors(index)} ({kind})",
        "path": str(path),
        "bytes": path.stat().st_size,
        "entries": len(index),
        "layers": spans(layers),
        **_training_step(path, index),
        **({"checksum": "stated, not checked here"} if states_checksum(path) else {}),
        **({"problem": f"not converted: {EXPERTS_IN_MINDSPORE}"} if has_experts(index) else {}),
        "totals": [
            {
                "role": role,
                "count": len(refs),
                "elements": sum(ref.numel for ref in refs),
                "bytes": sum(ref.nbytes for ref in refs),
            }
            for role, refs in totals.items()
        ],
        "tensors": [entry.row() for entry in tensors] if details else _collapse(tensors),
        "scalars": {name: _value(ref) for name, ref in list(scalars.items())[:_MAX_VALUES]},
    }


def _is_scalar(ref: TensorRef) -> bool:
    return ref.dtype == "str" or (ref.numel == 1 and len(ref.shape) <= 1)


def _value(ref: TensorRef) -> object:
    try:
        value = read_scalar(ref)
    except FormatError:
        return f"{ref.dtype}{list(ref.shape)}"
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _training_step(path: Path, index: Mapping[str, TensorRef]) -> Json:
    """Epoch and step as the file states them, and the iteration they amount to."""
    facts: dict[str, float] = {}
    for name in STEP_ENTRIES:
        value = _value(index[name]) if name in index else None
        if isinstance(value, int | float):
            facts[name] = value
    when = when_of_name(path.name)
    try:
        training_step = read_training_step(
            facts, global_batch_size=None, named=None if when == UNNAMED else when, where=str(path)
        )
    except InputError:
        return {"iteration": "unknown"}
    return {
        "iteration": training_step.iteration,
        "because": training_step.iteration_source,
        **conflicting(training_step.conflicts),
    }


def _collapse(entries: Iterable[_Entry]) -> list[Json]:
    """One row for the same tensor of many layers: ``layers.{0-31}.attention.qkv_proj.weight``; buckets differ in size."""
    groups: dict[tuple[str, str, tuple[int, ...] | None], list[_Entry]] = {}
    for entry in entries:
        shape = None if SHARD.fullmatch(entry.name) else entry.leaf.shape
        groups.setdefault((_NUMBER.sub("{}", entry.name), entry.leaf.dtype, shape), []).append(entry)
    rows: list[Json] = []
    for (pattern, _, _), same in groups.items():
        row = same[0].row()
        if len(same) > 1:
            numbers = {int(number) for entry in same for number in _NUMBER.findall(entry.name)}
            row["name"] = pattern.replace("{}", f"{{{spans(numbers)}}}")
            row["count"] = len(same)
            if len({entry.leaf.shape for entry in same}) > 1:
                row["shape"] = "various"
            row["bytes"] = sum(entry.leaf.nbytes for entry in same)
        rows.append(row)
    return rows


def _archive(path: Path, *, details: bool) -> Json:
    archive, leaves = Archive.open(path), open_pt(path)
    tensors = [_Entry(name, leaf) for name, leaf in leaves.items() if isinstance(leaf, TensorLeaf)]
    tops = {name.split("/")[1] for name in leaves}
    holds = "a Megatron model" if any(re.fullmatch(r"model\d*", top) for top in tops) else "other data"
    if "per_bucket_numel" in tops or any(name.endswith("/numel_unpadded") for name in leaves):
        holds = "a Megatron distributed optimizer"
    elif "args" in tops and holds == "other data":
        holds = "a template of pt_meta: a Megatron model file without its weights"
    return {
        "kind": "MSAdapter archive (.pt), which torch does not read"
        if is_msadapter(archive.pickle)
        else "torch archive (.pt)",
        "path": str(path),
        "bytes": path.stat().st_size,
        "records": len(archive.records),
        "holds": holds,
        "tree": _branches(leaves),
        "buckets": _buckets(leaves),
        # The buckets say it all in fewer lines.
        "tensors": [entry.row() for entry in tensors]
        if details
        else []
        if "per_bucket_numel" in tops
        else _collapse(tensors),
        "scalars": _scalars(leaves, details=details),
        "arguments": _arguments(leaves, details=details),
    }


def _branches(leaves: Leaves) -> list[Json]:
    """Each key at the top of the tree with what is below it; a tensor up there is in the table of tensors."""
    below: dict[str, list[Leaf]] = {}
    for name, leaf in leaves.items():
        _, top, *rest = name.split("/")
        if rest:
            below.setdefault(top, []).append(leaf)
        elif top and not isinstance(leaf, TensorLeaf):
            below.setdefault(top, [])
    return [
        {
            "key": top,
            "holds": short(leaves[f"/{top}"]),
            "tensors": sum(isinstance(leaf, TensorLeaf) for leaf in inner),
            "others": sum(not isinstance(leaf, TensorLeaf) and leaf not in CONTAINERS for leaf in inner),
            "bytes": sum(leaf.nbytes for leaf in inner if isinstance(leaf, TensorLeaf)),
        }
        for top, inner in below.items()
    ]


def _buckets(leaves: Leaves) -> list[Json]:
    found: list[Json] = []
    for name, leaf in leaves.items():
        parts = name.split("/")
        if parts[1] == "per_bucket_numel" and len(parts) == 5 and isinstance(leaf, int):
            used = leaves.get(name.replace("per_bucket_numel", "per_bucket_numel_unpadded", 1))
            found.append(
                {
                    "buffer": int(parts[2]),
                    "types": parts[3],
                    "bucket": int(parts[4]),
                    "elements": leaf,
                    "padding": leaf - used if isinstance(used, int) else None,
                }
            )
    return found


def _scalars(leaves: Mapping[str, Leaf], *, details: bool) -> Json:
    """Numbers and texts of the tree; a long list of numbers, such as the state of a generator, in one line."""
    folders: dict[str, list[str]] = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, bool | int | float | str) and not name.startswith(("/args/", "/per_bucket_numel")):
            folders.setdefault(name.rpartition("/")[0], []).append(name)
    found: Json = {}
    for folder, names in folders.items():
        if folder and len(names) > _LONG_LIST:
            found |= {f"{folder}/*": f"{len(names)} values"} if details else {}
        else:
            found |= {name: _plain(leaves[name]) for name in names if details or not folder or name.endswith(_TIMES)}
    return found


def _plain(leaf: Leaf) -> object:
    if isinstance(leaf, bool | int) or leaf is None:
        return leaf
    return leaf if isinstance(leaf, float) and math.isfinite(leaf) else short(leaf, 120)


def _arguments(leaves: Leaves, *, details: bool) -> Json:
    args = {
        name[6:]: _plain(leaf) for name, leaf in leaves.items() if name.startswith("/args/") and "/" not in name[6:]
    }
    if not args:
        return {}
    groups: Json = {
        group: {name: args[name] for name in names.split() if name in args} for group, names in _ARGUMENTS.items()
    }
    shown = {name for names in _ARGUMENTS.values() for name in names.split()}
    rest = {name: value for name, value in args.items() if name not in shown}
    groups["others"] = rest if details else f"{len(rest)} more arguments (--details)"
    return groups


def _folder(path: Path, *, details: bool) -> Json:
    names = [entry.name for entry in listing(path, option="PATH")]
    if any(ARGUMENTS.fullmatch(name) or PARAM_MAP.fullmatch(name) for name in names):
        return _metadata(path, names, details=details)
    if Seen(path).of_mindformers:
        return inspect_mindformers(path, details=details)
    if Seen(path).of_huggingface:
        return inspect_model(path, details=details)
    if TRACKER in names or any(map(is_iteration, names)):
        return _megatron(path, names)
    if is_distributed(path):
        found, leaves = inspect_distributed(path, details=details)
        return found | {"arguments": _arguments(leaves, details=details)}
    if expert_ranks((path / name for name in names), pipelined=True):
        found = _iteration(path, read_tracker(path.parent))
        kind = "MSAdapter iteration" if Seen(path).of_msadapter else "Megatron iteration"
        return {"kind": kind, "path": str(path), **found, **verdicts(path)}
    if ranks_of(names):
        return _training(path, names)
    files = checkpoint_files(path)
    if not files:
        raise UsageError(
            "the folder holds no checkpoint that is known here",
            where=path,
            hint=f"name a file ({', '.join(sorted(SUFFIXES))}), a folder of rank_* folders, a pt_meta or a Megatron folder",
        )
    return {"kind": "folder of checkpoints", "path": str(path), "files": [_held(*file) for file in files.items()]}


def _held(name: str, path: Path) -> Json:
    """What a file holds in one row; what is wrong with it, where it cannot be read."""
    seen = status(path, "the path")
    row: Json = {"file": name, "bytes": seen.st_size if seen else None}
    try:
        found = inspect(path)
    except InputError as error:
        row["holds"] = error.what
    else:
        row["holds"] = found.get("holds", found["kind"])
        row.update({key: found[key] for key in ("layers", "iteration") if key in found})
    return row


def _listing(files: Mapping[str, Path]) -> list[Json]:
    return [{"file": name, "bytes": path.stat().st_size} for name, path in files.items()]


def _metadata(path: Path, names: Sequence[str], *, details: bool) -> Json:
    args = [found for name in names if (found := ARGUMENTS.fullmatch(name))]
    maps = [found for name in names if (found := PARAM_MAP.fullmatch(name))]
    first = _arguments(open_pt(path / args[0][0]), details=details) if args else {}
    return {
        "kind": "pt_meta of a Megatron run",
        "path": str(path),
        "mode": "parameters and optimizer" if maps else "parameters only: no param maps",
        "ranks": [{"tp": int(found[1]), "pp": int(found[2]), "file": found[0]} for found in args],
        "paramMaps": [_param_map(path / found[0], found) for found in maps],
        "arguments": first,
    }


def _param_map(path: Path, found: re.Match[str]) -> Json:
    try:
        document = cast("dict[str, tuple[str, list[int], int, int, int]]", parse_json(read_whole(path, "the path")))
        rows = [(str(dtype), int(start), int(stop), int(bucket)) for dtype, _, start, stop, bucket in document.values()]
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FormatError(
            f"cannot be read as a param map: {error}", where=path, hint="copy it again from where it was made"
        ) from error
    return {
        "tp": int(found[2]),
        "pp": int(found[3]),
        "chunk": int(found[4]),
        "parameters": len(rows),
        "elements": sum(stop - start for _, start, stop, _ in rows),
        "buckets": len({bucket for *_, bucket in rows}),
        "type": ", ".join(sorted({dtype for dtype, *_ in rows})),
    }


def _training(path: Path, names: Sequence[str]) -> Json:
    """A folder of rank folders: the steps that every rank has, and the one that would be converted."""
    ranks = ranks_of(names)
    document: Json = {"kind": "MindSpore training output", "path": str(path), "ranks": spans(set(ranks))}
    layout = layout_of(ranks)
    if layout is None:
        return document | {"files": _listing(checkpoint_files(path))}
    try:
        steps = find_sources(path, layout)
    except Ckpt2ptError as error:
        return document | {"problem": error.what, "files": _listing(checkpoint_files(path))}
    chosen = choose(steps, last_saved(path, layout))
    first = next(iter(steps[chosen].values())).path
    index = index_file(first, partial=True)
    return document | {
        "steps": [
            {
                "name": "no step in the name" if when == UNNAMED else f"epoch {when[0]} step {when[1]}",
                "format": "+".join(sorted({file.path.suffix[1:] for file in files.values()})),
                "files": len(files),
                "bytes": sum(file.path.stat().st_size for file in files.values()),
                "merged": any(file.merged for file in files.values()),
                "chosen": when == chosen,
            }
            for when, files in steps.items()
        ],
        "chosen": str(first.relative_to(path)),
        **_training_step(first, index),
    }


def _megatron(path: Path, names: Sequence[str]) -> Json:
    named = read_tracker(path)
    folders = iterations(path / name for name in names)
    loaded = path / tracked_name(named)
    return {
        "kind": "MSAdapter checkpoints" if Seen(loaded).of_msadapter else "Megatron checkpoints",
        "path": str(path),
        "tracker": named or "none",
        **(_loads(loaded) if loaded in folders else {"loads": "nothing"}),
        "iterations": [{"name": folder.name, **_iteration(folder, named)} for folder in folders],
    }


def _loads(loaded: Path) -> Json:
    """The iteration that the tracker names; what is wrong with a distributed one is raised."""
    if is_distributed(loaded):
        found, _ = inspect_distributed(loaded, details=False)
        return {
            "loads": loaded.name,
            **{key: found[key] for key in ("optimizer", "mainParameters", "releases") if key in found},
        }
    return {"loads": loaded.name, **verdicts(loaded)}


def _iteration(folder: Path, named: str) -> Json:
    """One iteration: its ranks and files, and how far a conversion has come."""
    tensor, pipeline, experts = all_sizes(folder)
    shards = listing(folder, "*.distcp")
    if shards:
        size = sum(path.stat().st_size for path in shards)
        return {"files": len(shards), "bytes": size, "state": "a distributed checkpoint (torch_dist)"}
    files = checkpoint_files(folder)
    state = folder / STATE
    stages = {int(found[1]) for path in listing(state, "stage-*.json") if (found := _STAGE.fullmatch(path.name))}
    claim = read_record(state / "claim.json")
    current = tracked_name(named) == folder.name
    partial = sum(1 for _ in listing(folder, f"mp_rank_*/.*{PARTIAL}"))
    return {
        "tp": tensor,
        "pp": pipeline,
        **({"ep": experts} if experts > 1 else {}),
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files.values()),
        "optimizer": any(name.endswith("distrib_optim.pt") for name in files),
        "state": ("published" if current else "not named by the tracker")
        + (f", {partial} unfinished files" if partial else ""),
        "converted": f"stages {spans(stages)}" if claim else "not by ckpt2pt",
    }
