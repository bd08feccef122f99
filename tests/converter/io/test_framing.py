"""Frames around payloads: the bytes, and the checksum of the whole without reading it."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ckpt2pt.io.framing import Framer


@given(st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=40)), max_size=6))
def test_frame_and_payloads_make_the_file_and_its_checksum(
    tmp_path_factory: object, parts: list[tuple[bytes, bytes]]
) -> None:
    path = Path(os.fspath(tmp_path_factory.mktemp("frame"))) / "file"  # type: ignore[attr-defined]
    whole = b"".join(frame + payload for frame, payload in parts)
    at = 0
    with path.open("w+b") as file:
        for frame, payload in parts:
            os.pwrite(file.fileno(), payload, at + len(frame))
            at += len(frame) + len(payload)
        out = Framer(file.fileno())
        seen = b""
        for frame, payload in parts:
            out.put(frame)
            assert out.crc == zlib.crc32(seen + frame)
            out.skip(len(payload), zlib.crc32(payload))
            seen += frame + payload
        out.flush()
    assert path.read_bytes() == whole
    assert (out.crc, out.offset) == (zlib.crc32(whole), len(whole))
