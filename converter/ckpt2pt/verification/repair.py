"""Prove files that torch shall read against those of MSAdapter that they were made from: every leaf of their trees, every bit.

What may be otherwise is listed here: torch's states of random generators, and counts that are numbers now.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from ckpt2pt.core.progress import Advance
from ckpt2pt.errors import InputError
from ckpt2pt.verification.elements import Differing
from ckpt2pt.verification.gather import Files
from ckpt2pt.verification.leaves import Leaf, Leaves, TensorLeaf, open_pt, same_scalar
from ckpt2pt.verification.prove import crcs_of
from ckpt2pt.verification.report import Findings, Report

_GENERATOR = re.compile(r"/rng_state/\d+/(?:(torch_rng_state)|cuda_rng_state|rng_tracker_states/[^/]+)")
_TRACKER = "/rng_tracker_states/"
_COUNT = re.compile(r"(?:/\d+)?/\d+/\([^/]*\)/numel_unpadded")
_CPU_STATE, _DEVICE_STATE = 5056, 16
"""Bytes of torch's states (aten/src/ATen/CPUGeneratorImpl.cpp and cuda/CUDAGeneratorImpl.cpp)."""


def compare_repaired(
    sources: Mapping[str, Path],
    results: Mapping[str, Path],
    advance: Advance,
    directory: str = "",
    *,
    allow: Collection[str] = (),
) -> tuple[Report, Mapping[str, int]]:
    """Compare the files of a rank, by name, with those that they were made from; and the CRC-32 of each."""
    findings = Findings(directory)
    with Files([*sources.values(), *results.values()], advance) as files:
        for name, source in sources.items():
            try:
                found = open_pt(results[name], allow=allow, foreign=False)
            except InputError as error:
                findings.differ(name, "file", error.what.splitlines()[0])
                continue
            _compare(name, open_pt(source, allow=allow), found, findings, files)
        pieces = {str(path): sorted(files.pieces.get(str(path), ())) for path in results.values()}
    crcs = crcs_of(results, pieces)
    return findings.report(next(iter(results.values())).parent, files.nbytes), crcs


def _compare(name: str, source: Leaves, result: Leaves, findings: Findings, files: Files) -> None:
    if "/rng_state" not in result:
        source = {path: leaf for path, leaf in source.items() if not f"{path}/".startswith("/rng_state/")}
    known = {path for path in source if _TRACKER in path and path not in result}  # a generator that torch does not have
    wanted = [path for path in source if path not in known]
    if wanted != [*result]:
        there, missing = set(result), [path for path in wanted if path not in result]
        for path in missing:
            findings.differ(name, path, "is missing")
        for path in there.difference(wanted):
            findings.differ(name, path, "unexpected")
        if not missing and there == set(wanted):
            findings.differ(name, "file", "holds its keys in another order")
    for path in wanted:
        if path in result:
            _compare_leaf(name, path, source[path], result[path], findings, files)


def _compare_leaf(name: str, path: str, source: Leaf, result: Leaf, findings: Findings, files: Files) -> None:
    if found := _GENERATOR.fullmatch(path):
        nbytes = _CPU_STATE if found[1] else _DEVICE_STATE
        if not isinstance(result, TensorLeaf) or (result.dtype, result.shape) != ("uint8", (nbytes,)):
            findings.differ(name, path, "is no state of a generator of torch", f"uint8[{nbytes}]", result)
    elif isinstance(source, TensorLeaf) and type(result) is int and _COUNT.fullmatch(path):
        count = _count(source, files)
        if count != result:
            findings.differ(name, path, "has another value", count, result)
    elif not isinstance(source, TensorLeaf) or not isinstance(result, TensorLeaf):
        if not same_scalar(source, result):
            findings.differ(name, path, "has another value", source, result)
    elif repr(source) != repr(result):
        findings.differ(name, path, "has another type or shape", source, result)
    else:
        findings.tensors += 1
        tally = Differing(source.dtype, result.dtype, strict=True)
        tally.compare(files, source.elements, result.elements, source.numel)
        findings.settle(name, path, tally, "differ")


def _count(leaf: TensorLeaf, files: Files) -> int | None:
    """The number that a tensor of MindSpeed-LLM holds."""
    if leaf.dtype != "int64" or leaf.shape != ():
        return None
    return int.from_bytes(bytes(leaf.elements.block(files, 0, 1)), "little", signed=True)
