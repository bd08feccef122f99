"""Files written are those that mindspore writes, byte for byte, and are read back as what was asked for."""

from __future__ import annotations

import json
import math
import stat
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from checked import checked
from ckpt2pt.core.extents import DTYPE_BYTES, Extent, TensorRef
from ckpt2pt.core.tensor import Key
from ckpt2pt.engine.write import Stop, write_files
from ckpt2pt.errors import InputError, aside
from ckpt2pt.formats.mindspore import index_file, read_scalar
from ckpt2pt.formats.mindspore.entries import Entry, TensorBox, number_entry, text_entry
from ckpt2pt.formats.mindspore.writer import CkptFile, MindSporeFile, SafetensorsFile, mindspore_file
from ckptfiles import Tensor, some_tensors
from entries import entry_of, moves_into
from goldens import golden_root

SUFFIXES = ("ckpt", "safetensors")


def write(folder: Path, file: MindSporeFile, refs: Iterable[TensorRef] = ()) -> Path:
    folder.mkdir(exist_ok=True)
    moves = moves_into(file, refs)
    (written,), digests = write_files(folder, [file], moves, stop=Stop(), advance=lambda _: None, check=True)
    data = written.path.read_bytes()
    assert (written.nbytes, written.crc32) == (len(data), zlib.crc32(data))
    assert not list(folder.glob(".*"))
    assert digests.keys() == {f"param:{e.name}" for e in file.entries if not isinstance(e.source, bytes) and e.nbytes}
    return written.path


def payload(ref: TensorRef) -> bytes:
    return b"".join(Path(e.path).read_bytes()[e.offset : e.offset + e.nbytes] for e in ref.extents)


def at_hand(ref: TensorRef) -> Entry:
    if ref.dtype == "str":
        return text_entry(ref.name, str(read_scalar(ref)))
    return Entry(name=ref.name, dtype=ref.dtype, shape=ref.shape, source=payload(ref))


def mixed(ref: TensorRef) -> Entry:
    return entry_of(ref) if ref.numel > 1 and ref.dtype != "str" else at_hand(ref)


# ------------------------------------------------------------------------------------------------ what mindspore wrote

SAME_BYTES = {
    "all_dtypes.ckpt": (False, None),
    "append_dict.ckpt": (False, None),
    "crc.ckpt": (True, None),
    "sliced_bytes.ckpt": (False, 1024),
    "sliced_crc.ckpt": (True, 1024),
    "all_dtypes.safetensors": (False, None),
    "append_dict.safetensors": (False, None),
}


@pytest.mark.parametrize("name", SAME_BYTES)
@pytest.mark.parametrize("entry", [at_hand, mixed], ids=["given", "streamed"])
def test_a_file_of_mindspore_written_again_is_the_same_to_the_byte(
    name: str, entry: Callable[[TensorRef], Entry], tmp_path: Path
) -> None:
    golden = golden_root() / "mindspore" / name
    crc, limit = SAME_BYTES[name]
    refs = index_file(golden).values()
    entries = tuple(map(entry, refs))
    suffix = golden.suffix[1:]
    file = mindspore_file(suffix, name, entries, crc=crc)
    if limit:
        file = CkptFile(name=name, entries=entries, crc=crc, slice_bytes=limit)
    ours, theirs = write(tmp_path / "out", file, refs).read_bytes(), golden.read_bytes()
    if suffix == "safetensors":
        # The library keeps __metadata__ in a hash table: its order changes from run to run.
        for data in (ours, theirs):
            assert int.from_bytes(data[:8], "little") % 8 == 0
        ours, theirs = (
            data.replace(b'"format":"ms","t.int4":"Int4"', b'"t.int4":"Int4","format":"ms"') for data in (ours, theirs)
        )
    assert ours == theirs


