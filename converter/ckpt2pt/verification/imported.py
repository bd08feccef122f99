"""Prove an import: a rank's MindSpore file against the Megatron checkpoint, tensor by tensor, and the numbers beside them.

checkpoint --formats.megatron--> tensors -+
                                          +--tensors--> every bit; and the weights of the model file
network.ckpt --ckpt.source----> tensors -+
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, permutations
from pathlib import Path

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.index import Collector, Index
from ckpt2pt.core.names import NameTable
from ckpt2pt.core.params import legacy_name
from ckpt2pt.core.progress import Advance
from ckpt2pt.core.stated import STYLES, Stated
from ckpt2pt.core.tensor import Key
from ckpt2pt.core.topology import Rank
from ckpt2pt.errors import InputError
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.mindspore import index_file, read_scalars
from ckpt2pt.formats.mindspore.source import collect_entries
from ckpt2pt.verification.gather import Files
from ckpt2pt.verification.prove import crcs_of
from ckpt2pt.verification.report import NOTHING_PUBLISHED, Findings, Report
from ckpt2pt.verification.tensors import Held, Place, TensorComparison

_ORDERS = 1000
Entries = Mapping[str, TensorRef]


def prove_import(
    held: Held, rank: Rank, partials: Mapping[str, Path], table: NameTable, *, heed: Callable[[], None]
) -> Mapping[str, int]:
    """Compare a rank's files, which lie under temporary names, with the checkpoint; returns the CRC-32 of each.

    ``heed`` is called after every block, and may raise.  Raises :class:`VerificationError` for a difference.
    """
    report, crcs = compare_import(held, rank, partials, table, lambda _: heed())
    report.raise_differences(hint=NOTHING_PUBLISHED)
    return crcs


def compare_import(
    held: Held, rank: Rank, results: Mapping[str, Path], table: NameTable, advance: Advance
) -> tuple[Report, Mapping[str, int]]:
    """Compare a rank's files, by name, with the checkpoint; and the CRC-32 of each.

    Raises :class:`FormatError` where the checkpoint contradicts itself: a weight that is not its float32 copy, rounded.
    """
    name, path = next(iter(results.items()))
    findings = Findings()
    with Files([path], advance) as files:
        try:
            result, scalars = _read(held, index_file(path), table, name)
        except InputError as error:
            findings.differ(name, "file", error.what)
        else:
            places = {key: Place(name, _entry(key, table), "float32") for key in result}
            TensorComparison(held, rank, result, places, findings, files).run()
            _check_scalars(held, result, scalars, findings, name)
    crcs = crcs_of(results, {str(path): sorted(files.pieces[str(path)])})
    for other, crc in crcs.items():  # the files of data-parallel ranks hold the same
        if crc != crcs[name]:
            findings.differ(other, "file", f"is not that of {name}")
    return findings.report(path.parent, files.nbytes), crcs


def _read(held: Held, entries: Entries, table: NameTable, where: str) -> tuple[Index, Entries]:
    """The file's tensors, and what is none.  Its float32 parameters are main parameters, where these were asked for."""
    collector = Collector(1, where)
    scalars = collect_entries(collector, 0, entries, table, where)
    found = collector.index(partial=True)
    if "param" in held.roles:
        return found, scalars
    return {key._replace(role="main_param") if key.role == "param" else key: one for key, one in found.items()}, scalars


def _entry(key: Key, table: NameTable) -> str:
    [name, *_] = table.to_mindspore(legacy_name(key.name), lambda layer: layer)
    return f"{key.role}.{name}" if key.role.startswith("exp") else name


def _check_scalars(held: Held, result: Index, refs: Entries, findings: Findings, file: str) -> None:
    """Iteration, parameter groups and scheduler.

    A rank of another layout has the groups of its own parameters, with weight decay and without, in any order.  Biases and
    what has one dimension do not decay (Megatron-LM cac60ce4, megatron/core/optimizer/__init__.py).
    """
    values = {name: Stated(value, refs[name].dtype) for name, value in read_scalars(refs.values()).items()}
    kinds = {len(one.fused) > 1 and not one.key.name.endswith(".bias") for one in result.values()}
    groups: Sequence[Mapping[str, object]] = held.template.groups
    if held.layout and kinds <= {group.get("wd_mult") != 0 for group in groups}:
        groups = [group for group in groups if (group.get("wd_mult") != 0) in kinds]
    orders = islice(permutations(groups), _ORDERS) if held.layout else [groups]
    told = [list(_unlike(_scalars(held.template, held.iteration, order), values)) for order in orders]
    for name, expected, found in min(told, key=len):
        findings.differ(file, name, "has another value", expected, found)


def _scalars(template: Template, iteration: int, groups: Sequence[Mapping[str, object]]) -> dict[str, float]:
    found: dict[str, float] = {"step_num": iteration, "epoch_num": 0}
    for number, group in enumerate(groups):
        for key, value in group.items():
            if isinstance(value, int | float):
                spelled = f"{'learning_rate' if key == 'lr' else key}_group_{number}"
                found["state_step" if key == "step" else spelled] = value
    for key, value in template.scheduler.items():
        numeral: object = STYLES[key].index(str(value)) if key in STYLES and value is not None else value
        if isinstance(numeral, int | float):
            found[key] = numeral
    return found


def _unlike(wanted: Mapping[str, float], values: Mapping[str, Stated]) -> Iterator[tuple[str, object, object]]:
    for name in wanted.keys() | values.keys():
        expected, found = wanted.get(name), values.get(name)
        if expected is None or found is None:
            yield name, "nothing" if expected is None else expected, "nothing" if found is None else found.value
        elif not found.equals(int(expected) if found.dtype.startswith("int") else expected):
            yield name, expected, found.value
