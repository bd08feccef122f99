"""What ``ckpt2pt plan`` says: layers, files, bytes, memory and room, from headers alone."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckpt2pt.core.names import rules_remark
from ckpt2pt.core.topology import Rank, Topology
from ckpt2pt.discover import Discovered, Prepared, discover, prepare_all, target_of
from ckpt2pt.discover.loading import contradictions, kept_of_template, made_up
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import counted, printable, size, spelled
from ckpt2pt.formats.folders import COVERED, covered
from ckpt2pt.formats.megatron.legacy import Chunk, LegacyRank
from ckpt2pt.formats.megatron.resume import Unmet, warning
from ckpt2pt.io import text
from ckpt2pt.io.records import Json
from ckpt2pt.io.text import conflicting, table, warned
from ckpt2pt.io.volume import check_room, free_bytes
from ckpt2pt.publish import Target
from ckpt2pt.run.targets.request import (
    AnyRequest,
    DistRequest,
    HuggingFaceRequest,
    McoreRequest,
    MindFormersRequest,
    RepairRequest,
)
from ckpt2pt.show.facts import facts_of, releases_of
from ckpt2pt.show.folding import fold, spanned

if TYPE_CHECKING:
    from ckpt2pt.run.targets import mcore, shards, torch_dist

    ByTensors = mcore.Found | torch_dist.Found | shards.Shards

log = logging.getLogger("ckpt2pt")

_FORMATS = {
    "Megatron06": "Megatron 0.6",
    "Megatron": "Megatron 0.7 to 0.19",
    "Torch": "files of torch in place of those of MSAdapter",
    "TorchDist": "torch_dist of Megatron-LM 0.15 and newer",
    "Safetensors": "Hugging Face safetensors",
    "MindFormers": "MindFormers, Checkpoint 2.0",
    "ckpt": "MindSpore .ckpt",
    "safetensors": "MindSpore .safetensors",
}
WORKER_BYTES = 48 << 20
"""What one worker needs at most (benchmarks/), whatever the size of the checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a conversion would do, as a document, and where."""

    document: Json
    target: Target
    overwrite: bool

    def check(self) -> None:
        """Raise what would keep the conversion from being written: a result of another one, or too little room."""
        if not self.overwrite and covered(self.target):
            log.warning("%s", COVERED)
            return
        self.target.check(overwrite=self.overwrite)
        check_room(self.target.root, int(str(self.document["bytesToWrite"])), self.target.kind.option)


def planned(request: AnyRequest, stages: Sequence[int], *, names: bool = False) -> Plan:
    """Plan every rank of the given stages, from headers alone."""
    if isinstance(request, DistRequest):
        from ckpt2pt.show.torch_dist import planned_dist  # noqa: PLC0415 - which imports this one

        return planned_dist(request, stages, names=names)
    if isinstance(request, HuggingFaceRequest):
        from ckpt2pt.show.huggingface import planned_huggingface  # noqa: PLC0415 - which imports this one

        return planned_huggingface(request, stages, names=names)
    if isinstance(request, MindFormersRequest):
        from ckpt2pt.show.huggingface import planned_mindformers  # noqa: PLC0415 - which imports this one

        return planned_mindformers(request, stages, names=names)
    if isinstance(request, McoreRequest):
        from ckpt2pt.show.mcore import planned_mcore  # noqa: PLC0415 - which imports this one

        return planned_mcore(request, stages, names=names)
    if isinstance(request, RepairRequest):
        from ckpt2pt.show.repair import planned_repair  # noqa: PLC0415 - which imports this one

        return planned_repair(request, stages)
    if request.files:
        from ckpt2pt.show.imports import planned_mindspore  # noqa: PLC0415 - which imports this one

        return planned_mindspore(request, stages, names=names)
    chosen = discover(request, keep=[(tp, pp) for pp in stages for tp in range(request.topology.tensor)])
    target, ranks = target_of(request, chosen), prepare_all(request, chosen, stages)
    document = preview(request, chosen, target, ranks, names=names)
    return Plan(document=document, target=target, overwrite=request.overwrite)


def preview(
    request: Request, chosen: Discovered, target: Target, ranks: Iterable[tuple[Rank, Prepared]], *, names: bool
) -> Json:
    """The plan as a document for ``--output json``; each rank's plan is dropped before the next one is made."""
    stages: list[Json] = []
    warnings = _Warnings(request)
    for (tp, pp), prepared in ranks:
        plan = prepared.plan
        warnings.add((tp, pp), prepared)
        stages.append(
            {
                "stage": pp,
                "tp": tp,
                "source": prepared.source,
                "directory": request.topology.directory(tp, pp),
                "bytesToRead": prepared.source_bytes,
                "files": [{"name": file.name, "nbytes": file.lay_out().nbytes} for file in prepared.files],
                "chunks": [_chunk(chunk, plan, request, pp, names=names) for chunk in plan.chunks],
                "shards": [str(path) for file in chosen.read_for((tp, pp), request) for path in file.peers],
                "shardInfo": str(chosen.read_for((tp, pp), request)[0].info or ""),
                "ignored": dict(Counter(reason for _, reason in plan.ignored)),
                "comparedCopies": [*dict.fromkeys(f"{kept.name} = {copy.name}" for kept, copy in plan.copies)],
                "done": target.rank_manifest(tp, pp) is not None,
            }
        )
    first = next(iter(warnings.unmet))
    kept = kept_of_template(request, chosen, first)
    head = head_of(request, chosen, target, first, warnings.all(chosen), kept)
    return with_ranks(head, stages, target, request.workers)


