"""The result of any conversion is verified by one call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckpt2pt.core.progress import SILENCE
from ckpt2pt.kube.conversion.schema import Place, Source, Spec, Target
from ckpt2pt.kube.resolve import resolve_any
from ckpt2pt.run.conversion import run
from ckpt2pt.run.targets.request import AnyRequest
from ckpt2pt.run.verify import verify_result
from dist import TIED


def request(target: Target) -> AnyRequest:
    source, metadata = Source(path=str(TIED / "ms")), Place(path=str(TIED / "pt_meta"))
    return replace(resolve_any(Spec(source=source, metadata=metadata, target=target), in_process=True))


def test_each_kind_is_compared_with_its_source(tmp_path: Path) -> None:
    for target in (Target(path=str(tmp_path / "a")), Target(path=str(tmp_path / "b"), format="TorchDist")):
        asked = request(target)
        run(asked, [0], SILENCE)
        report = verify_result(asked, [0], level="full", reader="own", reporter=SILENCE)
        assert not report.differences
        assert report.checked_tensors > 50
