"""What a model for Hugging Face transformers holds: its class, and its tensors by its own names."""

from __future__ import annotations

from pathlib import Path

from ckpt2pt.core.index import layer_numbers
from ckpt2pt.core.params import EMBEDDING, expert_count
from ckpt2pt.core.tensor import Key
from ckpt2pt.formats.checkpoint import Selection
from ckpt2pt.formats.huggingface.arguments import family_of
from ckpt2pt.formats.huggingface.read import open_huggingface, read_config, read_headers
from ckpt2pt.io.records import Json
from ckpt2pt.show.mindformers import rows_of


def inspect_model(path: Path, *, details: bool) -> Json:
    """The document of a folder.  That its tensors are those of its class is proved; what is wrong is raised."""
    found = open_huggingface(path, Selection(iteration=1))
    headers, _ = read_headers(path)
    names = [key.name for key in found.index]
    return {
        "kind": "model for Hugging Face transformers",
        "path": str(path),
        "class": family_of(read_config(path)).architecture,
        "layers": len(layer_numbers(found.index)),
        "experts": expert_count(names) or "none",
        "tokens": found.index[Key("param", EMBEDDING)].shape[0],
        "optimizer": "none",
        "files": len(headers),
        "tensors": rows_of({name: ref for held in headers.values() for name, ref in held.items()}, details=details),
        **({"warnings": list(found.warnings)} if found.warnings else {}),
    }
