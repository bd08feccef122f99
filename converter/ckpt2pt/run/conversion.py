"""Carry out a conversion, in either direction: preflight, claim, ranks in parallel, publish.

measure every rank asked for            nothing has been written; everything that can be wrong is found here
-> claim, lock of the stage
-> ranks, in worker processes            a rank's files appear together, by rename
-> stage manifest                       when every rank of the stage is there and verified
-> report, tracker                      when every stage is there; by whoever sees it first
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import cast

from ckpt2pt import __version__
from ckpt2pt.core.foldernames import rank_name
from ckpt2pt.core.names import rules_remark
from ckpt2pt.core.progress import Reporter
from ckpt2pt.core.topology import Rank
from ckpt2pt.discover import Discovered, discover, distinct, prepare, prove_unchanged, target_of
from ckpt2pt.discover.checkpoint import kind_of
from ckpt2pt.discover.loading import check_loadable, contradictions_of, kept_of_template, made_up
from ckpt2pt.discover.metadata import assumptions
from ckpt2pt.discover.request import Pace, Request, Verify
from ckpt2pt.engine.write import ReadPieces
from ckpt2pt.errors import InterruptedRunError, TargetConflictError, counted, of_rank, printable, ref, size
from ckpt2pt.formats.folders import COVERED, covered
from ckpt2pt.formats.megatron.resume import warning
from ckpt2pt.formats.ptmeta.metadata import RankMeta
from ckpt2pt.io.paths import is_folder
from ckpt2pt.io.records import Json
from ckpt2pt.io.text import checksums_reported, conflicting, warned
from ckpt2pt.io.volume import check_volume
from ckpt2pt.publish import Target
from ckpt2pt.publish.unchanged import refuse_lost
from ckpt2pt.run.kept import PROOFS, is_kept
from ckpt2pt.run.pool import stopped_by_signals, work_through
from ckpt2pt.run.rank import RankTask
from ckpt2pt.run.targets.request import AnyRequest, DistRequest, HuggingFaceRequest, MindFormersRequest, RepairRequest

log = logging.getLogger("ckpt2pt")


def _nothing(_: Target, __: int) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What is converted, in either direction; worker processes get a copy of it.

    ``identity_options`` are the options that decide what is written, ``facts`` what else the manifest of a stage tells,
    ``inputs`` the files that each rank is read from, ``conflicts`` what contradicts the chosen iteration, ``warnings`` what a
    user should know before the result is used, ``kept`` the entries that are of the metadata's iteration.
    """

    target: Target
    pace: Pace
    verify: Verify
    overwrite: bool
    identity_options: Json
    facts: Json
    inputs: Mapping[Rank, Sequence[Json]]
    conflicts: tuple[str, ...]
    warnings: tuple[str, ...]
    how_to_load: str = ""
    kept: tuple[str, ...] = ()
    prepare: Callable[[Rank, Target], RankTask]
    examine: Callable[[Target, int], tuple[str, ...]] = _nothing
    """What is suspicious of a stage whose ranks are all there."""
    join: Callable[[Target], None] | None = None
    """Publishes the files that join those of all ranks, where the format has such."""

    def plan(self, rank: Rank, /) -> RankTask:
        """One rank, to be written into the target as it is now."""
        return self.prepare(rank, self.target)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run did.  ``newer`` is a later iteration, which the tracker goes on naming; ``how_to_load`` ends a sentence.

    ``verified`` is how every file of it was verified, those that were kept included; kept files may be better verified.
    """

    target: Target
    stages: tuple[int, ...]
    converted: tuple[Rank, ...]
    kept: tuple[Rank, ...]
    bytes_written: int
    files: int
    verified: Verify
    seconds: float
    published: bool
    newer: int | None
    conflicts: tuple[str, ...]
    warnings: tuple[str, ...]
    how_to_load: str = ""
    kept_of_template: tuple[str, ...] = ()
    """Entries that are pt_meta's as they are, of another iteration."""
    source_checksums: Mapping[str, int] = field(default_factory=dict[str, int])
    """How many files of the source were verified by their own checksums, not checked, or state none."""
    asked_to_stop: InterruptedRunError | None = None
    """A signal that came too late to stop this run; whoever would go on must heed it."""

    def document(self) -> Json:
        """For ``--output json`` and the termination message."""
        return {
            "iteration": self.target.iteration,
            "folder": str(self.target.at_home.folder),
            "stages": list(self.stages),
            "ranksConverted": len(self.converted),
            "ranksKept": len(self.kept),
            "bytesWritten": self.bytes_written,
            "verified": self.verified,
            "seconds": round(self.seconds, 3),
            "published": self.published,
            "newerIteration": self.newer,
            **conflicting(self.conflicts),
            "warnings": list(self.warnings),
            "sourceChecksums": dict(self.source_checksums),
            "fromTemplate": list(self.kept_of_template),
        }

    @property
    def remarks(self) -> tuple[str, ...]:
        """What contradicts the iteration, in whole sentences."""
        chosen = f"iteration {self.target.iteration} was chosen, but"
        return tuple(f"{chosen} {conflict}" for conflict in self.conflicts)

    def sentence(self) -> str:
        """For a person."""
        stages = f"{len(self.stages)} of {counted(self.target.stages, 'stage')}"
        did = f"wrote {counted(len(self.converted), 'rank')} ({size(self.bytes_written)}) in {self.seconds:.1f} s"
        if not self.converted:
            did = "everything was there already"
        elif self.kept:
            did += f", kept {len(self.kept)} that were there"
        end = f"published; {self.target.kind.reader} can load it{self.how_to_load}"
        if not self.published:
            end = f"{'the tracker' if self.target.kind.tracker else 'it'} waits for the other stages"
            if self.target.beside:
                end = "the result that is there stays until the other stages are done, too"
        elif self.newer is not None:
            end = f"published; the tracker stays at iteration {self.newer}, which is newer: write {self.target.iteration} into it to go back"
        did += checksums_reported(self.source_checksums)
        if self.kept_of_template:
            did += f"\nas pt_meta has it, of another iteration: {', '.join(self.kept_of_template)}"
        first = f"iteration {self.target.iteration}, {stages}: {did}"
        return "\n".join([*warned(self.warnings), first, printable(str(self.target.at_home.folder)), end])