@pytest.mark.parametrize("rank", [0, 2])
def test_a_training_file_of_the_reference_written_again_is_the_same(rank: int, tmp_path: Path) -> None:
    folder = golden_root() / "megatron06" / "j_tp1pp2dp2" / "ms_zero_merged" / f"rank_{rank}"
    (golden,) = folder.glob("*.ckpt")
    refs = index_file(golden).values()
    file = CkptFile(name=golden.name, entries=tuple(map(mixed, refs)))
    assert write(tmp_path / "out", file, refs).read_bytes() == golden.read_bytes()


# ---------------------------------------------------------------------------------------------- what our readers promise


def source_of(tensors: list[Tensor], path: Path) -> list[TensorRef]:
    """The tensors laid into one raw file, each in two extents."""
    refs: list[TensorRef] = []
    data = b""
    for each in tensors:
        half = len(each.data) // 2
        cuts = ((len(data), half), (len(data) + half, len(each.data) - half))
        extents = tuple(Extent(str(path), start, size) for start, size in cuts if size)
        refs.append(TensorRef(each.name, each.dtype, each.shape, extents))
        data += each.data
    path.write_bytes(data)
    return refs


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_type_and_shape_comes_back(suffix: str, tmp_path: Path) -> None:
    tensors = some_tensors()
    refs = source_of(tensors, tmp_path / "raw")
    path = write(tmp_path / "out", mindspore_file(suffix, "x", [*map(entry_of, refs)]), refs)
    found = index_file(path)
    assert {Tensor(ref.name, ref.dtype, ref.shape, payload(ref)) for ref in found.values()} == set(tensors)
    if suffix == "ckpt":
        assert list(found) == [each.name for each in tensors]


@pytest.mark.parametrize("crc", [False, True])
@pytest.mark.parametrize("limit", [8, 24, 1 << 10])
def test_slices_and_checksum_come_back_and_a_reader_that_checks_agrees(crc: bool, limit: int, tmp_path: Path) -> None:
    tensors = some_tensors()
    refs = source_of(tensors, tmp_path / "raw")
    file = CkptFile(name="x.ckpt", entries=tuple(map(entry_of, refs)), crc=crc, slice_bytes=limit)
    path = write(tmp_path / "out", file, refs)
    found = checked(path)
    assert {ref.name: payload(ref) for ref in found.values()} == {each.name: each.data for each in tensors}
    assert {name: len(ref.extents) for name, ref in found.items()} == {
        each.name: -(-len(each.data) // limit) for each in tensors
    }
    assert path.read_bytes()[-17:].startswith(b"crc_num") == crc


@settings(deadline=None, max_examples=40)  # each writes a file
@given(
    st.lists(
        st.tuples(
            st.text(min_size=1, max_size=200),
            st.sampled_from(sorted(set(DTYPE_BYTES) - {"complex64"})),
            st.lists(st.integers(0, 5), max_size=3),
        ),
        max_size=8,
        min_size=1,
        unique_by=lambda each: each[0],
    ),
    st.booleans(),
)
def test_any_entries_come_back(
    tmp_path_factory: pytest.TempPathFactory, described: list[tuple[str, str, list[int]]], crc: bool
) -> None:
    folder = tmp_path_factory.mktemp("any")
    entries: list[Entry] = []
    for name, dtype, shape in described:
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        entries.append(Entry(name=name, dtype=dtype, shape=tuple(shape), source=bytes(nbytes)))
    path = write(folder, CkptFile(name="x.ckpt", entries=tuple(entries), crc=crc, slice_bytes=64))
    found = checked(path)
    # One element under dims [0] would be a legacy scalar; an empty tensor of one dimension has none.
    assert [(r.name, r.dtype, r.shape, payload(r)) for r in found.values()] == [
        (e.name, e.dtype, e.shape, e.source) for e in entries
    ]


def test_types_are_cast_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"\x80\x3f\x00\xc0")
    source = TensorRef("w", "bfloat16", (2,), (Extent(str(tmp_path / "raw"), 0, 4),))
    for suffix in SUFFIXES:
        file = mindspore_file(suffix, f"x.{suffix}", [entry_of(source, "float32")])
        assert payload(index_file(write(tmp_path / "out", file, [source]))["w"]) == b"\0\0\x80\x3f\0\0\x00\xc0"


