"""Megatron's checkpoints read backwards: torch judges where each tensor lies; damaged ones are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.errors import FormatError, MissingInputError
from ckpt2pt.formats.folders import iteration_folder
from ckpt2pt.formats.megatron.headers import rank_folders, read_rank
from goldens import golden_sets


def loaded(ref: TensorRef) -> torch.Tensor:
    (extent,) = ref.extents
    with Path(extent.path).open("rb") as file:
        file.seek(extent.offset)
        raw = bytearray(file.read(extent.nbytes))
    return torch.frombuffer(raw, dtype=getattr(torch, ref.dtype)).reshape(ref.shape)


@pytest.mark.parametrize("folder", golden_sets(), ids=lambda folder: folder.name)
def test_every_tensor_is_what_torch_loads(folder: Path) -> None:
    for place in rank_folders(iteration_folder(folder / "A")).values():
        rank = read_rank(place)
        optim = torch.load(place / "distrib_optim.pt")
        buffers = [buffer for number, buffer in optim.items() if isinstance(number, int)]
        assert rank.buffers is not None
        for stored, buffer in zip(rank.buffers, buffers, strict=True):
            (kinds,) = buffer.values()
            for index, bucket in enumerate(stored):
                for kind, ref in bucket.tensors.items():
                    assert torch.equal(loaded(ref).view(torch.int32), kinds[kind][index].view(torch.int32))
        assert sum(ref.numel for chunk in rank.chunks for _, ref in chunk) == sum(
            bucket.numel_unpadded for buffer in rank.buffers for bucket in buffer
        )


def save(folder: Path, *, model: Any = None, optim: Any = None, **more: Any) -> Path:
    place = folder / "mp_rank_00"
    place.mkdir(exist_ok=True)
    weights = {"language_model": {"encoder": {"final_norm.weight": torch.ones(4)}}} if model is None else model
    torch.save({"iteration": 3, "model": weights} | more, place / "model_optim_rng.pt")
    if optim is not None:
        torch.save(optim, place / "distrib_optim.pt")
    return place


def buckets(numel: int = 4, *, header: int = 4) -> dict[Any, Any]:
    key = (torch.bfloat16, torch.float32)
    lists = {kind: [torch.zeros(numel)] for kind in ("param", "exp_avg", "exp_avg_sq")}
    return {"per_bucket_numel": [{key: [header]}], "per_bucket_numel_unpadded": [{key: [header]}], 0: {key: lists}}


def test_extra_states_are_no_parameters_and_the_tied_head_has_its_buffer_name(tmp_path: Path) -> None:
    model = {
        "language_model": {
            "encoder": {"layers.0.mlp.dense_4h_to_h._extra_state": None, "final_norm.weight": torch.ones(2)}
        },
        "word_embeddings_for_head": {"weight": torch.ones(3, 2)},
    }
    (chunk,) = read_rank(save(tmp_path, model=model)).chunks
    assert [name for name, _ in chunk] == ["language_model.encoder.final_norm.weight", "word_embeddings.weight"]


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    for name in ("mp_rank_00_000", "mp_rank_01_000", "mp_rank_00_001"):
        (tmp_path / name).mkdir()
    with pytest.raises(MissingInputError, match="1 of 4 ranks are missing: tp 1 pp 1"):
        rank_folders(tmp_path)


def test_no_rank_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no mp_rank"):
        rank_folders(tmp_path)
    with pytest.raises(MissingInputError, match="not there"):
        rank_folders(tmp_path / "none")


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ({"mtp.layers.0.eh_proj.weight": torch.ones(2)}, "no parameter of a GPT model"),
        ({"decoder.layers.0.mlp.router.weight": torch.ones(2)}, "mixture of experts"),
        ({"language_model": {"encoder": {"final_norm.weight": "text"}}}, "not a tensor"),
        ({"language_model": {"encoder": {"final_norm.weight": torch.ones(2, 3).t()}}}, "not a contiguous tensor"),
    ],
)
def test_models_that_cannot_be_read(model: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=what):
        read_rank(save(tmp_path, model=model))


@pytest.mark.parametrize(
    ("optim", "what"),
    [
        ({"buckets_coalesced": True}, "there is no buffer"),
        ({}, "there is no buffer"),
        ({0: {(torch.bfloat16, torch.float32): {}}}, "neither numel_unpadded"),
        (buckets(3), "float32 with 3 elements"),
        (buckets(5), "float32 with 5 elements"),
        (buckets() | {1: {}}, "1 entries for 2 buffers"),
        (buckets() | {0: {}}, "dictionary of buckets is missing"),
        ({key: value for key, value in buckets().items() if key != "per_bucket_numel"}, "a list of buckets is missing"),
    ],
)
def test_optimizers_that_cannot_be_read(optim: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=what):
        read_rank(save(tmp_path, optim=optim))


def test_chunks_are_numbered_without_a_gap(tmp_path: Path) -> None:
    place = save(tmp_path, model={}, model1={}, model3={})
    with pytest.raises(FormatError, match="model chunks are"):
        read_rank(place)
