"""What a conversion was asked for, one frozen value from flags or a CheckpointConversion; and who is informed how far it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, cast

from ckpt2pt.core.moves import OPTIM_KINDS
from ckpt2pt.core.names import Rules
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import UsageError, ref
from ckpt2pt.io.access import access_error
from ckpt2pt.io.digests import sha256
from ckpt2pt.io.files import read_text
from ckpt2pt.io.flags import nearest

Verify = Literal["none", "digest", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How ranks are worked on: ``workers`` at a time, ``timeout`` seconds for each, or one by one ``in_process``.

    ``reread`` reads every byte of what an earlier run finished.
    """

    workers: int = 1
    in_process: bool = False
    timeout: float | None = None
    reread: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MindSporeFiles:
    """The files of a MindSpore result.

    ``contents`` are the kinds of tensors to be taken of the optimizer's state; ``copies`` writes a file for every data- and
    context-parallel rank instead of the first alone; ``crc`` adds mindspore's checksum to a ``.ckpt``.
    """

    format: Literal["ckpt", "safetensors"] = "ckpt"
    prefix: str = "network"
    copies: bool = False
    contents: tuple[str, ...] = OPTIM_KINDS
    crc: bool = False
    merged: bool = False
    """Merged of data-parallel shards, beside whose names they have theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """All options of ``ckpt2pt convert``.

    ``when`` is (epoch, step) of the checkpoint, for callers that have looked themselves; ``target_data`` is the data x
    context parallel size of the Megatron run to come (None: that of pt_meta); ``shard_info`` is the folder that describes
    data-parallel shards (None: ``opt_shard_info`` in the source); ``timeout`` is in seconds and for each rank;
    ``workers`` is the number of ranks converted at a time.
    """

    topology: Topology
    """The layout of the result."""
    source: Path
    """Of Megatron the folder of the iteration."""
    metadata: Path | None
    """None: what a Megatron source says itself.  Of an import the param maps that are proved."""
    target: Path
    files: MindSporeFiles | None = None
    """None: Megatron's."""
    full: bool = True
    source_format: str | None = None
    shard_info: Path | None = None
    iteration: int | None = None
    when: tuple[int, int] | None = None
    target_data: int | None = None
    rules: Rules = field(default_factory=Rules)
    reference_samples: bool = False
    overwrite: bool = False
    verify: Verify = "digest"
    workers: int = 1
    in_process: bool = False
    timeout: float | None = None
    reread: bool = False
    source_topology: Topology | None = None
    """The layout of the source where it is another one; of a MindSpore source the layers do not matter."""

    @property
    def source_layout(self) -> Topology:
        """How the source is laid out."""
        return self.source_topology or self.topology

    @property
    def from_megatron(self) -> bool:
        """Whether the source is a Megatron checkpoint, in either of its forms: ``megatron`` (torch) or ``torch_dist``."""
        return self.source_format in {"megatron", "torch_dist"}

    @property
    def pace(self) -> Pace:
        """How its ranks are worked on."""
        return Pace(workers=self.workers, in_process=self.in_process, timeout=self.timeout, reread=self.reread)

    def identity_options(self) -> dict[str, object]:
        """The options that decide what is written, for the conversion's identity and the manifest."""
        topology, files = self.topology, self.files
        kind: dict[str, object] = {"format": "Megatron06"}
        if files:
            kind = {**asdict(files), "direction": "import"}
        return {
            "mode": "Full" if self.full else "ParamsOnly",
            **kind,
            "numLayers": topology.num_layers,
            "noopLayers": sorted(topology.noop),
            "layersPerStage": list(topology.layers_per_stage) if topology.layers_per_stage else None,
            "tensor": topology.tensor,
            "pipeline": topology.pipeline,
            "virtualPipeline": topology.virtual,
            "data": topology.data,
            "context": topology.context,
            "targetDataParallel": self.target_data,
            "referenceSamples": self.reference_samples,
            **({"source": _degrees(self.source_topology)} if self.source_topology else {}),
            "rules": {
                "layer_modules": dict(self.rules.layer_modules),
                "modules": dict(self.rules.modules),
                "ignore": list(self.rules.ignore),
            },
        }


def _degrees(layout: Topology) -> dict[str, int]:
    names = ("tensor", "pipeline", "data", "context")
    return {name: getattr(layout, name) for name in names}


def digest(document: object) -> str:
    """SHA-256 of a JSON document in canonical form."""
    return sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


_SECTIONS = {"layer_modules", "modules", "ignore", "pickle_globals"}


def rules_of(given: str | None) -> Rules:
    """Rules from ``--rules``: the path of a rule file, or a JSON object, as a Job passes those of its document."""
    if given is None:
        return Rules()
    hint = "see docs/rules.md for the sections layer_modules, modules, ignore and pickle_globals"
    if not given:
        raise UsageError("neither rules nor the path of a rule file", where=ref("model.rules"), hint=hint)
    if not given.lstrip().startswith(("{", "[")):
        return load_rules(Path(given))
    try:
        return parse_rules(json.loads(given), where=ref("model.rules"), hint=hint)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not a JSON document: {error}", where=ref("model.rules"), hint=hint) from error


def load_rules(path: Path) -> Rules:
    """Read a rule file (YAML).  Sections: layer_modules, modules (Megatron: MindSpore), ignore, pickle_globals."""
    import yaml  # noqa: PLC0415 - only when a rule file is given

    hint = "see docs/rules.md for the sections layer_modules, modules, ignore and pickle_globals"
    try:
        document: object = yaml.safe_load(read_text(path))
    except OSError as error:
        raise access_error(error, path, "reading", option=ref("model.rules")) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"not a YAML document: {error}", where=path, hint=hint) from error
    return parse_rules(document, where=str(path), hint=hint)


def parse_rules(document: object, *, where: str, hint: str) -> Rules:
    """Rules from a parsed document; the same shape in a rule file and in ``spec.model.rules``."""
    if document is None:
        return Rules()
    if not isinstance(document, dict):
        raise UsageError("the rules are not a mapping of sections", where=where, hint=hint)
    sections = cast("dict[str, object]", document)
    unknown = sorted(map(str, set(sections) - _SECTIONS))
    if unknown:
        near = nearest(unknown[0], sorted(_SECTIONS))
        hint = f"did you mean {near}? {hint}" if near else hint
        raise UsageError(f"unknown section {unknown[0]}", where=where, hint=hint)
    return Rules(
        layer_modules=_names(sections, "layer_modules", where, hint),
        modules=_names(sections, "modules", where, hint),
        ignore=_list(sections, "ignore", where, hint),
        pickle_globals=_list(sections, "pickle_globals", where, hint),
    )


def _names(sections: Mapping[str, object], section: str, where: str, hint: str) -> dict[str, str]:
    value: object = sections.get(section) or {}
    if not isinstance(value, dict):
        raise UsageError(f"{section} is not a mapping of Megatron name to MindSpore name", where=where, hint=hint)
    pairs = cast("dict[object, object]", value)
    if not all(isinstance(part, str) and part for pair in pairs.items() for part in pair):
        raise UsageError(f"{section} holds something else than names", where=where, hint=hint)
    return cast("dict[str, str]", pairs)


def _list(sections: Mapping[str, object], section: str, where: str, hint: str) -> tuple[str, ...]:
    value: object = sections.get(section) or []
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in cast("list[object]", value)):
        raise UsageError(f"{section} is not a list of names", where=where, hint=hint)
    return tuple(cast("list[str]", value))
