"""Remove older results: only those of this very conversion, never the one that the tracker names."""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast, get_args

from ckpt2pt.core.foldernames import iteration_name, iteration_of
from ckpt2pt.discover.request import Request, Verify
from ckpt2pt.errors import TryAgainError
from ckpt2pt.io.paths import is_file, listing, status
from ckpt2pt.publish import STATE, Holdings, nobody_at_work, read_record, remove_ours, retire, tracked
from ckpt2pt.publish.kinds import REPORT
from ckpt2pt.publish.retire import REMOVED, files_below, foreign, records_of
from ckpt2pt.run.targets.request import AnyRequest

log = logging.getLogger("ckpt2pt")


def verified_as(request: AnyRequest, iteration: int) -> Verify | None:
    """How every file of a result was verified, at the least; None where no manifest of this conversion says it."""
    results = dict(_results(request.target))
    if iteration not in results or not _is_ours(results[iteration], request):
        return None
    levels = [(read_record(path) or {}).get("verified") for path in listing(results[iteration] / STATE, "rank-*.json")]
    return None if None in levels else next((level for level in get_args(Verify) if level in levels), None)


def prune(request: AnyRequest, keep: int) -> list[int]:
    """Remove what is older than the last ``keep`` complete results (0: nothing); returns their iterations."""
    root = request.target
    for left in listing(root, f".iter_*{REMOVED}"):
        remove_ours(left)
    named = tracked(root)
    ours = {iteration: folder for iteration, folder in _results(root) if _is_ours(folder, request)}
    complete = sorted(iteration for iteration, folder in ours.items() if is_file(folder / STATE / REPORT))
    if keep <= 0 or len(complete) <= keep or named is None:
        return []
    oldest = complete[-keep]
    candidates = sorted(iteration for iteration in ours if iteration < oldest and iteration != named)
    return [iteration for iteration in candidates if _remove(ours[iteration])]


def _remove(folder: Path) -> bool:
    """Remove a result unless it holds what is not ours, or somebody is at work in it."""
    names = list(files_below(folder))
    held = Holdings.of(folder, records_of(folder / STATE))
    unexpected = foreign(folder, names, held)
    if unexpected is not None:
        log.warning("%s is kept: it holds %s, which ckpt2pt did not write", folder, unexpected)
        return False
    try:
        with nobody_at_work(folder / STATE):
            retire(folder, held)
    except TryAgainError as error:
        log.warning("%s is kept: %s", folder, error.what)
        return False
    return True


def _results(root: Path) -> Iterator[tuple[int, Path]]:
    for folder in listing(root, "iter_*"):
        iteration, seen = iteration_of(folder.name), status(folder, follow=False)
        ours = iteration is not None and folder.name == iteration_name(iteration)  # a folder renamed is another's
        if iteration is not None and ours and seen and stat.S_ISDIR(seen.st_mode):
            yield iteration, folder


def _is_ours(folder: Path, request: AnyRequest) -> bool:
    """Whether the claim there is of a conversion with the same options.

    One by global tensors has some besides, which its source decides: they are those of the result that the tracker names.
    """
    claimed = _options(folder)
    asked = cast("dict[str, object]", json.loads(json.dumps(request.identity_options())))
    if isinstance(request, Request):
        return claimed == asked
    named = tracked(request.target)
    alike = named is not None and claimed == _options(request.target / iteration_name(named))
    return alike and {**claimed, **asked} == claimed


def _options(folder: Path) -> Mapping[str, object]:
    found = (read_record(folder / STATE / "claim.json") or {}).get("options")
    return cast("Mapping[str, object]", found) if isinstance(found, dict) else {}
