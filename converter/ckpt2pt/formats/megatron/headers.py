"""A checkpoint of Megatron-LM 0.6 to 0.19 in the ``torch`` format: its ranks, and where the bytes of every parameter and bucket lie.

iter_0000500/mp_rank_01_003/model_optim_rng.pt   -> template (all but the weights), chunks of (name, TensorRef)
                            distrib_optim.pt     -> buffers of buckets of {param, exp_avg, exp_avg_sq: TensorRef}

Headers only.  Formats: Megatron-LM cac60ce4, megatron/checkpointing.py; core_v0.19.0, megatron/training/checkpointing.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.foldernames import expert_ranks, model_ranks, parallel_sizes
from ckpt2pt.core.moves import MODEL_FILE, OPTIM_FILE
from ckpt2pt.core.names import TIED_HEAD, common_prefix
from ckpt2pt.core.params import HEAD, legacy_name, legacy_spelling
from ckpt2pt.errors import FormatError, MissingInputError, aside, ref
from ckpt2pt.formats.megatron.distributed import Buckets, StoredBucket, joined, read_states, tensor_ref
from ckpt2pt.formats.megatron.optimizer import Copies, groups_alone, read_copies
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.msadapter import is_msadapter, read_tree
from ckpt2pt.formats.torchfile.trees import Value, entries
from ckpt2pt.io.paths import is_file, is_folder, listing

_MODEL_KEY = re.compile(r"model(\d*)")
_TIED_HEAD_SAVED = "word_embeddings_for_head.weight"
_HEAD = legacy_name(HEAD)
_SAVED_AGAIN = "point at a checkpoint of a GPT model of Megatron-LM 0.6 to 0.19, saved with --use-distributed-optimizer"
_EXPERTS = re.compile(r"\.mlp\.(?:router|experts|local_experts|shared_experts)\.")
_UNKNOWN_EXPERTS = re.compile(r"\.mlp\.(?:local_experts|experts\.weight[12]$)")
"""Experts of legacy models, and ``GroupedMLP``, which holds them transposed in one tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronRank:
    """One ``mp_rank_*`` folder.  ``chunks`` holds for each model chunk its parameters in order of registration.

    Names are those of a legacy GPT model, also where the file has others (``core_names``).  ``buffers`` are those of
    ``distrib_optim.pt``, None where there is none; ``copies`` what ``model_optim_rng.pt`` holds of the optimizer in a run
    without the distributed one, None unless it was asked for.
    """

    folder: Path
    template: Template
    chunks: tuple[tuple[tuple[str, TensorRef], ...], ...]
    buffers: tuple[tuple[StoredBucket, ...], ...] | None
    copies: Copies | None = None
    prefix: str = ""
    """What all names of parameters carried in the file, such as ``module.``; left out here."""
    core_names: bool = False
    apart: bool = False
    """Whether experts have buffers of their own, as with expert parallelism; those of a chunk follow its dense ones."""
    lacks_dense: bool = False
    """Whether the rank of another expert holds the optimizer of dense parameters."""
    msadapter: bool = False
    """Whether MSAdapter wrote it: its states of random generators, which are MindSpore's, are left out."""

    @property
    def coalesced(self) -> bool:
        """Whether the buffers are those of 0.7 or newer."""
        return self.apart or any(bucket.coalesced for buffer in self.buffers or () for bucket in buffer)

    @property
    def has_plain_optimizer(self) -> bool:
        """Whether ``model_optim_rng.pt`` holds the optimizer, as without ``--use-distributed-optimizer``."""
        return _has_plain_optimizer(self.template)


def rank_folders(iteration: Path) -> dict[tuple[int, int], Path]:
    """(tp, pp) -> ``mp_rank_TT[_PPP]``.  Raises :class:`MissingInputError` when there is none, or a gap."""
    if not is_folder(iteration, ref("source.path")):
        raise MissingInputError(
            "the folder is not there", where=iteration, hint=f"check {ref('source.path')}", field="source.path"
        )
    found = model_ranks(listing(iteration, option=ref("source.path")))
    if not found and listing(iteration, "*.distcp"):
        raise FormatError(
            "this is a distributed checkpoint (torch_dist, .distcp files); ckpt2pt reads the torch format, mp_rank_*/*.pt",
            where=iteration,
            hint="load it with Megatron-LM and save it again without --use-dist-ckpt (--ckpt-format torch)",
        )
    if not found:
        raise MissingInputError(
            "no mp_rank_* folder",
            where=iteration,
            hint=f"point {ref('source.path')} at a Megatron checkpoint (torch format)",
            field="source.path",
        )
    tensor, pipeline = parallel_sizes(found)
    missing = [f"tp {tp} pp {pp}" for pp in range(pipeline) for tp in range(tensor) if (tp, pp) not in found]
    if missing:
        raise MissingInputError(
            f"{len(missing)} of {tensor * pipeline} ranks are missing: {', '.join(missing[:6])}",
            where=iteration,
            hint="copy the whole iteration",
        )
    return found


