"""What Megatron-LM 0.6 needs of a template, rule by rule: a missing or wrong entry is named, and a good one passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import FormatError, TopologyError, VerificationError
from ckpt2pt.formats.megatron.resume import RULES, TargetRun, unmet
from ckpt2pt.formats.ptmeta.metadata import read_template
from ckpt2pt.formats.torchfile.trees import tensor
from ckpt2pt.verification.prove import verify_target
from goldens import golden_sets
from handmade import Handmade

Tree = dict[Any, Any]
TWO = Topology(num_layers=4, pipeline=2)


def drop(*keys: str) -> Callable[[Tree], object]:
    return lambda tree: [tree.pop(key) for key in keys]


def put(**entries: Any) -> Callable[[Tree], object]:
    return lambda tree: tree.update(entries)


def argument(**values: Any) -> Callable[[Tree], object]:
    """Sets training arguments; one that is ``drop`` goes."""

    def change(tree: Tree) -> None:
        state = tree["args"].state
        state.update(values)
        for name in [name for name, value in values.items() if value is drop]:
            del state[name]

    return change


def group(number: int = 0, **values: Any) -> Callable[[Tree], object]:
    def change(tree: Tree) -> None:
        one = tree["optimizer"]["optimizer"]["param_groups"][number]
        one.update(values)
        for name in [name for name, value in values.items() if value is drop]:
            del one[name]

    return change


def groups(change: Callable[[list[Any]], Any]) -> Callable[[Tree], object]:
    return lambda tree: tree["optimizer"]["optimizer"].update(
        param_groups=change(tree["optimizer"]["optimizer"]["param_groups"])
    )


def scheduler(name: str) -> Callable[[Tree], object]:
    return lambda tree: tree["opt_param_scheduler"].pop(name)


def put_scheduler(**values: Any) -> Callable[[Tree], object]:
    return lambda tree: tree["opt_param_scheduler"].update(values)


def state(**values: Any) -> Callable[[Tree], object]:
    def change(tree: Tree) -> None:
        for name, value in values.items():
            if value is drop:
                del tree["rng_state"][0][name]
            else:
                tree["rng_state"][0][name] = value

    return change


def without_both(tree: Tree) -> None:
    drop("optimizer", "opt_param_scheduler", "rng_state")(tree)


#                                                          the key that is named, and whether weights alone need it
BROKEN: dict[str, tuple[Callable[[Tree], object], str, bool]] = {
    "no-save-optim": (drop("optimizer", "opt_param_scheduler"), "optimizer is missing", False),
    "no-save-rng": (drop("rng_state"), "rng_state is missing", False),
    "neither": (without_both, "rng_state is missing", False),
    "optimizer-none": (put(optimizer=None), "optimizer is None", False),
    "optimizer-of-another-form": (put(optimizer={"state": {}}), "optimizer is not {'optimizer'", False),
    "no-groups": (groups(lambda _: []), "has 0 groups", False),
    "one-group": (groups(lambda found: found[:1]), "has 1 groups", False),
    "three-groups": (groups(lambda found: [*found, found[0]]), "has 3 groups", False),
    "groups-in-another-order": (groups(lambda found: found[::-1]), "param_groups[0].wd_mult is ", False),
    "group-without-betas": (group(betas=drop), "param_groups[0].betas is missing", False),
    "group-with-one-beta": (group(betas=(0.9,)), "param_groups[0].betas is ", False),
    "group-without-eps": (group(eps=drop), "param_groups[0].eps is missing", False),
    "group-with-betas-of-text": (group(betas="ab"), "param_groups[0].betas is 'ab'", False),
    "group-with-eps-none": (group(eps=None), "param_groups[0].eps is None, not a number", False),
    "biases-without-wd-mult": (group(1, wd_mult=drop), "param_groups[1].wd_mult is missing, which counts as 1", False),
    "group-with-wd-mult-none": (group(wd_mult=None), "param_groups[0].wd_mult is None", False),
    "group-without-bias-correction": (group(bias_correction=drop), "bias_correction is missing", False),
    "group-without-decoupled": (group(is_decoupled_lr=drop), "is_decoupled_lr is missing", False),
    "no-scheduler": (drop("opt_param_scheduler"), "opt_param_scheduler is missing", False),
    "scheduler-none": (put(opt_param_scheduler=None), "opt_param_scheduler is missing", False),
    **{f"scheduler-without-{name}": (scheduler(name), f"opt_param_scheduler.{name} is missing", False)
       for name in ("max_lr", "min_lr", "lr_warmup_steps", "lr_decay_steps", "lr_decay_style", "num_steps", "end_wd",
                    "wd_incr_steps", "wd_incr_style")},
    "scheduler-steps-none": (put_scheduler(num_steps=None), "opt_param_scheduler.num_steps is None, not a number", False),
    "scheduler-style": (put_scheduler(lr_decay_style="step"), "lr_decay_style is 'step', not one of constant", False),
    "scheduler-decay-style": (put_scheduler(wd_incr_style="step"), "wd_incr_style is 'step', not one of constant", False),
    "old-scheduler-beside": (put(lr_scheduler={}), "lr_scheduler is there", False),
    "rng-empty": (put(rng_state=[]), "rng_state has 0 entries", False),
    "rng-dict": (put(rng_state={}), "rng_state is not a list", False),
    "rng-for-each-rank": (argument(data_parallel_random_init=True, data_parallel_size=2), "rng_state has 1 entries", False),
    **{f"rng-without-{name}": (state(**{name: drop}), f"rng_state[0].{name} is missing", False)
       for name in ("random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state", "rng_tracker_states")},
    "python-list": (state(random_rng_state=(3, [*range(625)], None)), "random_rng_state is not", False),
    "python-short": (state(random_rng_state=(3, (*range(624),), None)), "random_rng_state is not", False),
    "numpy-name": (state(np_rng_state=("PCG64", [*range(624)], 0, 0, 0.0)), "np_rng_state is not", False),
    "numpy-short": (state(np_rng_state=("MT19937", [*range(623)], 0, 0, 0.0)), "np_rng_state is not", False),
    "torch-short": (state(torch_rng_state=tensor("uint8", "1", 16, 0, (16,))), "torch_rng_state has 16 bytes", False),
    "torch-type": (state(torch_rng_state=tensor("float32", "1", 4, 0, (4,))), "torch_rng_state is not", False),
    "cuda-long": (state(cuda_rng_state=tensor("uint8", "0", 5056, 0, (5056,))), "cuda_rng_state has 5056", False),
    "tracker-empty": (state(rng_tracker_states={}), "rng_tracker_states is empty", False),
    "tracker-of-others": (state(rng_tracker_states={"x": tensor("uint8", "1", 16, 0, (16,))}), "has no model-parallel-rng", False),
    "no-version": (drop("checkpoint_version"), "checkpoint_version is missing", True),
    "version-2": (put(checkpoint_version=2.0), "checkpoint_version is 2.0, not 3.0", True),
    "version-true": (put(checkpoint_version=True), "checkpoint_version is True", True),
    "version-text": (put(checkpoint_version="3.0"), "checkpoint_version is '3.0'", True),
    "no-args": (drop("args"), "args is missing", False),
    "args-of-another-type": (put(args={"num_layers": 4}), "args is not a namespace", True),
    "other-tp": (argument(tensor_model_parallel_size=2), "args.tensor_model_parallel_size is 2", True),
    "other-pp": (argument(pipeline_model_parallel_size=4), "args.pipeline_model_parallel_size is 4", True),
    "no-pp": (argument(pipeline_model_parallel_size=drop), "args.pipeline_model_parallel_size is missing", True),
    "other-vpp": (argument(virtual_pipeline_model_parallel_size=2), "args.virtual_pipeline_model_parallel_size is 2", True),
    "other-layers": (argument(num_layers=6), "args.num_layers is 6, the run to come has 4", True),
    "no-layers": (argument(num_layers=drop), "args.num_layers is missing", True),
    "no-heads": (argument(num_attention_heads=drop), "args.num_attention_heads is missing", True),
    "heads-of-another-type": (argument(num_attention_heads=1.0), "args.num_attention_heads is 1.0", True),
    "no-hidden": (argument(hidden_size=drop), "args.hidden_size is missing", True),
    "no-tokenizer": (argument(vocab_file="v.txt"), "args.make_vocab_size_divisible_by is missing", True),
    "half-a-scaler": (lambda tree: (argument(fp16=True, loss_scale=None)(tree), tree["optimizer"].update(grad_scaler={})),
                      "optimizer.grad_scaler.scale is missing", False),
}  # fmt: skip
CASES = [pytest.param(change, key, always, id=name) for name, (change, key, always) in BROKEN.items()]


@pytest.mark.parametrize(("change", "key", "always"), CASES)
def test_a_template_that_megatron_refuses_is_refused_before_the_first_byte(
    change: Callable[[Tree], object], key: str, always: bool, tmp_path: Path
) -> None:
    model = Handmade(topology=TWO, edit=change)
    with pytest.raises(FormatError, match=r"args_tp00_pp000\.pt") as caught:
        model.convert(tmp_path)
    assert key in caught.value.what
    assert caught.value.exit_code == 65
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "key", "always"), CASES)
def test_weights_alone_need_only_what_megatron_reads_for_them(
    change: Callable[[Tree], object], key: str, always: bool, tmp_path: Path
) -> None:
    model = Handmade(topology=TWO, edit=change)
    if always:
        with pytest.raises(FormatError) as caught:
            model.convert(tmp_path, full=False)
        assert key in caught.value.what
    else:
        outcome = model.convert(tmp_path, full=False)
        assert outcome.sentence().endswith("can load it with --no-load-optim --no-load-rng (it holds parameters only)")


WEIGHT_DECAY = ("start_wd", "end_wd", "wd_incr_steps", "wd_incr_style")
GOOD: dict[str, Callable[[Tree], object]] = {
    "weights-without-wd-mult": groups(
        lambda found: [{name: value for name, value in one.items() if name != "wd_mult" or not value} for one in found]
    ),
    "group-without-what-the-scheduler-sets": group(lr=drop, weight_decay=drop, max_lr=drop, min_lr=drop, lr_mult=drop),
    "betas-in-a-list": group(betas=[0.9, 0.95]),
    "scheduler-without-weight-decay": lambda tree: [
        tree["opt_param_scheduler"].pop(name, None) for name in WEIGHT_DECAY
    ],
    "version-4": put(checkpoint_version=4.0),
    "no-iteration": drop("iteration"),
    "group-without-step": group(step=drop),
    "rng-in-a-tuple": lambda tree: tree.update(rng_state=tuple(tree["rng_state"])),
    "no-samples": argument(consumed_train_samples=drop),
}
"""What megatron-core 0.6.0 loads and goes on from as from the whole; iteration and step are put in by the conversion."""


@pytest.mark.parametrize("change", GOOD.values(), ids=GOOD)
def test_a_template_that_megatron_takes_is_taken(change: Callable[[Tree], object], tmp_path: Path) -> None:
    Handmade(topology=TWO, edit=change).convert(tmp_path)
    result = read_template(tmp_path / "out" / "iter_0000012" / "mp_rank_00_000" / "model_optim_rng.pt")
    assert result.tree["iteration"] == 12
    assert {group["step"] for group in result.groups} == {12}
    run = TargetRun(num_layers=4, tensor=1, pipeline=2, virtual=1)
    assert unmet(result, run, full=True, checkpoint=True) == ()


@pytest.mark.parametrize(
    ("change", "key", "always"),
    [
        pytest.param(drop("iteration"), "iteration is missing", True, id="no-iteration"),
        pytest.param(put(iteration=-1), "iteration is -1", True, id="iteration-below-0"),
        pytest.param(group(1, step=drop), "param_groups[1].step is missing", False, id="no-step"),
        pytest.param(group(step="x"), "param_groups[0].step is 'x'", False, id="step-text"),
    ],
)
def test_what_a_conversion_puts_in_is_needed_in_a_checkpoint(
    change: Callable[[Tree], object], key: str, always: bool, tmp_path: Path
) -> None:
    model = Handmade(topology=TWO, edit=change)
    model.write(tmp_path)
    template = read_template(tmp_path / "pt_meta" / "args_tp00_pp000.pt")
    run = TargetRun(num_layers=4, tensor=1, pipeline=2, virtual=1)
    assert unmet(template, run, full=True) == ()
    assert [key in str(rule) for rule in unmet(template, run, full=True, checkpoint=True)] == [True]
    assert bool(unmet(template, run, full=False, checkpoint=True)) == always


def test_heads_that_contradict_the_shapes_are_refused_where_kv_channels_is_absent(tmp_path: Path) -> None:
    """Megatron-LM works out kv_channels as hidden_size // num_attention_heads (megatron/arguments.py)."""
    Handmade(topology=TWO, kv=5, edit=argument(kv_channels=drop)).convert(tmp_path / "good")
    model = Handmade(topology=TWO, kv=5, edit=argument(kv_channels=drop, num_attention_heads=2))
    with pytest.raises(TopologyError, match="query_key_value"):
        model.convert(tmp_path / "bad")


