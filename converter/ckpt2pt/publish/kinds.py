"""How target folders are laid out, and what our records in them are called."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from ckpt2pt.errors import ref
from ckpt2pt.publish.files import STATE, is_partial


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How a target folder is laid out.

    ``folder`` is the iteration's place below the root (the root itself when empty), ``results`` what a conversion puts
    there, ``alone`` whether nothing else may be there; ``option`` names the folder's option in the user's words.
    """

    reader: str
    folder: str
    results: tuple[str, ...]
    alone: bool
    tracker: bool
    option: str
    replace: str
    state: str = STATE
    """Where claim, manifests and locks lie below that place."""
    merged: tuple[str, ...] = ()
    """Files that join those of all ranks, in the order in which they appear."""


MEGATRON = Kind(
    reader="Megatron",
    folder="iter_{:07d}",
    results=("mp_rank_*/*.pt",),
    alone=True,
    tracker=True,
    option=ref("target.path"),
    replace=ref("target.overwrite"),
)
_MERGED_FILES = ("common.pt", "metadata.json", ".metadata")
TORCH_DIST = Kind(
    reader="Megatron",
    folder="iter_{:07d}",
    results=("*.distcp", *_MERGED_FILES),
    alone=True,
    tracker=True,
    option=ref("target.path"),
    replace=ref("target.overwrite"),
    merged=_MERGED_FILES,
)
MINDSPORE = Kind(
    reader="MindSpore",
    folder="",
    results=(
        *("rank_*/*.ckpt", "rank_*/*.safetensors"),
        *(f"{meta}/{name}" for meta in ("pt_meta", "source_pt_meta") for name in ("args_tp*.pt", "*.json")),
    ),
    alone=False,
    tracker=False,
    option=ref("target.path"),
    replace=ref("target.overwrite"),
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What transformers and vLLM look for beside a model (transformers, tokenization_utils_base.py and the tokenizers of each model)."""
_HUGGINGFACE_FILES = ("model.safetensors.index.json", *TOKENIZER_FILES, "generation_config.json", "config.json")
HUGGINGFACE = Kind(
    reader="Hugging Face transformers",
    folder="",
    # Also what would win over a result, or take its place: a single file beside an index, the formats that older ones read.
    results=("*.safetensors", "*.bin", "*.bin.index.json", *_HUGGINGFACE_FILES),
    alone=False,
    tracker=False,
    option=ref("target.path"),
    replace=ref("target.overwrite"),
    merged=_HUGGINGFACE_FILES,
)

MINDFORMERS = Kind(
    reader="MindFormers",
    folder="iteration_{:08d}",
    results=("*.safetensors", "metadata.json", "common.json"),
    alone=True,
    tracker=True,
    option=ref("target.path"),
    replace=ref("target.overwrite"),
    merged=("metadata.json", "common.json"),
)

CLAIM = "claim.json"
REPORT = "report.json"
MERGED, WRITING_MERGED = "merged.json", "writing-merged.json"
_RECORDS = (CLAIM, REPORT, MERGED, "rank-*.json", "stage-*.json", "writing-*.json", "*.lock")


def rank_name(tp: int, pp: int) -> str:
    """Name of a rank's manifest."""
    return f"rank-{tp:02d}-{pp:03d}.json"


def writing_name(tp: int, pp: int) -> str:
    """Name of the record of what is about to appear of a rank."""
    return f"writing-{tp:02d}-{pp:03d}.json"


def stage_name(pp: int) -> str:
    """Name of a stage's manifest."""
    return f"stage-{pp:03d}.json"


def is_record(name: str) -> bool:
    """Whether a file in the folder of records is one of ours by its name."""
    return is_partial(name) or any(fnmatch.fnmatchcase(name, form) for form in _RECORDS)
