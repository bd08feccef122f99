"""The reference's scripts take its flags as it spells them, and mean what it means."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import build_alone, build_parser
from ckpt2pt.cli.programs.scripts import combine_ckpt_dp_zero, convert_ckpt2pt, convert_pt2ckpt
from ckpt2pt.kube.asked import spec_of
from ckpt2pt.kube.conversion.schema import MindSporeFiles
from conversions import request_of
from goldens import golden_root

# Every flag of the reference with a value that it takes (MindSpeed-Core-MS feature-0.1, mindspeed_ms/tools/converter).
CONVERT = [
    "--num-layers",
    "8",
    "--dp-size",
    "1",
    "--cp-size",
    "1",
    "--tp-size",
    "2",
    "--pp-size",
    "2",
    "--vpp-size",
    "2",
    "--src-model-format",
    "ckpt",
    "--noop",
    "62",
    "63",
    "--ms-path",
    "ms",
    "--param-map-path",
    "pt_meta",
    "--megatron-path",
    "out",
    "--convert-param-only",
    "--process-limit",
    "4",
    "--multiprocess-off",
    "--process_timeout",
    "3600",
]
IMPORT = [
    "--megatron-path",
    "mg",
    "--ms-path",
    "ms",
    "--param-map-path",
    "maps",
    "--pp-size",
    "2",
    "--tp-size",
    "2",
    "--dp-size",
    "1",
    "--cp-size",
    "1",
    "--parallel-init-order",
    "tp-cp-ep-dp-pp",
    "--vpp-size",
    "2",
    "--stage-list",
    "2",
    "2",
    "2",
    "2",
    "--num-layers",
    "8",
    "--generate-all-dp-cp",
    "--convert-param-only",
    "--file-prefix",
    "network",
    "--format",
    "safetensors",
    "--dist-opt-content",
    "param",
    "exp_avg",
    "exp_avg_sq",
    "--debug",
    "--multiprocess-off",
    "--process-limit",
    "4",
    "--process_timeout",
    "3600",
]
COMBINE = [
    "--strategy-dir",
    "a",
    "--checkpoint-dir",
    "b",
    "--output-dir",
    "c",
    "--src-format",
    "ckpt",
    "--dst-format",
    "safetensors",
    "--copy-to-all-dp-ranks",
    "--max-proccess-limit",
    "8",
    "--rank-section",
    "0",
    "8",
    "--no-save-optim",
]


def test_every_flag_of_the_scripts_is_taken() -> None:
    made = request_of(build_alone("convert", "x").parse_args(CONVERT))
    assert (made.topology.virtual, made.full, made.workers, made.timeout, made.in_process) == (2, False, 4, 3600, True)
    back = spec_of(build_alone("import", "x").parse_args(IMPORT))
    assert back.model.layers_per_stage == (2, 2, 2, 2)
    assert back.target.mindspore == MindSporeFiles(format="Safetensors", all_replicas=True)
    assert back.workers.rank_timeout_seconds == 3600
    merge = build_alone("combine", "x").parse_args(COMBINE)
    assert (merge.rank_section, merge.copy_to_all_dp_ranks, merge.no_save_optim) == ([0, 8], True, True)
    assert merge.max_proccess_limit == 8


def test_the_defaults_of_combine_are_the_references() -> None:
    merge = build_alone("combine", "x").parse_args([])
    places = (merge.strategy_dir, merge.checkpoint_dir, merge.output_dir)
    assert places == (Path("output/opt_shard_info"), Path("output"), Path("output"))
    assert (merge.src_format, merge.dst_format, merge.copy_to_all_dp_ranks, merge.rank_section) == (
        "ckpt",
        "ckpt",
        False,
        None,
    )


@pytest.mark.parametrize("script", [convert_ckpt2pt, convert_pt2ckpt, combine_ckpt_dp_zero])
def test_help_and_errors_name_the_script(script: object, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{script.__name__}.py"  # type: ignore[attr-defined]
    with pytest.raises(SystemExit) as left:
        script(["--help"])  # type: ignore[operator]
    assert left.value.code == 0
    assert f"usage: {name}" in capsys.readouterr().out
    assert script(["--process-limits", "4"]) == 64  # type: ignore[operator]
    assert f"the command line of {name}" in capsys.readouterr().err


def test_of_two_formats_the_script_takes_ckpt_as_the_reference_does(tmp_path: Path) -> None:
    words = ["--num-layers", "1", "--ms-path", "ms", "--param-map-path", "meta", "--megatron-path", str(tmp_path)]
    assert request_of(build_parser().parse_args(["convert", *words])).source_format is None
    assert convert_ckpt2pt([*words]) == 66


# From the golden sets' own command.txt, with which the reference exited 0.
COMMAND_LINES = """
convert_pt2ckpt.py --megatron-path e/A/iter_0000002 --param-map-path e/A/param_map --ms-path e/ms --format ckpt --num-layers 8 --dp-size 1 --cp-size 1 --tp-size 1 --pp-size 2 --vpp-size 2 --multiprocess-off
convert_ckpt2pt.py --num-layers 8 --dp-size 1 --cp-size 1 --tp-size 1 --pp-size 2 --vpp-size 2 --ms-path e/ms --param-map-path e/pt_meta --megatron-path e/C_full --src-model-format ckpt --noop 6 7 --multiprocess-off
convert_pt2ckpt.py --megatron-path e/A/iter_0000002 --ms-path e/ms_params --convert-param-only --format ckpt --num-layers 8 --dp-size 1 --cp-size 1 --tp-size 1 --pp-size 2 --vpp-size 2 --multiprocess-off
convert_ckpt2pt.py --num-layers 8 --dp-size 1 --cp-size 1 --tp-size 1 --pp-size 2 --vpp-size 2 --ms-path e/ms_params --param-map-path e/pt_meta_params --megatron-path e/C_params --src-model-format ckpt --convert-param-only --noop 6 7 --multiprocess-off
""".strip()


@pytest.mark.parametrize("line", COMMAND_LINES.splitlines())
def test_the_command_lines_of_the_golden_sets_are_done(line: str, tmp_path: Path) -> None:
    script, *words = line.split()
    golden = golden_root() / "megatron06" / "e_tp1pp2vpp2_noop_tail"
    written = words[words.index("--megatron-path" if script == "convert_ckpt2pt.py" else "--ms-path") + 1]
    here = [str(tmp_path) if word == written else re.sub(r"^e/", f"{golden}/", word) for word in words]
    assert {"convert_ckpt2pt.py": convert_ckpt2pt, "convert_pt2ckpt.py": convert_pt2ckpt}[script](here) == 0
    assert (tmp_path / "latest_checkpointed_iteration.txt").exists() == (script == "convert_ckpt2pt.py")
