"""One mutation of each kind in a right result: each is found, whether the layout stays or changes."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from changed import metadata_of
from ckpt2pt.core.tensor import sharded
from ckpt2pt.core.topology import Topology
from ckpt2pt.discover.request import Request
from ckpt2pt.engine.casts import find_cast
from ckpt2pt.errors import VerificationError
from ckpt2pt.formats.mindspore import ranks, shards
from ckpt2pt.formats.torchfile.trees import Global, as_tensor, tensor
from ckpt2pt.run.conversion import run
from ckpt2pt.verification.gather import Files
from ckpt2pt.verification.leaves import TensorLeaf, open_pt
from conversions import Quiet
from layouts import topology
from relaid import Relaid
from results import Result, convert_request, edit_tree, flip, set_element, tree_of
from sharding import Sharding

KEY = (Global("torch", "bfloat16"), Global("torch", "float32"))
BUCKET = "/0/(torch.bfloat16, torch.float32)/{}/0"
ENCODER = "language_model.encoder.layers."
QKV = f"{ENCODER}1.self_attention.query_key_value.weight"
MODEL, OPTIM = "model_optim_rng.pt", "distrib_optim.pt"


class Damaged(NamedTuple):
    """A copy of a finished conversion: two tensor-parallel ranks, two stages, tied embeddings, padded buckets."""

    result: Result

    def path(self, name: str, rank: tuple[int, int] = (0, 0)) -> Path:
        return self.result.file(name, rank)

    def found(self) -> list[str]:
        return [
            str(one) for rank in self.result.request.topology.ranks() for one in self.result.verify(rank).differences
        ]

    def leaf(self, name: str) -> str:
        return f"/model/language_model/encoder/{name.removeprefix('language_model.encoder.')}"

    def placed(self, name: str, rank: tuple[int, int] = (0, 0)) -> int:
        """The first element of a parameter in its bucket."""
        tp, pp = rank
        document = json.loads(
            (metadata_of(self.result.request) / f"param_map_buffer0_dp0tp{tp}pp{pp}vpp0.json").read_text()
        )
        return int(document[f"module.{name}"][2])

    def places(self, name: str) -> list[tuple[Path, str, int]]:
        """(file, leaf, first element) of a weight, its main parameter and its moments."""
        slices = [
            (self.path(OPTIM), BUCKET.format(kind), self.placed(name)) for kind in ("param", "exp_avg", "exp_avg_sq")
        ]
        return [(self.path(MODEL), self.leaf(name), 0), *slices]

    def exchange(self, one: str, first: int, other: str, second: int, numel: int) -> None:
        """Exchange elements of two parameters in everything that is held of them: the files agree with each other."""
        for (path, leaf, start), (_, far, far_start) in zip(self.places(one), self.places(other), strict=True):
            here, there = elements(path, leaf, start + first, numel), elements(path, far, far_start + second, numel)
            set_element(path, leaf, start + first, there)
            set_element(path, far, far_start + second, here)


def elements(path: Path, leaf: str, start: int, numel: int) -> bytes:
    found = open_pt(path)[leaf]
    assert isinstance(found, TensorLeaf)
    with Files() as files:
        return found.elements.block(files, start, start + numel).tobytes()


def made(tensor: int, pipeline: int = 2) -> Relaid:
    return Relaid(topology=topology(tensor=tensor, pipeline=pipeline), tied=True, data=7)


@pytest.fixture(scope="module", params=[False, True], ids=["same-layout", "another-layout"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("finished")
    return convert_request(made(1).becomes(made(2), folder) if request.param else made(2).write(folder))


@pytest.fixture
def damaged(finished: Result, tmp_path: Path) -> Damaged:
    found = Damaged(finished.copied(tmp_path / "out"))
    assert found.found() == []
    return found


def _swap_q_and_k(it: Damaged) -> None:
    columns = 6
    it.exchange(QKV, 0, QKV, 2 * columns, 2 * columns)


def _swap_layers(it: Damaged) -> None:
    it.exchange(f"{ENCODER}0.input_norm.weight", 0, f"{ENCODER}1.input_norm.weight", 0, 6)


def _swap_moments(it: Damaged) -> None:
    def edit(tree: dict[Any, Any]) -> None:
        buffer = tree[0][KEY]
        buffer["exp_avg"], buffer["exp_avg_sq"] = buffer["exp_avg_sq"], buffer["exp_avg"]

    edit_tree(it.path(OPTIM), edit)


def _swap_ranks(it: Damaged) -> None:
    for name in (MODEL, OPTIM):
        one, other = it.path(name, (0, 0)), it.path(name, (1, 0))
        kept = one.read_bytes()
        shutil.copyfile(other, one)
        other.write_bytes(kept)


def _pad(it: Damaged) -> None:
    path, leaf = it.path(OPTIM), BUCKET.format("exp_avg")
    found, [used] = open_pt(path)[leaf], tree_of(path)["per_bucket_numel_unpadded"][0][KEY]
    assert isinstance(found, TensorLeaf)
    assert used < found.numel
    set_element(path, leaf, found.numel - 1, struct.pack("<f", 1e-30))


def _truncate_weight(it: Damaged) -> None:
    """Cut off instead of rounded: the first weight for which that is another number."""
    path, leaf, start = it.places(QKV)[1]
    main = np.frombuffer(elements(path, leaf, start, 48), "<u4")
    place = int(np.argmax((main & 0xFFFF) > 0x8000))
    set_element(it.path(MODEL), it.leaf(QKV), place, struct.pack("<H", int(main[place]) >> 16))


def _differ_in_tied_copy(it: Damaged) -> None:
    """The last stage's copy alone, in both of its files."""
    start = it.placed("word_embeddings.weight", (1, 1))
    one = struct.pack("<f", 2.0)
    set_element(it.path(MODEL, (1, 1)), "/model/word_embeddings_for_head/weight", 3, one[2:])
    set_element(it.path(OPTIM, (1, 1)), BUCKET.format("param"), start + 3, one)


