"""The command line of import: the reference's own, as the golden sets record it, and ours."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.cli.imported import add_import_options
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import UsageError
from ckpt2pt.io.flags import Parser
from ckpt2pt.kube.asked import spec_of
from ckpt2pt.kube.conversion.spelling import of_command
from ckpt2pt.kube.resolve import resolve
from goldens import golden_sets

FOLDER = next(folder for folder in golden_sets() if folder.name == "b_st_tp2pp2_safetensors")
# As in the set's command.txt.
COMMAND = "--format safetensors --num-layers 4 --dp-size 1 --cp-size 1 --tp-size 2 --pp-size 2 --vpp-size 1 --multiprocess-off"


def parse(*words: str) -> argparse.Namespace:
    parser = Parser()
    add_import_options(parser)
    return parser.parse_args(["--megatron-path", "A", "--ms-path", "B", *words])


def request_of(options: argparse.Namespace) -> Request:
    return resolve(spec_of(options))


@pytest.mark.parametrize("full", [True, False])
def test_the_reference_command_line_does_the_same(full: bool, tmp_path: Path) -> None:
    more = ["--param-map-path", str(FOLDER / "A" / "param_map")] if full else ["--convert-param-only"]
    places = ["--megatron-path", str(FOLDER / "A" / "iter_0000002"), "--ms-path", str(tmp_path / "ms")]
    assert main(["import", *places, *more, *COMMAND.split(), "--progress", "none"]) == 0
    expected = FOLDER / ("ms" if full else "ms_params")
    for path in expected.glob("rank_*/*"):
        assert (tmp_path / "ms" / path.relative_to(expected)).read_bytes() == path.read_bytes()


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "import",
        "--megatron-path",
        str(FOLDER / "A"),
        "--ms-path",
        str(tmp_path),
        "--multiprocess-off",
        "--debug",
    ]
    assert main([*flags, "--progress", "none", "--output", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranksConverted"] == 4
    assert main([*flags, "--progress", "none"]) == 0
    assert "MindSpore can load it" in capsys.readouterr().out


def test_debug_tells_ranks_files_and_evidence_and_where_an_error_arose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["import", "--megatron-path", str(FOLDER / "A"), "--ms-path", str(tmp_path), "--progress", "none"]
    assert main([*words, "--debug"]) == 0
    reported = capsys.readouterr().err
    assert "cut as Topology(num_layers=4, tensor=2, pipeline=2" in reported
    assert re.search(r"tp 1 pp 1: \S+mp_rank_01_001 -> rank_3", reported)
    assert re.search(r"tp 1 pp 1: wrote .*rank_3/network\.ckpt.*offsets equal those of the weights", reported)
    for more, there in (([], False), (["--debug"], True)):
        assert main([*words, "--tp-size", "4", *more]) == 65
        assert ("Traceback" in capsys.readouterr().err) == there


def test_counts_of_layers_in_either_spelling() -> None:
    assert spec_of(parse("--stage-list", "2", "3")).model.layers_per_stage == (2, 3)
    assert spec_of(parse("--stage-list", "2,3")).model.layers_per_stage == (2, 3)
    assert not spec_of(parse()).model.layers_per_stage


def test_noop_layers_are_learnt_unless_given() -> None:
    assert spec_of(parse()).model.noop_layers is None
    assert spec_of(parse("--noop")).model.noop_layers == ()
    assert spec_of(parse("--noop", "1", "2")).model.noop_layers == (1, 2)


@pytest.mark.parametrize(
    "words",
    [
        ["--parallel-init-order", "tp-dp-pp"],
        ["--file-prefix", "a/b"],
        ["--file-prefix", ".hidden"],
        ["--process-limit", "0"],
        ["--process_timeout", "-1"],
    ],
)
def test_wrong_usage(words: list[str]) -> None:
    with pytest.raises(UsageError) as refused:
        request_of(parse(*words))
    assert words[0] in str(refused.value.spelled(of_command("import")))


@pytest.mark.parametrize("prefix", ["stratey1", "strategy12", "network_best_rank_0-x", "network_breakpoint"])
def test_a_prefix_whose_files_convert_would_pass_by_is_refused(prefix: str) -> None:
    with pytest.raises(UsageError) as refused:
        request_of(parse("--file-prefix", prefix))
    reported = str(refused.value.spelled(of_command("import")))
    assert f"--file-prefix is '{prefix}': convert passes by {prefix}.ckpt" in reported
    other = f"my_{prefix.replace('_', '')}"
    files = request_of(parse("--file-prefix", other, "--megatron-path", str(FOLDER / "A"))).files
    assert files is not None
    assert files.prefix == other


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_the_place_of_the_folder_is_wrong_usage(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    words = ["import", "--megatron-path", str(FOLDER / "A"), "--ms-path", str(tmp_path / place)]
    assert main([*words, "--multiprocess-off", "--progress", "none"]) == 64
    assert "a file stands where a folder is to be" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_the_help_says_what_the_checkpoint_says_and_what_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    reported = " ".join(capsys.readouterr().out.split()).partition("model and parallel layout: ")[2]
    for flag in ("--num-layers", "--tp-size", "--pp-size", "--vpp-size"):
        assert re.search(rf"{flag} [A-Z_]+ [^-]*(no-op [^-]*)?; default: as the checkpoint says", reported)
    for flag in ("--dp-size", "--cp-size"):
        assert re.search(rf"{flag} [A-Z_]+ [^-]*to come; default 1 ", reported)


def test_all_flags_of_the_reference_are_known() -> None:
    text = (
        "--param-map-path P --pp-size 1 --tp-size 1 --dp-size 1 --cp-size 1 --parallel-init-order tp-cp-ep-dp-pp --vpp-size 1 "
        "--stage-list 1 --num-layers 1 --generate-all-dp-cp --convert-param-only --file-prefix network --format ckpt "
        "--dist-opt-content param exp_avg exp_avg_sq --debug --multiprocess-off --process-limit 4 --process_timeout 3600"
    )
    spec = spec_of(parse(*text.split()))
    assert (spec.target.mindspore.all_replicas, spec.mode, spec.metadata.path) == (True, "ParamsOnly", "P")
    assert spec.workers.rank_timeout_seconds == 3600.0
