from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from archives import write_archive
from ckpt2pt.errors import Ckpt2ptError, FileAccessError, FormatError, MissingInputError
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.reader import CENTRAL, END, END64, LOCAL, LOCATOR

NAMES = ("data.pkl", ".format_version", ".storage_alignment", "byteorder",
         "data/0", "data/1", "data/2", "version", ".data/serialization_id")  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A sound archive of a kilobyte or two."""
    path = tmp_path_factory.mktemp("abuse") / "s.pt"
    torch.save([torch.arange(40, dtype=torch.uint8), torch.empty(0), torch.ones(5)], path)
    return path.read_bytes()


# Offsets of fields: APPNOTE.TXT 4.3.7, 4.3.12, 4.3.14 to 4.3.16.  Written out here, so that the reader is not its own judge.
Fields = dict[str, tuple[int, str]]
OF_ENTRY: Fields = {
    "signature": (0, "I"), "flags": (8, "H"), "method": (10, "H"), "crc": (16, "I"), "compressed": (20, "I"),
    "nbytes": (24, "I"), "n_name": (28, "H"), "n_extra": (30, "H"), "n_comment": (32, "H"), "disk": (34, "H"),
    "offset": (42, "I"),
}  # fmt: skip
OF_LOCAL: Fields = {
    "signature": (0, "I"), "flags": (6, "H"), "method": (8, "H"), "crc": (14, "I"), "nbytes": (22, "I"),
    "n_name": (26, "H"), "n_extra": (28, "H"), "letter": (30, "B"),
}  # fmt: skip
OF_END: Fields = {
    "disk": (4, "H"), "first_disk": (6, "H"), "here": (8, "H"), "count": (10, "H"), "nbytes": (12, "I"),
    "offset": (16, "I"), "n_comment": (20, "H"),
}  # fmt: skip
OF_END64: Fields = {
    "signature": (0, "I"), "nbytes": (4, "Q"), "disk": (16, "I"), "first_disk": (20, "I"), "here": (24, "Q"),
    "count": (32, "Q"), "size": (40, "Q"), "offset": (48, "Q"),
}  # fmt: skip
OF_LOCATOR: Fields = {"signature": (0, "I"), "disk": (4, "I"), "offset": (8, "Q"), "disks": (16, "I")}


class Victim:
    """An archive to be damaged by name: fields of its directory, its end records, its local headers."""

    def __init__(self, whole: bytes) -> None:
        self.data = bytearray(whole)
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            self.headers = {info.filename.partition("/")[2]: info.header_offset for info in archive.infolist()}
            self.directory = archive.start_dir
        self.entries: dict[str, int] = {}
        at = self.directory
        for name in NAMES:
            self.entries[name] = at
            n_name, n_extra = struct.unpack_from("<2H", whole, at + 28)
            at += CENTRAL.size + n_name + n_extra
        self.end64 = at
        self.locator = at + END64.size
        self.end = self.locator + LOCATOR.size

    def _set(self, base: int, fields: Fields, values: dict[str, int]) -> None:
        for name, value in values.items():
            offset, kind = fields[name]
            struct.pack_into(f"<{kind}", self.data, base + offset, value)

    def entry(self, name: str, **values: int) -> None:
        self._set(self.entries[name], OF_ENTRY, values)

    def local(self, name: str, **values: int) -> None:
        self._set(self.headers[name], OF_LOCAL, values)

    def ends(self, **values: int) -> None:
        self._set(self.end, OF_END, values)

    def ends64(self, **values: int) -> None:
        self._set(self.end64, OF_END64, values)

    def locates(self, **values: int) -> None:
        self._set(self.locator, OF_LOCATOR, values)

    def without_zip64(self) -> None:
        del self.data[self.end64 : self.end]
        self.end = self.end64

    def with_zip64_field(self, name: str, field: bytes) -> None:
        """Give an entry of the directory an extra field, and let everything behind it move."""
        entry = self.entries[name]
        n_name = struct.unpack_from("<H", self.data, entry + 28)[0]
        self.entry(name, n_extra=len(field))
        self.data[entry + CENTRAL.size + n_name : entry + CENTRAL.size + n_name] = field
        self.end64, self.locator, self.end = (at + len(field) for at in (self.end64, self.locator, self.end))
        self.ends64(size=self.end64 - self.directory)
        self.ends(nbytes=self.end64 - self.directory)
        self.locates(offset=self.end64)


def wide(*numbers: int, kind: int = 1) -> bytes:
    return struct.pack(f"<2H{len(numbers)}Q", kind, 8 * len(numbers), *numbers)


def refuse(path: Path, says: str) -> FormatError:
    with pytest.raises(FormatError, match=says) as caught:
        Archive.open(path)
    assert caught.value.where == str(path)
    assert caught.value.hint
    return caught.value


def test_the_victim_is_sound_before_it_is_damaged(whole: bytes, tmp_path: Path) -> None:
    victim = Victim(whole)
    (tmp_path / "a").write_bytes(victim.data)
    assert list(Archive.open(tmp_path / "a").records) == list(NAMES)
    victim.without_zip64()
    (tmp_path / "a").write_bytes(victim.data)
    assert list(Archive.open(tmp_path / "a").records) == list(NAMES)
    victim = Victim(whole)
    victim.entry("data/0", nbytes=0xFFFFFFFF, compressed=0xFFFFFFFF)
    victim.with_zip64_field("data/0", wide(40, 40))
    (tmp_path / "a").write_bytes(victim.data)
    assert Archive.open(tmp_path / "a").storages["0"].nbytes == 40


M = 0xFFFFFFFF
Damage = Callable[[Victim], object]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        # ---- what an entry says
        pytest.param(lambda v: v.entry("data/0", method=8), r"compressed \(method 8\)", id="deflated"),
        pytest.param(lambda v: v.entry("data/0", flags=0x809), "encrypted", id="encrypted"),
        pytest.param(lambda v: v.entry("data/0", flags=0x848), "encrypted", id="strongly-encrypted"),
        pytest.param(lambda v: v.entry("data/0", flags=0x2808), "encrypted", id="masked-headers"),
        pytest.param(lambda v: v.entry("data/0", disk=1), "one part of a zip archive", id="on-another-disk"),
        pytest.param(
            lambda v: v.entry("data/0", signature=0), "entry 4 of the directory is damaged", id="no-signature"
        ),
        pytest.param(lambda v: v.entry("data/0", compressed=39), "has 40 bytes and takes 39", id="two-sizes"),
        pytest.param(
            lambda v: v.entry("data/0", n_name=0xFFFF), "of the directory is damaged", id="name-past-the-directory"
        ),
        pytest.param(
            lambda v: v.entry(NAMES[-1], n_comment=1), "of the directory is damaged", id="comment-past-the-directory"
        ),
        pytest.param(lambda v: v.entry("version", n_extra=8), "of the directory is damaged", id="entries-out-of-step"),
        pytest.param(
            lambda v: v.entry("data/0", n_name=0), "of the directory is damaged", id="an-entry-without-a-name"
        ),
        # ---- where it lies
        pytest.param(lambda v: v.entry("data/0", nbytes=400, compressed=400), "reaches beyond", id="over-the-next"),
        pytest.param(
            lambda v: v.entry("data/0", nbytes=M - 1, compressed=M - 1), "reaches beyond", id="beyond-the-end"
        ),
        pytest.param(lambda v: v.entry("data/2", offset=v.headers["data/0"]), "reaches beyond", id="one-place-for-two"),
        pytest.param(lambda v: v.entry("data/2", offset=v.headers["data/0"] + 1), "reaches beyond", id="interleaved"),
        pytest.param(lambda v: v.entry("data/2", offset=v.directory), "reaches beyond", id="inside-the-directory"),
        pytest.param(lambda v: v.entry("data/2", offset=M - 1), "reaches beyond", id="offset-beyond-the-end"),
        pytest.param(
            lambda v: v.entry("data/2", offset=v.headers["data/2"] + 4), "no local header", id="offset-astray"
        ),
        # ---- zip64
        pytest.param(lambda v: v.entry("data/0", nbytes=M), "lacks the zip64 field", id="no-zip64-field"),
        pytest.param(
            lambda v: (v.entry("data/0", nbytes=M, compressed=M), v.with_zip64_field("data/0", wide(40))),
            "lacks the zip64 field with its 2",
            id="zip64-field-too-short",
        ),
        pytest.param(
            lambda v: (v.entry("data/0", nbytes=M, compressed=M), v.with_zip64_field("data/0", wide(40, 40, kind=2))),
            "lacks the zip64 field",
            id="a-field-of-another-kind",
        ),
        pytest.param(
            lambda v: (v.entry("data/0", nbytes=M), v.with_zip64_field("data/0", wide(40) + wide(41))),
            "lacks the zip64 field",
            id="two-zip64-fields",
        ),
        pytest.param(
            lambda v: (v.entry("data/0", nbytes=M), v.with_zip64_field("data/0", b"\1\0\xff\xff" + bytes(4))),
            "lacks the zip64 field",
            id="zip64-field-longer-than-the-extra",
        ),
        pytest.param(
            lambda v: (v.entry("data/0", nbytes=M, compressed=M), v.with_zip64_field("data/0", wide(1 << 63, 1 << 63))),
            "reaches beyond",
            id="size-2^63",
        ),
        pytest.param(
            lambda v: (v.entry("data/0", offset=M), v.with_zip64_field("data/0", wide((1 << 64) - 1))),
            "reaches beyond",
            id="offset-2^64-1",
        ),
        pytest.param(lambda v: v.ends64(count=1 << 63, here=1 << 63), "says 9 where the one of zip64", id="count-2^63"),
        pytest.param(
            lambda v: (v.ends64(count=1 << 63, here=1 << 63), v.ends(count=0xFFFF, here=0xFFFF)),
            "cannot hold 9223372036854775808 entries",
            id="count-2^63-well-stated",
        ),
        pytest.param(lambda v: v.ends64(size=1 << 63), "where the one of zip64", id="directory-of-2^63"),
        pytest.param(
            lambda v: (v.ends64(size=1 << 63), v.ends(nbytes=M)),
            "but it ends at byte",
            id="directory-of-2^63-well-stated",
        ),
        pytest.param(
            lambda v: (v.ends64(offset=(1 << 64) - 1), v.ends(offset=M)), "but it ends", id="directory-at-2^64-1"
        ),
        pytest.param(lambda v: v.locates(offset=1 << 63), "past its place", id="zip64-record-at-2^63"),
        pytest.param(lambda v: v.locates(offset=v.directory), "no zip64 end record", id="zip64-record-elsewhere"),
        pytest.param(lambda v: v.ends64(signature=0), "no zip64 end record", id="zip64-record-without-signature"),
        pytest.param(lambda v: v.ends64(nbytes=1 << 63), "no zip64 end record", id="zip64-record-of-2^63"),
        pytest.param(lambda v: v.ends64(here=8), "one part of a zip archive", id="zip64-entries-elsewhere"),
        pytest.param(lambda v: v.ends64(disk=1), "one part of a zip archive", id="zip64-another-disk"),
        pytest.param(
            lambda v: v.ends64(first_disk=1), "one part of a zip archive", id="zip64-directory-on-another-disk"
        ),
        pytest.param(lambda v: v.locates(disks=2), "one part of a zip archive", id="zip64-two-disks"),
        pytest.param(lambda v: v.locates(disk=1), "one part of a zip archive", id="zip64-record-on-another-disk"),
        pytest.param(lambda v: v.locates(signature=0), "but it ends at byte", id="locator-without-signature"),
        # ---- the end record
        pytest.param(lambda v: v.ends(disk=1), "one part of a zip archive", id="last-disk"),
        pytest.param(lambda v: v.ends(first_disk=1), "one part of a zip archive", id="directory-on-another-disk"),
        pytest.param(lambda v: v.ends(here=8), "one part of a zip archive", id="entries-elsewhere"),
        pytest.param(lambda v: v.ends(n_comment=1), "no end record: it is cut short", id="comment-cut-off"),
        pytest.param(lambda v: v.data.append(0), "no end record: it is cut short", id="a-byte-behind-the-end"),
        pytest.param(
            lambda v: (v.ends(count=8, here=8), v.ends64(count=8, here=8)), "goes on for", id="an-entry-hidden"
        ),
        pytest.param(
            lambda v: (v.ends(count=10, here=10), v.ends64(count=10, here=10)), "ends within", id="one-too-few"
        ),
        pytest.param(lambda v: (v.without_zip64(), v.ends(count=99, here=99)), "cannot hold 99", id="count-absurd"),
        pytest.param(lambda v: (v.without_zip64(), v.ends(offset=0)), "but it ends at byte", id="directory-at-0"),
        # ---- local headers
        pytest.param(lambda v: v.local("data/2", signature=0), "no local header", id="local-signature"),
        pytest.param(lambda v: v.local("data/2", letter=0x7A), "no local header", id="local-name"),
        pytest.param(lambda v: v.local("data/2", n_name=7), "no local header", id="local-name-length"),
        pytest.param(lambda v: v.local("data/2", n_extra=0xFFFF), "reaches beyond", id="local-extra-beyond-the-end"),
        pytest.param(lambda v: v.local("data/2", method=8), "contradicts", id="local-method"),
        pytest.param(lambda v: v.local("data/2", flags=0x809), "contradicts", id="local-encrypted"),
        pytest.param(lambda v: v.local("data/2", nbytes=7), "contradicts", id="local-size"),
        pytest.param(lambda v: v.local("data/2", crc=7), "contradicts", id="local-crc"),
    ],
)
def test_damage_is_refused_by_name(whole: bytes, tmp_path: Path, damage: Damage, says: str) -> None:
    victim = Victim(whole)
    damage(victim)
    assert victim.data != whole
    (tmp_path / "a.pt").write_bytes(victim.data)
    refuse(tmp_path / "a.pt", says)


def test_comment_with_an_end_record_in_it_is_refused(whole: bytes, tmp_path: Path) -> None:
    """Whoever searches forwards and whoever searches backwards would see two different checkpoints."""
    other = whole[-END.size :]
    (tmp_path / "a.pt").write_bytes(whole[:-2] + struct.pack("<H", len(other)) + other)
    refuse(tmp_path / "a.pt", "two end records")


def test_a_whole_archive_in_the_comment_is_refused(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(whole[:-2] + struct.pack("<H", len(whole)) + whole)
    refuse(tmp_path / "a.pt", "two end records")


def test_archive_after_other_bytes_is_refused(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"PK\3\4" + whole)
    refuse(tmp_path / "a.pt", "no zip64 end record of the right size")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        pytest.param(["s/data.pkl", "s/../data/0"], "is not a name", id="climbs"),
        pytest.param(["s/data.pkl", "s/./data/0"], "is not a name", id="stays"),
        pytest.param(["/s/data.pkl"], "is not a name", id="absolute"),
        pytest.param(["s/data.pkl", "s/data//0"], "is not a name", id="empty-part"),
        pytest.param(["s/", "s/data.pkl"], "is not a name", id="a-folder"),
        pytest.param(["s/data.pkl", "s/data\\0"], "is not a name", id="backslash"),
        pytest.param(["data.pkl"], "does not lie in the folder", id="no-folder"),
        pytest.param(["s/data.pkl", "t/data/0"], "does not lie in the folder 's'", id="two-folders"),
        pytest.param(["s/version"], "holds no data.pkl", id="no-pickle"),
        pytest.param(["s/constants.pkl", "s/code/a.py"], "TorchScript", id="torchscript"),
    ],
)
def test_names_that_torch_does_not_give_are_refused(tmp_path: Path, names: list[str], says: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for name in names:
            archive.writestr(name, b"1234")
    refuse(tmp_path / "a.pt", says)


def test_name_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("s/data.pkl", b"one")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("s/data.pkl", b"two")
    refuse(tmp_path / "a.pt", r"'s/data\.pkl' twice")


def test_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    write_archive(tmp_path / "a.pt", "ss", b"pickle", [b"1"])
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data.replace(b"ss/", b"\xff\xfe/"))
    refuse(tmp_path / "a.pt", "is not UTF-8")


def test_name_with_a_zero_byte_is_refused(tmp_path: Path) -> None:
    write_archive(tmp_path / "a.pt", "ss", b"pickle", [b"1"])
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data.replace(b"ss/", b"s\0/"))
    refuse(tmp_path / "a.pt", "is not a name")


def test_deflated_archive_is_refused_however_small_it_looks(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("s/data.pkl", bytes(10_000_000))
    refuse(tmp_path / "a.pt", "compressed")


@pytest.mark.parametrize(
    ("order", "says"), [(b"big", "byte order 'big'"), (b"middle", "'middle'"), (b"l" * 999, "'lllllll'"), (b"", "''")]
)
def test_other_byte_orders_are_refused(tmp_path: Path, order: bytes, says: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("s/data.pkl", b"pickle")
        archive.writestr("s/byteorder", order)
    refuse(tmp_path / "a.pt", says)


def test_pickle_of_more_than_half_a_gibibyte_is_refused_unread(tmp_path: Path) -> None:
    name, nbytes = b"s/data.pkl", (512 << 20) + 1
    head = LOCAL.pack(b"PK\3\4", 0, 0, 0, nbytes, nbytes, len(name), 0) + name
    entry = CENTRAL.pack(b"PK\1\2", 0, 0, 0, nbytes, nbytes, len(name), 0, 0, 0, 0) + name
    with (tmp_path / "a.pt").open("wb") as file:
        file.write(head)
        file.seek(nbytes, os.SEEK_CUR)
        file.write(entry + END.pack(b"PK\5\6", 0, 0, 1, 1, len(entry), len(head) + nbytes, 0))
    refuse(tmp_path / "a.pt", f"data.pkl has {nbytes:,} bytes")


def legacy(path: Path) -> None:
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"), io.BytesIO())


@pytest.mark.parametrize(
    ("write", "says"),
    [
        pytest.param(legacy, "torch before 1.6", id="row-of-pickles"),
        pytest.param(tar, "torch before 0.2", id="tar"),
        pytest.param(lambda path: path.write_bytes(b"PYTORCH1" + bytes(99)), "preview of torch 1.0", id="preview"),
        pytest.param(lambda path: path.write_bytes(pickle.dumps({}, 2)), "bare pickle", id="pickle"),
    ],
)
def test_older_formats_are_named_and_the_hint_is_to_save_again(
    tmp_path: Path, write: Callable[[Path], object], says: str
) -> None:
    write(tmp_path / "a.pt")
    assert "torch.save of torch 1.6 or newer" in refuse(tmp_path / "a.pt", says).hint


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(b"", "the file is empty", id="empty"),
        pytest.param(b"P", "not a torch archive: it starts with 50", id="one-byte"),
        pytest.param(b"PK\3\4", "no end record", id="four-bytes"),
        pytest.param(b"PK\5\6" + bytes(18), "holds no record", id="empty-zip"),
        pytest.param(b"\x93NUMPY\1\0v\0", "not a torch archive: it starts with 93 4e 55", id="numpy"),
        pytest.param(b"\x0a\x10checkpoint", "not a torch archive", id="mindspore"),
        pytest.param(b"PK\3\4" + END.pack(b"PK\5\6", 0, 0, 0, 0, 0, 4, 0), "holds no record", id="no-entries"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "a.pt").write_bytes(data)
    refuse(tmp_path / "a.pt", says)


def test_missing_file_is_a_missing_input(tmp_path: Path) -> None:
    for path in (tmp_path / "no.pt", tmp_path / "no" / "no.pt"):
        with pytest.raises(MissingInputError, match="is not there"):
            Archive.open(path)


def test_folder_and_pipe_are_refused_without_waiting(tmp_path: Path) -> None:
    refuse(tmp_path, "found a folder")
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "not a regular file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_closed_file_names_uid_and_hint(tmp_path: Path) -> None:
    (tmp_path / "a.pt").touch(mode=0)
    with pytest.raises(FileAccessError, match="permission denied: this process runs as uid"):
        Archive.open(tmp_path / "a.pt")


def test_device_error_is_reported_as_such(tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, nbytes: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    (tmp_path / "a.pt").write_bytes(whole)
    monkeypatch.setattr("os.pread", fail)
    with pytest.raises(FileAccessError, match=r"reading failed: the device or the server .* \(Input/output error\)"):
        Archive.open(tmp_path / "a.pt")


def test_file_that_shrinks_after_it_was_opened_is_reported_as_such(tmp_path: Path, whole: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(whole)
    archive = Archive.open(tmp_path / "a.pt")
    os.truncate(tmp_path / "a.pt", 700)
    with pytest.raises(FileAccessError, match="ended at byte"):
        archive.verify_crcs()


# -------------------------------------------------------------------------------------- everything else is an error too


def test_every_truncation_is_refused(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(whole)
    for size in reversed(range(len(whole))):
        os.truncate(path, size)
        with pytest.raises(FormatError):
            Archive.open(path)


def read_all(path: Path) -> None:
    """Whatever the bytes are: a reading, or one of our errors; and never a record outside the file."""
    with suppress(Ckpt2ptError):
        archive = Archive.open(path)
        for _, extent, _ in archive.records.values():
            assert 0 <= extent.offset <= extent.offset + extent.nbytes <= archive.nbytes
        archive.verify_crcs()


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_every_single_byte_may_be_wrong(whole: bytes, tmp_path: Path, flip: int) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(whole)
    with path.open("r+b", buffering=0) as file:
        for at, value in enumerate(whole):
            os.pwrite(file.fileno(), bytes([value ^ flip]), at)
            read_all(path)
            os.pwrite(file.fileno(), bytes([value]), at)


interesting = st.sampled_from(
    [b"\0" * 2, b"\xff" * 2, b"\xff" * 4, b"\xff" * 8, b"\0" * 8, bytes(7) + b"\x80", b"PK\1\2", b"PK\3\4", b"PK\5\6"]
) | st.binary(min_size=1, max_size=8)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mixture_of_damage_ends_in_a_reading_or_in_our_error(
    whole: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    mutant = bytearray(whole)
    places = st.integers(0, len(whole) - 1) | st.integers(Victim(whole).directory, len(whole) - 1)
    for at, new in data.draw(st.lists(st.tuples(places, interesting), min_size=1, max_size=6)):
        mutant[at : at + len(new)] = new
    if data.draw(st.booleans()):
        start, stop = sorted(data.draw(st.tuples(places, places)))
        del mutant[start:stop]
    (tmp_path / "a.pt").write_bytes(mutant)
    read_all(tmp_path / "a.pt")


def test_absurd_numbers_cost_no_memory(whole: bytes, tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        for field, (_, kind) in OF_END64.items():
            for bits in (31, 8 * struct.calcsize(kind)):
                victim = Victim(whole)
                victim.ends(nbytes=M, offset=M, count=0xFFFF, here=0xFFFF)
                victim.ends64(**{field: (1 << bits) - 1})
                (tmp_path / "a.pt").write_bytes(victim.data)
                read_all(tmp_path / "a.pt")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_directory_as_large_as_a_file_of_terabytes_is_refused_unread(tmp_path: Path) -> None:
    nbytes = 1 << 40
    with (tmp_path / "a.pt").open("wb") as file:
        file.write(b"PK\3\4")
        file.seek(nbytes, os.SEEK_CUR)
        file.write(END64.pack(b"PK\6\6", END64.size - 12, 0, 0, 0, 0, 1 << 20, 1 << 20, nbytes, 4))
        file.write(LOCATOR.pack(b"PK\6\7", 0, 4 + nbytes, 1) + END.pack(b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, M, M, 0))
    refuse(tmp_path / "a.pt", f"a directory of {nbytes:,} bytes; at most")