@dataclass(frozen=True, slots=True)
class _Reading:
    """The source of one rank."""

    request: Request
    chosen: Discovered
    rank: Rank
    meta: RankMeta | None = None
    """Held for as long as the rank is written: what its files copy may lie in memory that it owns."""

    def prove_unchanged(self) -> None:
        prove_unchanged(self.request, self.chosen, self.rank)

    def prove_read(self, read: ReadPieces) -> Mapping[str, int]:
        every_byte = self.request.full or self.request.verify == "full"
        kind = kind_of(self.request)
        return kind.prove_read(self.request, self.chosen, self.rank, read, every_byte=every_byte)

    def prove_result(self, partials: Mapping[str, Path], heed: Callable[[], None]) -> Mapping[str, int]:
        if self.request.files:
            from ckpt2pt.verification.imported import prove_import  # noqa: PLC0415 - a second reader, only when asked for

            return prove_import(self.request, self.chosen, self.rank, partials, heed=heed)
        from ckpt2pt.verification.prove import prove_partials  # noqa: PLC0415 - the same

        return prove_partials(self.request, self.chosen, self.rank, partials, heed=heed)


def _plan_mindspore(request: Request, chosen: Discovered, rank: Rank, target: Target) -> RankTask:
    from ckpt2pt.discover.mindspore import prepare_mindspore  # noqa: PLC0415 - for MindSpore results alone

    prepared = prepare_mindspore(request, chosen, rank)
    return RankTask(
        rank=rank,
        target=target,
        reading=_Reading(request, chosen, rank),
        verify=request.verify,
        repair=request.overwrite,
        files=prepared.files,
        moves=prepared.moves,
        metadata=prepared.metadata,
        copies=prepared.copies,
        source_bytes=prepared.source_bytes,
        facts={"source": str(chosen.origin(rank, request)), "evidence": prepared.evidence},
        remarks=prepared.remarks,
    )


def _plan(request: Request, chosen: Discovered, rank: Rank, target: Target) -> RankTask:
    prepared = prepare(request, chosen, rank)
    check_loadable(request, rank, prepared.meta)
    plan = prepared.plan
    return RankTask(
        rank=rank,
        target=target,
        reading=_Reading(request, chosen, rank, prepared.meta),
        verify=request.verify,
        repair=request.overwrite,
        directory=request.topology.directory(*rank),
        files=prepared.files,
        moves=prepared.moves,
        copies=plan.copies,
        source_bytes=prepared.source_bytes,
        facts={"source": prepared.source, "ignored": dict(plan.ignored)},
        remarks=plan.held.remarks,
        unused_rules=plan.unused_rules,
    )


def _examine(request: Request, chosen: Discovered, target: Target, pp: int) -> tuple[str, ...]:
    if request.topology.tensor == 1:
        return _nothing(target, pp)
    from ckpt2pt.verification.copies import copies_of  # noqa: PLC0415 - numpy, for layouts that can have copies

    return copies_of(request, chosen, target, pp)


