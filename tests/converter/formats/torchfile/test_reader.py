from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch

from ckpt2pt.errors import FormatError
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.reader import PtFile
from ckpt2pt.io.checksums import crc32


def test_golden_archives_are_read_as_zipfile_reads_them(golden_set: Path) -> None:
    archives = sorted(golden_set.rglob("*.pt"))
    assert archives
    for path in archives:
        archive = Archive.open(path)
        archive.verify_crcs()
        assert archive.nbytes == path.stat().st_size
        with zipfile.ZipFile(path) as seen, path.open("rb") as file:
            infos = {info.filename.removeprefix(f"{archive.stem}/"): info for info in seen.infolist()}
            assert list(archive.records) == list(infos)
            for name, (_, extent, crc) in archive.records.items():
                assert (extent.nbytes, crc) == (infos[name].file_size, infos[name].CRC)
                assert os.pread(file.fileno(), extent.nbytes, extent.offset) == seen.read(infos[name])
            assert archive.pickle == seen.read(infos["data.pkl"])
        assert archive.storages == {
            name[5:]: extent for name, extent, _ in archive.records.values() if name.startswith("data/")
        }


def old_archive(path: Path) -> None:
    """An archive as torch 1.6 laid it out: none of the small records that came later."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", b"pickle")
        archive.writestr("archive/data/94823", b"12345678")
        archive.writestr("archive/version", b"3\n")


def test_archive_of_torch_1_6_is_read(tmp_path: Path) -> None:
    old_archive(tmp_path / "old.pt")
    archive = Archive.open(tmp_path / "old.pt")
    extent = archive.storages["94823"]
    assert (archive.stem, archive.pickle) == ("archive", b"pickle")
    assert (tmp_path / "old.pt").read_bytes()[extent.offset :][: extent.nbytes] == b"12345678"


def test_stem_may_differ_from_the_name_of_the_file(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model_optim_rng.pt")
    (tmp_path / "model_optim_rng.pt").rename(tmp_path / "renamed.bin")
    assert Archive.open(tmp_path / "renamed.bin").stem == "model_optim_rng"


def test_a_comment_at_the_end_does_no_harm(tmp_path: Path) -> None:
    torch.save(torch.ones(3), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive:
        archive.comment = b"a comment with PK\5\6 in it"
    assert list(Archive.open(tmp_path / "a.pt").storages) == ["0"]


def test_tensor_that_holds_a_zip_file_does_no_harm(tmp_path: Path) -> None:
    torch.save(torch.ones(3), tmp_path / "inner.pt")
    inner = bytearray((tmp_path / "inner.pt").read_bytes())
    torch.save(torch.frombuffer(inner, dtype=torch.uint8), tmp_path / "outer.pt")
    assert Archive.open(tmp_path / "outer.pt").storages["0"].nbytes == len(inner)


def test_no_file_stays_open(tmp_path: Path) -> None:
    torch.save(torch.ones(3), tmp_path / "a.pt")
    before = len(os.listdir("/proc/self/fd"))
    archive = Archive.open(tmp_path / "a.pt")
    archive.verify_crcs()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["data/0", "data/1", "version", ".data/serialization_id"])
def test_flipped_bit_is_found_by_the_crc_of_its_record(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.pt"
    torch.save([torch.ones(3), torch.ones(300_000)], path)
    extent = Archive.open(path).records[name].extent
    data = bytearray(path.read_bytes())
    data[extent.offset + extent.nbytes - 1] ^= 1
    path.write_bytes(data)
    archive = Archive.open(path)
    with pytest.raises(FormatError, match=f"CRC-32 of {name} is"):
        archive.verify_crcs()


def test_flipped_bit_in_the_pickle_is_found_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(torch.ones(3), path)
    offset = Archive.open(path).records["data.pkl"].extent.offset
    data = bytearray(path.read_bytes())
    data[offset + 10] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"CRC-32 of data\.pkl is"):
        Archive.open(path)


def without_crcs(path: Path) -> Archive:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.ones(3), path)
    finally:
        torch.serialization.set_crc32_options(True)
    return Archive.open(path)


def test_file_without_crcs_can_be_read_but_not_verified(tmp_path: Path) -> None:
    archive = without_crcs(tmp_path / "a.pt")
    with pytest.raises(FormatError, match=r"no CRC-32 is stored for data\.pkl"):
        archive.verify_crcs()


def test_only_what_was_not_read_is_read_again_for_the_crc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    torch.save([torch.arange(1000.0), torch.ones(7), torch.zeros(5)], path)
    archive, data = Archive.open(path), path.read_bytes()
    first, second = (archive.records[name].extent for name in ("data/0", "data/1"))

    def piece(start: int, stop: int) -> tuple[int, int, int]:
        return start, stop - start, crc32(data[start:stop], 0)

    end, other = first.offset + first.nbytes, second.offset
    pieces = [piece(first.offset + 8, first.offset + 800), piece(first.offset + 900, end), piece(other, other + 28)]
    read: list[int] = []
    real = PtFile._pread

    def counted(self: PtFile, offset: int, nbytes: int) -> bytes:
        if first.offset <= offset and offset + nbytes <= other + 64:  # and not the directory behind
            read.append(nbytes)
        return real(self, offset, nbytes)

    monkeypatch.setattr(PtFile, "_pread", counted)
    Archive.prove_read(Path(archive.path), pieces)
    Archive.prove_read(Path(archive.path), [*pieces, piece(first.offset, first.offset + 400)])
    assert sum(read) == 8 + 100 + 400 + 100, "a piece that begins inside another one is read again"
    wrong = [(*pieces[2][:2], pieces[2][2] ^ 1)]
    with pytest.raises(FormatError, match="CRC-32 of data/1 is"):
        Archive.prove_read(Path(archive.path), wrong)


def test_without_crcs_there_is_nothing_to_prove(tmp_path: Path) -> None:
    archive = without_crcs(tmp_path / "a.pt")
    Archive.prove_read(Path(archive.path), [(archive.storages["0"].offset, 12, 1)])
