"""What a model for Hugging Face transformers holds: its class, and its tensors by its own names."""

from __future__ import annotations

from pathlib import Path

from ckpt2pt.core.index import layer_numbers
from ckpt2pt.core.params import EMBEDDING, expert_count
from ckpt2pt.core.tensor import Key
from ckpt2pt.formats.checkpoint import Selection
from ckpt2pt.formats.huggingface.read import checkpoint_of, read_saved
from ckpt2pt.io.records import Json
from ckpt2pt.show.mindformers import rows_of


def inspect_model(path: Path, *, details: bool) -> Json:
    """The document of a folder.  That its tensors are those of its class is proved; what is wrong is raised."""
    saved = read_saved(path)
    found = checkpoint_of(saved, path, Selection(iteration=1))
    names = [key.name for key in found.index]
    return {
        "kind": "model for Hugging Face transformers",
        "path": str(path),
        "class": saved.family.architecture,
        "layers": len(layer_numbers(found.index)),
        "experts": expert_count(names) or "none",
        "tokens": found.index[Key("param", EMBEDDING)].shape[0],
        "optimizer": "none",
        "files": len(saved.headers),
        "tensors": rows_of(saved.tensors, details=details),
        **({"warnings": list(found.warnings)} if found.warnings else {}),
    }
