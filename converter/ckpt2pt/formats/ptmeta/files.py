"""The files of ``pt_meta``, made in memory and published whole; what is there already and differs is not overwritten."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt2pt import __version__
from ckpt2pt.core.buckets import Buffer
from ckpt2pt.core.extents import Extent
from ckpt2pt.core.layout import param_map
from ckpt2pt.errors import FormatError, UsageError, ref
from ckpt2pt.formats.megatron.payload import tree_payload
from ckpt2pt.formats.ptmeta.metadata import ARGUMENTS, PARAM_MAP
from ckpt2pt.formats.torchfile.archive import archive_bytes
from ckpt2pt.formats.torchfile.trees import Value
from ckpt2pt.io.access import access_error
from ckpt2pt.io.checksums import crc32
from ckpt2pt.io.digests import sha256
from ckpt2pt.io.files import OpenFiles, read_all, read_at
from ckpt2pt.io.paths import listing, status
from ckpt2pt.io.records import seal
from ckpt2pt.io.volume import check_volume
from ckpt2pt.publish import STATE, Holdings, Ledger, host, locked, make_folder, publish_bytes, sweep_partials
from ckpt2pt.publish.ledger import not_ours
from ckpt2pt.publish.retire import foreign

ORIGIN = "origin.json"
ARGS_KEYS = (
    "args",
    "checkpoint_version",
    "iteration",
    "optimizer",
    "opt_param_scheduler",
    "rng_state",
    "num_floating_point_operations_so_far",
)
"""What the reference keeps of a model file (MindSpeed-Core-MS feature-0.1, tools/converter/convert_pt2ckpt.py)."""

_MAX_STORAGE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFiles:
    """The metadata of one rank: the tree of its arguments file, its storages, its chunks' buffers.

    ``names`` holds for each chunk its parameters in buffer order, for a conversion of parameters only.
    """

    tp: int
    pp: int
    tree: Mapping[str, Value]
    storages: Mapping[str, Extent | bytes]
    buffers: tuple[tuple[Buffer, ...], ...]
    names: tuple[tuple[str, ...], ...]
    path: str = "the metadata to be written"
    """What the tree was read from, for messages."""


def render(ranks: Sequence[RankFiles], *, with_maps: bool, among: OpenFiles | None = None) -> dict[str, bytes]:
    """File name -> content for all ranks; maps before arguments.  Without maps the name lists take their place.

    ``among`` are open files, which those that hold the tensors may be read with.
    """
    files: dict[str, bytes] = {}
    for rank in ranks:
        # Maps are numbered by the buffers there are: a chunk of no-op layers alone has none.
        filled = [buffers for buffers in rank.buffers if buffers] if with_maps else []
        for vpp, buffers in enumerate(filled):
            for number, buffer in enumerate(buffers):
                name = f"param_map_buffer{number}_dp0tp{rank.tp}pp{rank.pp}vpp{vpp}.json"
                files[name] = json.dumps(param_map(buffer)).encode()
    for rank in ranks:
        files[f"args_tp{rank.tp:02d}_pp{rank.pp:03d}.pt"] = arguments_file(rank, with_maps=with_maps, among=among)
    return files


def arguments_file(rank: RankFiles, *, with_maps: bool, among: OpenFiles | None = None) -> bytes:
    """``args_tp*_pp*.pt`` of a rank; it is small: what is large in a model file are the weights."""
    tree: dict[str, Value] = {key: rank.tree[key] for key in ARGS_KEYS if key in rank.tree}
    if not with_maps:
        tree["param_name_list"] = [list(names) for names in rank.names]
    stem = f"args_tp{rank.tp:02d}_pp{rank.pp:03d}"
    pickle, keys = tree_payload(tree, rank.storages, rank.path)
    with OpenFiles() as files:
        return archive_bytes(stem, pickle, [_content(rank.storages[key], among or files) for key in keys])


def _content(storage: Extent | bytes, files: OpenFiles) -> bytes:
    if isinstance(storage, bytes):
        return storage
    if storage.nbytes > _MAX_STORAGE_BYTES:
        raise FormatError(
            f"a tensor of {storage.nbytes} bytes beside the weights", where=storage.path, hint="report this checkpoint"
        )
    data = bytearray(storage.nbytes)
    read_at(files.get(storage.path)[0], memoryview(data), storage.offset, storage.path)
    return bytes(data)


def origin(*, way: str, evidence: Sequence[str], assumed: Mapping[str, object]) -> bytes:
    """``origin.json``: how the folder came to be; a conversion copies ``assumed`` into its manifest."""
    document = {"version": 1, "program": f"ckpt2pt {__version__}", "from": way, "evidence": list(evidence)}
    return (json.dumps({**document, "assumed": dict(assumed)}, indent=1) + "\n").encode()


def publish(folder: Path, files: Mapping[str, bytes], *, overwrite: bool) -> tuple[str, ...]:
    """Write what is not there yet; returns the names written.

    A file of the same name and another content, or metadata of other ranks, is refused unless ``overwrite``; with it, only
    files that this command wrote are replaced or removed.
    """
    ledger = _ledger(folder, files)
    missing, extra = _compare(folder, files, overwrite=overwrite)
    if not missing and not extra and status(ledger.writing) is None:
        return ()
    check_volume(folder, sum(len(files[name]) for name in missing), ref("target.path"))
    make_folder(folder / STATE, folder)
    with locked(ledger.record.with_suffix(".lock"), "writing this metadata"):
        missing, extra = _compare(folder, files, overwrite=overwrite)
        held = Holdings.of(folder, [ledger.writing, ledger.record])
        publish_bytes(ledger.claim, seal({"identity": ledger.identity, "host": host()}))
        for place in (folder, folder / STATE):
            sweep_partials(place)
        mine = {name: _entry(name, files[name]) for name in missing}
        ledger.announce(list(mine.values()))
        for name in missing:
            publish_bytes(folder / name, files[name], fence=ledger.fence)
        for name in extra:
            ledger.fence()
            (folder / name).unlink(missing_ok=True)
        kept = [entry for name in files if name not in mine for entry in held.entries(name)]
        ledger.publish({"identity": ledger.identity, "files": [*mine.values(), *kept]})
    return tuple(missing)


def _compare(folder: Path, files: Mapping[str, bytes], *, overwrite: bool) -> tuple[list[str], list[str]]:
    """What has to be written, and what has to go; refuses what may not be replaced or removed."""
    there = {path.name: path for path in listing(folder, option=ref("target.path"))}
    extra = sorted(
        name for name in there if (ARGUMENTS.fullmatch(name) or PARAM_MAP.fullmatch(name)) and name not in files
    )
    changed = sorted(name for name in files if name in there and not _same(there[name], files[name]))
    hint = f"choose another {ref('target.path')}, or "
    if (extra or changed) and not overwrite:
        what = f"{changed[0]} is there and differs" if changed else f"{extra[0]} is of another model or cut"
        raise UsageError(what, where=folder, hint=f"{hint}replace what is there with {ref('target.overwrite')}")
    ledger = _ledger(folder, files)
    unexpected = foreign(folder, [*changed, *extra], Holdings.of(folder, [ledger.writing, ledger.record]))
    if unexpected is not None:
        raise not_ours(folder / unexpected, f"{hint}move it away: it is never replaced")
    return [name for name in files if name not in there or name in changed], extra


def _ledger(folder: Path, files: Mapping[str, bytes]) -> Ledger:
    digest = sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name} {len(content)}\n".encode() + content)
    hint = f"choose another {ref('target.path')}, or move it away: it is never replaced"
    return Ledger.of_group(folder, folder / STATE / "pt_meta.json", digest.hexdigest(), hint=hint)


def _entry(name: str, content: bytes) -> dict[str, object]:
    return {"path": name, "nbytes": len(content), "crc32": f"{crc32(content, 0):08x}"}


def _same(path: Path, content: bytes) -> bool:
    try:
        return path.stat().st_size == len(content) and read_all(path, len(content) + 1) == content
    except OSError as error:
        raise access_error(error, path, "reading", reading=True) from error
