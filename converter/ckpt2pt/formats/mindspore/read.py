"""MindSpore training output, read as global tensors.

rank_R/*.ckpt, *.safetensors, shards --ckpt.ranks--> the files of one iteration --ckpt.collect--> tensors
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

from ckpt2pt.core.index import Index
from ckpt2pt.core.names import NameTable
from ckpt2pt.core.params import EMBEDDING, FINAL_NORM
from ckpt2pt.core.topology import Rank
from ckpt2pt.core.training_step import TrainingStep, agree, read_training_step
from ckpt2pt.errors import InputError, MissingInputError
from ckpt2pt.formats.checkpoint import Checkpoint, Selection
from ckpt2pt.formats.mindspore import facts_of, index_file, statement_of
from ckpt2pt.formats.mindspore.degrees import Header, check_ranks, find_layout
from ckpt2pt.formats.mindspore.filenames import CheckpointId
from ckpt2pt.formats.mindspore.ranks import SourceFile, choose, find_groups, find_sources, index_source, last_saved
from ckpt2pt.formats.mindspore.shards import has_shards
from ckpt2pt.formats.mindspore.source import collect


def open_mindspore(
    path: Path, wanted: Selection, *, wanted_format: str | None = None, info: Path | None = None
) -> Checkpoint:
    """Read the headers of every rank of one iteration, the newest that all ranks have unless ``wanted`` names another.

    Parallel sizes may be left out where the folders, a ``pt_meta`` beside the ranks or the files tell them.
    ``wanted_format`` is ``ckpt``, ``safetensors`` or None for either, ``info`` the folder that describes data-parallel shards
    (None: ``opt_shard_info`` beside the ranks).
    """
    iteration, rules = wanted.iteration, wanted.rules
    table, header = NameTable(rules), cache(index_file)
    layout = find_layout(path, wanted.tensor, wanted.pipeline, table, header)
    found = find_sources(path, layout, wanted_format=wanted_format)
    found = find_groups(
        path, layout, found, sharded=lambda file: has_shards(header(file)), info=info, wanted_format=wanted_format
    )
    when = (
        choose(found, last_saved(path, layout)) if iteration is None else _of_iteration(path, found, iteration, header)
    )
    files = found[when]
    warnings = check_ranks(path, when, files, layout, table, header)
    agree({file: facts_of(header(file)) for group in files.values() for file in group.paths}, path)
    index, _ = collect(
        files, layout, table, str(path), lambda rank, file: index_source(file, layout.group(*rank), header)
    )
    if not rules.modules:
        _check_ends(index, path)
    training_step = _training_step(files, header)
    return Checkpoint(
        path=path,
        format="mindspore",
        iteration=training_step.iteration if training_step else None,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        index=index,
        warnings=warnings,
        statement=statement_of(header(next(iter(files.values())).path)),
        samples=training_step.samples if training_step else None,
    )


def _check_ends(index: Index, path: Path) -> None:
    """Layers have gaps where there are no-op layers, but a model begins with its embedding and ends with a norm."""
    names = {key.name for key in index}
    lacking = [name for name in (EMBEDDING, FINAL_NORM) if name not in names]
    if lacking:
        raise MissingInputError(
            f"no rank holds {lacking[0]}, so the {'first' if lacking[0] == EMBEDDING else 'last'} pipeline stage is missing",
            where=path,
            hint="copy the folders of all ranks, and check the parallel sizes if you give them",
        )


def _of_iteration(
    path: Path, found: Mapping[CheckpointId, Mapping[Rank, SourceFile]], iteration: int, header: Header
) -> CheckpointId:
    training_steps = {when: _training_step(files, header) for when, files in found.items()}
    steps = {when: training_step.iteration if training_step else None for when, training_step in training_steps.items()}
    matching = [when for when, step in steps.items() if step == iteration]
    if len(matching) == 1:
        return matching[0]
    there = ", ".join(str(step) for step in sorted({step for step in steps.values() if step is not None}))
    raise MissingInputError(
        f"{len(matching) or 'no'} checkpoints are of iteration {iteration}; there are iterations {there or 'that nothing states'}",
        where=path,
        hint="ask for one of them, or leave the iteration out for the newest",
    )


def _training_step(files: Mapping[Rank, SourceFile], header: Header) -> TrainingStep | None:
    first = next(iter(files.values()))
    with suppress(InputError):
        facts = facts_of(header(first.path))
        return read_training_step(facts, global_batch_size=None, named=first.named, where=str(first.path))
    return None
