"""What both readers promise alike: the same tensors, the same refusals, and no byte of payload read."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from checked import checked
from ckpt2pt.core.extents import DTYPE_BYTES, TensorRef
from ckpt2pt.errors import FormatError, InputError, MissingInputError, PermissionDeniedError, aside
from ckpt2pt.formats.mindspore import (
    index_ckpt,
    index_file,
    index_safetensors,
    prove_checksum,
    read_scalar,
    states_checksum,
)
from ckptfiles import MINDSPORE, Tensor, chunk, ckpt, safe, safe_entry, safe_file, some_tensors, varint
from goldens import golden_root
from other_user import become_another_user


@dataclass(frozen=True)
class Reader:
    suffix: str
    index: Callable[..., dict[str, TensorRef]]
    write: Callable[..., bytes]


CKPT = Reader(".ckpt", index_ckpt, ckpt)
SAFETENSORS = Reader(".safetensors", index_safetensors, safe)
READERS = [CKPT, SAFETENSORS]
each_reader = pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.suffix)
either_door = pytest.mark.parametrize("door", ["reader", "index_file"])


def payload(ref: TensorRef) -> bytes:
    """Read by other means than the reader's own."""
    return b"".join(Path(e.path).read_bytes()[e.offset : e.offset + e.nbytes] for e in ref.extents)


def samples() -> list[Path]:
    """What real mindspore wrote and read back, but for the files that are there to be refused."""
    found = (golden_root() / "mindspore").glob("*.json")
    return sorted(path.with_suffix("") for path in found if not path.name.startswith(("enc_", "remove_redundancy")))


def test_the_samples_are_there() -> None:
    assert {path.suffix for path in samples()} == {".ckpt", ".safetensors"}


@pytest.mark.parametrize("sample", samples(), ids=lambda path: path.name)
def test_every_sample_is_read_as_mindspore_reads_it(sample: Path) -> None:
    found = checked(sample)
    expected = json.loads(sample.with_name(sample.name + ".json").read_text(encoding="utf-8"))
    assert sorted(found) == sorted(row["name"] for row in expected)
    for row in expected:
        ref = found[row["name"]]
        assert (ref.name, ref.dtype, list(ref.shape)) == (row["name"], row["dtype"].lower(), row["shape"])
        data = str(read_scalar(ref)).encode() if ref.dtype == "str" else payload(ref)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (row["nbytes"], row["sha256"])
    if sample.suffix == ".ckpt":
        assert list(found) == [row["name"] for row in expected]


