"""The reference's command line is accepted as it is, and what it would take badly is refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from ckpt2pt.cli.combine import add_combine_options, request_of
from ckpt2pt.cli.commands import main
from ckpt2pt.discover.request import MindSporeFiles
from ckpt2pt.errors import UsageError
from goldens import golden_root

SOURCE = golden_root() / "megatron06" / "j_tp1pp2dp2" / "ms_zero_src"


PLACES = ("--strategy-dir", str(SOURCE / "opt_shard_info"), "--checkpoint-dir", str(SOURCE))


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_combine_options(parser)
    return parser.parse_args(words)


def test_defaults_are_those_of_the_reference() -> None:
    found = parse()
    places = (found.strategy_dir, found.checkpoint_dir, found.output_dir)
    assert places == (Path("output/opt_shard_info"), Path("output"), Path("output"))
    request, section = request_of(parse(*PLACES))
    assert request.files == MindSporeFiles(format="ckpt", merged=True)
    assert (request.source_format, request.full, request.verify, section) == ("ckpt", True, "digest", None)


def test_every_flag_of_the_reference_counts() -> None:
    request, section = request_of(
        parse(
            *PLACES, "--output-dir", "c", "--src-format", "safetensors", "--dst-format", "safetensors",
            "--copy-to-all-dp-ranks", "--max-proccess-limit", "3", "--rank-section", "2", "6", "--no-save-optim",
        )
    )  # fmt: skip
    assert request.files == MindSporeFiles(format="safetensors", copies=True, merged=True)
    assert (request.target, request.source_format, request.full, request.workers) == (
        Path("c"),
        "safetensors",
        False,
        3,
    )
    assert (request.topology.pipeline, section) == (2, (2, 6))


def test_the_right_spelling_counts_too() -> None:
    for flag in ("--max-process-limit", "--max-proccess-limit"):
        assert request_of(parse(*PLACES, flag, "5"))[0].workers == 5


@pytest.mark.parametrize(
    "words",
    [["--max-proccess-limit", "0"], ["--rank-section", "3", "3"], ["--rank-section", "-1", "3"], ["--crc", "--dst-format", "safetensors"]],
)  # fmt: skip
def test_what_cannot_be_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        request_of(parse(*words))
    assert words[0] in caught.value.what


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["combine", "--strategy-dir", str(SOURCE / "opt_shard_info"), "--checkpoint-dir", str(SOURCE)]
    words += ["--output-dir", str(tmp_path), "--multiprocess-off", "--progress", "none"]
    assert main(words) == 0
    assert "epoch 0, step 2: merged 2 ranks of 2 shards each (1.8 MiB)" in capsys.readouterr().out
    assert main(words) == 0
    assert "everything was there already" in capsys.readouterr().out
    assert main([*words[:-4], str(tmp_path), "--crc", "--progress", "none", "--multiprocess-off"]) == 64


def test_groups_are_merged_stage_by_stage(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = golden / "megatron06" / "j_tp1pp2dp2" / "ms_zero_src"
    words = [
        "combine",
        "--checkpoint-dir",
        str(source),
        "--strategy-dir",
        str(source / "opt_shard_info"),
        "--progress",
        "none",
    ]
    assert main([*words, "--output-dir", str(tmp_path / "whole")]) == 0
    parts = [*words, "--output-dir", str(tmp_path / "parts"), "--output", "json", "--stage"]
    for stage in (1, 0):
        capsys.readouterr()
        assert main([*parts, str(stage)]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["ranksMerged"], found["published"]) == (1, stage == 0)
    whole, made = (
        {path.relative_to(root): path.read_bytes() for path in root.glob("rank_*/*")}
        for root in (tmp_path / "whole", tmp_path / "parts")
    )
    assert made == whole
    assert len(made) == 2
    assert main([*parts, "2"]) == 64
    assert main([*parts, "0", "--rank-section", "0", "2"]) == 64
