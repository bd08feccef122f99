"""Buckets of dp_reshardable are distinguished by the order of the parameters and proved by the weights, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import ckpt2pt
from ckpt2pt.core.tensor import ROLES
from ckpt2pt.errors import InputError
from ckpt2pt.formats.torchfile.trees import namespace
from torchdist import Array, Piece, whole, write_folder

HIDDEN, FFN, VOCABULARY, POSITIONS = 8, 20, 24, 5
STATE = "optimizer.distributed.dp_group_idx_{}.gbuf_idx_{}.dtype_(torch.bfloat16, torch.float32).bucket_idx_{}.{}"


class Run(NamedTuple):
    """A training: how it is cut, which layers each (stage, chunk) has, and after how many elements a bucket ends."""

    tensor: int
    layers: tuple[tuple[int, ...], ...]
    fused: bool = False
    tied: bool = False
    bucket: int = 1 << 30
    data: int = 1

    @property
    def stages(self) -> int:
        return len(self.layers[0])


RUNS = {
    "one rank": Run(1, ((3,),)),
    "tensor and pipeline parallel, unevenly": Run(2, ((1, 3),)),
    "Transformer Engine's order": Run(2, ((2, 1),), fused=True),
    "tied embeddings over stages": Run(2, ((1, 2),), tied=True),
    "tied embeddings on one stage": Run(2, ((2,),), tied=True),
    "several buckets, cut for three ranks": Run(1, ((3,),), bucket=300, data=3),
    "interleaved stages, one without layers": Run(1, ((1, 1), (1, 0))),
}


def shapes(layer: int) -> dict[str, tuple[int, ...]]:
    """The weights of a layer by their canonical names, in the order of Megatron's own modules."""
    at = f"decoder.layers.{layer}."
    return {
        f"{at}input_layernorm.weight": (HIDDEN,), f"{at}input_layernorm.bias": (HIDDEN,),
        f"{at}self_attention.linear_proj.weight": (HIDDEN, HIDDEN), f"{at}self_attention.linear_proj.bias": (HIDDEN,),
        f"{at}self_attention.linear_qkv.weight": (3 * HIDDEN, HIDDEN), f"{at}self_attention.linear_qkv.bias": (3 * HIDDEN,),
        f"{at}pre_mlp_layernorm.weight": (HIDDEN,), f"{at}pre_mlp_layernorm.bias": (HIDDEN,),
        f"{at}mlp.linear_fc1.weight": (2 * FFN, HIDDEN), f"{at}mlp.linear_fc1.bias": (2 * FFN,),
        f"{at}mlp.linear_fc2.weight": (HIDDEN, FFN), f"{at}mlp.linear_fc2.bias": (HIDDEN,),
    }  # fmt: skip


def names_of(run: Run, stage: int, chunk: int) -> list[str]:
    """What a rank registers, in order."""
    before = sum(row[s] for c, row in enumerate(run.layers) for s in range(run.stages) if (c, s) < (chunk, stage))
    found = (
        ["embedding.word_embeddings.weight", "embedding.position_embeddings.weight"] if (stage, chunk) == (0, 0) else []
    )
    for layer in range(before, before + run.layers[chunk][stage]):
        own = list(shapes(layer))
        found += own[2:4] + own[:2] + own[4:] if run.fused else own
    if (stage, chunk) == (run.stages - 1, len(run.layers) - 1):
        found += ["decoder.final_layernorm.weight", "decoder.final_layernorm.bias"]
        found += [] if run.tied and run.stages == 1 else ["output_layer.weight"]
    return found


def part(name: str, array: Array, tp: int, run: Run) -> Array:
    """What a tensor-parallel rank holds."""
    if "linear_fc1" in name:
        return np.concatenate([np.split(half, run.tensor)[tp] for half in np.split(array, 2)])
    if "linear_qkv" in name or "word_embeddings" in name or "output_layer" in name:
        return np.split(array, run.tensor)[tp]
    return np.split(array, run.tensor, 1)[tp] if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else array


def filled(arrays: dict[str, Array], names: list[str], tp: int, run: Run) -> list[Array]:
    """The buckets of a rank: parameters from the last to the first, each at a multiple of 64."""
    buckets: list[list[Array]] = [[]]
    for name in reversed(names):
        shared = run.tied and run.stages > 1 and name in {"output_layer.weight", "embedding.word_embeddings.weight"}
        if buckets[-1] and (shared or sum(map(len, buckets[-1])) >= run.bucket):
            buckets.append([])
        held = sum(map(len, buckets[-1]))
        buckets[-1] += [np.zeros(-held % 64, "<f4"), part(name, arrays[name], tp, run).ravel()]
        if shared:
            buckets.append([])
    return [np.concatenate(one) for one in buckets if one]


