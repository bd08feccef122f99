"""Plans made from headers alone: what goes where, and what is left."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ckpt2pt.core.buckets import parse_param_map
from ckpt2pt.core.extents import Extent, TensorRef
from ckpt2pt.core.names import NameTable, Rules
from ckpt2pt.core.stage import ChunkMap, RankInput, RankPlan, check_layers, plan_rank, spans
from ckpt2pt.core.topology import Topology
from ckpt2pt.core.training_step import TrainingStep
from ckpt2pt.errors import Ckpt2ptError, CoverageError, FormatError, InputError, TopologyError, aside

STEP = TrainingStep(iteration=5, samples=20, iteration_source="test")
NORM = "language_model.encoder.layers.{}.input_norm.weight"
ONE = Topology(num_layers=2)


def ref(name: str, shape: tuple[int, ...] = (3,), dtype: str = "float32") -> TensorRef:
    return TensorRef(name, dtype, shape, (Extent("f", 0, 12),))


def with_moments(*names: str) -> dict[str, TensorRef]:
    return {p + name: ref(p + name) for name in names for p in ("", "exp_avg.", "exp_avg_sq.")}


def chunk(*names: str, vpp: int = 0, buffer: bool = True, dtype: str = "bfloat16") -> ChunkMap:
    document: dict[str, Any] = {
        name: [f"torch.{dtype}", [3], 3 * n, 3 * n + 3, 0] for n, name in enumerate(reversed(names))
    }
    return ChunkMap(
        vpp=vpp, names=names, buffer=parse_param_map(document, where="map", divisor=4) if buffer and names else None
    )


def plan(
    index: dict[str, TensorRef], *chunks: ChunkMap, topology: Topology = ONE, full: bool = True, **more: Any
) -> RankPlan:
    options: dict[str, Any] = {
        "tp": 0, "pp": 0, "source": "rank_0/network.ckpt", "index": index, "training_step": STEP, "chunks": chunks, "sizes": {},
        "params_dtype": "bfloat16", "tied": False,
    }  # fmt: skip
    rules = more.pop("rules", None)
    return plan_rank(RankInput(**(options | more)), topology, NameTable(rules), full=full)


BOTH = chunk(NORM.format(0), NORM.format(1))


def test_each_slot_is_filled_with_the_parameter_and_both_moments() -> None:
    made = plan(with_moments(NORM.format(0), NORM.format(1)), BOTH)
    assert [(w.name, w.layer, w.source.name) for w in made.weights] == [
        (NORM.format(0), 0, NORM.format(0)), (NORM.format(1), 1, NORM.format(1)),
    ]  # fmt: skip
    first = next(iter(made.weights))
    assert first.moments is not None
    assert [m.name for m in first.moments] == [f"exp_avg.{NORM.format(0)}", f"exp_avg_sq.{NORM.format(0)}"]
    assert (first.dtype, first.placement and first.placement.start) == ("bfloat16", 3)
    assert (made.full, made.payload_bytes) == (True, 2 * 6 + 12 * 8)  # six elements, padded to eight for four ranks
    assert (made.directory, made.ignored, made.tied_copies) == ("mp_rank_00", (), ())


def test_params_only_leaves_the_moments_and_says_so() -> None:
    made = plan(with_moments(NORM.format(0), NORM.format(1)), BOTH, full=False)
    assert not made.full
    assert made.payload_bytes == 2 * 6
    assert all(w.moments is None and w.placement is None for w in made.weights)
    assert {reason for _, reason in made.ignored} == {"params only"}
    assert len(made.ignored) == 4


def test_params_only_needs_no_param_map() -> None:
    made = plan(
        {n: ref(n) for n in (NORM.format(0), NORM.format(1))},
        chunk(NORM.format(0), NORM.format(1), buffer=False),
        full=False,
        params_dtype="float16",
    )
    assert {w.dtype for w in made.weights} == {"float16"}


def test_the_optimizer_needs_a_param_map() -> None:
    with pytest.raises(FormatError, match="no param map") as caught:
        plan(with_moments(NORM.format(0), NORM.format(1)), chunk(NORM.format(0), NORM.format(1), buffer=False))
    assert aside("mode") in caught.value.hint


def test_layers_are_global_in_the_source_and_local_in_the_target() -> None:
    topology = Topology(num_layers=4, pipeline=2, virtual=2)
    made = plan(
        with_moments(NORM.format(1), NORM.format(3), "language_model.encoder.final_norm.weight"),
        chunk(NORM.format(0), vpp=0),
        chunk(NORM.format(0), "language_model.encoder.final_norm.weight", vpp=1),
        topology=topology,
        pp=1,
    )
    assert [(c.key, [w.source.name for w in c.weights]) for c in made.chunks] == [
        ("model0", [NORM.format(1)]),
        ("model1", [NORM.format(3), "language_model.encoder.final_norm.weight"]),
    ]
    assert made.directory == "mp_rank_00_001"


def test_a_pipeline_suffix_in_the_source_is_no_part_of_the_name() -> None:
    index = with_moments(NORM.format("0_pp0_id0"), NORM.format("1_pp0_id1"))
    assert [w.source.name for w in plan(index, BOTH).weights] == [NORM.format("0_pp0_id0"), NORM.format("1_pp0_id1")]


@pytest.mark.parametrize("prefixes", [("adam_m.", "adam_v."), ("moment1.", "moment2.")])
def test_moments_have_several_prefixes(prefixes: tuple[str, str]) -> None:
    index = {p + n: ref(p + n) for n in (NORM.format(0), NORM.format(1)) for p in ("", *prefixes)}
    made = plan(index, BOTH)
    assert [[m.name for m in w.moments or ()] for w in made.weights] == [
        [p + NORM.format(n) for p in prefixes] for n in (0, 1)
    ]


def test_what_a_training_file_holds_besides_is_listed_with_its_reason() -> None:
    index = with_moments(NORM.format(0), NORM.format(1)) | {n: ref(n) for n in ("step_num", "loss_scale")}
    assert dict(plan(index, BOTH).ignored) == {"step_num": "training progress", "loss_scale": "loss scaling"}


def test_a_rule_file_may_leave_something_out() -> None:
    index = with_moments(NORM.format(0), NORM.format(1)) | {"ema.shadow": ref("ema.shadow")}
    assert plan(index, BOTH, rules=Rules(ignore=("ema.*",))).ignored == (("ema.shadow", "rule file"),)


def without(name: str) -> dict[str, TensorRef]:
    return {key: value for key, value in with_moments(NORM.format(0), NORM.format(1)).items() if key != name}


def changed(name: str, **more: Any) -> dict[str, TensorRef]:
    return with_moments(NORM.format(0), NORM.format(1)) | {name: ref(name, **more)}


FIRST = NORM.format(0)
REFUSED: dict[str, tuple[dict[str, TensorRef], type[Ckpt2ptError], str]] = {
    "missing": (without(FIRST), CoverageError, f"{FIRST} is missing, which Megatron's {FIRST} is made from"),
    "moment-missing": (without(f"exp_avg_sq.{FIRST}"), CoverageError, f"exp_avg_sq.{FIRST} is missing"),
    "extra": (changed(NORM.format(2)), CoverageError, f"{NORM.format(2)} has no place"),
    "shape": (changed(FIRST, shape=(3, 1)), TopologyError, "has shape [3, 1], the target needs [3]"),
    "moment-shape": (changed(f"exp_avg.{FIRST}", shape=(2,)), TopologyError, "has shape [2], the target needs [3]"),
    "int8": (changed(FIRST, dtype="int8"), InputError, "is of type int8"),
    "text": (changed(FIRST, dtype="str"), InputError, "is of type str"),
    "moment-int32": (changed(f"exp_avg.{FIRST}", dtype="int32"), InputError, "is of type int32"),
    "shards": (changed("exp_avg_sq.buffer_0_bucket_3"), InputError, "1 data-parallel shards"),
    "twice": (changed(NORM.format("0_pp0_id0")), CoverageError, f"are the same param of {FIRST}"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_source_that_does_not_match_is_refused(case: str) -> None:
    index, error, message = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)) as caught:
        plan(index, BOTH)
    assert caught.value.where == "rank_0/network.ckpt"


def test_a_target_type_nobody_can_convert_to_is_refused() -> None:
    with pytest.raises(FormatError, match="parameters of type float8"):
        plan(with_moments(FIRST, NORM.format(1)), chunk(FIRST, NORM.format(1), dtype="float8"))


def test_a_shape_that_the_arguments_contradict_is_refused() -> None:
    with pytest.raises(TopologyError, match=r"has shape \[3\], the arguments in pt_meta give \[4\]"):
        plan(with_moments(FIRST, NORM.format(1)), BOTH, sizes={"hidden_size": 4})


@pytest.mark.parametrize(
    ("topology", "chunks", "message"),
    [
        pytest.param(Topology(num_layers=3), (BOTH,), "layer slots 0-1 in the metadata, but 0-2", id="too-few-layers"),
        pytest.param(
            Topology(num_layers=2, noop=frozenset({1})), (BOTH,), "slots 0-1 in the metadata, but 0 ", id="noop"
        ),
        pytest.param(
            Topology(num_layers=4, pipeline=2, virtual=2), (BOTH,), "describes chunks [0], the options ask for [0, 1]",
            id="chunks",
        ),
    ],
)  # fmt: skip
def test_metadata_of_another_cut_is_refused(topology: Topology, chunks: tuple[ChunkMap, ...], message: str) -> None:
    with pytest.raises(TopologyError, match=re.escape(message)):
        check_layers(chunks, topology, pp=0, where="pt_meta")


EMBEDDING, HEAD = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"


def test_a_tied_copy_beside_the_embedding_becomes_a_pair_to_compare() -> None:
    made = plan(
        with_moments(EMBEDDING, FIRST, HEAD), chunk(EMBEDDING, FIRST), topology=Topology(num_layers=1), tied=True
    )
    assert [(a.name, b.name) for a, b in made.tied_copies] == [
        (p + EMBEDDING, p + HEAD) for p in ("", "exp_avg.", "exp_avg_sq.")
    ]
    assert dict(made.ignored)[HEAD] == f"copy of the tied {EMBEDDING}"


def test_a_copy_is_extra_when_embeddings_are_not_tied() -> None:
    with pytest.raises(CoverageError, match=r"output_layer.weight has no place"):
        plan(with_moments(EMBEDDING, FIRST, HEAD), chunk(EMBEDDING, FIRST), topology=Topology(num_layers=1))


@pytest.mark.parametrize("own", [HEAD, "word_embeddings.weight", None])
def test_a_tied_head_is_the_stages_own_or_else_the_first_stages(own: str | None) -> None:
    first_stage = {p + EMBEDDING: ref(p + EMBEDDING) for p in ("", "adam_m.", "adam_v.")}
    made = plan(
        with_moments(NORM.format(1), *([own] if own else [])),
        chunk(FIRST, "word_embeddings.weight"),
        topology=Topology(num_layers=2, pipeline=2), pp=1, tied=True, first_stage=first_stage,
    )  # fmt: skip
    head = list(made.weights)[-1]
    expected = [p + own for p in ("", "exp_avg.", "exp_avg_sq.")] if own else list(first_stage)
    assert [r.name for r in (head.source, *(head.moments or ()))] == expected


def test_a_chunk_without_parameters_keeps_its_key() -> None:
    topology = Topology(num_layers=3, virtual=3, noop=frozenset({1}))
    made = plan(with_moments(FIRST, NORM.format(2)), chunk(FIRST), chunk(FIRST, vpp=2), topology=topology)
    assert [(c.key, len(c.weights), c.buffer is None) for c in made.chunks] == [
        ("model0", 1, False), ("model1", 0, True), ("model2", 1, False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("numbers", "text"), [(set(), "none"), ({4}, "4"), ({0, 1, 2, 5}, "0-2,5"), ({1, 3, 5}, "1,3,5"), ({9, 8}, "8-9")]
)
def test_spans_are_short(numbers: set[int], text: str) -> None:
    assert spans(numbers) == text