def all_sizes(iteration: Path) -> tuple[int, int, int]:
    """Tensor, pipeline and expert parallel size by the folders of an iteration; 1 for each where there is none.

    Whether a second number is that of a stage or of experts, only the arguments tell.
    """
    folders = expert_ranks(listing(iteration), pipelined=True)
    tensor, pipeline, experts = (1 + max(numbers) for numbers in zip((0, 0, 0), *folders, strict=True))
    if (
        pipeline > 1
        and experts == 1
        and is_expert_parallel(read_rank(folders[min(folders)], optimizer=False, experts=True))
    ):
        return tensor, 1, pipeline
    return tensor, pipeline, experts


def is_expert_parallel(rank: MegatronRank) -> bool:
    """Whether the run had expert parallel ranks and one pipeline stage: ``mp_rank_00_001`` is then one of experts."""
    args = rank.template.args
    experts = args.get("expert_model_parallel_size")
    return isinstance(experts, int) and experts > 1 and args.get("pipeline_model_parallel_size") == 1


def read_rank(
    folder: Path, *, optimizer: bool = True, copies: bool = False, experts: bool = False, allow: tuple[str, ...] = ()
) -> MegatronRank:
    """Read the headers of one rank; ``optimizer`` False leaves ``distrib_optim.pt`` alone.

    ``copies`` asks for the optimizer in ``model_optim_rng.pt`` of a run without the distributed one.  A mixture of experts
    is refused unless ``experts``.
    """
    optim = folder / OPTIM_FILE
    there = optimizer and is_file(optim, ref("source.path"))
    return read_files(folder / MODEL_FILE, optim if there else None, copies=copies, experts=experts, allow=allow)


def read_files(
    path: Path, optim: Path | None, *, copies: bool = False, experts: bool = False, allow: tuple[str, ...] = ()
) -> MegatronRank:
    """The same of files that may have other names: the model's and the optimizer's."""
    archive = Archive.open(path)
    tree = read_tree(archive, allow=allow)
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise FormatError("the file does not hold a dictionary with text keys", where=path, hint=_SAVED_AGAIN)
    named = cast("dict[str, Value]", tree)
    keys = sorted((key for key in named if _MODEL_KEY.fullmatch(key)), key=lambda key: int(key[5:] or 0))
    if keys not in (["model"], [f"model{number}" for number in range(len(keys))]) or not keys:
        raise FormatError(f"model chunks are {', '.join(keys) or 'none'}", where=path, hint=_SAVED_AGAIN)
    found = {key: _weights(named[key], archive, path) for key in keys}
    prefix = common_prefix({name: name for weights in found.values() for name in weights}, where=str(path))
    template = Template(
        path=str(path),
        tree={
            key: groups_alone(value) if key == "optimizer" else value for key, value in named.items() if key not in keys
        },
        storages=dict(archive.storages),
    )
    foreign = is_msadapter(archive.pickle)
    if foreign:
        template.tree.pop("rng_state", None)
    core_names = _has_core_names(found.values(), prefix)
    tied = core_names and template.args.get("untie_embeddings_and_output_weights") is False
    chunks = tuple(tuple(_named(weights, prefix, path, tied=tied, experts=experts)) for weights in found.values())
    states = read_states(optim) if optim else None
    apart = experts and states is not None and len(states) == 2
    buffers = _by_chunk(states, chunks) if states and apart else joined(states, optim) if states and optim else None
    whole = copies and buffers is None and _has_plain_optimizer(template)
    return MegatronRank(
        folder=path.parent,
        template=template,
        chunks=chunks,
        buffers=buffers,
        prefix=prefix,
        core_names=core_names,
        apart=apart,
        lacks_dense=bool(states and apart and states[0] is None),
        msadapter=foreign,
        copies=read_copies(
            named.get("optimizer"), chunks, lambda value, name: tensor_ref(value, archive, name, path), where=path
        )
        if whole
        else None,
    )