def _edit(change: Callable[[dict[Any, Any]], object], name: str = MODEL) -> Callable[[Damaged], None]:
    def edit(tree: dict[Any, Any]) -> None:
        change(tree)

    return lambda it: edit_tree(it.path(name), edit)


def _encoder(change: Callable[[list[tuple[Any, Any]]], list[tuple[Any, Any]]]) -> Callable[[Damaged], None]:
    def edit(tree: dict[Any, Any]) -> None:
        node = tree["model"]["language_model"]["encoder"]
        node.pairs = change(node.pairs)

    return _edit(edit)


def _shorten(tree: dict[Any, Any]) -> None:
    found = as_tensor(tree[0][KEY]["exp_avg"][0])
    assert found
    shape = (found.shape[0] - 1,)
    tree[0][KEY]["exp_avg"] = [tensor("float32", found.key, found.storage_numel, 0, shape)]


NORM_LEAF = "/model/language_model/encoder/layers.1.input_norm.weight"
MUTATIONS = [
    pytest.param(lambda it: flip(it.path(MODEL), NORM_LEAF, 4), "1 of 6 elements differ from the source", id="bit-of-a-weight"),
    pytest.param(lambda it: flip(it.path(OPTIM), BUCKET.format("param"), 9), "distrib_optim.pt: param of", id="bit-of-a-main-parameter"),
    pytest.param(lambda it: flip(it.path(OPTIM), BUCKET.format("exp_avg"), 9), "distrib_optim.pt: exp_avg of", id="bit-of-a-moment"),
    pytest.param(lambda it: flip(it.path(OPTIM), BUCKET.format("exp_avg_sq"), 9), "exp_avg_sq of", id="bit-of-the-second-moment"),
    pytest.param(lambda it: flip(it.path(MODEL), "/rng_state/0/torch_rng_state", 9), "rng_state", id="bit-of-the-random-state"),
    pytest.param(_pad, "of the padding are not zero", id="padding"),
    pytest.param(_truncate_weight, f"{QKV}: 1 of 144 elements differ", id="weight-cut-off-instead-of-rounded"),
    pytest.param(_swap_q_and_k, f"exp_avg of {QKV}: 24 of 144 elements differ", id="rows-of-q-and-k"),
    pytest.param(_swap_layers, "layers.0.input_norm.weight: 6 of 6", id="layers"),
    pytest.param(_swap_moments, "exp_avg_sq of", id="moments"),
    pytest.param(_swap_ranks, "elements differ from the source", id="tensor-parallel-ranks"),
    pytest.param(_differ_in_tied_copy, "word_embeddings.weight: 1 of", id="tied-copy"),
    pytest.param(_edit(lambda tree: tree.pop("rng_state")), "/rng_state: is missing", id="key-missing"),
    pytest.param(_edit(lambda tree: tree.update(more=1)), "/more: is unexpected", id="key-more"),
    pytest.param(_encoder(lambda pairs: pairs[1:]), "input_norm.weight: is missing", id="weight-missing"),
    pytest.param(
        _encoder(lambda pairs: [*pairs, ("layers.7.input_norm.weight", pairs[0][1])]), "layers.7.input_norm.weight: is unexpected", id="weight-more"
    ),
    pytest.param(_edit(lambda tree: tree.update(iteration=13)), "/iteration: has another value: expected 12, found 13", id="iteration"),
    pytest.param(
        _edit(lambda tree: tree["optimizer"]["optimizer"]["param_groups"][0].update(lr=1.0)), "/param_groups/0/lr", id="scalar"
    ),
    pytest.param(_edit(lambda tree: tree["optimizer"]["optimizer"]["param_groups"].reverse()), "/wd_mult: has another", id="order-of-groups"),
    pytest.param(_encoder(lambda pairs: [pairs[1], pairs[0], *pairs[2:]]), "keys are in another order", id="order-of-weights"),
    pytest.param(
        _encoder(lambda pairs: [(pairs[0][0], tensor("float16", "1", 6, 0, (6,))), *pairs[1:]]), "has another type or shape", id="type-of-a-weight"
    ),
    pytest.param(_edit(_shorten, OPTIM), "exp_avg/0: has another type or size", id="bucket-too-short"),
    pytest.param(
        _edit(lambda tree: tree["per_bucket_numel"][0].update({KEY: [7]}), OPTIM), "/0: is another number", id="size-of-a-bucket"
    ),
    pytest.param(lambda it: it.path(OPTIM).write_bytes(it.path(OPTIM).read_bytes()[:900]), "distrib_optim.pt: file", id="file-cut"),
]  # fmt: skip


