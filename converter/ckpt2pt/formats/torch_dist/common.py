"""What a distributed checkpoint holds that is no tensor: arguments, iteration, groups of the optimizer, scheduler.

``common.pt`` up to 0.18, the object ``common_state/shard_0_1`` since 0.19; where both are there, Megatron-LM 0.19 reads
``common.pt`` (megatron/core/dist_checkpointing/strategies/common.py).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import cast

from ckpt2pt.core.extents import Extent
from ckpt2pt.core.foldernames import iteration_of
from ckpt2pt.errors import FormatError, MissingInputError, ref
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.megatron.scaler import SCALER, plain_scaler
from ckpt2pt.formats.torch_dist.items import read_object
from ckpt2pt.formats.torch_dist.metadata import Metadata
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.pickles import read_pickle
from ckpt2pt.formats.torchfile.trees import Value
from ckpt2pt.io.paths import is_file

COMMON = "common.pt"
COMMON_STATE = "common_state/shard_0_1"

_OF_RANK = re.compile(rf"optimizer\.distributed\.dp_group_idx_\d+\.(optimizer|{SCALER})/shard_0_1")
"""What each model-parallel rank has as an object of its own in forms other than fully_reshardable."""
_HINT = "copy the whole folder again from where it was written"


def read_common(metadata: Metadata, allow: tuple[str, ...] = ()) -> Template:
    """The common state.  Raises :class:`MissingInputError` where there is none."""
    path = metadata.folder / COMMON
    storages: dict[str, Extent]
    if is_file(path, ref("source.path")):
        archive = Archive.open(path)
        tree, storages = read_pickle(archive.pickle, where=str(path), allow=allow), dict(archive.storages)
    elif COMMON_STATE in metadata.objects:
        item = metadata.objects[COMMON_STATE]
        path = metadata.folder / item.file
        held, storages = read_object(metadata.folder, item, allow)
        tree = held[0] if isinstance(held, list) and len(held) == 1 else held
    else:
        raise MissingInputError(
            f"there is no {COMMON}, and no object {COMMON_STATE} either", where=metadata.folder, hint=_HINT
        )
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise FormatError("the common state is no dictionary with text keys", where=path, hint=_HINT)
    found = Template(path=str(path), tree=cast("dict[str, Value]", tree), storages=storages)
    own = None if found.groups else _of_ranks(metadata, allow)
    return replace(found, tree={**found.tree, "optimizer": own}) if own else found


def _of_ranks(metadata: Metadata, allow: tuple[str, ...]) -> dict[Value, Value] | None:
    """The optimizer of dp_reshardable, where each model-parallel rank has objects of its own: each group once, one loss scale.

    None where there is none.
    """
    groups: list[Value] = []
    found: dict[Value, Value] = {"optimizer": {"param_groups": groups}}
    for key, item in metadata.objects.items():
        kind = _OF_RANK.fullmatch(key)
        if not kind or (kind[1] == SCALER and SCALER in found):
            continue
        held, storages = read_object(metadata.folder, item, allow)
        state = held[0] if isinstance(held, list) and held else None
        if not isinstance(state, dict):
            continue
        if kind[1] == SCALER:
            found[SCALER] = cast("Value", plain_scaler(state, storages, str(metadata.folder / item.file)))
            continue
        listed = state.get("param_groups")
        for group in listed if isinstance(listed, list) else ():
            if group not in groups:
                groups.append(group)
    return found if groups else None


def iteration_of_common(common: Template, folder: Path) -> int | None:
    """The training step that it states, else that of the folder's name."""
    stated = common.tree.get("iteration")
    return stated if type(stated) is int and stated >= 0 else iteration_of(folder.name)


def sharding_of(common: Template, metadata: Metadata) -> str | None:
    """How the optimizer's state is stored: ``fully_reshardable``, ``dp_reshardable``, ...; None where nothing says it.

    Releases up to 0.12 do not state it: then flattened tensors and whole objects tell.
    """
    content = common.tree.get("content_metadata")
    found = content.get("distrib_optim_sharding_type") if isinstance(content, dict) else None
    if isinstance(found, str):
        return found
    if any(entry.unflattened for entry in metadata.tensors.values()):
        return "fully_sharded_model_space"
    return "dp_zero_gather_scatter" if metadata.whole_states else None
