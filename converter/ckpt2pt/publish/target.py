"""One iteration's folder: taken by one conversion, written beside what it replaces, announced last."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from ckpt2pt.core.foldernames import TRACKER
from ckpt2pt.core.topology import Rank
from ckpt2pt.errors import Ckpt2ptError, InterruptedRunError, TargetConflictError, TryAgainError
from ckpt2pt.io.digests import sha256
from ckpt2pt.io.paths import is_folder, is_there, listing, status
from ckpt2pt.io.records import Json, seal, seal_joined, unseal
from ckpt2pt.publish import swap
from ckpt2pt.publish.files import (
    STATE,
    host,
    make_folder,
    publish_bytes,
    read_record,
    read_small,
    refuse_link,
    sweep_partials,
)
from ckpt2pt.publish.kinds import CLAIM, MEGATRON, REPORT, Kind, rank_name, stage_name, writing_name
from ckpt2pt.publish.ledger import Holdings, Ledger, not_ours, taken_over
from ckpt2pt.publish.leftovers import nobody_at_work, sweep_leftovers
from ckpt2pt.publish.locks import WAIT_SECONDS, Lock, locked
from ckpt2pt.publish.retire import files_below, foreign, records_of, retire
from ckpt2pt.publish.tracker import announce, check_tracker, tracked
from ckpt2pt.publish.unchanged import has_all_stages, prove_unchanged

_ID_DIGITS = 16
_CLAIMED = {"identity": "identity", "purpose": "options_digest", "base": "base", "full": "full"}
"""What a claim tells of a conversion: its entry, and the attribute."""


def _nothing() -> None:
    """Nobody asks this run to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One iteration's folder, owned by one conversion.

    ``identity`` is the digest of everything that decides what is written, ``options_digest`` that of the options alone, and
    ``ranks`` those of the options and what each rank is read from.  Without ``options_digest`` any change makes another conversion.
    ``base`` is the digest of the source and of the options but for ``full``: parameters alone, and with the optimizer.
    ``beside`` is true while the result of another conversion stands in the folder, which this one is to replace.
    """

    root: Path
    iteration: int
    identity: str
    stages: int
    tensor: int
    options_digest: str = ""
    ranks: Mapping[Rank, str] = field(default_factory=dict[Rank, str])
    kind: Kind = MEGATRON
    base: str = ""
    full: bool = True
    beside: bool = False

    @property
    def at_home(self) -> Target:
        """The same in its final place."""
        return replace(self, beside=False)

    @property
    def folder(self) -> Path:
        """``root/iter_0000500``, or the root for MindSpore; while it is to replace another result, a hidden folder near it."""
        place = self._at(self.iteration)
        if not self.beside:
            return place
        name = f"{self.identity[:_ID_DIGITS]}{swap.NEW}"
        return self.root / f".{place.name}.{name}" if self.kind.alone else self.root / self.kind.state / name

    def _at(self, iteration: int) -> Path:
        return self.root / self.kind.folder.format(iteration)

    @property
    def state(self) -> Path:
        """Where claim, manifests and locks lie."""
        return self.folder / (STATE if self.beside else self.kind.state)

    # ---------------------------------------------------------------------------------------------------------- claim

    def check(self, *, overwrite: bool) -> Target:
        """Where to write: here, or beside what is to be replaced.  Refuses what is somebody else's; touches nothing."""
        home = self.at_home
        for path in {home.folder, home.state} - {self.root}:
            refuse_link(path)
        if self.kind.tracker:
            check_tracker(self.root)
        data = read_small(home.state / CLAIM)  # once: another worker may be about to write it
        claim = unseal(data)
        if claim is None:
            return home._check_unclaimed(data, overwrite=overwrite)
        if claim.get("identity") == self.identity or self._goes_on(claim):
            return home
        if not self._replaces(claim, overwrite=overwrite):
            raise TargetConflictError(
                f"iteration {self.iteration} there is the result of another conversion "
                f"(begun {claim.get('begun')} by {claim.get('host')}): other options, another source, or a source that changed since",
                where=home.folder,
                hint=self._hint,
            )
        found = replace(self, beside=True)
        if self.kind.alone:
            swap.refuse_mount(home.folder)
        if not is_there(found.state / CLAIM):  # proved by the first worker, and again before anything is replaced
            home._refuse_foreign()
        return found

    @property
    def _hint(self) -> str:
        return f"choose another {self.kind.option}, or replace it with {self.kind.replace}"

    def _replaces(self, claim: Json, *, overwrite: bool) -> bool:
        """Whether this conversion may take the place of another one's result: it extends the parameters of the same source."""
        extends = self.base and claim.get("base") == self.base and self.full and claim.get("full") is False
        return overwrite or bool(extends)

    def _check_unclaimed(self, data: bytes, *, overwrite: bool) -> Target:
        """A folder without a claim has to be empty, whatever is asked for."""
        claim = self.state / CLAIM
        if data or status(claim, follow=False):
            if read_small(claim) != data:
                return self.check(overwrite=overwrite)
            raise TargetConflictError(
                "the claim of the conversion there is damaged, so nobody can tell what is whose",
                where=claim,
                hint=f"choose another {self.kind.option}, or remove what is there yourself",
            )
        found = listing(self.folder) if self.kind.alone else self._results()
        unexpected_files = sorted(str(path.relative_to(self.folder)) for path in found if path.name != STATE)
        if not unexpected_files:
            return self
        if read_small(claim) != data:
            return self.check(overwrite=overwrite)  # another worker has taken the folder meanwhile, and begun
        raise TargetConflictError(
            f"the folder holds {unexpected_files[0]}, which ckpt2pt did not write",
            where=self.folder,
            hint=f"choose another {self.kind.option}, or move what is there away: it is never replaced",
        )

    def _refuse_foreign(self) -> Holdings:
        """Refuse a folder that holds what no record lists as it is; the first such file is named."""
        names = (
            list(files_below(self.folder))
            if self.kind.alone
            else [path.relative_to(self.folder).as_posix() for path in self._results()]
        )
        held = Holdings.of(self.folder, records_of(self.state))  # behind the names: what has one is in a record before
        unexpected = foreign(self.folder, names, held)
        if unexpected is not None:
            raise not_ours(self.folder / unexpected, self._keep)
        return held

    @property
    def _keep(self) -> str:
        return f"choose another {self.kind.option}, or move it away: it is never replaced"

    def _goes_on(self, claim: Json) -> bool:
        """Whether the same was begun with a source that was mended since, and nothing is published yet."""
        return (
            bool(self.options_digest)
            and claim.get("purpose") == self.options_digest
            and not is_there(self.at_home.state / REPORT, self.kind.option)
        )

    def _results(self) -> list[Path]:
        return [path for pattern in self.kind.results for path in listing(self.folder, pattern, self.kind.option)]

    def recover(self, heed: Callable[[], None] = _nothing) -> None:
        """Finish what a run that was killed while it replaced a result has left half done."""
        home = self.at_home
        if self.kind.alone:
            swap.recover(home.folder)
        elif swap.unfinished(home.state):
            with home._claim_lock(heed), nobody_at_work(home.state):
                claim = swap.unfinished(home.state)
                if claim:
                    self._move(claim)

    def _move(self, claim: Json) -> None:
        home = replace(self.at_home, identity=str(claim.get("identity")))
        swap.move(home.folder, home.state, claim, home.fence, self._keep)

    def claim(self, facts: Json, *, overwrite: bool, heed: Callable[[], None] = _nothing) -> None:
        """Take the folder.  A worker of the same conversion finds it taken and goes on."""
        home = self.at_home
        self.check(overwrite=overwrite)
        make_folder(home.state, self.root)
        with home._claim_lock(heed):
            if self.check(overwrite=overwrite).beside != self.beside:
                raise TryAgainError(
                    "another run has published its result there meanwhile",
                    where=home.folder,
                    hint="run the same command again",
                )
            self._sweep_leftovers()
            if self.beside:
                make_folder(self.state, self.root)
            sweep_partials(self.state, CLAIM)
            old = read_record(self.state / CLAIM)
            if old and old.get("identity") == self.identity:
                return
            with ExitStack() as alone:
                if not (old and self._goes_on(old)):
                    alone.enter_context(nobody_at_work(home.state))
                claimed = {entry: getattr(self, name) for entry, name in _CLAIMED.items()}
                publish_bytes(self.state / CLAIM, seal({**claimed, "host": host(), **facts}))
                if old:
                    self._take_over(old)

    def _take_over(self, old: Json) -> None:
        """Behind the claim: what workers of the older one are still writing never gets its name (ledger.py)."""
        for folder in (self.state, *self._folders()):
            sweep_partials(folder)
        report = read_record(self.state / REPORT)
        if report and report.get("identity") != self.identity:
            publish_bytes(self.state / CLAIM, seal(old))
            raise TryAgainError(
                "the conversion there was published at this very moment",
                where=self.folder,
                hint="run the same command again",
            )

    def _sweep_leftovers(self) -> None:
        home = self.at_home.folder
        near = listing(self.root, f".{home.name}.*") if self.kind.alone else listing(home / self.kind.state)
        sweep_leftovers(near, replace(self, beside=True).folder, replacing=self.beside)

    @contextmanager
    def stage_lock(self, pp: int, heed: Callable[[], None] = _nothing) -> Generator[Lock]:
        """Hold a stage; a second run on it learns who has it.  Refused when the folder was taken away meanwhile."""
        with self.guarded(), locked(self.state / f"stage-{pp:03d}.lock", "converting this stage", heed=heed) as lock:
            with self.at_home._claim_lock(heed):
                self.fence()
            yield lock

    def _claim_lock(self, heed: Callable[[], None] = _nothing) -> AbstractContextManager[Lock]:
        return locked(self.state / "claim.lock", "looking after this folder", wait=WAIT_SECONDS, heed=heed)

    def fence(self) -> None:
        """Raise when another conversion has taken the folder."""
        claim = read_record(self.state / CLAIM) or {}
        if claim.get("identity") == self.identity:
            return
        other = (claim if claim or not self.beside else read_record(self.at_home.state / CLAIM)) or {}
        if other.get("identity") == self.identity:
            raise TryAgainError(
                "another worker of the same conversion has published it meanwhile",
                where=self.at_home.folder,
                hint="run the same command again: what is finished is kept",
            )
        raise taken_over(self.folder, f"{other.get('host', 'nobody')}, begun {other.get('begun', 'at no known time')}")

    @contextmanager
    def guarded(self) -> Generator[None]:
        """Whatever fails in a folder that was taken away fails because of that."""
        try:
            yield
        except InterruptedRunError:
            raise
        except Ckpt2ptError as error:
            try:
                self.fence()
            except TryAgainError as taken:
                raise taken from error
            except Ckpt2ptError:
                raise error from None
            raise

    # ------------------------------------------------------------------------------------------------------ manifests

    def sweep(self, stages: Collection[int]) -> None:
        """Remove temporary files that killed runs left of these stages; call with their locks held."""
        for pp in stages:
            for name in (f"rank-*-{pp:03d}.json", f"writing-*-{pp:03d}.json", stage_name(pp)):
                sweep_partials(self.state, name)
            for tp in range(self.tensor):
                ledger = self.ledger((tp, pp))
                if is_there(ledger.writing) and self.rank_manifest(tp, pp):
                    ledger.end_writing()
        every = set(stages) == set(range(self.stages))
        for folder in self._folders():
            if every or (self.kind.alone and any(folder.name.endswith(f"_{pp:03d}") for pp in stages)):
                sweep_partials(folder)

    def _folders(self) -> list[Path]:
        """Folders that hold files of a result."""
        forms = {pattern.rpartition("/")[0] for pattern in self.kind.results if "/" in pattern}
        inside = [path for form in sorted(forms) for path in listing(self.folder, form) if is_folder(path)]
        return [*inside, self.folder] if self.kind.merged else inside

    def ledger(self, rank: Rank, *, repair: bool = False) -> Ledger:
        """The records of one rank's files."""
        return Ledger(
            folder=self.folder,
            claim=self.state / CLAIM,
            identity=self.identity,
            writing=self.state / writing_name(*rank),
            record=self.state / rank_name(*rank),
            hint=f"{self._keep}; the same conversion repairs its own result with {self.kind.replace}",
            repair=repair,
        )

    def rank_manifest(self, tp: int, pp: int) -> Json | None:
        """The manifest of a finished rank whose files are still there with their sizes; None otherwise."""
        manifest = self.manifest_of((tp, pp))
        return manifest if manifest is not None and self.has_files(manifest) else None

    def manifest_of(self, rank: Rank) -> Json | None:
        """The same, whatever has become of the files."""
        manifest = read_record(self.state / rank_name(*rank))
        return manifest if manifest is not None and self.is_of_rank(rank, manifest) else None

    def has_files(self, manifest: Json) -> bool:
        """Whether all files that a manifest lists are there with their sizes."""
        files = cast("list[Json]", manifest.get("files", []))
        found = ((status(self.folder / str(file["path"]), self.kind.option), file["nbytes"]) for file in files)
        return all(seen is not None and seen.st_size == nbytes for seen, nbytes in found)

    def publish_rank(self, tp: int, pp: int, manifest: Json) -> None:
        """Say that a rank's files are there."""
        self.ledger((tp, pp)).publish({"identity": self.ranks.get((tp, pp), self.identity), **manifest})

    def stage_manifest(self, pp: int) -> Json | None:
        """The manifest of a finished stage of this conversion, None while a rank is missing."""
        manifest = read_record(self.state / stage_name(pp))
        if manifest is None or not self.is_of_stage(pp, manifest):
            return None
        return manifest if all(self.rank_manifest(tp, pp) for tp in range(self.tensor)) else None

    def is_of_stage(self, pp: int, manifest: Json) -> bool:
        """Whether a stage's manifest joins ranks of this conversion and of what they read now."""
        return manifest.get("identity") == self._stage_identity(pp)

    def _stage_identity(self, pp: int) -> str:
        ranks = [self.ranks[tp, pp] for tp in range(self.tensor) if (tp, pp) in self.ranks]
        return sha256("".join(ranks).encode()).hexdigest() if ranks else self.identity

    def is_of_rank(self, rank: Rank, manifest: Json) -> bool:
        """Whether a rank's manifest is of this conversion and of what it reads now."""
        return manifest.get("identity") == self.ranks.get(rank, self.identity)

    def publish_stage(self, pp: int, facts: Mapping[str, object]) -> None:
        """Join the ranks' manifests.  The ranks' own stay: a rerun looks at them."""
        ranks = [self.rank_manifest(tp, pp) for tp in range(self.tensor)]
        if not all(ranks):
            self.fence()
            raise TryAgainError(
                f"files of tp {ranks.index(None)} pp {pp} were removed while the stage was converted",
                where=self.folder,
                hint="keep other programs out of this folder, and run the same command again",
            )
        publish_bytes(
            self.state / stage_name(pp),
            seal({"identity": self._stage_identity(pp), "stage": pp, **facts, "ranks": ranks}),
            fence=self.fence,
        )

    # ----------------------------------------------------------------------------------------------------- publishing

    def publish_iteration(self, join: Callable[[Target], None] | None = None) -> bool:
        """Write what ``join`` writes, report and tracker when every stage is there, as it was written.  Any worker may; all write the same.

        Raises :class:`VerificationError` for a file that was changed since its rank was finished.
        """
        home = self.at_home
        if self.beside and (read_record(home.state / CLAIM) or {}).get("identity") == self.identity:
            return home.publish_iteration(join)  # another worker was faster
        if not has_all_stages(self) or not all(self.stage_manifest(pp) for pp in range(self.stages)):
            self.fence()
            return False
        with self.guarded(), home._claim_lock():
            self.fence()
            sweep_partials(self.state, REPORT)
            prove_unchanged(self)
            if join:
                join(self)
            publish_bytes(self.state / REPORT, seal_joined(self._head, "stages", self._briefs()), fence=self.fence)
            if self.beside:
                self._replace()
        if self.kind.tracker:
            home._publish_tracker()
        return True

    def _replace(self) -> None:
        """Take the place of the older result; call with the claim's lock held."""
        home = self.at_home
        with nobody_at_work(home.state):
            held = home._refuse_foreign()
            self.fence()
            if self.kind.alone:
                retire(swap.exchange(self.folder, home.folder), held)
            else:
                claim = read_record(self.state / CLAIM) or {}
                claim = swap.begin_moving(home.folder, home.state, self.folder, claim, held)
                for folder in (home.state, *home._folders()):
                    sweep_partials(folder)
                self._move(claim)

    def _publish_tracker(self) -> None:
        lock = self.root / f".{TRACKER}.lock"
        with locked(lock, "writing the tracker", wait=WAIT_SECONDS, passing=True) as held:
            for folder in (self.root, self.state):  # under this lock: another run may be writing the tracker
                sweep_partials(folder, TRACKER)
            if self.newer is None:
                # Written in our own folder: when that is taken away, so is the tracker that would name it.
                announce(self.root, self.iteration, beside=self.state / TRACKER, fence=self.fence, alone=held.proved)

    @property
    def _head(self) -> Json:
        return {"identity": self.identity, "iteration": self.iteration}

    def _briefs(self) -> Iterator[Json]:
        """One stage after the other: together they may be larger than what a worker needs."""
        for pp in range(self.stages):
            path = self.state / stage_name(pp)
            manifest = read_record(path)
            if manifest is None:
                raise TryAgainError("the manifest was removed", where=path, hint="run the same command again")
            yield _brief(manifest)

    def report(self, manifests: Iterable[Json]) -> Json:
        """The whole conversion in one document."""
        return {**self._head, "stages": [_brief(manifest) for manifest in manifests]}

    @property
    def newer(self) -> int | None:
        """A later iteration that the tracker names, and that is there: Megatron would go back in time without a word."""
        named = tracked(self.root) if self.kind.tracker else None
        return named if named is not None and named > self.iteration and is_folder(self._at(named)) else None


def _brief(manifest: Json) -> Json:
    """A stage's manifest without the digests of single tensors, which stay in the stage's own file."""
    ranks = cast("list[Json]", manifest.get("ranks") or [])
    return {**manifest, "ranks": [{key: value for key, value in rank.items() if key != "tensors"} for rank in ranks]}