def head_of(
    request: Request, chosen: Discovered, target: Target, rank: Rank, warnings: list[str], kept: Sequence[str]
) -> Json:
    """What a plan says of all ranks together, of which ``rank`` is one; ``kept`` are entries of the metadata's own iteration."""
    return {
        "iteration": chosen.training_step.iteration,
        "because": chosen.training_step.iteration_source,
        **conflicting(chosen.training_step.conflicts),
        "warnings": warnings,
        "fromTemplate": list(kept),
        "consumedSamples": chosen.training_step.samples,
        "identity": chosen.identity,
        "target": str(target.folder),
        "options": request.identity_options(),
        "facts": dict(facts_of(request, chosen, rank, kept)),
        "releases": dict(releases_of(request)),
    }


def by_tensors(found: ByTensors, ranks: Sequence[Json], warnings: Iterable[str]) -> Plan:
    """The plan of a conversion by global tensors, of which each rank's is ready."""
    target, state = found.target, found.source.state
    head: Json = {
        "iteration": state.iteration,
        "because": "the checkpoint",
        **conflicting(),
        "warnings": [*warnings],
        "fromTemplate": [],
        "consumedSamples": state.samples,
        "identity": target.identity,
        "target": str(target.folder),
        "options": found.identity_options,
        "facts": dict(found.facts),
        "releases": dict(found.releases),
    }
    document = with_ranks(head, ranks, target, found.request.workers)
    return Plan(document=document, target=target, overwrite=found.request.overwrite)


def with_ranks(head: Json, ranks: Sequence[Json], target: Target, workers: int) -> Json:
    """A plan as a document: what is said of all of it, its ranks, and what they come to."""
    files = (file for rank in ranks for key in ("files", "metadata") for file in map(_mapping, _list(rank.get(key))))
    at_work = min(workers, len(ranks)) or 1
    return {
        **head,
        "ranks": [*ranks],
        "bytesToRead": sum(_int(rank["bytesToRead"]) for rank in ranks),
        "bytesToWrite": sum(_int(file["nbytes"]) for file in files),
        "bytesFree": free_bytes(target.root),
        "workers": at_work,
        "memoryBytes": at_work * WORKER_BYTES,
    }


def slots_of(topology: Topology, pp: int, vpp: int) -> Json:
    """Which part of the model a chunk is."""
    slots = topology.slots(pp, vpp)
    return {
        "layers": [layer for layer in slots if layer not in topology.noop],
        "noopLayers": [layer for layer in slots if layer in topology.noop],
        "embedding": topology.holds_embedding(pp, vpp),
        "head": topology.holds_head(pp, vpp),
    }