def test_numbers_and_texts_are_entries_too(tmp_path: Path) -> None:
    entries = (
        number_entry("step_num", 7, "int64"),
        number_entry("lr", 0.5, "float32"),
        number_entry("max_lr", 0.1, "float64"),
        number_entry("flag", True, "bool"),
        text_entry("text", "naïve 𝄞"),
        text_entry("none", ""),
    )
    found = index_file(write(tmp_path, CkptFile(name="x.ckpt", entries=entries)))
    values = {name: read_scalar(ref) for name, ref in found.items()}
    assert values == {"step_num": 7, "lr": 0.5, "max_lr": 0.1, "flag": True, "text": "naïve 𝄞", "none": ""}


def test_a_finished_file_is_read_only_as_mindspore_leaves_it(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        file = mindspore_file(suffix, f"x.{suffix}", [number_entry("a", 1, "int64")])
        for _ in range(2):  # and may be replaced
            assert stat.S_IMODE(write(tmp_path, file).stat().st_mode) == 0o400


# ----------------------------------------------------------------------------------------------------- what is refused


def test_a_threshold_of_exactly_the_limit_is_one_entry_and_a_byte_more_is_two() -> None:
    for nbytes, wanted in ((512 << 20, 1), ((512 << 20) + 4, 2), (2 << 30, 4)):
        numel = nbytes // 4
        source = TensorRef("w", "float32", (numel,), (Extent("x", 0, nbytes),))
        layout = CkptFile(name="x", entries=(entry_of(source),)).lay_out()
        assert layout.storages == wanted
        assert layout.storage_nbytes(0) == min(nbytes, 512 << 20)
        assert sum(map(layout.storage_nbytes, range(wanted))) == nbytes


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(text_entry("t", "text"), id="text"),
        pytest.param(number_entry("crc_num", 1, "int64"), id="crc_num"),
        pytest.param(number_entry("format", 1, "int64"), id="format"),
    ],
)
def test_what_mindspore_could_not_load_from_safetensors_is_refused(entry: Entry) -> None:
    with pytest.raises(InputError, match=entry.name) as caught:
        SafetensorsFile(name="x.safetensors", entries=(entry,)).lay_out()
    assert caught.value.hint == f"write .ckpt instead{aside('target.format')}"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "entries",
    [
        pytest.param([number_entry("a", 1, "int64")] * 2, id="twice"),
        pytest.param([Entry(name="a", dtype="float32", shape=(2,), source=b"1234")], id="short"),
        pytest.param([Entry(name="a", dtype="float32", shape=(2,), source=TensorBox(Key("param", "a"), ((0,), (3,))))], id="other-shape"),
    ],
)  # fmt: skip
def test_entries_that_contradict_themselves_are_a_bug(suffix: str, entries: list[Entry]) -> None:
    with pytest.raises(ValueError, match="a"):
        mindspore_file(suffix, "x", entries).lay_out()


def test_the_header_of_a_safetensors_file_is_what_the_library_makes(tmp_path: Path) -> None:
    tensors = [each for each in some_tensors() if each.dtype != "bfloat16"]
    refs = source_of(tensors, tmp_path / "raw")
    path = write(tmp_path / "out", mindspore_file("safetensors", "x.safetensors", [*map(entry_of, refs)]), refs)
    loaded = safetensors.numpy.load_file(path)
    assert {name: (value.tobytes(), value.shape) for name, value in loaded.items()} == {
        each.name: (each.data, each.shape) for each in tensors
    }
    library = safetensors.numpy.save(loaded, metadata={"format": "ms"})
    assert path.read_bytes() == library
    assert json.loads(library[8 : 8 + int.from_bytes(library[:8], "little")])["__metadata__"] == {"format": "ms"}
