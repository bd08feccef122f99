"""Files of other programs, known by their first bytes: what somebody named by mistake is said to be what it is.  Pure."""

from __future__ import annotations

import re

HEAD_BYTES = 512
"""How much of a file :func:`recognise` looks at."""

TORCH_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The long integer 0x1950a86a20f9469cfc6c, pickled after the protocol: torch/serialization.py, MAGIC_NUMBER."""

_MAGICS: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "a GGUF file (llama.cpp)"),
    (b"ggml", "a GGML file (llama.cpp)"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras, h5py)"),
    (b"\x93NUMPY", "an array of numpy (.npy)"),
    (b"PK\3\4", "a zip archive: a .pt file of torch, or a .distcp or .npz file"),
    (b"PK\5\6", "an empty zip archive"),
    (b"PYTORCH1", "a file of a preview of torch 1.0"),
    (b"\x1f\x8b", "compressed with gzip"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (b"\xfd7zXZ\0", "compressed with xz"),
    (b"BZh", "compressed with bzip2"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself (run git lfs pull)"),
)
READS = "ckpt2pt reads .ckpt and .safetensors files of MindSpore, and .pt files of torch"
_SHORTEST = 4  # characters: fewer tell nothing
_PARAM_MAP = re.compile(r'\s*\{\s*"[^"]+"\s*:\s*\[\s*"(?:torch\.)?\w+"\s*,\s*\[')


def recognise(head: bytes) -> str:
    """What a file of another program is, by at most its first :data:`HEAD_BYTES` bytes; empty when nothing says so.

    Files of MindSpore (whose first byte is a line feed) and safetensors are not looked for here.
    """
    for magic, name in _MAGICS:
        if head.startswith(magic):
            return name
    if head[2:].startswith(TORCH_LEGACY):
        return "a file of torch before 1.6, a row of pickles"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if re.match(rb"\x80[\x02-\x05]", head):
        return "a bare pickle"
    return "" if head.startswith(b"\n") else _text(head)


def _text(head: bytes) -> str:
    try:
        # The last character may have been cut.
        text = head.decode() if len(head) < HEAD_BYTES else head[:-4].decode(errors="strict") + " "
    except UnicodeDecodeError:
        return ""
    if len(text.strip()) < _SHORTEST or not all(char.isprintable() or char in "\n\r\t" for char in text):
        return ""
    if _PARAM_MAP.match(text):
        return "a param map (JSON)"
    if '"weight_map"' in text:
        return "an index of Hugging Face shards (JSON)"
    return "a JSON document" if re.match(r"\s*[\[{]", text) else "a text"
