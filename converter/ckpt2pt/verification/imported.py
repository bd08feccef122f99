"""Prove a MindSpore result: a rank's file against what it was made from, tensor by tensor, and the numbers beside them.

Megatron, or another layout   source --its reader--> tensors -+
                                                              +--tensors--> every bit; and the weights of a Megatron model file
                              file --ckpt.source---> tensors -+
MindSpore, the same layout    entry by entry, whatever it is
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, permutations
from pathlib import Path
from typing import TypeVar

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.index import Collector, Index
from ckpt2pt.core.names import NameTable
from ckpt2pt.core.params import HEAD, legacy_name
from ckpt2pt.core.progress import Advance
from ckpt2pt.core.stated import STYLES, Stated, is_stated
from ckpt2pt.core.tensor import Key, Role
from ckpt2pt.core.topology import Rank
from ckpt2pt.discover import Discovered
from ckpt2pt.discover.mindspore import files_named, files_of, meta_of_training, role_of
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import InputError
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.megatron.read import ROLES
from ckpt2pt.formats.mindspore import index_file, read_scalars
from ckpt2pt.formats.mindspore.source import collect_entries
from ckpt2pt.formats.ptmeta.metadata import RankMeta
from ckpt2pt.io.paths import status
from ckpt2pt.publish import Target
from ckpt2pt.verification.elements import Differing
from ckpt2pt.verification.gather import Files
from ckpt2pt.verification.leaves import leaf_of
from ckpt2pt.verification.manifests import digest_files
from ckpt2pt.verification.prove import crcs_of
from ckpt2pt.verification.report import NOTHING_PUBLISHED, Findings, Report
from ckpt2pt.verification.sharded import expected_index
from ckpt2pt.verification.source import held_for
from ckpt2pt.verification.tensors import Held, Place, TensorComparison

T = TypeVar("T")
_ORDERS = 1000
_GROUP = re.compile(r"(.+)_group_(\d+)")
Entries = Mapping[str, TensorRef]


def prove_import(
    request: Request, chosen: Discovered, rank: Rank, partials: Mapping[str, Path], *, heed: Callable[[], None]
) -> Mapping[str, int]:
    """Compare a rank's files, which lie under temporary names, with the source; returns the CRC-32 of each.

    ``heed`` is called after every block, and may raise.  Raises :class:`VerificationError` for a difference.
    """
    report, crcs = compare_import(request, chosen, rank, partials, lambda _: heed())
    report.raise_differences(hint=NOTHING_PUBLISHED)
    return crcs


def compare_import(
    request: Request, chosen: Discovered, rank: Rank, results: Mapping[str, Path], advance: Advance
) -> tuple[Report, Mapping[str, int]]:
    """Compare a rank's files, by name, with the source; and the CRC-32 of each.

    Raises :class:`FormatError` where a Megatron source contradicts itself: a weight that is not its float32 copy, rounded.
    """
    name, path = next(iter(results.items()))
    findings = Findings()
    with Files([path], advance) as files:
        found = _read(lambda: index_file(path), findings, name)
        if found is not None and (request.from_megatron or request.source_topology):
            _compare_tensors(request, chosen, rank, found, findings, files, name)
        elif found is not None:
            _compare_entries(request, expected_index(chosen.files[rank]), found, findings, files, name)
    crcs = crcs_of(results, {str(path): sorted(files.pieces[str(path)])})
    for other, crc in crcs.items():  # the files of data-parallel ranks hold the same
        if crc != crcs[name]:
            findings.differ(other, "file", f"is not that of {name}")
    return findings.report(path.parent, files.nbytes), crcs


def verify_import_of_rank(request: Request, chosen: Discovered, target: Target, rank: Rank, advance: Advance) -> Report:
    """A rank that is there: every element against the source, and every file against its manifest."""
    results = {name: target.folder / name for name in files_named(request, chosen, rank)}
    report, crcs = Findings().report(target.folder, 0), None
    if all(map(status, results.values())):  # else the manifest tells which is not there
        report, crcs = compare_import(request, chosen, rank, results, advance)
    differences, nbytes = digest_files(target, rank, advance, crcs)
    return replace(report, differences=(*differences, *report.differences), checked_bytes=nbytes)


def _compare_entries(
    request: Request, source: Entries, result: Entries, findings: Findings, files: Files, file: str
) -> None:
    """Every entry of the source, of whatever type; nothing is missing that was asked for, and nothing is there besides."""
    for entry in result.keys() - source.keys():
        findings.differ(file, entry, "is not in the source")
    for entry, ref in source.items():
        if entry not in result:
            is_parameter = role_of(entry) == "param" and f"exp_avg.{entry}" in source
            if is_parameter if not request.full else role_of(entry) in files_of(request).contents:
                findings.differ(file, entry, "is in the source, and not in the result")
            continue
        one, other = leaf_of(ref), leaf_of(result[entry])
        findings.tensors += 1
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            findings.differ(file, entry, "has another type or shape", repr(one), repr(other))
            continue
        tally = Differing(one.dtype, one.dtype, strict=True).compare(files, one.elements, other.elements, one.numel)
        findings.settle(file, entry, tally, "differs from the source")


def _compare_tensors(
    request: Request, chosen: Discovered, rank: Rank, entries: Entries, findings: Findings, files: Files, file: str
) -> None:
    table, megatron = NameTable(request.rules), request.from_megatron
    meta = meta_of_training(request)
    if request.source_format == "torch_dist":
        from ckpt2pt.discover.distributed import own_meta  # noqa: PLC0415 - for such sources

        meta = own_meta(request, rank)
    elif megatron:
        from ckpt2pt.discover.stored import own_of  # noqa: PLC0415 - for Megatron sources

        first = (0, 0) if request.source_topology else rank
        meta = RankMeta(template=own_of(request).headers(first)[0].template, chunks=())
    held, _ = held_for(request, chosen, rank, meta)
    kinds = files_of(request).contents if request.full else ("param",)
    there = {key.role for key in held.tensors}  # a MindSpore source may have been saved without moments
    roles: list[Role] = [role for role in held.roles if role in kinds and role in there]
    if megatron and request.full:
        roles = [ROLES[kind] for kind in kinds]
    tensors = held.tensors
    if not megatron and meta.tied and request.topology.pipeline == 1:  # one stage has one copy of the embeddings
        tensors = {key: tensor for key, tensor in tensors.items() if key.name != HEAD}
    held = held._replace(roles=roles, tensors=tensors)
    read = _read(lambda: _tensors(held, entries, table, file), findings, file)
    if read is None:
        return
    result, scalars = read
    places: dict[Key, Place] = {}
    for key, one in result.items():
        source = None if megatron else held.find(key.role, key.name)
        dtype = "float32" if megatron else (source or one).dtype
        places[key] = Place(file, _entry(key, table), dtype)
    TensorComparison(held, rank, result, places, findings, files).run()
    if megatron:
        _check_scalars(held, result, scalars, findings, file)
    else:
        collector = Collector(1, file)
        collected = collect_entries(collector, 0, expected_index(chosen.files[0, 0]), table, file)
        _check_numbers(_numbers(collected), _numbers(scalars), findings, file, full=request.full)


def _numbers(entries: Entries) -> Mapping[str, object]:
    return read_scalars(ref for ref in entries.values() if ref.numel == 1 or ref.dtype == "str")


def _check_numbers(
    source: Mapping[str, object], result: Mapping[str, object], findings: Findings, file: str, *, full: bool
) -> None:
    """Numbers of a MindSpore source; a rank of another layout has its parameter groups in an order of its own.

    Beside weights alone those of the optimizer and of the time are left out; what is there has to be the source's.
    """
    (known, groups), (found, its) = _by_group(source), _by_group(result)
    for name in sorted(found.keys() | known.keys() if full else found):
        if known.get(name) != found.get(name):
            findings.differ(file, name, "has another value", known.get(name), found.get(name))
    for number, group in its.items():
        if not any(group == one if full else group.items() <= one.items() for one in groups.values()):
            findings.differ(file, f"group {number}", "is no parameter group of the source", "", group)


def _by_group(values: Mapping[str, object]) -> tuple[dict[str, object], dict[str, dict[str, object]]]:
    plain, groups = dict[str, object](), dict[str, dict[str, object]]()
    for name, value in values.items():
        if match := _GROUP.fullmatch(name):
            groups.setdefault(match[2], {})[match[1]] = value
        else:
            plain[name] = value
    return plain, groups


def _read(read: Callable[[], T], findings: Findings, file: str) -> T | None:
    """What is read of the result; None where it cannot be read, which is a difference and not an error."""
    try:
        return read()
    except InputError as error:
        findings.differ(file, "file", error.what)
        return None


def _tensors(held: Held, entries: Entries, table: NameTable, where: str) -> tuple[Index, Entries]:
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
    mismatches = [list(_unlike(_scalars(held.template, held.iteration, order), values)) for order in orders]
    for name, expected, found in min(mismatches, key=len):
        findings.differ(file, name, "has another value", expected, found)


def _scalars(template: Template, iteration: int, groups: Sequence[Mapping[str, object]]) -> dict[str, float]:
    found: dict[str, float] = {"step_num": iteration, "epoch_num": 0}
    for number, group in enumerate(groups):
        for key, value in group.items():
            if isinstance(value, int | float):
                spelled = f"{'learning_rate' if key == 'lr' else key}_group_{number}"
                if key == "step" or is_stated(spelled):  # MindSpeed-Core-MS has no place for what newer releases add
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
