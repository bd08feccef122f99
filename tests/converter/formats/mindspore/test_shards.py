"""Shards seen as parameters: every element where its description says, and numbers in every refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import CoverageError, FormatError, InputError, TopologyError, ref
from ckpt2pt.formats.mindspore.ranks import SourceFile
from ckpt2pt.formats.mindspore.shards import check_ranks, has_shards, join_shards, read_info
from ckpt2pt.verification.sharded import expected_index
from ckptfiles import Tensor, ckpt
from goldens import golden_root
from handmade import Handmade
from sharding import Sharding

GOLDEN = golden_root() / "mindspore" / "dist_opt_dp2_tp2"


def payload(ref: TensorRef) -> bytes:
    return b"".join(Path(e.path).read_bytes()[e.offset : e.offset + e.nbytes] for e in ref.extents)


def both_readings(paths: list[Path], info: Path) -> dict[str, TensorRef]:
    """The converter's index, after the verifier's own has been found to give the same bytes."""
    found = join_shards(paths, read_info(info))
    again = expected_index(SourceFile(path=paths[0], when=(0, 1), merged=False, peers=tuple(paths), info=info))
    assert {n: (r.dtype, r.shape, payload(r)) for n, r in again.items()} == {
        n: (r.dtype, r.shape, payload(r)) for n, r in found.items()
    }
    return found


@pytest.mark.parametrize("tp", [0, 1])
def test_the_golden_shards_merge_to_the_expected_values(tp: int) -> None:
    paths = [GOLDEN / f"rank_{rank}" / f"network_rank_{rank}-0_10.ckpt" for rank in (tp, tp + 2)]
    (info,) = (GOLDEN / "opt_shard_info" / f"rank_{tp}").iterdir()
    found = both_readings(paths, info)
    check_ranks(read_info(info), (tp, tp + 2))
    expected = np.load(GOLDEN / f"expected_merged_tp{tp}.npz")
    assert len(expected.files) == 66
    for name in expected.files:
        assert (found[name].dtype, found[name].shape) == (expected[name].dtype.name, expected[name].shape)
        assert payload(found[name]) == expected[name].tobytes()
    assert found.keys() >= set(expected.files)
    assert not has_shards(found)


SHARDINGS = {
    "one-bucket": Sharding(per_bucket=99),
    "buckets": Sharding(per_bucket=3),
    "a-bucket-each": Sharding(per_bucket=1),
    "buffers": Sharding(per_bucket=2, buffers=3),
    "trailing-garbage": Sharding(tail='": [0, 1]}}'),
}


def small(data: int, context: int = 1) -> Handmade:
    return Handmade(Topology(num_layers=2, data=data, context=context), hidden=8, vocab=16)


def sources(made: Handmade, cut: Sharding, folder: Path) -> tuple[list[Path], Path]:
    cut.write(made, folder)
    group = made.topology.group(0, 0)
    return [cut.place(made, folder, 0, 0, rank, n) for n, rank in enumerate(group)], cut.info(made, folder, 0, 0)


@pytest.mark.parametrize(("data", "context"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("case", SHARDINGS)
def test_any_group_and_any_buckets_give_every_parameter(case: str, data: int, context: int, tmp_path: Path) -> None:
    made = small(data, context)
    paths, info = sources(made, SHARDINGS[case], tmp_path)
    found = both_readings(paths, info)
    assert {name: (ref.shape, payload(ref)) for name, ref in found.items()} == {
        name: (each.shape, each.data) for name, each in made.entries[0, 0].items()
    }
    largest = max(len(ref.extents) for ref in found.values())
    assert largest <= data * context
    if data * context > 1 and case == "a-bucket-each":
        assert largest == data * context


@pytest.mark.parametrize("with_moments", [True, False])
def test_zero3_parameters_are_joined_along_their_first_axis(with_moments: bool, tmp_path: Path) -> None:
    made = small(4)
    apart = tuple(
        name
        for name in made.entries[0, 0]
        if name.endswith(("mlp.projection.weight", "embeddings.weight")) and "exp" not in name
    )
    assert len(apart) == 3
    paths, info = sources(made, Sharding(zero3=apart), tmp_path)
    document = json.loads(info.read_text())
    assert len(document["zero3_params"]) == 9
    if not with_moments:
        info.write_text(json.dumps(document | {"zero3_params": list(apart)}))
    found = both_readings(paths, info)
    assert {n: (r.shape, payload(r)) for n, r in found.items()} == {
        n: (t.shape, t.data) for n, t in made.entries[0, 0].items()
    }


def test_what_only_a_later_rank_holds_is_not_lost_and_what_all_hold_is_the_firsts(tmp_path: Path) -> None:
    made = small(2)
    apart = "language_model.embedding.word_embeddings.weight"
    paths, info = sources(made, Sharding(zero3=(apart,)), tmp_path)
    change(paths[0], lambda tensors: [Tensor("seed", "int64", (), bytes(8)), *tensors])
    change(
        paths[1],
        lambda tensors: [*tensors, Tensor("seed", "int64", (), b"1" * 8), Tensor("late", "int64", (), bytes(8))],
    )
    found = both_readings(paths, info)
    assert payload(found["seed"]) == bytes(8)
    assert payload(found["late"]) == bytes(8)
    # Shards first, then ZeRO-3, then the rest: the order in which the reference merges them.
    places = [list(found).index(name) for name in (apart, f"exp_avg.{apart}", f"exp_avg_sq.{apart}", "seed", "late")]
    assert places == sorted(places)
    assert places[0] == len(read_info(info).places) * 3


def test_a_zero3_parameter_that_a_rank_lacks_is_refused(tmp_path: Path) -> None:
    made = small(2)
    apart = ("language_model.embedding.word_embeddings.weight",)
    paths, info = sources(made, Sharding(zero3=apart), tmp_path)
    change(paths[1], lambda tensors: [t for t in tensors if t.name != apart[0]])
    with pytest.raises(InputError, match=r"in 1 of 2 ranks, with shapes \[8, 8\]"):
        join_shards(paths, read_info(info))


# --------------------------------------------------------------------------------------------------------- what falls short


def test_elements_that_no_rank_saved_are_reported_with_their_numbers(tmp_path: Path) -> None:
    """Without alignment a bucket of 1001 elements over two ranks loses its last one; the next bucket must not shift."""
    made = Handmade(Topology(num_layers=1, data=2), hidden=7, vocab=11)
    paths, info = sources(made, Sharding(per_bucket=1, aligned=False), tmp_path)
    odd = [n for n, t in made.entries[0, 0].items() if "exp" not in n and t.shape and len(t.data) // 4 % 2]
    assert odd
    with pytest.raises(
        InputError, match=r"needs elements \[\d+, \d+\) of buffer 0, and from \d+ on they are in no shard: "
    ) as caught:
        join_shards(paths, read_info(info))
    assert "2 ranks hold 2 x" in caught.value.what
    assert "the last 1 were never saved" in caught.value.what
    with pytest.raises(FormatError, match="is in none of 2 shards"):
        expected_index(SourceFile(path=paths[0], when=(0, 1), merged=False, peers=tuple(paths), info=info))


def test_a_gap_that_no_parameter_needs_shifts_nothing(tmp_path: Path) -> None:
    made = small(2)
    cut = Sharding(per_bucket=2)
    paths, info = sources(made, cut, tmp_path)
    # The description says that each bucket has one element more than the shards hold: the later ones move by one.
    document = json.loads(info.read_text())
    for moved, (number, sizes) in enumerate(document["buffer_info"]["0"]["buckets"].items()):
        for param in document["param_info"].values():
            if param["range_map"][1] == int(number):
                param["range_map"][2] += moved
                param["range_map"][3] += moved
        sizes[0] += 1
    info.write_text(json.dumps(document))
    found = both_readings(paths, info)
    assert {name: payload(ref) for name, ref in found.items()} == {n: t.data for n, t in made.entries[0, 0].items()}


# ------------------------------------------------------------------------------------------------------------ what is wrong


def change(path: Path, how: Callable[[list[Tensor]], list[Tensor]]) -> None:
    from ckpt2pt.formats.mindspore import index_file

    tensors = [Tensor(r.name, r.dtype, r.shape, payload(r)) for r in index_file(path).values()]
    path.write_bytes(ckpt(how(tensors)))


def without(name: str) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda tensors: [each for each in tensors if each.name != name]


def cut_short(name: str) -> Callable[[list[Tensor]], list[Tensor]]:
    def how(tensors: list[Tensor]) -> list[Tensor]:
        return [Tensor(t.name, t.dtype, (t.shape[0] - 1,), t.data[:-4]) if t.name == name else t for t in tensors]

    return how


FILES: dict[str, tuple[Callable[[list[Tensor]], list[Tensor]], type[InputError], str]] = {
    "missing": (without("buffer_0_bucket_1"), InputError, r"1 missing \(buffer_0_bucket_1\)"),
    "moment-missing": (without("exp_avg_sq.buffer_0_bucket_0"), InputError, "1 missing"),
    "more": (lambda t: [*t, Tensor("buffer_9_bucket_0", "float32", (1,), bytes(4))], InputError, r"1 not described \(buffer_9"),
    "short": (cut_short("buffer_0_bucket_0"), InputError, r"each of 2 ranks holds \d+ // 2 of them"),
    "named-too": (
        lambda t: [*t, Tensor("language_model.output_layer.weight", "float32", (16, 8), bytes(512))],
        CoverageError,
        "is there as a whole and as shards",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files_that_do_not_fit_their_description_are_refused(case: str, tmp_path: Path) -> None:
    how, kind, what = FILES[case]
    paths, info = sources(small(2), Sharding(), tmp_path)
    change(paths[0], how)
    with pytest.raises(kind, match=what) as caught:
        join_shards(paths, read_info(info))
    assert caught.value.hint


def set_in(*keys: str | int, value: Any) -> Callable[[Any], None]:
    def how(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return how


HEAD = "language_model.output_layer.weight"
DOCUMENTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "no-params": (lambda d: d.pop("param_info"), "param_info"),
    "no-buffers": (lambda d: d.pop("buffer_info"), "buffer_info"),
    "no-ranks": (lambda d: d.pop("dp_rank_list"), "dp_rank_list"),
    "empty-ranks": (set_in("dp_rank_list", value=[]), r"dp_rank_list is \[\]"),
    "rank-twice": (set_in("dp_rank_list", value=[0, 0]), r"dp_rank_list is \[0, 0\]"),
    "text-for-a-number": (set_in("param_info", HEAD, "range_map", 2, value="0"), "where a count belongs"),
    "true-for-a-number": (set_in("param_info", HEAD, "range_map", 2, value=True), "where a count belongs"),
    "negative": (set_in("param_info", HEAD, "range_map", 2, value=-1), "-1 where a count belongs"),
    "infinite": (set_in("param_info", HEAD, "range_map", 2, value=float("inf")), "Infinity is no number"),
    "huge": (set_in("param_info", HEAD, "range_map", 3, value=1 << 70), "where a count belongs"),
    "three-numbers": (set_in("param_info", HEAD, "range_map", value=[0, 0, 1]), "ValueError"),
    "other-shape": (set_in("param_info", HEAD, "shape", value=[16, 9]), r"of shape \[16, 9\] is at \[0, 128\)"),
    "beyond": (set_in("param_info", HEAD, "range_map", value=[0, 0, 10**6, 10**6 + 128]), "which has"),
    "no-such-buffer": (set_in("param_info", HEAD, "range_map", value=[7, 0, 0, 128]), "buffer 7, which has 0"),
    "overlap": (set_in("param_info", HEAD, "range_map", value=[0, 0, 1, 129]), "overlap at element"),
    "bucket-missing": (lambda d: d["buffer_info"]["0"]["buckets"].pop("0"), "are numbered"),
    "a-list": (set_in("param_info", value=[1]), "AttributeError"),
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_a_description_that_contradicts_itself_is_refused(case: str, tmp_path: Path) -> None:
    how, what = DOCUMENTS[case]
    _, info = sources(small(2), Sharding(), tmp_path)
    document = json.loads(info.read_text())
    how(document)
    info.write_text(json.dumps(document))
    with pytest.raises(FormatError, match=what) as caught:
        read_info(info)
    assert ref("source.optShardInfoPath") in caught.value.hint


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", "3", "[]", '{"param_info": 3}', "\0"])
def test_what_is_no_description_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(FormatError):
        read_info(path)


def test_another_group_of_ranks_is_a_wrong_degree(tmp_path: Path) -> None:
    _, info = sources(small(4), Sharding(), tmp_path)
    with pytest.raises(TopologyError, match=r"over ranks \[0, 1, 2, 3\], the options give ranks \[0, 1\]") as caught:
        check_ranks(read_info(info), (0, 1))
    assert ref("parallelism") in caught.value.hint
