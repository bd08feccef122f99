"""Whether Megatron-LM can load what a conversion will write, and what of it a user should know before it is used."""

from __future__ import annotations

from collections.abc import Iterable

from ckpt2pt.ckpt import statement_of
from ckpt2pt.ckpt.ranks import index_source
from ckpt2pt.errors import FormatError
from ckpt2pt.mapping.topology import Rank
from ckpt2pt.meta import metadata_files, read_arguments
from ckpt2pt.pt.resume import Unmet, hint, summary
from ckpt2pt.request import Request
from ckpt2pt.survey import Survey, meta_of


def unmet_of(request: Request, rank: Rank) -> tuple[Unmet, ...]:
    """What keeps Megatron-LM from loading the result of a rank, by its metadata."""
    return meta_of(request, rank).unmet(request.topology, full=request.full)


def check_loadable(request: Request, ranks: Iterable[Rank]) -> None:
    """Refuse metadata from which Megatron-LM could not resume (parameters only: could not load weights)."""
    for tp, pp in ranks:
        found = unmet_of(request, (tp, pp))
        if found:
            raise FormatError(
                f"Megatron-LM 0.6 cannot {'resume from' if request.full else 'load'} what this metadata gives: "
                + summary(found),
                where=metadata_files(request.metadata, tp=tp, pp=pp)[0],
                mend=hint(found)
                + (", or convert with spec.mode ParamsOnly (--convert-param-only)" if request.full else ""),
            )


def kept_of_template(request: Request, chosen: Survey, rank: Rank) -> tuple[str, ...]:
    """What a result takes from the metadata as it is though it belongs to another iteration; none where it is the same."""
    tree = read_arguments(request.metadata, rank, allow=request.rules.pickle_globals).tree
    if tree.get("iteration") == chosen.clock.iteration:
        return ()
    return tuple(key for key in ("rng_state", "num_floating_point_operations_so_far") if key in tree)


def contradictions(request: Request, chosen: Survey, rank: Rank) -> tuple[str, ...]:
    """A warning where the checkpoint and the metadata of a rank tell different settings of optimizer or scheduler."""
    stated = (0, 0) if request.source_topology else rank
    index = index_source(chosen.files[stated], request.source_layout.group(*stated))
    template = read_arguments(request.metadata, rank, allow=request.rules.pickle_globals)
    conflicts = template.carried(statement_of(index)).conflicts
    if not conflicts:
        return ()
    return (
        f"the checkpoint and pt_meta disagree, and the checkpoint's values are taken: {', '.join(conflicts)}\n"
        "  hint: start Megatron-LM with the same, or with --override-opt_param-scheduler",
    )