def made(
    path: Path, run: Run, change: Callable[[dict[str, Any]], object] = lambda _: None
) -> dict[str, dict[str, Array]]:
    """Write such a checkpoint; role -> name -> elements."""
    random = np.random.default_rng(0)
    layers = sum(map(sum, run.layers))
    sizes = {
        "embedding.word_embeddings.weight": (VOCABULARY, HIDDEN), "embedding.position_embeddings.weight": (POSITIONS, HIDDEN),
        **{name: shape for layer in range(layers) for name, shape in shapes(layer).items()},
        "decoder.final_layernorm.weight": (HIDDEN,), "decoder.final_layernorm.bias": (HIDDEN,),
        **({} if run.tied else {"output_layer.weight": (VOCABULARY, HIDDEN)}),
    }  # fmt: skip
    truth = {
        role: {name: random.normal(size=shape).astype("<f4") for name, shape in sizes.items()} for role in ROLES[1:]
    }
    halves = {name: ((array.view("<u4") + 0x8000) >> 16).astype("<u2") for name, array in truth["main_param"].items()}
    keys: dict[str, Any] = {name: (array, whole(array)) for name, array in halves.items()}
    for role, kind in zip(ROLES[1:], ("param", "exp_avg", "exp_avg_sq"), strict=True):
        arrays = truth[role] | (
            {"output_layer.weight": truth[role]["embedding.word_embeddings.weight"]} if run.tied else {}
        )
        for rank in range(run.tensor * run.stages):
            for chunk in range(len(run.layers)):
                names = names_of(run, rank // run.tensor, chunk)
                for number, bucket in enumerate(filled(arrays, names, rank % run.tensor, run)):
                    keys[STATE.format(rank, chunk, number, kind)] = bucket, pieces(len(bucket), run.data)
    args = {
        "tensor_model_parallel_size": run.tensor, "pipeline_model_parallel_size": run.stages,
        "transformer_impl": "transformer_engine" if run.fused else "local",
    }  # fmt: skip
    change(keys)
    write_folder(path, keys, common={"args": namespace(args)})
    return {
        **{str(role): held for role, held in truth.items()},
        "param": {name: (half.astype("<u4") << 16).view("<f4") for name, half in halves.items()},
    }


def pieces(numel: int, ranks: int) -> list[Piece]:
    """What each data-parallel rank writes."""
    each = -(-numel // ranks)
    return [Piece((at,), (min(each, numel - at),), f"__{at}_0.distcp") for at in range(0, numel, each)]


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_every_parameter_is_found_in_its_bucket(tmp_path: Path, run: Run) -> None:
    truth = made(tmp_path / "x", run)
    with ckpt2pt.open(tmp_path / "x") as checkpoint:
        for role in ROLES:
            assert set(checkpoint.keys(role)) == set(truth[role])
            for name, array in truth[role].items():
                np.testing.assert_array_equal(checkpoint.get(name, role), array, f"{role} {name}")


def test_the_order_of_keys_in_the_index_does_not_matter(tmp_path: Path) -> None:
    def turn(keys: dict[str, Any]) -> None:
        rows = list(keys.items())[::-1]
        keys.clear()
        keys.update(rows)

    truth = made(tmp_path / "x", RUNS["tied embeddings over stages"], turn)
    with ckpt2pt.open(tmp_path / "x") as checkpoint:
        for name, array in truth["exp_avg"].items():
            np.testing.assert_array_equal(checkpoint.get(name, "exp_avg"), array, name)


def shortened(keys: dict[str, Any]) -> None:
    for key, (array, _) in list(keys.items()):
        if "bucket_idx_" in key:
            keys[key] = array[:-64], whole(array[:-64])


def lost(keys: dict[str, Any]) -> None:
    del keys[STATE.format(0, 0, 0, "exp_avg")]


def turned(keys: dict[str, Any]) -> None:
    for key in [key for key in keys if "dp_group_idx_" in key]:
        other = key.replace("idx_0.g", "idx_X.g").replace("idx_1.g", "idx_0.g").replace("idx_X.g", "idx_1.g")
        if key < other:
            keys[key], keys[other] = keys[other], keys[key]


def unknown(keys: dict[str, Any]) -> None:
    array = np.zeros(math.prod((4, 4)), "<f4").reshape(4, 4)
    keys["decoder.layers.0.mixer.weight"] = array, whole(array)


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        (shortened, "no number of layers fills"),
        (lost, "the buckets of exp_avg are not those of the main parameters"),
        (turned, "do not round to the weights"),
        (unknown, "the place of decoder.layers.0.mixer.weight in them is not known"),
    ],
)
def test_what_cannot_be_proved_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], reported: str
) -> None:
    made(tmp_path / "x", Run(2, ((2,),)), change)
    with pytest.raises(InputError, match=reported) as caught:
        ckpt2pt.open(tmp_path / "x")
    assert "convert weights alone" in str(caught.value.hint)


def test_a_bucket_with_a_hole_is_refused(tmp_path: Path) -> None:
    def holed(keys: dict[str, Any]) -> None:
        for key, (array, _) in list(keys.items()):
            if "bucket_idx_" in key:
                keys[key] = array, [Piece((0,), (10,)), Piece((20,), (len(array) - 20,))]

    made(tmp_path / "x", Run(1, ((1,),)), holed)
    with pytest.raises(InputError, match="holds element 10 of one"):
        ckpt2pt.open(tmp_path / "x")
