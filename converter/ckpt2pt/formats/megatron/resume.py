"""What Megatron-LM 0.6 reads of a model file besides the weights when it resumes from it, as one table.  Pure.

A conversion takes these entries from a template (``pt_meta/args_*.pt``); where one is missing or wrong, Megatron-LM ends
at start-up or, worse, goes on with other numbers.  All of it is in Megatron-LM cac60ce4 (core_v0.6.0); :class:`Rule` names
the file and function that reads an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard, cast

from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.torchfile.trees import Call, Value, as_tensor, is_namespace
from ckpt2pt.io.inputs import quoted

_DETAILS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRun:
    """The Megatron run to come.  None is what is not known.

    ``groups`` tells for each parameter group of the rank, in Megatron's order, whether its weights decay.
    """

    num_layers: int | None
    tensor: int
    pipeline: int
    virtual: int
    groups: tuple[bool, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmet:
    """A rule that a template breaks: the entry and what is wrong with it.

    ``synthesize`` is what ``pt-meta --synthesize`` takes to make the entry anew; empty where nothing can.
    """

    key: str
    problem: str
    synthesize: str

    def __str__(self) -> str:
        return f"{self.key} {self.problem}"


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry: its place in the file, which function reads it, and a check that yields what is wrong.

    ``always`` holds for weights alone as well (``--no-load-optim --no-load-rng``).  ``put_in`` is an entry that a
    conversion puts in itself: it is looked at in a checkpoint and not in a template.
    """

    key: str
    reader: str
    check: Callable[[Template, TargetRun], Iterable[tuple[str, str]]]
    synthesize: str = ""
    always: bool = False
    put_in: bool = False


def unmet(template: Template, run: TargetRun, *, full: bool, checkpoint: bool = False) -> tuple[Unmet, ...]:
    """The rules that ``template`` breaks for this run, in Megatron-LM's order of reading.

    ``full`` False keeps to what loading weights alone needs; ``checkpoint`` says that it is a model file that will be
    loaded as it is, and not what a conversion is made with.
    """
    return tuple(
        Unmet(key=rule.key + suffix, problem=problem, synthesize=rule.synthesize)
        for rule in RULES
        if (full or rule.always) and (checkpoint or not rule.put_in)
        for suffix, problem in rule.check(template, run)
    )


def summary(found: Sequence[Unmet]) -> str:
    """The first of the broken rules in one line."""
    more = len(found) - _DETAILS
    return "; ".join(map(str, found[:_DETAILS])) + (f"; and {more} more" if more > 0 else "")


def hint(found: Sequence[Unmet]) -> str:
    """What to do about a template that cannot be resumed from."""
    made = dict.fromkeys(one.synthesize for one in found if one.synthesize)
    if made and all(one.synthesize for one in found):
        command = f"ckpt2pt pt-meta --megatron-path CHECKPOINT --overwrite --synthesize {' '.join(made)}"
        return f"make pt_meta again: {command}; or use a checkpoint that was saved with all of it"
    return "make pt_meta again from a checkpoint of Megatron-LM 0.6 of this model and these degrees"


def first_of(found: Mapping[tuple[int, int], Sequence[Unmet]]) -> str:
    """The first rank (tp, pp) that breaks rules with its rules, in one line; empty where none does."""
    broken = {rank: rules for rank, rules in found.items() if rules}
    if not broken:
        return ""
    (tp, pp), first = next(iter(broken.items()))
    ranks = f"{len(broken)} of {len(found)} ranks, first tp {tp} pp {pp}: " if len(found) > 1 else ""
    return ranks + summary(first)


def warning(found: Mapping[tuple[int, int], Sequence[Unmet]], *, full: bool) -> tuple[str, ...]:
    """One warning for the templates of all ranks (tp, pp), with a hint in its second line; or none."""
    first = first_of(found)
    if not first:
        return ()
    every = tuple(rule for rules in found.values() for rule in rules)
    what = f"Megatron-LM 0.6 cannot {'resume from' if full else 'load'} what this metadata gives: {first}"
    return (f"{what}\n  hint: {hint(every)}",)


# ---------------------------------------------------------------------------------------------------------------- checks

