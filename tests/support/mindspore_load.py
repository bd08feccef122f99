"""Run by the Python of .venv-mindspore: load checkpoints with mindspore itself and print what it read, as JSON.

python mindspore_load.py FILE...  ->  [{name: [dtype, shape, SHA-256 of the bytes]}, ...]
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import mindspore


def described(value: Any) -> list[object]:
    if isinstance(value, str):
        return ["str", [], hashlib.sha256(value.encode()).hexdigest()]
    data = value.asnumpy()
    if str(data.dtype) == "bfloat16":
        data = data.view("uint16")
    return [str(value.dtype).lower(), list(value.shape), hashlib.sha256(data.tobytes()).hexdigest()]


def load(path: str) -> dict[str, list[object]]:
    kind = "safetensors" if path.endswith(".safetensors") else "ckpt"
    # A checksum is compared where there is one.
    found = mindspore.load_checkpoint(path, format=kind, crc_check=kind == "ckpt")
    return {name: described(value) for name, value in found.items()}


if __name__ == "__main__":
    sys.stdout.write(json.dumps([load(path) for path in sys.argv[1:]]) + "\n")