def _has_plain_optimizer(template: Template) -> bool:
    return template.args.get("use_distributed_optimizer") is not True and "optimizer" in template.tree


def _weights(model: Value, archive: Archive, path: Path) -> dict[str, TensorRef]:
    """Parameters in order: nested dictionaries joined by dots."""
    # Dictionaries may be shared, and double what there is with each level: each visit has to pay for a byte of the pickle.
    visits_left = len(archive.pickle)

    def walk(prefix: str, value: Value) -> Iterator[tuple[str, TensorRef]]:
        nonlocal visits_left
        visits_left -= 1
        if visits_left < 0:
            raise FormatError("more parameters than a file of its size can hold", where=path, hint=_SAVED_AGAIN)
        inner = entries(value)
        if inner is not None:
            for key, item in inner:
                yield from walk(f"{prefix}.{key!s}" if prefix else str(key), item)
        elif value is not None and not prefix.endswith("._extra_state"):
            yield prefix, tensor_ref(value, archive, prefix, path)

    found: dict[str, TensorRef] = {}
    for name, entry in walk("", model):
        if found.setdefault(name, entry) is not entry:
            raise FormatError(f"{name} is there twice", where=path, hint=_SAVED_AGAIN)
    return found


def _by_chunk(
    states: Sequence[tuple[Buckets, ...] | None], chunks: Sequence[Sequence[tuple[str, TensorRef]]]
) -> tuple[Buckets, ...]:
    """Buffers of dense parameters and of experts, chunk by chunk; where a chunk has several, as they come."""
    left = [list(state) if state is not None else None for state in states]
    found: list[Buckets] = []
    for chunk in chunks:
        kinds = {is_expert(name) for name, _ in chunk}
        for kind, state in enumerate(left):
            if state and bool(kind) in kinds:
                found.append(state.pop(0))
    return (*found, *(buckets for state in left for buckets in state or ()))


def is_expert(name: str) -> bool:
    """Whether it is a parameter of one expert, which ranks of other experts do not hold."""
    return ".mlp.experts." in name


def _has_core_names(chunks: Iterable[Mapping[str, TensorRef]], prefix: str) -> bool:
    """Whether these are the parameters of a Megatron core model: a legacy one has ``language_model.`` before them."""
    names = [name.removeprefix(prefix) for weights in chunks for name in weights]
    return bool(names) and not any(name.startswith(("language_model.", "word_embeddings")) for name in names)


def _named(
    weights: Mapping[str, TensorRef], prefix: str, path: Path, *, tied: bool, experts: bool
) -> Iterator[tuple[str, TensorRef]]:
    """The same under legacy names, without the prefix, the tied head under the name that buffers use.

    ``tied``: a Megatron core model calls its last stage's copy of the embedding ``output_layer``.
    """
    seen: set[str] = set()
    for full, entry in weights.items():
        name = legacy_spelling(full.removeprefix(prefix))
        name = TIED_HEAD if name == _TIED_HEAD_SAVED or (tied and name == _HEAD) else name
        if name in seen:
            raise FormatError(f"{name} is there twice", where=path, hint=_SAVED_AGAIN)
        seen.add(name)
        if _EXPERTS.search(name) and (not experts or _UNKNOWN_EXPERTS.search(name)):
            raise FormatError(
                f"{full} is of a mixture of experts, in a form that ckpt2pt does not read"
                if experts
                else f"{full} is of a mixture of experts, which no result for MindSpore or Megatron-LM 0.6 holds",
                where=path,
                hint="save it with an MLP for each expert, or with the grouped one of Transformer Engine"
                if experts
                else f"choose Megatron-LM 0.7 to 0.19 or torch_dist{aside('target.format')}",
            )
        if not name.startswith(("language_model.", "mtp.") if experts else "language_model.") and name != TIED_HEAD:
            raise FormatError(f"{full} is no parameter of a GPT model of Megatron-LM", where=path, hint=_SAVED_AGAIN)
        yield name, entry._replace(name=name)