@pytest.mark.parametrize(("mutate", "reported"), MUTATIONS)
def test_a_mutation_of_the_result_is_found(damaged: Damaged, mutate: Callable[[Damaged], None], reported: str) -> None:
    mutate(damaged)
    found = damaged.found()
    assert any(reported in one for one in found), found


# ------------------------------------------------------------------------------------------------- a wrong conversion


def refused(request: Request) -> None:
    """The full proof, which is part of the conversion, finds it, and nothing is published."""
    with pytest.raises(VerificationError, match="differ from the source"):
        run(request, range(request.topology.pipeline), Quiet())
    assert not list(request.target.glob("iter_*/mp_rank_*/*.pt"))


@pytest.mark.parametrize("relaid", [False, True], ids=["same-layout", "another-layout"])
def test_shards_that_were_joined_in_a_wrong_order_are_found(
    relaid: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader's joining is broken on purpose: the proof must not share the mistake."""
    source = Relaid(topology=Topology(num_layers=2, data=4), data=2)
    Sharding().write(source, tmp_path / "ms")
    target = Relaid(topology=Topology(num_layers=2, tensor=2), data=2) if relaid else source
    target.write_meta(tmp_path / "pt_meta")
    request = target.request(tmp_path, source_topology=source.topology if relaid else None)
    right = shards.join_shards
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "join_shards", lambda paths, info: right((paths[1], paths[0], *paths[2:]), info))
        patch.setattr("ckpt2pt.formats.mindspore.source._KEPT", {})
        refused(request)
    assert run(request, [0], Quiet()).published


def test_a_planner_that_takes_the_box_of_another_rank_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(shape: Sequence[int], axis: int | None, rank: int, of: int, first: int, storage: object) -> object:
        return sharded(tuple(shape), axis, of - 1 - rank, of, first, storage)

    request = made(1).becomes(made(2), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("ckpt2pt.core.reshard.sharded", wrong)
        refused(request)
    assert run(request, [0, 1], Quiet()).published


def test_a_cast_that_cuts_off_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(source: str, target: str) -> Callable[[memoryview, memoryview], None] | None:
        def cut_off(data: memoryview, out: memoryview) -> None:
            np.frombuffer(out, "<u2")[:] = np.frombuffer(data, "<u2")[1::2]

        return cut_off if find_cast(source, target) else None

    request = made(2).write(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("ckpt2pt.engine.write.find_cast", wrong)
        refused(request)
    assert run(request, [0, 1], Quiet()).published