_Found = Iterable[tuple[str, str]]
_ARCHITECTURE = ("num_layers", "hidden_size", "num_attention_heads")
_WITH_VOCABULARY = ("max_position_embeddings", "make_vocab_size_divisible_by", "padded_vocab_size", "tokenizer_type")
_GROUP = ("is_decoupled_lr", "bias_correction", "betas", "eps")
_SCHEDULER = ("max_lr", "min_lr", "lr_warmup_steps", "lr_decay_steps", "lr_decay_style", "num_steps")
_WEIGHT_DECAY = ("start_wd", "end_wd", "wd_incr_steps", "wd_incr_style")
_NUMBERS = ("lr_warmup_steps", "lr_decay_steps", "num_steps", "start_wd", "end_wd", "wd_incr_steps")
_STYLES = {
    "lr_decay_style": ("constant", "linear", "cosine", "inverse-square-root"),
    "wd_incr_style": ("constant", "linear", "cosine"),
}
_GRAD_SCALER = ("scale", "growth_tracker", "hysteresis_tracker")
_TORCH_STATES = frozenset({5056})  # pytorch, aten/src/ATen/CPUGeneratorImpl.cpp
_CUDA_STATES = frozenset({16, 816})  # pytorch, aten/src/ATen/cuda/CUDAGeneratorImpl.cpp; the latter before 2.1
_TWISTER_WORDS = 624
_VERSION = 3.0
_MODEL_PARALLEL = "model-parallel-rng"


def _missing(tree: Mapping[str, Value], keys: Iterable[str]) -> _Found:
    return ((f".{key}", "is missing") for key in keys if key not in tree)


def _no_args(template: Template, _: TargetRun) -> _Found:
    return () if "args" in template.tree else (("", "is missing"),)


def _args(template: Template, _: TargetRun) -> _Found:
    if "args" in template.tree and not is_namespace(template.tree["args"]):
        yield "", "is not a namespace"


def _version(template: Template, _: TargetRun) -> _Found:
    found = template.tree.get("checkpoint_version")
    if found is None:
        yield "", "is missing"
    elif not _is_number(found) or found < _VERSION:
        yield "", f"is {_shown(found)}, not {_VERSION} or newer"


def _iteration(template: Template, _: TargetRun) -> _Found:
    found = template.tree.get("iteration")
    if type(found) is not int or found < 0:
        yield "", "is missing" if found is None else f"is {_shown(found)}, not a count of iterations"


def _architecture(template: Template, run: TargetRun) -> _Found:
    args = _attributes(template)
    if args is None:
        return
    for name in _ARCHITECTURE:
        value = args.get(name)
        if type(value) is not int or value < 1:
            yield f".{name}", "is missing" if name not in args else f"is {_shown(value)}, not a number above 0"
        elif name == "num_layers" and run.num_layers not in (None, value):
            yield f".{name}", f"is {value}, the run to come has {run.num_layers}"


def _degrees(template: Template, run: TargetRun) -> _Found:
    args = _attributes(template)
    if args is None:
        return
    for name, wanted in (
        ("tensor_model_parallel_size", run.tensor),
        ("pipeline_model_parallel_size", run.pipeline),
    ):
        if args.get(name) != wanted or isinstance(args[name], bool):
            yield (
                f".{name}",
                "is missing" if name not in args else f"is {_shown(args[name])}, the run to come has {wanted}",
            )


def _virtual(template: Template, run: TargetRun) -> _Found:
    """Read for no comparison, but it names the entries model0, model1, ... that are loaded."""
    args = _attributes(template) or {}
    value = args.get("virtual_pipeline_model_parallel_size")
    if "virtual_pipeline_model_parallel_size" in args and (value or 1) != run.virtual:
        yield "", f"is {_shown(value)}, the run to come has {run.virtual} model chunks in each stage"


def _vocabulary(template: Template, _: TargetRun) -> _Found:
    args = _attributes(template) or {}
    return _missing(args, _WITH_VOCABULARY) if args.get("vocab_file") else ()


def _groups(template: Template, run: TargetRun) -> _Found:
    optimizer = template.tree.get("optimizer")
    inner = optimizer.get("optimizer") if isinstance(optimizer, dict) else None
    groups = inner.get("param_groups") if isinstance(inner, dict) else None
    if not isinstance(groups, list):
        if optimizer is None:
            yield "", "is None" if "optimizer" in template.tree else "is missing"
        else:
            yield "", "is not {'optimizer': {'param_groups': [...]}} (saved without --use-distributed-optimizer?)"
        return
    place = ".optimizer.param_groups"
    if run.groups is not None and len(groups) != len(run.groups):
        yield place, f"has {len(groups)} groups, the parameters of this rank make {len(run.groups)}"
        return
    for number, group in enumerate(groups):
        if not isinstance(group, dict):
            yield f"{place}[{number}]", "is not a dictionary"
            continue
        known = _texts(group)
        for key, problem in (*_missing(known, _GROUP), *_wrong_settings(known), *_wrong_decay(known, run, number)):
            yield f"{place}[{number}]{key}", problem