@dataclass(slots=True)
class _Warnings:
    """What is remembered of each rank's plan for the sake of warnings."""

    request: Request
    unmet: dict[Rank, tuple[Unmet, ...]] = field(default_factory=dict[Rank, tuple[Unmet, ...]])
    remarks: dict[str, None] = field(default_factory=dict[str, None])
    contradictions: tuple[str, ...] = ()
    samples: dict[Rank, Mapping[str, int]] = field(default_factory=dict[Rank, Mapping[str, int]])
    unused_rules: list[frozenset[str]] = field(default_factory=list[frozenset[str]])

    def add(self, rank: Rank, prepared: Prepared) -> None:
        if not self.unmet:
            self.contradictions = contradictions(prepared.meta.template, prepared.stated)
        self.unmet[rank] = prepared.meta.unmet(self.request.topology, full=self.request.full)
        self.remarks.update(dict.fromkeys(prepared.plan.held.remarks))
        self.unused_rules.append(prepared.plan.unused_rules)
        if self.request.topology.tensor > 1:
            from ckpt2pt.verification.copies import sample_weights  # noqa: PLC0415 - numpy, for layouts that can have copies

            self.samples[rank] = sample_weights(prepared)

    def all(self, chosen: Discovered) -> list[str]:
        found = [*warning(self.unmet, full=self.request.full), *self.remarks, *self.contradictions]
        found += made_up(self.request)
        if self.samples:
            from ckpt2pt.verification.copies import suspected_copies  # noqa: PLC0415 - as above

            found += suspected_copies(self.request, chosen, self.samples)
        # Of all ranks together: a rule may be for a name that one stage alone has.
        if len(self.unmet) == self.request.topology.tensor * self.request.topology.pipeline:
            found += rules_remark(self.unused_rules)
        return found


def _chunk(chunk: Chunk, plan: LegacyRank, request: Request, pp: int, *, names: bool) -> Json:
    document: Json = {
        "chunk": chunk.vpp,
        "key": chunk.key,
        **slots_of(request.topology, pp, chunk.vpp),
        "parameters": len(chunk.parameters),
        "numel": sum(one.numel for one in chunk.parameters),
        "buckets": [
            {"numel": bucket.numel, "numelUnpadded": bucket.numel_unpadded}
            for bucket in (chunk.buffer.buckets if chunk.buffer else ())
        ],
    }
    if names:
        document["names"] = [
            {
                "megatron": one.name,
                "mindspore": plan.held.name(one.tensor.key),
                "shape": list(one.part.shape),
                "dtype": f"{one.tensor.dtype} -> {chunk.dtype}",
                "bucketStart": one.placement.start if one.placement else None,
            }
            for one in chunk.parameters
        ]
    return document


def render(document: Json, *, details: bool = False) -> str:
    """The plan as text; stages and ranks that are alike share a line unless ``details`` are asked for."""
    options = _mapping(document["options"])
    number = "rank" if "expert" in options else "tp"
    lines = [
        *warned(_list(document["warnings"])),
        f"iteration  {document['iteration']} (from {document['because']}), {_count(document['consumedSamples'])} samples consumed",
        *(f"  warning: {spelled(str(conflict))}" for conflict in _list(document["conflicts"])),
        f"target     {printable(str(document['target']))}",
        f"mode       {options['mode']}, {_FORMATS[str(options['format'])]}; tp {options['tensor']}, pp {options['pipeline']}, "
        f"vpp {options['virtualPipeline']}" + (f", ep {options['expert']}" if "expert" in options else ""),
        "",
        *table(
            ("stage", number, "chunk", "layers", "ends", "parameters", "elements", "buckets", "padding"),
            _chunk_rows(document, details=details),
            right=frozenset({5, 6, 7, 8}),
        ),
        "",
        *table(
            ("stage", number, "file", "bytes", "", "source"),
            _file_rows(document, details=details),
            right=frozenset({3}),
        ),
        "",
    ]
    ignored: Counter[str] = Counter()
    for rank in _list(document["ranks"]):
        for reason, count in _mapping(_mapping(rank)["ignored"]).items():
            ignored[reason] += int(str(count))
    if ignored:
        lines.append("not carried: " + ", ".join(f"{count} x {reason}" for reason, count in sorted(ignored.items())))
    if document["fromTemplate"]:
        lines.append(f"as pt_meta has it, of another iteration: {', '.join(map(str, _list(document['fromTemplate'])))}")
    lines += _shard_lines(document)
    if metadata := [file for _, rank in _ranks(document) for file in map(_mapping, _list(rank.get("metadata")))]:
        nbytes = sum(_int(file["nbytes"]) for file in metadata)
        lines.append(f"and the metadata of the checkpoint: {counted(len(metadata), 'file')}, {_size(nbytes)}")
    lines += _name_lines(document, details=details)
    for title, key in (("where it is from", "facts"), ("releases that load it", "releases")):
        if rows := _mapping(document.get(key) or {}):
            lines += [title, *(f"  {line}" for line in table(("", ""), [*rows.items()])[1:]), ""]
    lines.append(
        f"reads {_size(document['bytesToRead'])}, writes {_size(document['bytesToWrite'])}; {_free(document)}; "
        f"{counted(_int(document['workers']), 'worker')}, at most {_size(document['memoryBytes'])} of memory"
    )
    return "\n".join(lines)


