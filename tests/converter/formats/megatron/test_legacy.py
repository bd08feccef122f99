"""The files of a rank of Megatron-LM 0.6 from headers alone: what goes where, and what is left."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.core.buckets import ChunkMap, parse_param_map
from ckpt2pt.core.extents import Extent, TensorRef
from ckpt2pt.core.fill import bytes_read, moves_of
from ckpt2pt.core.names import NameTable, Rules
from ckpt2pt.core.params import HEAD as CORE_HEAD
from ckpt2pt.core.slots import FileSlots
from ckpt2pt.core.stated import Statement
from ckpt2pt.core.tensor import Key, Role
from ckpt2pt.core.topology import Topology
from ckpt2pt.core.training_step import TrainingStep
from ckpt2pt.discover import Prepared, discover, prepare
from ckpt2pt.errors import Ckpt2ptError, CoverageError, FormatError, InputError, TopologyError, aside
from ckpt2pt.formats.megatron.legacy import LegacyRank, check_layers, plan_rank
from ckpt2pt.formats.megatron.payload import FilePayload, Template
from ckpt2pt.formats.mindspore.source import held_in
from ckpt2pt.formats.ptmeta.metadata import RankMeta
from ckpt2pt.formats.torchfile.pickles import read_pickle
from ckpt2pt.formats.torchfile.trees import Global, Value, namespace, namespace_attrs
from handmade import Handmade

STEP = TrainingStep(iteration=5, samples=20, iteration_source="test")
WHERE = "rank_0/network.ckpt"
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
    entries: dict[str, TensorRef],
    *chunks: ChunkMap,
    topology: Topology = ONE,
    full: bool = True,
    pp: int = 0,
    tied: bool = False,
    dtype: str = "bfloat16",
    sizes: dict[str, Value] | None = None,
    rules: Rules | None = None,
    first_stage: dict[str, TensorRef] | None = None,
) -> LegacyRank:
    args = {**(sizes or {}), "params_dtype": Global("torch", dtype), "untie_embeddings_and_output_weights": not tied}
    meta = RankMeta(template=Template(path="args", tree={"args": namespace(args)}, storages={}), chunks=chunks)
    table = NameTable(rules)
    held = held_in(entries, table, WHERE, full=full, first_stage=first_stage)
    return plan_rank(held, meta, pp, topology, table, full=full, where=WHERE)


def sources(made: LegacyRank) -> list[str]:
    """The entries that weights are made from."""
    return [made.held.name(one.tensor.key) for one in made.parameters]


def laid_out(made: LegacyRank) -> tuple[tuple[FilePayload, FileSlots], ...]:
    return made.lay_out(Template(path="args", tree={}, storages={}), STEP, Statement())


def written(made: LegacyRank) -> int:
    return sum(sum(payload.storages) for payload, _ in laid_out(made))


BOTH = chunk(NORM.format(0), NORM.format(1))


def test_each_slot_is_filled_with_the_parameter_and_both_moments() -> None:
    made = plan(with_moments(NORM.format(0), NORM.format(1)), BOTH)
    assert [one.name for one in made.parameters] == sources(made) == [NORM.format(0), NORM.format(1)]
    first, (model, optimizer) = next(made.parameters), laid_out(made)
    assert (made.chunks[0].dtype, first.placement and first.placement.start) == ("bfloat16", 3)
    assert [(slot.key.role, slot.storage, slot.start) for slot in optimizer[1].slots] == [
        (role, storage, start) for storage, role in enumerate(("param", "exp_avg", "exp_avg_sq")) for start in (0, 3)
    ]
    assert [(slot.dtype, slot.storage, slot.start) for slot in model[1].slots] == [("bfloat16", n, 0) for n in (0, 1)]
    assert written(made) == 2 * 6 + 12 * 8, "six elements, padded to eight for four ranks"
    assert bytes_read(made.held.index, [slots for _, slots in laid_out(made)], WHERE) == 3 * 4 * 6
    assert (made.full, made.ignored, made.copies) == (True, (), ())


def test_each_element_is_read_once_and_written_to_both_files() -> None:
    made = plan(with_moments(NORM.format(0), NORM.format(1)), BOTH)
    moves = moves_of(made.held.index, [slots for _, slots in laid_out(made)], WHERE)
    assert sorted((move.role, len(move.sinks)) for move in moves) == [
        *[("exp_avg", 1)] * 2, *[("exp_avg_sq", 1)] * 2, *[("param", 2)] * 2,
    ]  # fmt: skip
    assert {move.copies for move in moves} == {()}, "what a rank holds is one stretch of its file"


def test_params_only_leaves_the_moments_and_says_so() -> None:
    made = plan(with_moments(NORM.format(0), NORM.format(1)), BOTH, full=False)
    assert not made.full
    assert written(made) == 2 * 6
    assert all(one.placement is None for one in made.parameters)
    assert {reason for _, reason in made.ignored} == {"params only"}
    assert len(made.ignored) == 4


def test_params_only_needs_no_param_map() -> None:
    made = plan(
        {n: ref(n) for n in (NORM.format(0), NORM.format(1))},
        chunk(NORM.format(0), NORM.format(1), buffer=False),
        full=False,
        dtype="float16",
    )
    assert {chunk.dtype for chunk in made.chunks} == {"float16"}


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
    assert [(c.key, [made.held.name(one.tensor.key) for one in c.parameters]) for c in made.chunks] == [
        ("model0", [NORM.format(1)]),
        ("model1", [NORM.format(3), "language_model.encoder.final_norm.weight"]),
    ]


def test_a_pipeline_suffix_in_the_source_is_no_part_of_the_name() -> None:
    index = with_moments(NORM.format("0_pp0_id0"), NORM.format("1_pp0_id1"))
    assert sources(plan(index, BOTH)) == [NORM.format("0_pp0_id0"), NORM.format("1_pp0_id1")]


@pytest.mark.parametrize("prefixes", [("adam_m.", "adam_v."), ("moment1.", "moment2.")])
def test_moments_have_several_prefixes(prefixes: tuple[str, str]) -> None:
    index = {p + n: ref(p + n) for n in (NORM.format(0), NORM.format(1)) for p in ("", *prefixes)}
    made = plan(index, BOTH)
    moments = [key for key in made.held.index if key.role != "param"]
    assert [made.held.name(key) for key in moments] == [p + NORM.format(n) for n in (0, 1) for p in prefixes]


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
    assert [(a.name, b.name) for a, b in made.copies] == [
        (p + EMBEDDING, p + HEAD) for p in ("", "exp_avg.", "exp_avg_sq.")
    ]
    assert dict(made.ignored)[HEAD] == f"copy of the tied {EMBEDDING}"


def test_a_copy_is_extra_when_embeddings_are_not_tied() -> None:
    with pytest.raises(CoverageError, match=r"output_layer.weight has no place"):
        plan(with_moments(EMBEDDING, FIRST, HEAD), chunk(EMBEDDING, FIRST), topology=Topology(num_layers=1))


@pytest.mark.parametrize("own", [HEAD, "word_embeddings.weight", None])
@pytest.mark.parametrize("full", [True, False])
def test_a_tied_head_is_the_stages_own_or_else_the_first_stages(own: str | None, full: bool) -> None:
    first_stage = {p + EMBEDDING: ref(p + EMBEDDING) for p in ("", "adam_m.", "adam_v.")}
    made = plan(
        with_moments(NORM.format(1), *([own] if own else [])),
        chunk(FIRST, "word_embeddings.weight"),
        topology=Topology(num_layers=2, pipeline=2), pp=1, tied=True, first_stage=first_stage, full=full,
    )  # fmt: skip
    key = [*made.parameters][-1].tensor.key
    assert (key.name == CORE_HEAD) == (own == HEAD)
    expected = [p + own for p in ("", "exp_avg.", "exp_avg_sq.")] if own else list(first_stage)
    roles: tuple[Role, ...] = ("param", "exp_avg", "exp_avg_sq") if full else ("param",)
    assert [made.held.name(Key(role, key.name)) for role in roles] == expected[: len(roles)]
    assert len(made.ignored) == (0 if full else 4 if own else 2)


def test_a_chunk_without_parameters_keeps_its_key() -> None:
    topology = Topology(num_layers=3, virtual=3, noop=frozenset({1}))
    made = plan(with_moments(FIRST, NORM.format(2)), chunk(FIRST), chunk(FIRST, vpp=2), topology=topology)
    assert [(c.key, len(c.parameters), c.buffer is None) for c in made.chunks] == [
        ("model0", 1, False), ("model1", 0, True), ("model2", 1, False),
    ]  # fmt: skip
    value = read_pickle(laid_out(made)[0][0].pickle, where="model")
    assert isinstance(value, dict)
    assert {"model0", "model1", "model2"} <= value.keys()


# ------------------------------------------------------------------------------------------------- the trees of both files

HANDMADE = TrainingStep(iteration=12, samples=48, iteration_source="the checkpoint")


def prepared(folder: Path) -> Prepared:
    request = Handmade(topology=Topology(num_layers=2, virtual=2), data=2).write(folder)
    return prepare(request, discover(request), (0, 0))


def tree(found: Prepared, **more: Any) -> dict[Any, Any]:
    model, *_ = found.plan.lay_out(more.pop("template", found.meta.template), HANDMADE, Statement(), **more)
    value = read_pickle(model[0].pickle, where="model")
    assert isinstance(value, dict)
    return dict(value)


def test_weights_follow_the_iteration_and_the_rest_keeps_its_order(tmp_path: Path) -> None:
    assert list(tree(prepared(tmp_path))) == [
        "args", "checkpoint_version", "iteration", "model0", "model1", "optimizer", "opt_param_scheduler", "rng_state",
    ]  # fmt: skip


@pytest.mark.parametrize(("reference", "samples"), [(False, 48), (True, 0)])
def test_the_time_is_put_wherever_megatron_looks_for_it(reference: bool, samples: int, tmp_path: Path) -> None:
    found = tree(prepared(tmp_path), reference_samples=reference)
    args = namespace_attrs(found["args"])
    assert (found["iteration"], args["iteration"], args["consumed_train_samples"]) == (12, 12, samples)
    assert found["opt_param_scheduler"]["num_steps"] == 48
    assert [group["step"] for group in found["optimizer"]["optimizer"]["param_groups"]] == [12, 12]


def test_storages_of_the_template_come_after_those_of_the_weights(tmp_path: Path) -> None:
    found = prepared(tmp_path)
    model, optimizer = found.files
    assert len(model.copied) == 3
    assert model.storages[-3:] == (5056, 16, 16) == tuple(one.nbytes for one in model.copied if isinstance(one, Extent))
    assert len(model.storages) == len(list(found.plan.parameters)) + 3
    assert (len(optimizer.storages), optimizer.copied) == (6, ())


def test_an_optimizer_of_another_kind_stays_as_it_is(tmp_path: Path) -> None:
    """A full conversion refuses it before (formats/megatron/resume.py); beside weights alone nothing reads it."""
    found = prepared(tmp_path)
    template = Template(
        path="p", tree=found.meta.template.tree | {"optimizer": {"state": 1}}, storages=found.meta.template.storages
    )
    assert tree(found, template=template)["optimizer"] == {"state": 1}


def test_a_storage_that_the_template_does_not_hold_is_refused(tmp_path: Path) -> None:
    found = prepared(tmp_path)
    with pytest.raises(FormatError, match="does not hold"):
        tree(found, template=replace(found.meta.template, storages={}))
