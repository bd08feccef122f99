"""``ckpt2pt pt-meta``: one of the two ways, then the files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from ckpt2pt.core.progress import SILENCE, Reporter
from ckpt2pt.errors import UsageError, counted, grouped, printable, ref
from ckpt2pt.formats.megatron.resume import warning
from ckpt2pt.formats.ptmeta.capture import capture
from ckpt2pt.formats.ptmeta.describe import describe
from ckpt2pt.formats.ptmeta.files import ORIGIN, RankFiles, origin, publish, render
from ckpt2pt.formats.ptmeta.missing import SYNTHESIZED
from ckpt2pt.formats.ptmeta.relayout import NewLayout, PtMeta, relayout
from ckpt2pt.formats.ptmeta.synthesize import Wanted, synthesize
from ckpt2pt.io.text import warned

_SHOWN = 15
"""Arguments that are named without ``--details``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What was made; ``written`` is None while assumptions wait to be accepted.

    ``warnings`` come first in what a person reads; ``loadable`` is False where they say that Megatron-LM cannot resume.
    """

    folder: Path
    way: str
    ranks: int
    maps: int
    evidence: tuple[str, ...]
    assumed: Mapping[str, object]
    written: tuple[str, ...] | None
    warnings: tuple[str, ...] = ()
    loadable: bool = True

    def document(self) -> dict[str, object]:
        """For ``--output json``."""
        return {
            "kind": "pt_meta",
            "path": str(self.folder),
            "from": self.way,
            "ranks": self.ranks,
            "paramMaps": self.maps,
            "written": None if self.written is None else len(self.written),
            "warnings": list(self.warnings),
            "loadable": self.loadable,
            "evidence": list(self.evidence),
            "assumed": dict(self.assumed),
        }

    def sentence(self, *, details: bool = False) -> str:
        """For a person: warnings first; ``details`` lists every assumed argument instead of counting them."""
        folder = printable(str(self.folder))
        lines = [f"{folder}: {counted(self.ranks, 'rank')}, {counted(self.maps, 'param map')}, from a {self.way}"]
        lines[:0] = warned(self.warnings)
        label = "proved " if self.loadable else "layout "
        lines += [f"  {label}  {grouped(fact)}" for fact in self.evidence]
        for what, value in self.assumed.items():
            if isinstance(value, dict):
                inner = cast("dict[str, object]", value)
                if details:
                    lines.append(f"  assumed  {what}:")
                    lines += [f"             {name}: {item}" for name, item in inner.items()]
                elif len(inner) <= _SHOWN:
                    lines.append(f"  assumed  {what}: " + ", ".join(f"{name} {item}" for name, item in inner.items()))
                else:
                    lines.append(f"  assumed  {what}: {len(inner)} of them ({ref('details')} lists them)")
            else:
                lines.append(f"  assumed  {what}: {value}")
        if self.written is not None:
            lines.append(
                f"wrote {counted(len(self.written), 'file')}" if self.written else "everything was there already"
            )
        return "\n".join(lines)

    def confirm(self) -> None:
        """Raise :class:`UsageError` while the assumptions are not accepted."""
        if self.written is None:
            raise UsageError(
                "the metadata rests on the assumptions above, and nothing was written",
                where=self.folder,
                hint=f"check them, correct the description where it is wrong, and run the command again with {ref('acceptAssumptions')}",
            )


def from_checkpoint(
    checkpoint: Path,
    folder: Path,
    *,
    target_data: int | None,
    bucket_size: int | None,
    compare: bool,
    overwrite: bool,
    synthesize: tuple[str, ...] = (),
    allow: tuple[str, ...] = (),
    reporter: Reporter = SILENCE,
) -> Made:
    """Make ``folder`` from a checkpoint that Megatron wrote."""
    found = capture(
        checkpoint,
        target_data=target_data,
        bucket_size=bucket_size,
        compare=compare,
        synthesize=synthesize,
        allow=allow,
        reporter=reporter,
    )
    assumed: dict[str, object] = dict(SYNTHESIZED[part] for part in found.made)
    if not found.with_maps:
        assumed["optimizer"] = "the run had no --use-distributed-optimizer: good for parameters only"
    if target_data:
        assumed["data x context parallel size"] = (
            f"{target_data}, as ckpt2pt convert --target-dp-size {target_data} needs it"
        )
    made = _made(folder, "checkpoint", found.ranks, found.evidence, assumed, found.with_maps, overwrite=overwrite)
    problems = warning(found.unmet, full=found.with_maps)
    return replace(made, warnings=problems, loadable=not problems)


def from_description(path: Path, folder: Path, wanted: Wanted, *, accepted: bool, overwrite: bool) -> Made:
    """Make ``folder`` from a description; without ``accepted`` nothing is written."""
    found = synthesize(describe(path), wanted)
    if accepted:
        made = _made(folder, "description", found.ranks, found.evidence, found.assumed, True, overwrite=overwrite)
        return replace(made, warnings=found.warnings)
    return Made(
        folder=folder,
        way="description",
        ranks=len(found.ranks),
        maps=sum(len(buffers) for rank in found.ranks for buffers in rank.buffers),
        evidence=found.evidence,
        assumed=found.assumed,
        written=None,
        warnings=found.warnings,
    )


def from_pt_meta(old: Path, folder: Path, new: NewLayout, *, overwrite: bool, allow: tuple[str, ...] = ()) -> Made:
    """Make ``folder`` for another parallel layout."""
    found = relayout(PtMeta(old, allow), new)
    ranks = tuple(map(found.rank, found.layout.ranks()))
    return _made(folder, "pt_meta of another layout", ranks, (), found.assumed, True, overwrite=overwrite)


def _made(
    folder: Path,
    way: str,
    ranks: tuple[RankFiles, ...],
    evidence: tuple[str, ...],
    assumed: Mapping[str, object],
    with_maps: bool,
    *,
    overwrite: bool,
) -> Made:
    files = render(ranks, with_maps=with_maps)
    maps = sum(name.endswith(".json") for name in files)
    files[ORIGIN] = origin(way=way, evidence=evidence, assumed=assumed)
    written = publish(folder, files, overwrite=overwrite)
    return Made(
        folder=folder, way=way, ranks=len(ranks), maps=maps, evidence=evidence, assumed=assumed, written=written
    )
