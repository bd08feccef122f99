"""The verifier's own arithmetic of shards, and that it finds what a wrong joining would leave behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.mindspore.ranks import SourceFile
from ckpt2pt.run.conversion import run
from ckpt2pt.verification.prove import verify_target
from ckpt2pt.verification.sharded import expected_index
from conversions import Quiet
from handmade import Handmade
from sharding import Sharding


def made_in(folder: Path) -> Handmade:
    made = Handmade(Topology(num_layers=2, data=4), hidden=8, vocab=12, data=2)
    Sharding().write(made, folder / "ms")
    made.write_meta(folder / "pt_meta")
    return made


def group(made: Handmade, folder: Path) -> SourceFile:
    cut = Sharding()
    paths = tuple(cut.place(made, folder / "ms", 0, 0, rank, rank) for rank in range(4))
    return SourceFile(path=paths[0], when=(0, 12), merged=False, peers=paths, info=cut.info(made, folder / "ms", 0, 0))


def test_every_element_is_at_the_address_that_its_number_gives(tmp_path: Path) -> None:
    made = made_in(tmp_path)
    found = expected_index(group(made, tmp_path))
    for name, each in made.entries[0, 0].items():
        parts = [Path(e.path).read_bytes()[e.offset : e.offset + e.nbytes] for e in found[name].extents]
        assert b"".join(parts) == each.data


@pytest.mark.parametrize("text", ["", "{}", '{"param_info": {}, "buffer_info": {"0": {"buckets": {"a": [1]}}}}'])
def test_a_description_that_does_not_add_up_is_refused(text: str, tmp_path: Path) -> None:
    file = group(made_in(tmp_path), tmp_path)
    assert file.info
    file.info.write_text(text)
    with pytest.raises(FormatError, match="do not add up"):
        expected_index(file)


def test_a_joining_that_swaps_two_ranks_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer's joining is broken on purpose; the proof must not share the mistake."""
    from ckpt2pt.formats.mindspore import ranks, shards

    made = made_in(tmp_path)
    right = shards.join_shards
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "join_shards", lambda paths, info: right((paths[1], paths[0], *paths[2:]), info))
        run(made.request(tmp_path, verify="digest"), [0], Quiet())
    report = verify_target(made.request(tmp_path), [0], level="full")
    assert report.differences


def test_a_changed_peer_is_found(tmp_path: Path) -> None:
    made = made_in(tmp_path)
    outcome = run(made.request(tmp_path), [0], Quiet())
    file = group(made, tmp_path)
    target = outcome.target.folder / "mp_rank_00" / "distrib_optim.pt"
    assert not verify_target(made.request(tmp_path), [0], level="full").differences
    data = bytearray(target.read_bytes())
    name, ref = next((n, r) for n, r in expected_index(file).items() if r.extents[0].path.endswith("rank_3-0_12.ckpt"))
    extent = ref.extents[0]
    raw = Path(extent.path).read_bytes()[extent.offset : extent.offset + extent.nbytes]
    at = data.find(raw)
    assert at > 0, name
    data[at] ^= 1
    target.write_bytes(data)
    assert verify_target(made.request(tmp_path), [0], level="full").differences
