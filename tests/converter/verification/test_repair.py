"""The proof of a repair finds whatever is not as the source has it, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt2pt.formats.torchfile.archive import Archive, archive_bytes
from ckpt2pt.formats.torchfile.pickles import read_pickle, write_pickle
from ckpt2pt.formats.torchfile.trees import MISSING, Call, Value, as_tensor, entries, tensor
from ckpt2pt.verification.repair import compare_repaired

NAMES = ("model_optim_rng.pt", "distrib_optim.pt")


def compared(golden: Path, folder: Path) -> list[str]:
    source = golden / "msadapter/moe_ep2/iter_0000002/mp_rank_00_000"
    report, crcs = compare_repaired(
        {name: source / name for name in NAMES}, {name: folder / name for name in NAMES}, lambda _: None
    )
    assert crcs.keys() == set(NAMES)
    return [f"{one.file}: {one.tensor}: {one.problem}" for one in report.differences]


def opened(golden: Path, name: str) -> tuple[Value, list[bytes]]:
    """What Megatron itself saved of the same rank."""
    path = golden / "reference_torch/moe_ep2/iter_0000002/mp_rank_00_000" / name
    archive = Archive.open(path)
    data = path.read_bytes()
    payloads = [
        data[one.offset :][: one.nbytes] for _, one in sorted(archive.storages.items(), key=lambda item: int(item[0]))
    ]
    tree = read_pickle(archive.pickle, where=name)
    if isinstance(tree, dict) and isinstance(tree["model"], Call):
        tree["model"].state = MISSING  # the versions of its modules, which MSAdapter does not save
    return tree, payloads


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / name).write_bytes(archive_bytes(name[:-3], *_parts(golden, name)))
    return tmp_path


def _parts(golden: Path, name: str) -> tuple[bytes, list[bytes]]:
    tree, payloads = opened(golden, name)
    return write_pickle(tree), payloads


def test_what_megatron_itself_saved_is_right(golden: Path, folder: Path) -> None:
    assert compared(golden, folder) == []


def test_one_bit_is_found(golden: Path, folder: Path) -> None:
    tree, payloads = opened(golden, NAMES[1])
    payloads[1] = bytes([payloads[1][0] ^ 1]) + payloads[1][1:]
    (folder / NAMES[1]).write_bytes(archive_bytes("distrib_optim", write_pickle(tree), payloads))
    [line] = compared(golden, folder)
    assert "1 of 14,912 elements differ" in line


def test_counts_keys_and_generators_are_compared(golden: Path, folder: Path) -> None:
    tree, payloads = opened(golden, NAMES[1])
    assert isinstance(tree, list)
    assert isinstance(tree[0], dict)
    buffers = tree[0][0]
    assert isinstance(buffers, dict)
    [kinds] = buffers.values()
    assert isinstance(kinds, dict)
    kinds["numel_unpadded"] = 14911
    kinds["more"] = 1
    (folder / NAMES[1]).write_bytes(archive_bytes("distrib_optim", write_pickle(tree), payloads))
    model, storages = opened(golden, NAMES[0])
    assert isinstance(model, dict)
    states = model["rng_state"]
    assert isinstance(states, list)
    assert isinstance(states[0], dict)
    held = as_tensor(states[0]["torch_rng_state"])
    assert held
    storages[int(held.key)] = bytes(16)
    states[0]["torch_rng_state"] = tensor("uint8", held.key, 16, 0, (16,))
    model["iteration"] = 3
    weights = model["model"]
    assert not isinstance(weights, dict)
    pairs = entries(weights)
    assert pairs
    (folder / NAMES[0]).write_bytes(archive_bytes("model_optim_rng", write_pickle(model), storages))
    found = "\n".join(compared(golden, folder))
    for said in (
        "numel_unpadded: has another value", "/more: unexpected", "/iteration: has another value",
        "torch_rng_state: is no state of a generator of torch",
    ):  # fmt: skip
        assert said in found


def test_a_result_that_torch_does_not_read_is_a_difference(golden: Path, folder: Path) -> None:
    source = golden / "msadapter/moe_ep2/iter_0000002/mp_rank_00_000"
    (folder / NAMES[0]).write_bytes((source / NAMES[0]).read_bytes())
    [line] = compared(golden, folder)
    assert "model_optim_rng.pt: file: the pickle names mindspore" in line
