"""Remove older results: only those of this very conversion, never the one that the tracker names.

megatron_pt/iter_0000400  --rename-->  .iter_0000400.removed  --> gone      what a killed run left is swept next time
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import cast, get_args

from ckpt2pt.publish import PARTIAL, STATE, TRACKER, read_record
from ckpt2pt.records import Json
from ckpt2pt.request import Request, Verify
from ckpt2pt.system.access import access_error

log = logging.getLogger("ckpt2pt")

_FOLDER = re.compile(r"iter_(\d{7,})")
_REMOVED = ".removed"


def tracked(root: Path) -> int | None:
    """The iteration that the tracker names; None without one, or when it says ``release``."""
    try:
        text = (root / TRACKER).read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise access_error(error, root / TRACKER, "reading", reading=True) from error
    return int(text) if re.fullmatch("[0-9]+", text) else None


def verified_as(request: Request, iteration: int) -> Verify | None:
    """How every file of a result was verified, at the least; None where no manifest of this conversion says it."""
    results = dict(_results(request.target))
    if iteration not in results or not _is_ours(results[iteration], request):
        return None
    told = [(read_record(path) or {}).get("verified") for path in (results[iteration] / STATE).glob("rank-*.json")]
    return None if None in told else next((level for level in get_args(Verify) if level in told), None)


def prune(request: Request, keep: int) -> list[int]:
    """Remove what is older than the last ``keep`` complete results (0: nothing); returns their iterations."""
    root = request.target
    for left in root.glob(f".iter_*{_REMOVED}"):
        shutil.rmtree(left, ignore_errors=True)
    named = tracked(root)
    ours = {iteration: folder for iteration, folder in _results(root) if _is_ours(folder, request)}
    complete = sorted(iteration for iteration, folder in ours.items() if (folder / STATE / "report.json").is_file())
    if keep <= 0 or len(complete) <= keep or named is None:
        return []
    oldest = complete[-keep]
    gone: list[int] = []
    for iteration in sorted(iteration for iteration in ours if iteration < oldest and iteration != named):
        strangers = _strangers(ours[iteration])
        if strangers:
            log.warning("%s is kept: it holds %s, which ckpt2pt did not write", ours[iteration], strangers[0])
            continue
        hidden = ours[iteration].with_name(f".{ours[iteration].name}{_REMOVED}")
        try:
            ours[iteration].rename(hidden)
        except OSError as error:
            raise access_error(error, ours[iteration], "removing an older result") from error
        shutil.rmtree(hidden, ignore_errors=True)
        gone.append(iteration)
    return gone


def _results(root: Path) -> Iterator[tuple[int, Path]]:
    for folder in sorted(root.glob("iter_*")):
        found = _FOLDER.fullmatch(folder.name)
        if found and folder.is_dir() and not folder.is_symlink():
            yield int(found[1]), folder


def _is_ours(folder: Path, request: Request) -> bool:
    """Whether the claim there is of a conversion with the same options."""
    claim = read_record(folder / STATE / "claim.json")
    return claim is not None and claim.get("options") == json.loads(json.dumps(request.meaning()))


def _strangers(folder: Path) -> list[str]:
    """Files that no manifest of ours lists."""
    listed: set[str] = set()
    for path in (folder / STATE).glob("rank-*.json"):
        files = cast("list[Json]", (read_record(path) or {}).get("files", []))
        listed.update(str(file["path"]) for file in files)
    found = (
        os.path.relpath(os.path.join(top, name), folder) for top, _, names in os.walk(folder) for name in names
    )  # fmt: skip
    return sorted(
        name for name in found if name not in listed and not name.startswith(f"{STATE}/") and not name.endswith(PARTIAL)
    )