def run(request: AnyRequest, stages: Sequence[int], reporter: Reporter) -> Outcome:
    """Convert the given pipeline stages of the result; what an earlier run finished is kept."""
    if isinstance(request, Request):
        return run_discovered(request, stages, reporter)[0]
    began = time.monotonic()
    if isinstance(request, DistRequest):
        from ckpt2pt.run.targets.torch_dist import conversion_of  # noqa: PLC0415 - which imports this one

        return carry_out(conversion_of(request, stages), stages, reporter, began)
    if isinstance(request, RepairRequest):
        from ckpt2pt.run.targets.repair import conversion_of as conversion_of_repair  # noqa: PLC0415 - as above

        return carry_out(conversion_of_repair(request, stages), stages, reporter, began)
    if isinstance(request, HuggingFaceRequest):
        from ckpt2pt.run.targets.huggingface import conversion_of as conversion_to_huggingface  # noqa: PLC0415 - as above

        return carry_out(conversion_to_huggingface(request, stages), stages, reporter, began)
    if isinstance(request, MindFormersRequest):
        from ckpt2pt.run.targets.mindformers import conversion_of as conversion_to_mindformers  # noqa: PLC0415 - as above

        return carry_out(conversion_to_mindformers(request, stages), stages, reporter, began)
    from ckpt2pt.run.targets.mcore import conversion_of as conversion_of_mcore  # noqa: PLC0415 - as above

    return carry_out(conversion_of_mcore(request, stages), stages, reporter, began)


def run_discovered(request: Request, stages: Sequence[int], reporter: Reporter) -> tuple[Outcome, Discovered]:
    """The same, and what was found of the source."""
    began = time.monotonic()
    ranks = [(tp, pp) for pp in stages for tp in range(request.topology.tensor)]
    chosen = discover(request, keep=ranks).only(ranks, request)
    log.debug("iteration %d of %s, cut as %s", chosen.training_step.iteration, request.source, request.source_layout)
    layout = request.topology
    for rank in ranks:
        place = rank_name(layout.source_rank(*rank)) if request.files else layout.directory(*rank)
        log.debug("tp %d pp %d: %s -> %s", *rank, chosen.origin(rank, request), place)
    conversion = _conversion(request, chosen, stages, ranks)
    outcome = carry_out(conversion, stages, reporter, began)
    for tp, pp in outcome.converted:
        done = outcome.target.rank_manifest(tp, pp) or {}
        log.debug("tp %d pp %d: wrote %s %s", tp, pp, done.get("files"), done.get("evidence", ""))
    return outcome, chosen


def _conversion(request: Request, chosen: Discovered, stages: Sequence[int], ranks: Sequence[Rank]) -> Conversion:
    target = target_of(request, chosen)
    found = Conversion(
        target=target,
        pace=request.pace,
        verify=request.verify,
        overwrite=request.overwrite,
        identity_options=request.identity_options(),
        facts={},
        inputs=chosen.inputs,
        conflicts=chosen.training_step.conflicts,
        warnings=(),
        prepare=partial(_plan_mindspore if request.files else _plan, request, chosen),
        examine=partial(_examine, request, chosen),
    )
    if request.files:
        from ckpt2pt.discover.mindspore import unmet_by  # noqa: PLC0415 - for MindSpore results alone

        return replace(found, warnings=warning(unmet_by(request, stages), full=request.full))
    found = replace(
        found,
        facts={"assumed": assumptions(request)},
        warnings=(*contradictions_of(request, chosen, ranks[0]), *made_up(request)) if ranks else (),
        how_to_load="" if request.full else " with --no-load-optim --no-load-rng (it holds parameters only)",
        kept=kept_of_template(request, chosen, ranks[0]) if ranks else (),
    )
    if is_folder(target.folder, target.kind.option):
        for rank in ranks:  # one that an earlier run finished is not planned, which would check it
            with of_rank(rank):
                check_loadable(request, rank)
    return found


