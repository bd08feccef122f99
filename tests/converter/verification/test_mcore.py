"""Results of today's Megatron, read back and compared: what was changed is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt2pt.core.progress import SILENCE
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import VerificationError
from ckpt2pt.run.conversion import run
from ckpt2pt.run.targets.mcore import find
from ckpt2pt.run.targets.request import McoreRequest
from ckpt2pt.run.verify import verify_result
from ckpt2pt.verification.leaves import TensorLeaf, open_pt
from ckpt2pt.verification.mcore import prove_files
from mcoresets import odd_set, script_of

FILES = ("model_optim_rng.pt", "distrib_optim.pt")


@pytest.fixture
def request_of_odd(tmp_path: Path) -> McoreRequest:
    folder = odd_set()
    return McoreRequest(
        topology=Topology(num_layers=1),
        source=folder / "ms",
        target=tmp_path / "out",
        source_format="mindspore",
        metadata=script_of(folder, tmp_path),
    )


def written(request: McoreRequest) -> dict[str, Path]:
    folder = run(request, [0], SILENCE).target.folder / "mp_rank_00"
    return {name: folder / name for name in FILES}


def test_result_is_proved_and_every_tensor_counts(request_of_odd: McoreRequest) -> None:
    results = written(request_of_odd)
    crcs = prove_files(find(request_of_odd).expected, (0, 0), results, heed=lambda: None)
    assert set(crcs) == set(FILES)
    report = verify_result(request_of_odd, [0], level="full", reader="own", reporter=SILENCE)
    assert report.differences == ()
    assert report.checked_tensors == 4 * 28


@pytest.mark.parametrize(("file", "leaf"), [(FILES[0], "weight"), (FILES[1], "exp_avg_sq")])
def test_flipped_bit_is_found(file: str, leaf: str, request_of_odd: McoreRequest) -> None:
    results = written(request_of_odd)
    held = next(
        one for path, one in open_pt(results[file]).items() if path.endswith(leaf) and isinstance(one, TensorLeaf)
    )
    extent = held.extents[0]
    content = bytearray(results[file].read_bytes())
    content[extent.offset + 4] ^= 1
    results[file].write_bytes(content)
    with pytest.raises(VerificationError):
        prove_files(find(request_of_odd).expected, (0, 0), results, heed=lambda: None)
    report = verify_result(request_of_odd, [0], level="digest", reader="own", reporter=SILENCE)
    assert len(report.differences) == 1


def test_result_of_another_state_is_found(tmp_path: Path, request_of_odd: McoreRequest) -> None:
    results = written(request_of_odd)
    script_of(odd_set(), tmp_path, "--adam-eps", "1e-6")
    with pytest.raises(VerificationError, match="eps"):
        prove_files(find(request_of_odd).expected, (0, 0), results, heed=lambda: None)
