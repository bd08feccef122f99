"""Whether Megatron-LM can load a checkpoint or what a conversion will write, and what of it a user should know before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ckpt2pt.core.foldernames import expert_ranks, model_rank_name, model_rank_of
from ckpt2pt.core.moves import OPTIM_FILE
from ckpt2pt.core.stated import Statement
from ckpt2pt.core.topology import Rank
from ckpt2pt.discover.checkpoint import Discovered, kind_of
from ckpt2pt.discover.metadata import assumptions, meta_of, template_of
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import Ckpt2ptError, FormatError, aside
from ckpt2pt.formats.families import Seen
from ckpt2pt.formats.megatron.headers import MegatronRank, is_expert_parallel, rank_folders, read_rank
from ckpt2pt.formats.megatron.loads import loads_of
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.megatron.release import optimizer_form, written_by
from ckpt2pt.formats.megatron.resume import Unmet, first_of, hint, summary
from ckpt2pt.formats.ptmeta.metadata import RankMeta
from ckpt2pt.io.paths import is_file, listing
from ckpt2pt.io.records import Json


def check_loadable(request: Request, rank: Rank, meta: RankMeta | None = None) -> None:
    """Refuse metadata from which Megatron-LM could not resume (parameters only: could not load weights).

    ``meta`` is that of the rank where it has been read already.
    """
    meta = meta or meta_of(request, rank)
    found = meta.unmet(request.topology, full=request.full)
    if found:
        raise FormatError(
            f"Megatron-LM 0.6 cannot {'resume from' if request.full else 'load'} what this metadata gives: "
            + summary(found),
            where=meta.template.where,
            hint=hint(found) + (f", or convert weights alone{aside('mode')}" if request.full else ""),
        )


def kept_of_template(request: Request, chosen: Discovered, rank: Rank) -> tuple[str, ...]:
    """What a result takes from the metadata as it is though it belongs to another iteration; none where it is the same."""
    tree = template_of(request, rank).tree
    if tree.get("iteration") == chosen.training_step.iteration:
        return ()
    return tuple(key for key in ("rng_state", "num_floating_point_operations_so_far") if key in tree)


def contradictions(template: Template, stated: Statement) -> tuple[str, ...]:
    """A warning where the checkpoint and the metadata of a rank tell different settings of optimizer or scheduler."""
    conflicts = template.carried(stated).conflicts
    if not conflicts:
        return ()
    return (
        f"the checkpoint and pt_meta disagree, and the checkpoint's values are taken: {', '.join(conflicts)}\n"
        "  hint: start Megatron-LM with the same, or with --override-opt_param-scheduler",
    )


def contradictions_of(request: Request, chosen: Discovered, rank: Rank) -> tuple[str, ...]:
    """The same, of a rank that was not planned."""
    template = template_of(request, rank)
    return contradictions(template, kind_of(request).stated(request, chosen, rank))


def made_up(request: Request) -> tuple[str, ...]:
    """A warning for what of a result neither the source nor a pt_meta of somebody states."""
    sentences = {
        "rng_state": "the states of the random number generators are",
        "optimizer": "the optimizer is",
        "arguments": "arguments are",
    }
    found = {} if request.metadata else assumptions(request)
    return tuple(f"{sentences[what]} {value}" for what, value in found.items() if what in sentences)


_OF_MSADAPTER: Json = {
    "container": "MSAdapter (MindSpeed-LLM on MindSpore)",
    "resumable": "no: no release of torch reads files of MSAdapter",
    "nextStep": "ckpt2pt convert --target-format torch, for files of torch; or any other format of a result",
}


def verdicts(iteration: Path) -> Json:
    """Which release wrote an iteration, with which form of optimizer; of one of Megatron-LM 0.6, or one that it may read:

    whether 0.6 can resume from it as it is, and, if not, whether it can load its weights.
    """
    from ckpt2pt.formats.ptmeta.capture import unmet_of_rank  # noqa: PLC0415 - not for conversions, whose memory it would cost

    broken: dict[bool, dict[Rank, tuple[Unmet, ...]]] = {True: {}, False: {}}
    facts: Json = {}
    releases: Json = {}
    try:
        every = expert_ranks(listing(iteration), pipelined=True)
        if every:
            first = read_rank(every[min(every)], experts=True)
            facts = {"writtenBy": f"Megatron-LM {written_by(first)}", "optimizer": optimizer_form(first)}
            if first.msadapter:
                return facts | _OF_MSADAPTER | (_rounding(first, every) if first.coalesced else {})
            releases = {"releases": dict(found)} if (found := loads_of(first)) else {}
            if first.core_names or first.coalesced:
                why = "names of its parameters" if first.core_names else "form of its optimizer"
                facts["resumable"] = f"not by Megatron-LM 0.6, which does not know the {why}"
                return facts | (_rounding(first, every) if first.coalesced else {}) | releases
        ranks = rank_folders(iteration)
        for rank, folder in ranks.items():
            held = read_rank(folder, optimizer=False)
            for full, so_far in broken.items():
                rules = unmet_of_rank(held, ranks, full=full, checkpoint=True)
                so_far[rank] = (*_misplaced(held, pipelined=max(ranks)[1] > 0, full=full), *rules)
    except Ckpt2ptError as error:
        if Seen(iteration).of_msadapter:
            return _OF_MSADAPTER
        return facts | {"resumable": f"unknown: {error.what}"}
    resumes, loads = (first_of(broken[full]) for full in (True, False))
    if not resumes:
        return facts | {"resumable": "yes, by Megatron-LM 0.6"} | releases
    return facts | {"resumable": f"no: {resumes}", "weightsLoadable": f"no: {loads}" if loads else "yes"}


def _rounding(first: MegatronRank, ranks: Mapping[tuple[int, int, int], Path]) -> dict[str, str]:
    """Whether the main parameters of all ranks round to the weights, by samples of each."""
    from ckpt2pt.formats.ptmeta.capture import SAMPLE_NUMEL, lay_out_rank  # noqa: PLC0415 - see above

    for (_, pp, _), folder in ranks.items():
        try:
            rank = read_rank(folder, experts=True)
            if rank.buffers is not None:
                lay_out_rank(rank, 0 if is_expert_parallel(first) else pp, at_most=SAMPLE_NUMEL)
        except Ckpt2ptError as error:
            return {"mainParameters": f"not those of the weights: {folder.name}: {error.what}"}
    return {"mainParameters": "round to the weights, by samples of each"}


def _misplaced(rank: MegatronRank, *, pipelined: bool, full: bool) -> tuple[Unmet, ...]:
    """Files that Megatron-LM does not find: megatron/checkpointing.py, get_checkpoint_name."""
    folder, found = rank.folder, list[Unmet]()
    tp, pp = model_rank_of(folder.name) or (0, 0)
    right = model_rank_name(tp, pp if pipelined else None)
    if folder.name != right:
        found.append(Unmet(key=folder.name, problem=f"has to be {right} for this pipeline size", synthesize=""))
    distributed = rank.template.args.get("use_distributed_optimizer") is True
    if full and distributed and not is_file(folder / OPTIM_FILE):
        found.append(Unmet(key=OPTIM_FILE, problem="is missing", synthesize=""))
    return tuple(found)