@each_reader
@either_door
def test_tensors_of_every_type_and_shape_lie_where_the_index_says(reader: Reader, door: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{reader.suffix}"
    path.write_bytes(reader.write(some_tensors()))
    found = reader.index(path) if door == "reader" else index_file(path)
    read_back = {Tensor(ref.name, ref.dtype, ref.shape, payload(ref)) for ref in found.values()}
    assert read_back == set(some_tensors())
    assert all(name == ref.name and ref.numel * DTYPE_BYTES[ref.dtype] == ref.nbytes for name, ref in found.items())


@each_reader
def test_suffix_does_not_matter_where_the_content_speaks(reader: Reader, tmp_path: Path) -> None:
    data = reader.write(some_tensors())
    for name in ("x.ckpt", "x.safetensors", "x"):
        (tmp_path / name).write_bytes(data)
        assert len(index_file(tmp_path / name)) == len(some_tensors())


def test_a_brace_where_a_json_header_would_begin_does_not_make_a_checkpoint_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(ckpt([Tensor("abcd{}", "int8", (1,), b"x")]))
    assert path.read_bytes()[8:9] == b"{"
    assert list(index_file(path)) == ["abcd{}"]


@each_reader
def test_a_right_checksum_is_accepted_and_a_wrong_one_is_refused_only_on_request(
    reader: Reader, tmp_path: Path
) -> None:
    path = tmp_path / f"x{reader.suffix}"
    data = bytearray(reader.write(some_tensors(), crc=True))
    path.write_bytes(data)
    good = reader.index(path)
    assert good == checked(path)
    assert states_checksum(path)
    assert prove_checksum(path)
    data[good["t.int64"].extents[0].offset] ^= 1
    path.write_bytes(data)
    assert reader.index(path) == good
    with pytest.raises(FormatError, match="CRC-32"):
        prove_checksum(path)


@each_reader
def test_a_file_without_a_checksum_passes_the_check(reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / f"x{reader.suffix}"
    path.write_bytes(reader.write(some_tensors()))
    assert not prove_checksum(path)
    assert not states_checksum(path)


@each_reader
@either_door
@pytest.mark.parametrize(
    ("make", "kind", "what"),
    [
        pytest.param(lambda path: None, MissingInputError, "not there", id="missing"),
        pytest.param(lambda path: path.parent.joinpath("rank_0").symlink_to("gone"), MissingInputError, "not there", id="folder-is-dead-link"),
        pytest.param(lambda path: path.symlink_to(path.name), MissingInputError, "symbolic links", id="link-to-itself"),
        pytest.param(lambda path: path.touch(), FormatError, "empty", id="empty"),
        pytest.param(lambda path: path.mkdir(), FormatError, "a folder", id="folder"),
        pytest.param(os.mkfifo, FormatError, "not a regular file", id="pipe-without-writer"),
    ],
)  # fmt: skip
def test_what_is_no_file_is_refused_by_name(
    reader: Reader, door: str, make: Callable[[Path], object], kind: type[InputError], what: str, tmp_path: Path
) -> None:
    path = tmp_path / f"x{reader.suffix}"
    make(path)
    with pytest.raises(kind, match=what) as caught:
        (reader.index if door == "reader" else index_file)(path)
    assert caught.value.where.startswith(str(path))
    assert caught.value.hint


@each_reader
def test_every_truncation_is_refused_or_ends_between_two_entries(reader: Reader, tmp_path: Path) -> None:
    tensors = some_tensors()[:5]
    data = reader.write(tensors)
    # A .ckpt has no end mark: cut between two entries, it is a shorter file that is whole.
    whole = {len(ckpt(tensors[:n])): n for n in range(1, 5)} if reader is CKPT else {}
    path = tmp_path / f"x{reader.suffix}"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        if size in whole:
            assert list(reader.index(path)) == [t.name for t in tensors[: whole[size]]]
            continue
        with pytest.raises(FormatError) as caught:
            reader.index(path)
        assert caught.value.where.startswith(str(path))


def read_bytes_and_calls() -> tuple[int, int]:
    """What this process has read so far."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"]), int(counts["syscr"])


def large(reader: Reader, nbytes: int) -> bytes:
    """The head of a file of one tensor of ``nbytes``; the payload is a hole."""
    if reader is SAFETENSORS:
        return safe_file({"big": safe_entry("uint8", (nbytes,), 0, nbytes)})
    head = varint(1 << 3) + varint(nbytes) + chunk(2, b"UInt8") + varint(3 << 3 | 2) + varint(nbytes)
    name = chunk(1, b"big") + varint(2 << 3 | 2) + varint(len(head) + nbytes)
    return varint(1 << 3 | 2) + varint(len(name) + len(head) + nbytes) + name + head


@each_reader
def test_payload_is_never_read(reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / f"x{reader.suffix}"
    nbytes = 1 << 40
    head = large(reader, nbytes)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + nbytes)
    before = read_bytes_and_calls()
    found = index_file(path)
    after = read_bytes_and_calls()
    assert [(ref.nbytes, ref.extents[0].offset) for ref in found.values()] == [(nbytes, len(head))]
    assert after[0] - before[0] < 100_000


def test_heads_between_large_payloads_are_all_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    nbytes = 16 << 20
    head = large(CKPT, nbytes)
    with path.open("wb") as file:
        for n in range(200):
            file.write(head.replace(b"big", b"%03d" % n))
            file.seek(nbytes, os.SEEK_CUR)
        file.truncate()
    before = read_bytes_and_calls()
    assert len(index_ckpt(path)) == 200
    assert read_bytes_and_calls()[0] - before[0] < 200 * 5000


@each_reader
def test_many_small_tensors_take_few_reads_and_little_time(reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / f"x{reader.suffix}"
    path.write_bytes(reader.write(Tensor(f"layers.{n}.weight", "float32", (4, 4), bytes(64)) for n in range(20_000)))
    before, start = read_bytes_and_calls(), time.process_time()
    assert len(index_file(path)) == 20_000
    after, seconds = read_bytes_and_calls(), time.process_time() - start
    assert after[1] - before[1] < 100
    assert after[0] - before[0] < 1.1 * path.stat().st_size
    assert seconds < 5, "a tenth of a second was measured"


@each_reader
def test_no_file_stays_open(reader: Reader, tmp_path: Path) -> None:
    good, bad = tmp_path / f"good{reader.suffix}", tmp_path / f"bad{reader.suffix}"
    good.write_bytes(reader.write(some_tensors(), crc=True))
    bad.write_bytes(good.read_bytes()[:99])
    before = os.listdir("/proc/self/fd")
    found = checked(good)
    read_scalar(found["one"])
    for path in (bad, tmp_path):
        with pytest.raises(FormatError):
            index_file(path)
    assert os.listdir("/proc/self/fd") == before


@each_reader
@either_door
def test_a_file_of_another_user_names_owner_mode_and_us(reader: Reader, door: str, unexpected: Path) -> None:
    path = unexpected / f"x{reader.suffix}"
    path.write_bytes(reader.write(some_tensors()))
    path.chmod(0o400 if os.getuid() == 0 else 0)
    owner = path.stat().st_uid
    become_another_user()
    with pytest.raises(PermissionDeniedError) as caught:
        (reader.index if door == "reader" else index_file)(path)
    assert f"belongs to uid {owner}," in caught.value.what
    assert f"mode {path.stat().st_mode & 0o777:04o}" in caught.value.what
    assert f"runs as uid {os.geteuid()}," in caught.value.what
    assert caught.value.hint.startswith(f"run as uid {owner}{aside('workers.security.runAsUser')}, ")
    assert f"chmod a+r {path}" in caught.value.hint


def test_a_closed_folder_above_the_file_is_named(unexpected: Path) -> None:
    closed = unexpected / "rank_0"
    (closed / "deep").mkdir(parents=True)
    (closed / "deep" / "x.ckpt").write_bytes(ckpt(some_tensors()))
    closed.chmod(0o600 if os.getuid() else 0o700)
    become_another_user()
    with pytest.raises(PermissionDeniedError, match="the folder rank_0 belongs to") as caught:
        index_file(closed / "deep" / "x.ckpt")
    assert f"chmod a+rx {closed}`" in caught.value.hint
    os.seteuid(os.getuid())
    closed.chmod(0o700)


def test_spellings_of_the_writer_cover_the_table() -> None:
    assert {*MINDSPORE} < {t.dtype for t in some_tensors()} == {*DTYPE_BYTES} - {"int4", "complex64"}
