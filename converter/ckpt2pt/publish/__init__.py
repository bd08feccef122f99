"""The target folder: who may write it, what stands in it, and when a name appears.

megatron_pt/latest_checkpointed_iteration.txt         last of all, and never back
megatron_pt/iter_0000500/.ckpt2pt/claim.json          whose folder this is
                                 /writing-01-003.json names that are about to appear
                                 /rank-01-003.json    both files of a rank are there
                                 /stage-003.json      every rank of a stage is there and verified
                                 /merged.json         files that join those of all ranks (torch_dist)
                                 /report.json         written with the tracker
megatron_pt/.iter_0000500.0123456789abcdef.new/       what will replace it, complete or not (docs/adr/0009)
"""

from ckpt2pt.core.foldernames import TRACKER
from ckpt2pt.publish.files import (
    PARTIAL,
    STATE,
    host,
    make_folder,
    partial_name,
    publish_bytes,
    read_json,
    read_record,
    sweep_partials,
    sync_folder,
)
from ckpt2pt.publish.kinds import HUGGINGFACE, MEGATRON, MINDFORMERS, MINDSPORE, TORCH_DIST, Kind, rank_name
from ckpt2pt.publish.ledger import Holdings, Ledger
from ckpt2pt.publish.leftovers import nobody_at_work
from ckpt2pt.publish.locks import Lock, locked
from ckpt2pt.publish.retire import remove_ours, retire
from ckpt2pt.publish.target import Target
from ckpt2pt.publish.tracker import read_tracker, tracked

__all__ = [
    "HUGGINGFACE",
    "MEGATRON",
    "MINDFORMERS",
    "MINDSPORE",
    "PARTIAL",
    "STATE",
    "TORCH_DIST",
    "TRACKER",
    "Holdings",
    "Kind",
    "Ledger",
    "Lock",
    "Target",
    "host",
    "locked",
    "make_folder",
    "nobody_at_work",
    "partial_name",
    "publish_bytes",
    "rank_name",
    "read_json",
    "read_record",
    "read_tracker",
    "remove_ours",
    "retire",
    "sweep_partials",
    "sync_folder",
    "tracked",
]
