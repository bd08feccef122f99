"""The plan of a conversion into today's Megatron says what would be written, and writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from ckpt2pt.core.topology import Topology
from ckpt2pt.run.targets.request import McoreRequest
from ckpt2pt.show.preview import planned, render
from mcoresets import odd_set, script_of


def test_plan_lists_files_chunks_and_names(tmp_path: Path) -> None:
    folder = odd_set()
    request = McoreRequest(
        source=folder / "ms", target=tmp_path / "out", source_format="mindspore",
        metadata=script_of(folder, tmp_path), topology=Topology(num_layers=2, pipeline=2), transformer="transformer_engine",
    )  # fmt: skip
    plan = planned(request, [0, 1], names=True)
    ranks = cast("list[dict[str, Any]]", plan.document["ranks"])
    assert [rank["directory"] for rank in ranks] == ["mp_rank_00_000", "mp_rank_00_001"]
    names = [one["megatron"] for one in ranks[1]["chunks"][0]["names"]]
    assert names[0] == "decoder.layers.0.self_attention.linear_proj.weight"
    text = render(plan.document)
    assert "Megatron 0.7 to 0.19; tp 1, pp 2" in text
    facts = cast("dict[str, str]", plan.document["facts"])
    assert facts["iteration"] == facts["consumed samples"].replace(
        "iteration x global_batch_size of pretrain.sh, the metadata", "the checkpoint"
    )
    assert facts["parameter groups"].startswith("pretrain.sh, the metadata")
    assert "adam_beta1" in facts["arguments by default"]
    assert "adam_beta2" not in facts["arguments by default"]
    assert facts["precision of weights"] == "bfloat16, the arguments"
    assert facts["layer spec"] == "as asked for"
    assert (
        cast("dict[str, str]", plan.document["releases"])["0.8 to 0.19"]
        == "yes, with the layer spec of Transformer Engine"
    )
    assert "0.6          no: it reads optimizer files of another form" in text
    assert not (tmp_path / "out").exists()