def carry_out(conversion: Conversion, stages: Sequence[int], reporter: Reporter, began: float) -> Outcome:
    """Convert the given pipeline stages; what an earlier run finished is kept."""
    with stopped_by_signals() as stop:
        conversion.target.recover(stop.check)
    target = conversion.target
    ranks = [(tp, pp) for pp in stages for tp in range(target.tensor)]
    proof = "" if conversion.overwrite else covered(target)
    if proof:
        return _covered(conversion, stages, ranks, cast("Verify", proof), began)
    target = target.check(overwrite=conversion.overwrite)
    conversion = replace(conversion, target=target)
    how = {"overwrite": conversion.overwrite, "reread": conversion.pace.reread}
    kept = tuple(rank for rank in ranks if is_kept(target, rank, conversion.verify, **how))
    todo = tuple(rank for rank in ranks if rank not in kept)
    totals, size, remarks, alone = _plan_all(conversion, todo)
    both = "; the result that is there stays until the new one is complete, so there has to be room for both"
    check_volume(target.root, size, target.kind.option, both if target.beside else "")
    options: Json = {"version": __version__, "options": conversion.identity_options}
    with stopped_by_signals() as stop, ExitStack() as ending:
        target.claim({**options, "begun": _now()}, overwrite=conversion.overwrite, heed=stop.check)
        with ExitStack() as locks:
            held = [locks.enter_context(target.stage_lock(pp, stop.check)) for pp in stages]
            target.sweep(stages)
            reporter.begin(totals, target.iteration)
            ending.callback(reporter.close)
            work_through(conversion, todo, alone, reporter, stop, held)
            with target.guarded():
                warnings = [text for pp in stages for text in _publish_stage(conversion, pp, options)]
        # A signal comes too late from here on: these stages are done, which an error would deny.
        published = target.publish_iteration(conversion.join)
        if not published:
            refuse_lost(target)
    target = target.at_home if published else target
    manifests = [target.rank_manifest(*rank) or {} for rank in ranks]
    return Outcome(
        target=target,
        stages=tuple(stages),
        converted=todo,
        kept=kept,
        bytes_written=size,
        files=sum(len(cast("list[Json]", manifest.get("files", []))) for manifest in manifests),
        verified=conversion.verify,
        seconds=time.monotonic() - began,
        published=published,
        newer=target.newer,
        conflicts=conversion.conflicts,
        warnings=(*conversion.warnings, *remarks, *warnings),
        how_to_load=conversion.how_to_load,
        kept_of_template=conversion.kept,
        source_checksums=_source_checksums(manifests),
        asked_to_stop=stop.error if isinstance(stop.error, InterruptedRunError) else None,
    )


def _plan_all(
    conversion: Conversion, todo: Sequence[Rank]
) -> tuple[dict[Rank, int], int, tuple[str, ...], RankTask | None]:
    """Bytes to read for each rank, bytes to write, what to warn of; and the plan itself where there is only one.

    One at a time: the plans of many ranks would not fit into the memory of one.
    """
    target, totals, nbytes = conversion.target, dict[Rank, int](), 0
    remarks, unused, share = dict[str, None](), list[frozenset[str]](), None
    for rank in todo:
        with of_rank(rank):
            share = conversion.plan(rank)
            target.ledger(rank, repair=conversion.overwrite).refuse(share.paths)
        totals[rank] = share.source_bytes
        nbytes += share.nbytes
        remarks |= dict.fromkeys(share.remarks)
        unused.append(share.unused_rules)
    if len(unused) == target.tensor * target.stages:  # a rule may be for a name that one stage alone has
        remarks |= dict.fromkeys(rules_remark(unused))
    return totals, nbytes, tuple(remarks), share if len(todo) == 1 else None


def _covered(
    conversion: Conversion, stages: Sequence[int], ranks: Sequence[Rank], proof: Verify, began: float
) -> Outcome:
    """Nothing is left to do: the full conversion that is there holds the parameters, and was verified as asked for."""
    if PROOFS[proof] < PROOFS[conversion.verify]:
        raise TargetConflictError(
            f"a full conversion of the same source is there, verified {proof}; {conversion.verify} is asked for",
            where=conversion.target.folder,
            hint=f"run the full conversion again with this {ref('verify')}: it verifies what is there",
        )
    return Outcome(
        target=conversion.target,
        stages=tuple(stages),
        converted=(),
        kept=tuple(ranks),
        bytes_written=0,
        files=len(ranks),
        verified=proof,
        seconds=time.monotonic() - began,
        published=True,
        newer=conversion.target.newer,
        conflicts=conversion.conflicts,
        warnings=(COVERED,),
    )


def _source_checksums(manifests: Iterable[Json]) -> Mapping[str, int]:
    """How many source files were verified by their own checksums, by the manifests of the ranks."""
    found = Counter[str]()
    for manifest in manifests:
        found.update(cast("dict[str, int]", manifest.get("sourceChecksums", {})))
    return found


def _publish_stage(conversion: Conversion, pp: int, options: Json) -> tuple[str, ...]:
    """Join the manifests of a stage's ranks; returns what is suspicious of them."""
    target, found = conversion.target, conversion.examine(conversion.target, pp)
    # Its own inputs alone: those of all ranks in each stage would grow with the square of their number.
    inputs = list(distinct(conversion.inputs[tp, pp] for tp in range(target.tensor)))
    facts: Json = {"iteration": target.iteration, "inputs": inputs, **conversion.facts}
    facts |= {"warnings": list(found)} if found else {}
    target.publish_stage(pp, {**options, **facts})
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
