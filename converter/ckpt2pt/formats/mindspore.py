"""MindSpore training output, read as global tensors.

rank_R/*.ckpt, *.safetensors, shards --ckpt.ranks--> the files of one iteration --ckpt.collect--> tensors
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ckpt2pt.ckpt import index_file
from ckpt2pt.ckpt.collect import collect
from ckpt2pt.ckpt.ranks import SourceFile, choose, find_groups, find_sources, last_saved
from ckpt2pt.ckpt.shards import has_shards
from ckpt2pt.errors import InputError, MissingInputError, UsageError
from ckpt2pt.formats.checkpoint import Checkpoint
from ckpt2pt.mapping.names import NameTable, Rules
from ckpt2pt.mapping.topology import Rank, Topology
from ckpt2pt.meta import read_stated
from ckpt2pt.plan.clock import read_clock
from ckpt2pt.survey import agree, facts_of
from ckpt2pt.system.paths import listing

_RANK = re.compile(r"rank_(\d{1,9})")
_MODEL_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_OPTION = "the checkpoint's path"


def open_mindspore(
    path: Path, *, tensor: int | None, pipeline: int | None, iteration: int | None, rules: Rules
) -> Checkpoint:
    """Read the headers of every rank of one iteration, the newest that all ranks have unless ``iteration`` names another.

    ``tensor`` and ``pipeline`` may be left out where folder names or a ``pt_meta`` beside the ranks state them.
    """
    layout = _layout(path, tensor, pipeline)
    found = find_sources(path, layout)
    found = find_groups(path, layout, found, sharded=lambda file: has_shards(index_file(file)))
    steps = {when: _iteration(files) for when, files in found.items()}
    if iteration is None:
        when = choose(found, last_saved(path, layout))
    else:
        matching = [when for when, step in steps.items() if step == iteration]
        if len(matching) != 1:
            there = ", ".join(sorted(str(step) for step in steps.values() if step is not None)) or "none that is stated"
            raise MissingInputError(
                f"{len(matching)} checkpoints are of iteration {iteration}; there are iterations {there}",
                where=path,
                mend="ask for one of them, or leave the iteration out for the newest",
            )
        when = matching[0]
    files = found[when]
    agree({file: facts_of(index_file(file)) for group in files.values() for file in group.paths}, path)
    return Checkpoint(
        path=path,
        format="mindspore",
        iteration=steps[when],
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        index=collect(files, layout, NameTable(rules), str(path)),
    )


def _iteration(files: Mapping[Rank, SourceFile]) -> int | None:
    first = next(iter(files.values()))
    with suppress(InputError):
        facts = facts_of(index_file(first.path))
        return read_clock(facts, global_batch_size=None, named=first.named, where=str(first.path)).iteration
    return None


def _layout(path: Path, tensor: int | None, pipeline: int | None) -> Topology:
    """Which folders belong to which rank; the layers do not matter, so each stage has one."""
    names = [entry.name for entry in listing(path, option=_OPTION)]
    ranks = sorted(int(match[1]) for name in names if (match := _RANK.fullmatch(name)))
    if not ranks:
        folders = [
            match
            for inner in (path, *listing(path, "iter_*", _OPTION))
            for entry in listing(inner, option=_OPTION)
            if (match := _MODEL_RANK.fullmatch(entry.name))
        ]
        tensor = 1 + max((int(match[1]) for match in folders), default=0) if tensor is None else tensor
        pipeline = 1 + max((int(match[2] or 0) for match in folders), default=0) if pipeline is None else pipeline
        return Topology(num_layers=pipeline, tensor=tensor, pipeline=pipeline)
    if (tensor is None or pipeline is None) and (stated := read_stated(path / "pt_meta")):
        tensor = stated.tensor if tensor is None else tensor
        pipeline = stated.pipeline if pipeline is None else pipeline
    if ranks == [0]:
        tensor, pipeline = tensor or 1, pipeline or 1
    if tensor is None or pipeline is None:
        raise UsageError(
            f"{len(ranks)} rank folders, and nothing says which of them are tensor parallel and which pipeline parallel",
            where=path,
            mend="give tp and pp, as in ckpt2pt.open(path, tp=2, pp=4)",
        )
    return Topology(num_layers=pipeline, tensor=tensor, pipeline=pipeline, data=_data(ranks, tensor, pipeline))


def _data(ranks: list[int], tensor: int, pipeline: int) -> int:
    """The size of the data x context parallel group: all ranks have a folder, or the first of each group has."""
    count, last = len(ranks), ranks[-1]
    if last + 1 == count:
        return max(1, count // (tensor * pipeline))
    return max(1, (last + 1 - tensor) // (tensor * (pipeline - 1))) if pipeline > 1 else 1