def _wrong_settings(group: Mapping[str, Value]) -> _Found:
    betas = group.get("betas")
    if "betas" in group and not (isinstance(betas, tuple | list) and len(betas) == 2 and all(map(_is_number, betas))):
        yield ".betas", f"is {_shown(betas)}, not two numbers"
    if "eps" in group and not _is_number(group["eps"]):
        yield ".eps", f"is {_shown(group['eps'])}, not a number"


def _wrong_decay(group: Mapping[str, Value], run: TargetRun, number: int) -> _Found:
    """Where it is missing the scheduler takes 1: biases and norms would decay, and nothing says so."""
    if run.groups is None:
        return
    value = group.get("wd_mult", 1.0)
    if not _is_number(value) or bool(value) != run.groups[number]:
        kind = "weights" if run.groups[number] else "biases and norms"
        found = f"is {_shown(value)}" if "wd_mult" in group else "is missing, which counts as 1"
        yield ".wd_mult", f"{found}, this group holds the {kind} of this rank"


def _steps(template: Template, _: TargetRun) -> _Found:
    for number, group in enumerate(template.groups):
        step = group.get("step")
        if not _is_number(step) and as_tensor(step) is None:
            problem = "is missing: Adam would begin at step 1 again" if step is None else f"is {_shown(step)}"
            yield f".optimizer.param_groups[{number}].step", problem


def _scaler(template: Template, _: TargetRun) -> _Found:
    args = _attributes(template) or {}
    optimizer = template.tree.get("optimizer")
    scaler = optimizer.get("grad_scaler") if isinstance(optimizer, dict) else None
    if isinstance(scaler, dict) and args.get("fp16") is True and args.get("loss_scale") is None:
        return _missing(_texts(scaler), _GRAD_SCALER)
    return ()


def _scheduler(template: Template, _: TargetRun) -> _Found:
    state = template.tree.get("opt_param_scheduler")
    if not isinstance(state, dict):
        yield "", "is missing" if state is None else "is not a dictionary"
        return
    known = _texts(state)
    wanted = (*_SCHEDULER, *(_WEIGHT_DECAY if "start_wd" in known else ()))
    yield from _missing(known, wanted)
    for name in wanted:
        value = known.get(name)
        if name in known and name in _NUMBERS and not _is_number(value):
            yield f".{name}", f"is {_shown(value)}, not a number"
        if name in known and name in _STYLES and value not in _STYLES[name]:
            yield f".{name}", f"is {_shown(value)}, not one of {', '.join(_STYLES[name])}"
    if "num_iters" in known:
        yield ".num_iters", "is there, and Megatron-LM reads it in place of num_steps"


def _old_scheduler(template: Template, _: TargetRun) -> _Found:
    if "lr_scheduler" in template.tree:
        yield "", "is there, and Megatron-LM reads it in place of opt_param_scheduler"


def _random_states(template: Template, _: TargetRun) -> _Found:
    states = template.tree.get("rng_state")
    args = _attributes(template) or {}
    if not isinstance(states, list | tuple):
        yield "", "is missing" if states is None else "is not a list"
        return
    size = args.get("data_parallel_size")
    wanted = size if args.get("data_parallel_random_init") is True and isinstance(size, int) else 1
    if len(states) < wanted:
        yield "", f"has {len(states)} entries, {wanted} are read"
        return
    for number, state in enumerate(states[:wanted]):
        if not isinstance(state, dict):
            yield f"[{number}]", "is not a dictionary"
            continue
        for key, check in _GENERATORS.items():
            problem = "is missing" if key not in state else check(state[key])
            if problem:
                yield f"[{number}].{key}", problem


def _python_state(value: Value) -> str:
    """``random.setstate``: version 3, 624 words and a position, and a number kept back or None."""
    match value:
        case (3, tuple(words), None | float()):
            good = len(words) == _TWISTER_WORDS + 1 and all(type(word) is int and 0 <= word < 2**32 for word in words)
            return "" if good and cast("int", words[-1]) <= _TWISTER_WORDS else "is not 624 words and a position"
        case _:
            return "is not a state of Python's random"


def _numpy_state(value: Value) -> str:
    """``numpy.random.set_state``: the name, 624 words in an array or a list, and a position."""
    if not isinstance(value, tuple | list) or len(value) not in (3, 5) or value[0] != "MT19937":
        return "is not a state of numpy's MT19937"
    words = value[1]
    if isinstance(words, Call):  # an array, made by _reconstruct and filled from its state
        shape = words.state[1] if isinstance(words.state, tuple) and len(words.state) > 1 else None
        good = shape == (_TWISTER_WORDS,)
    else:
        good = isinstance(words, tuple | list) and len(words) == _TWISTER_WORDS and all(type(n) is int for n in words)
    return "" if good and type(value[2]) is int else "is not 624 words and a position"


