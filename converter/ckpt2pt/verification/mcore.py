"""Prove a result of Megatron-LM 0.7 to 0.19: a rank's files, read as any source is, against the tensors of the source.

files --formats.megatron--> tensors (the layout of the buffers proved by the weights) -+--tensors--> every bit
source -----------------------------------------------------------------------------+
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ckpt2pt.core.index import Collector, Index
from ckpt2pt.core.params import is_buffer
from ckpt2pt.core.progress import Advance
from ckpt2pt.core.state import State
from ckpt2pt.core.tensor import Key
from ckpt2pt.core.topology import Rank
from ckpt2pt.errors import InputError
from ckpt2pt.formats.megatron.headers import MegatronRank, read_files
from ckpt2pt.formats.megatron.payload import groups_of
from ckpt2pt.formats.megatron.read import Shifted, collect_rank
from ckpt2pt.formats.megatron.scaler import stored_scaler
from ckpt2pt.formats.ptmeta.capture import SAMPLE_NUMEL, lay_out_rank
from ckpt2pt.verification.gather import Files
from ckpt2pt.verification.prove import crcs_of
from ckpt2pt.verification.report import NOTHING_PUBLISHED, Findings, Report
from ckpt2pt.verification.structure import MODEL_FILE, OPTIM_FILE
from ckpt2pt.verification.tensors import Held, Place, TensorComparison


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What has to be in a result: tensors, and what is none; ``dtype`` is that of the weights.

    ``rounds`` says that main parameters of the source round to its weights, which then prove where a parameter lies; else sizes
    do, and every element besides.
    """

    held: Held
    state: State
    dtype: str
    rounds: bool = True


def prove_files(
    expected: Expected, rank: Rank, partials: Mapping[str, Path], *, heed: Callable[[], None]
) -> Mapping[str, int]:
    """Compare a rank's files, which lie under temporary names, with the source; returns the CRC-32 of each.

    ``heed`` is called after every block, and may raise.  Raises :class:`VerificationError` for a difference.
    """
    report, crcs = compare_files(expected, rank, partials, lambda _: heed())
    report.raise_differences(hint=NOTHING_PUBLISHED)
    return crcs


def compare_files(
    expected: Expected, rank: Rank, results: Mapping[str, Path], advance: Advance, directory: str = ""
) -> tuple[Report, Mapping[str, int]]:
    """Compare a rank's files, by name, with the source; and the CRC-32 of each."""
    findings, held = Findings(directory), expected.held
    assert held.layout, "a result has a layout"
    ep, tp = divmod(rank[0], held.layout.tensor)
    rank = tp, rank[1]
    with Files([*results.values()], advance) as files:
        try:
            stored = read_files(results[MODEL_FILE], results.get(OPTIM_FILE), experts=True)
            result = _index(stored, held, rank, ep, SAMPLE_NUMEL if expected.rounds else -1)
        except InputError as error:
            findings.differ(MODEL_FILE, "file", error.what.splitlines()[0])
        else:
            _check_values(expected.state, stored, findings, full=len(held.roles) > 1)
            places = {
                key: Place(MODEL_FILE, str(key), _weight_type(expected, key))
                if key.role == "param"
                else Place(OPTIM_FILE, str(key), "float32")
                for key in result
            }
            TensorComparison(held, rank, result, places, findings, files, ep).run()
    crcs = crcs_of(results, {str(path): sorted(files.pieces.get(str(path), ())) for path in results.values()})
    return findings.report(results[MODEL_FILE].parent, files.nbytes), crcs


def _weight_type(expected: Expected, key: Key) -> str:
    """A buffer keeps its own type."""
    source = expected.held.tensors.get(key) if is_buffer(key.name) else None
    return source.dtype if source else expected.dtype


def _index(stored: MegatronRank, held: Held, rank: Rank, ep: int, at_most: int) -> Index:
    assert held.layout, "a result has a layout"
    collector = Collector(1, str(stored.folder))
    buffers = lay_out_rank(stored, rank[1], at_most=at_most).buffers if stored.buffers is not None else ()
    collect_rank(Shifted(collector, 0, held.experts(ep).start), (0, rank[1]), stored, held.layout, buffers)
    return collector.index(partial=True)


def _check_values(state: State, stored: MegatronRank, findings: Findings, *, full: bool) -> None:
    """Iteration, samples, groups and scheduler as the source and its metadata state them."""
    template = stored.template
    found: dict[str, object] = {
        "iteration": template.tree.get("iteration"),
        "consumed_train_samples": template.args.get("consumed_train_samples"),
    }
    wanted: dict[str, object] = {"iteration": state.iteration, "consumed_train_samples": state.samples or 0}
    if full:
        for name, value in state.scheduler.items():
            wanted[f"opt_param_scheduler/{name}"] = value
            found[f"opt_param_scheduler/{name}"] = template.scheduler.get(name)
        if state.scaler is not None:
            wanted["optimizer/grad_scaler"] = state.scaler
            found["optimizer/grad_scaler"] = stored_scaler(template)
        optimizers = [groups_of(one) for one in template.optimizers]
        numbered = [(experts, group) for experts, groups in enumerate(optimizers) for group in groups]
        for number, (experts, group) in enumerate(numbered):
            known = state.group(decays=bool(group.get("wd_mult", 1.0)), experts=bool(experts))
            for name in known.keys() & group.keys():
                wanted[f"param_groups/{number}/{name}"] = known[name]
                found[f"param_groups/{number}/{name}"] = cast("object", group[name])
    for name, value in wanted.items():
        if found[name] != value:
            findings.differ(MODEL_FILE, name, "has another value", value, found[name])