def _ranks(document: Json) -> Iterable[tuple[Rank, dict[str, object]]]:
    """Ranks are numbered inside their stage: those of the first experts, then those of the next."""
    tensor = _int(_mapping(document["options"])["tensor"])
    for rank in map(_mapping, _list(document["ranks"])):
        yield (_int(rank.get("ep", 0)) * tensor + _int(rank["tp"]), _int(rank["stage"])), rank


def _chunk_rows(document: Json, *, details: bool) -> Iterable[tuple[object, ...]]:
    layers: dict[tuple[Rank, object], list[object]] = {}
    cells: list[tuple[Rank, tuple[object, ...]]] = []
    for rank, planned in _ranks(document):
        for chunk in map(_mapping, _list(planned["chunks"])):
            buckets = [_mapping(bucket) for bucket in _list(chunk["buckets"])]
            padding = sum(_int(bucket["numel"]) - _int(bucket["numelUnpadded"]) for bucket in buckets)
            layers[rank, chunk["chunk"]] = _list(chunk["layers"])
            numbers = chunk["parameters"], chunk["numel"], len(buckets) or "-", padding if buckets else "-"
            ends = "+".join(name for name in ("embedding", "head") if chunk[name]) or "-"
            each = len(_list(chunk["layers"])), spans(chunk["noopLayers"])
            cells.append((rank, (chunk["chunk"], *each, ends, *map(_count, numbers))))
    folded = fold(cells, details=details)
    if not details:
        folded.sort(key=lambda one: (_int(one[0][0]), one[1][0][1]))
    for cell, ranks in folded:
        number, count, noop, *rest = cell
        several = f" ({count} each)" if len({pp for _, pp in ranks}) > 1 else ""
        without = f" (no-op {noop})" if noop != "none" else ""
        union = spans([layer for rank in ranks for layer in layers[rank, number]])
        yield *spanned(ranks), number, f"{union}{several}{without}", *rest


def _file_rows(document: Json, *, details: bool) -> Iterable[tuple[object, ...]]:
    planned = dict(_ranks(document))
    cells = (
        (rank, (file["name"], _size(file["nbytes"]), "there" if one["done"] else ""))
        for rank, one in planned.items()
        for file in map(_mapping, _list(one["files"]))
    )
    for (name, nbytes, there), ranks in fold(cells, details=details):
        first = planned[ranks[0]]
        more = sum(max(1, len(_list(planned[rank]["shards"]))) for rank in ranks) - 1
        source = f"{first['source']} and {more} more" if more else first["source"]
        file = name if len(ranks) > 1 or not first["directory"] else f"{first['directory']}/{name}"
        # A file of one rank has its place in its name.
        place = ("", "") if details else spanned(ranks)
        yield *place, file, f"{nbytes} each" if len(ranks) > 1 else nbytes, there, source


def _shard_lines(document: Json) -> list[str]:
    """One line for the data-parallel shards that are read in place of whole files."""
    ranks = [rank for rank in map(_mapping, _list(document["ranks"])) if rank["shards"]]
    if not ranks:
        return []
    count = len(_list(ranks[0]["shards"]))
    return [f"data-parallel shards, joined in place: {count} files for each rank, described by {ranks[0]['shardInfo']}"]


def _name_lines(document: Json, *, details: bool) -> list[str]:
    cells = (
        (rank, (chunk["chunk"], name["mindspore"], name["megatron"], str(name["shape"]), name["dtype"]))
        for rank, planned in _ranks(document)
        for chunk in map(_mapping, _list(planned["chunks"]))
        for name in map(_mapping, _list(chunk.get("names", [])))
    )
    rows = [(*spanned(ranks), *cell) for cell, ranks in fold(cells, details=details)]
    return [*table(("stage", "tp", "chunk", "MindSpore", "Megatron", "shape", "type"), rows), ""] if rows else []


def _free(document: Json) -> str:
    free = document["bytesFree"]
    return "free space unknown" if free is None else f"{_size(free)} free"


def _int(number: object) -> int:
    return int(str(number))


def _count(number: object) -> str:
    """``12,582,912``; what is no number as it is."""
    return f"{number:,}" if isinstance(number, int) else str(number)


def _size(nbytes: object) -> str:
    return size(float(str(nbytes)))


def spans(numbers: object) -> str:
    """``[0, 1, 2, 5]`` -> ``0-2,5``."""
    return text.spans({int(str(n)) for n in _list(numbers)})


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}  # pyright: ignore[reportUnknownVariableType]


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []  # pyright: ignore[reportUnknownVariableType]