def test_what_the_rules_let_pass_is_what_megatron_itself_saved() -> None:
    """Every template of the golden sets, full and of parameters only."""
    for folder in golden_sets():
        for full, name in ((True, "pt_meta"), (False, "pt_meta_params")):
            for path in (folder / name).glob("args_*.pt"):
                template = read_template(path)
                args: Any = template.args
                run = TargetRun(
                    num_layers=args["num_layers"],
                    tensor=args["tensor_model_parallel_size"],
                    pipeline=args["pipeline_model_parallel_size"],
                    virtual=args["virtual_pipeline_model_parallel_size"] or 1,
                )
                assert unmet(template, run, full=full) == ()


def test_every_rule_names_the_code_that_reads_the_entry() -> None:
    assert all(rule.reader.startswith("megatron/") for rule in RULES)


def test_plan_warns_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Handmade(topology=TWO, edit=drop("rng_state"))
    model.write(tmp_path)
    paths = [
        "--ms-path",
        f"{tmp_path}/ms",
        "--param-map-path",
        f"{tmp_path}/pt_meta",
        "--megatron-path",
        f"{tmp_path}/o",
    ]
    assert main(["plan", *paths, "--num-layers", "4", "--pp-size", "2"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("warning: Megatron-LM 0.6 cannot resume")
    assert "2 of 2 ranks, first tp 0 pp 0: rng_state is missing" in first
    assert "--synthesize rng" in second


def test_ranks_that_an_earlier_version_finished_are_not_called_loadable(tmp_path: Path) -> None:
    model = Handmade(topology=TWO)
    model.convert(tmp_path)
    model.edit = drop("rng_state")
    model.write_meta(tmp_path / "pt_meta")
    with pytest.raises(FormatError, match="rng_state is missing"):
        model.convert(tmp_path)


def test_verify_finds_a_result_that_megatron_cannot_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Handmade(topology=TWO, edit=drop("opt_param_scheduler"))
    request = model.write(tmp_path)
    monkeypatch.setattr(
        "ckpt2pt.run.conversion.check_loadable", lambda *_: None
    )  # as version 0.1.0, which did not look
    with pytest.raises(VerificationError, match="opt_param_scheduler: is missing: Megatron-LM"):
        model.convert(tmp_path)
    model.convert(tmp_path, verify="digest")
    report = verify_target(request, range(2), level="full")
    assert [d.tensor for d in report.differences] == ["opt_param_scheduler", "opt_param_scheduler"]
