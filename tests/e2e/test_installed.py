"""The distribution as a user gets it: what the wheel holds, and the command it installs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ckpt2pt import __version__
from goldens import REPOSITORY, golden_root

COMMAND = Path(sys.executable).with_name("ckpt2pt")


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*words], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "door", [pytest.param([str(COMMAND)], id="script"), pytest.param([sys.executable, "-m", "ckpt2pt"], id="module")]
)
def test_both_doors_tell_the_version(door: list[str]) -> None:
    done = call(*door, "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == __version__


def test_help_names_every_command_and_an_unknown_one_is_wrong_usage() -> None:
    done = call(str(COMMAND), "--help")
    assert done.returncode == 0, done.stderr
    for command in ("convert", "plan", "inspect", "verify", "run"):
        assert command in done.stdout
    refused = call(str(COMMAND), "transmogrify")
    assert refused.returncode == 64
    assert "Traceback" not in refused.stderr


def test_wheel_holds_both_packages_typed_and_nothing_else(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {
        "ckpt2pt",
        "ckpt2pt_operator",
        f"ckpt2pt-{__version__}.dist-info",
    }
    assert {"ckpt2pt/py.typed", "ckpt2pt_operator/py.typed", "ckpt2pt/cli/commands.py"} <= names


J = golden_root() / "megatron06" / "j_tp1pp2dp2"


def script(name: str, *words: object) -> list[str]:
    """As a job script calls it: by its path, behind the interpreter."""
    return [sys.executable, str(COMMAND.with_name(name)), *map(str, words)]


def test_the_references_scripts_are_installed_and_write_what_the_reference_wrote(tmp_path: Path) -> None:
    degrees = [
        "--num-layers",
        "4",
        "--dp-size",
        "2",
        "--cp-size",
        "1",
        "--tp-size",
        "1",
        "--pp-size",
        "2",
        "--vpp-size",
        "1",
    ]
    merged = call(
        *script("combine_ckpt_dp_zero.py", "--strategy-dir", J / "ms_zero_src/opt_shard_info"),
        *("--checkpoint-dir", str(J / "ms_zero_src"), "--output-dir", str(tmp_path / "merged")),
        *("--src-format", "ckpt", "--dst-format", "ckpt"),
    )
    assert merged.returncode == 0, merged.stderr
    for path in (J / "ms_zero_merged").glob("rank_*/*"):
        assert (tmp_path / "merged" / path.parent.name / path.name).read_bytes() == path.read_bytes()
    places = ("--ms-path", tmp_path / "merged", "--param-map-path", J / "pt_meta", "--megatron-path", tmp_path / "pt")
    done = call(*script("convert_ckpt2pt.py", *degrees, *places, "--src-model-format", "ckpt", "--multiprocess-off"))
    assert done.returncode == 0, done.stderr
    assert call(str(COMMAND), "verify", str(J / "A"), str(tmp_path / "pt"), "--ignore-padding").returncode == 0
    back = call(
        *script("convert_pt2ckpt.py", "--megatron-path", J / "A/iter_0000002", "--param-map-path", J / "A/param_map"),
        *("--ms-path", str(tmp_path / "ms"), "--format", "ckpt", *degrees, "--multiprocess-off"),
    )
    assert back.returncode == 0, back.stderr
    for path in (J / "ms").glob("rank_*/network.ckpt"):
        assert (tmp_path / "ms" / path.parent.name / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("name", "code"),
    [("convert_ckpt2pt.py", 66), ("convert_pt2ckpt.py", 66), ("combine_ckpt_dp_zero.py", 66)],
)
def test_a_script_that_fails_says_so_with_its_exit_code(name: str, code: int, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    words: dict[str, list[object]] = {
        "convert_ckpt2pt.py": ["--num-layers", 4, "--ms-path", gone, "--param-map-path", gone, "--megatron-path", gone],
        "convert_pt2ckpt.py": ["--megatron-path", gone, "--ms-path", tmp_path / "ms"],
        "combine_ckpt_dp_zero.py": ["--strategy-dir", gone, "--checkpoint-dir", gone, "--output-dir", gone],
    }
    failed = call(*script(name, *words[name]))
    assert (failed.returncode, "Traceback" in failed.stderr) == (code, False)
    assert str(gone) in failed.stderr