def _bytes_of(sizes: frozenset[int]) -> Callable[[Value], str]:
    def check(value: Value) -> str:
        found = as_tensor(value)
        if found is None or found.dtype != "uint8" or len(found.shape) != 1:
            return "is not a tensor of bytes"
        return "" if found.numel in sizes else f"has {found.numel} bytes, not {max(sizes)}"

    return check


def _tracker(value: Value) -> str:
    if not isinstance(value, dict) or not value:
        return "is empty" if value == {} else "is not a dictionary"
    if _MODEL_PARALLEL not in value:
        return f"has no {_MODEL_PARALLEL}"
    wrong = next(((key, why) for key, state in value.items() if (why := _bytes_of(_CUDA_STATES)(state))), None)
    return f"{wrong[0]!r} {wrong[1]}" if wrong else ""


_GENERATORS: Mapping[str, Callable[[Value], str]] = {
    "random_rng_state": _python_state,
    "np_rng_state": _numpy_state,
    "torch_rng_state": _bytes_of(_TORCH_STATES),
    "cuda_rng_state": _bytes_of(_CUDA_STATES),
    "rng_tracker_states": _tracker,
}


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: object) -> str:
    return quoted(cast("str", value))


def _attributes(template: Template) -> dict[str, Value] | None:
    return template.args if is_namespace(template.tree.get("args")) else None


def _texts(value: Mapping[Value, Value]) -> Mapping[str, Value]:
    return {key: item for key, item in value.items() if isinstance(key, str)}


# ----------------------------------------------------------------------------------------------------------------- table

_LOAD = "megatron/checkpointing.py, load_checkpoint"
_CHECK = "megatron/checkpointing.py, check_checkpoint_args"
RULES: tuple[Rule, ...] = (
    # Absent counts as version 0: qkv is re-ordered; below 3.0 args.model_parallel_size is compared, which is not there.
    Rule("checkpoint_version", f"{_LOAD}; {_CHECK}; fix_query_key_value_ordering", _version, always=True),
    Rule("iteration", _LOAD, _iteration, always=True, put_in=True),
    # Absent is no error: nothing is compared, and the data start again at sample 0.
    Rule("args", _LOAD, _no_args),
    Rule("args", _CHECK, _args, always=True),
    Rule("args", _CHECK, _architecture, always=True),
    Rule("args", _CHECK, _vocabulary, always=True),
    Rule("args", _CHECK, _degrees, always=True),
    Rule("args.virtual_pipeline_model_parallel_size", _LOAD, _virtual, always=True),
    # torch takes the groups over wholesale: nothing fills in what they lack, and their order is their only name.
    Rule(
        "optimizer",
        "megatron/core/optimizer/distrib_optimizer.py, load_state_dict; megatron/training.py, train; apex FusedAdam",
        _groups,
        "optimizer",
    ),
    Rule("optimizer", "megatron/core/optimizer/__init__.py; apex FusedAdam, step", _steps, put_in=True),
    Rule("optimizer.grad_scaler", "megatron/core/optimizer/grad_scaler.py, load_state_dict", _scaler, "optimizer"),
    Rule("lr_scheduler", _LOAD, _old_scheduler),
    Rule("opt_param_scheduler", "megatron/optimizer_param_scheduler.py, load_state_dict", _scheduler, "scheduler"),
    Rule("rng_state", f"{_LOAD}; megatron/core/tensor_parallel/random.py, CudaRNGStatesTracker", _random_states, "rng"),
)  # fmt: skip
"""Not in it: ``num_floating_point_operations_so_far`` and ``args.consumed_*_samples`` (0 where absent), what a conversion
itself puts in (``model``, ``num_steps``), and ``lr``, ``weight_decay``, ``max_lr``, ``min_lr`` and ``lr_mult`` of a
group, which the scheduler sets before the first step or has defaults for.  Entries under names that Megatron-LM wrote
before it had a distributed optimizer (``start_lr``, ``total_iters``, generators at the top of the file, ...) count as
missing, though 0.6 still reads them.

Every rule was tried on a checkpoint of Megatron-LM 0.6 with megatron-core 0.6.0 from PyPI, loading and one step on a CPU:
tests/converter/formats/megatron/test_resume.py has the cases.  Not seen there: the size of a CUDA generator's state, which needs a GPU,
and ``virtual_pipeline_model_parallel_size``, which is compared nowhere."""
