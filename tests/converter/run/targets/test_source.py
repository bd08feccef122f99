"""A source by its tensors: what it is identified by, and the type of the weights that are made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from ckpt2pt.core.tensor import Key
from ckpt2pt.core.topology import Topology
from ckpt2pt.discover.request import Verify
from ckpt2pt.errors import FormatError, MissingInputError, TryAgainError
from ckpt2pt.run.targets.request import TargetRequest
from ckpt2pt.run.targets.source import located, read_source
from mcoresets import odd_set, script_of
from torchdist import as_bfloat16, gpt, of_layers, whole, write_folder, write_gpt


def request(tmp_path: Path, *script: str) -> TargetRequest:
    folder = odd_set()
    return TargetRequest(
        topology=Topology(num_layers=1),
        source=folder / "ms",
        target=tmp_path / "out",
        source_format="mindspore",
        metadata=script_of(folder, tmp_path, *script),
    )


def test_identity_changes_with_what_the_metadata_states(tmp_path: Path) -> None:
    one = read_source(request(tmp_path)).identity({})
    assert read_source(request(tmp_path)).identity({}) == one
    assert read_source(request(tmp_path)).identity({"mode": "Full"}) != one
    assert read_source(request(tmp_path, "--seed", "5")).identity({}) != one


@pytest.mark.parametrize(
    ("metadata", "dtype", "remarks"),
    [
        pytest.param(True, "bfloat16", 0, id="the-script-says-bf16"),
        pytest.param(False, "bfloat16", 1, id="nothing-says-it"),
    ],
)
def test_weights_of_a_mindspore_source_have_the_type_of_the_training(
    metadata: bool, dtype: str, remarks: int, tmp_path: Path
) -> None:
    asked = request(tmp_path)
    found = read_source(asked if metadata else replace(asked, metadata=None))
    assert (found.dtype, len(found.remarks)) == (dtype, remarks)


def test_weights_alone_leave_moments_out(tmp_path: Path) -> None:
    found = read_source(replace(request(tmp_path), full=False))
    assert {key.role for key in found.index} == {"param"}


def test_source_that_changes_is_noticed(tmp_path: Path) -> None:
    found = read_source(request(tmp_path))
    stale = replace(found, stats={path: {**one, "nbytes": 1} for path, one in found.stats.items()})
    found.prove_unchanged(found.stats)
    with pytest.raises(TryAgainError, match="written while it was read"):
        stale.prove_unchanged(found.stats)


def distributed(tmp_path: Path) -> TargetRequest:
    folder = write_gpt(tmp_path / "save" / "iter_0000003", gpt())
    return TargetRequest(topology=Topology(num_layers=1), source=folder.parent, target=tmp_path / "out")


def test_records_of_a_distributed_source_are_proved_where_they_were_read_whole(tmp_path: Path) -> None:
    asked = distributed(tmp_path)
    source = located(read_source(asked), None)
    [extent] = source.index[Key("exp_avg", "output_layer.weight")].views[0].storage
    path = Path(extent.path)

    def counts(stop: int, verify: Verify = "digest") -> Mapping[str, int]:
        data = path.read_bytes()[extent.offset : stop]
        reported = {extent.path: [(extent.offset, len(data), crc32(data))]}
        return replace(source, request=replace(asked, verify=verify)).prove_read(reported)

    whole, part = extent.offset + extent.nbytes, extent.offset + 8
    verified, not_checked = ({"verified": one, "notChecked": 1 - one, "none": 0} for one in (1, 0))
    assert counts(whole) == counts(part, "full") == verified
    assert counts(part) == counts(whole, "none") == not_checked
    with path.open("r+b") as file:
        file.seek(whole - 1)
        file.write(b"\x55")
    assert counts(part) == not_checked
    for stop, verify in ((whole, "digest"), (part, "full")):
        with pytest.raises(FormatError, match="CRC-32"):
            counts(stop, verify)  # type: ignore[arg-type]


def test_an_optimizer_in_whole_objects_is_refused_by_name(tmp_path: Path) -> None:
    array = of_layers(4)
    held: Any = {"optimizer.distributed.dp_group_idx_0.param_state/shard_0_1": {}}
    keys = {"decoder.layers.input_layernorm.weight": (as_bfloat16(array), whole(array))}
    asked = replace(
        request(tmp_path), source=write_folder(tmp_path / "x", keys, objects=held), source_format="torch_dist"
    )
    with pytest.raises(MissingInputError, match="dp_zero_gather_scatter"):
        read_source(replace(asked, metadata=None))
    assert read_source(replace(asked, metadata=None, full=False)).facts["iteration"] == "the checkpoint"
