"""Golden sets as requests: which degrees each was made with, and a run of it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

from ckpt2pt.core.topology import Topology
from ckpt2pt.discover.request import Request
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.pickles import read_pickle
from ckpt2pt.formats.torchfile.trees import namespace_attrs
from ckpt2pt.kube.asked import spec_of
from ckpt2pt.kube.resolve import resolve


class Quiet:
    """A reporter that says nothing."""

    def begin(self, totals: Mapping[tuple[int, int], int], iteration: int) -> None: ...
    def advance(self, rank: tuple[int, int], nbytes: int) -> None: ...
    def end(self, rank: tuple[int, int]) -> None: ...
    def close(self) -> None: ...


def topology_of(folder: Path) -> Topology:
    """The degrees in a set's name, its layers from its arguments, its no-op layers from the one set that has some."""
    degrees = {
        name: int(value) for name, value in re.findall(r"(tp|pp|vpp|dp)(\d+)", folder.name.replace("vpp", " vpp"))
    }
    pipeline = re.search(r"(?<!v)pp(\d+)", folder.name)
    args = read_pickle(Archive.open(folder / "pt_meta" / "args_tp00_pp000.pt").pickle, where=folder.name)
    assert isinstance(args, dict)
    layers = namespace_attrs(args["args"])["num_layers"]
    assert isinstance(layers, int)
    return Topology(
        num_layers=layers,
        tensor=degrees.get("tp", 1),
        pipeline=int(pipeline[1]) if pipeline else 1,
        virtual=degrees.get("vpp", 1),
        data=degrees.get("dp", 1),
        noop=frozenset({6, 7}) if folder.name.endswith("noop_tail") else frozenset(),
    )


def request_of(options: argparse.Namespace) -> Request:
    """The request of a conversion to Megatron that flags describe."""
    return resolve(spec_of(options), in_process=getattr(options, "multiprocess_off", False))


def request_for(folder: Path, target: Path, *, full: bool = True, **more: object) -> Request:
    """A set taken the way of the reference: ms + pt_meta, or ms_params + pt_meta_params."""
    suffix = "" if full else "_params"
    options: dict[str, object] = {
        "topology": topology_of(folder),
        "source": folder / f"ms{suffix}",
        "metadata": folder / f"pt_meta{suffix}",
        "target": target,
        "full": full,
        "in_process": True,
    }
    return Request(**(options | more))  # type: ignore[arg-type]


def flags_for(folder: Path, target: Path, *, full: bool = True) -> list[str]:
    """The same as :func:`request_for` on the reference's command line."""
    request = request_for(folder, target, full=full)
    cut = request.topology
    flags = [
        "--num-layers",
        cut.num_layers,
        "--tp-size",
        cut.tensor,
        "--pp-size",
        cut.pipeline,
        "--vpp-size",
        cut.virtual,
    ]
    flags += ["--dp-size", cut.data, "--cp-size", 1, "--ms-path", request.source, "--param-map-path", request.metadata]
    flags += ["--megatron-path", target, *(["--noop", *sorted(cut.noop)] if cut.noop else [])]
    return [*map(str, flags), *([] if full else ["--convert-param-only"])]
