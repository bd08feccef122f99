"""A file that was copied to another rank is noticed, and nothing else is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.core.topology import Topology
from ckpt2pt.discover.request import Request
from ckpt2pt.verification.copies import copied_ranks
from ckptfiles import Tensor
from handmade import Handmade

SAYS = "hold the same bits in every weight that tensor parallelism splits"
TP3 = Topology(num_layers=4, tensor=3, pipeline=2)


def flags_of(request: Request) -> list[str]:
    cut = request.topology
    words = ["--num-layers", cut.num_layers, "--tp-size", cut.tensor, "--pp-size", cut.pipeline]
    words += ["--ms-path", request.source, "--param-map-path", request.metadata, "--megatron-path", request.target]
    return [*map(str, words), "--multiprocess-off"]


def copy_rank(request: Request, source: int, target: int) -> None:
    [path] = (request.source / f"rank_{source}").iterdir()
    shutil.copy(path, request.source / f"rank_{target}" / path.name.replace(f"rank_{source}", f"rank_{target}"))


def test_a_byte_copy_of_another_rank_is_a_warning_of_convert_and_of_verify(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    request = Handmade(TP3).write(tmp_path)
    copy_rank(request, 3, 5)
    assert main(["convert", *flags_of(request)]) == 0
    reported = [line for line in capfd.readouterr().out.splitlines() if SAYS in line]
    assert reported == [
        f"warning: {request.source}/rank_3/network_rank_3-0_12.ckpt and {request.source}/rank_5/network_rank_5-0_12.ckpt "
        f"{SAYS}: one may be a copy of the other"
    ]
    verify = [word for word in flags_of(request) if word != "--multiprocess-off"]
    assert main(["verify", *verify, "--output", "json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["warnings"]) == 1
    assert main(["verify", str(request.target)]) == 0
    assert SAYS in capfd.readouterr().out
    assert main(["convert", *flags_of(request), "--output", "json"]) == 0  # all is there, and it is said again
    assert len(json.loads(capfd.readouterr().out)["warnings"]) == 1


def test_it_is_a_warning_of_plan_of_import_and_of_a_replacement(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    request = Handmade(TP3).write(tmp_path)
    flags = flags_of(request)
    assert main(["convert", *flags]) == 0
    copy_rank(request, 3, 5)
    assert SAYS not in capfd.readouterr().out
    assert main(["plan", *flags[:-1]]) == 64
    begins = SAYS.replace("hold", "begin with")
    reported = [line for line in capfd.readouterr().out.splitlines() if begins in line]
    assert reported == [
        f"warning: {request.source}/rank_3/network_rank_3-0_12.ckpt and {request.source}/rank_5/network_rank_5-0_12.ckpt "
        f"{begins}: one may be a copy of the other"
    ]
    assert main(["convert", *flags, "--overwrite"]) == 0
    assert SAYS in capfd.readouterr().out
    assert main(["import", "--megatron-path", str(request.target), "--ms-path", str(tmp_path / "back")]) == 0
    folder = request.target / "iter_0000012"
    assert f"{folder}/mp_rank_00_001 and {folder}/mp_rank_02_001 {SAYS}" in capfd.readouterr().out


def test_a_plan_of_ranks_as_they_should_be_does_not_warn(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *flags_of(Handmade(TP3).write(tmp_path))[:-1]]) == 0
    assert "same bits" not in capfd.readouterr().out


def warnings_of(made: Handmade, folder: Path, **more: object) -> tuple[str, ...]:
    return made.convert(folder, **more).warnings


@pytest.mark.parametrize("full", [True, False], ids=["full", "params-only"])
def test_ranks_as_they_should_be_are_no_reason_to_warn(full: bool, tmp_path: Path) -> None:
    assert warnings_of(Handmade(TP3), tmp_path, full=full) == ()


@pytest.mark.parametrize("content", [b"\0\0\0\0", b"\0\0\x80\x3f"], ids=["zeros", "ones"])
def test_weights_that_are_constant_say_nothing(content: bytes, tmp_path: Path) -> None:
    made = Handmade(TP3)
    for entries in made.entries.values():
        for name, tensor in list(entries.items()):
            if tensor.dtype == "float32":
                entries[name] = replace(tensor, data=content * (len(tensor.data) // 4))
    assert warnings_of(made, tmp_path, verify="digest") == ()


def test_one_weight_that_differs_is_enough(tmp_path: Path) -> None:
    made = Handmade(TP3)
    name = "language_model.encoder.layers.1.mlp.mapping.weight"
    other: Tensor = made.entries[1, 0][name]
    made.entries[1, 0] = {**made.entries[0, 0], name: other}
    assert warnings_of(made, tmp_path, verify="digest") == ()
    made.entries[1, 0] = made.entries[0, 0]
    assert len(warnings_of(made, tmp_path / "equal", verify="digest")) == 1


def test_ranks_of_two_stages_and_ranks_without_a_split_weight_are_not_compared() -> None:
    weight = {"language_model.encoder.layers.0.mlp.mapping.weight": "aa"}
    norm = {"language_model.encoder.final_norm.weight": "bb"}
    assert copied_ranks({(0, 0): weight, (1, 1): weight}, lambda _: []) == []
    assert copied_ranks({(0, 0): norm, (1, 0): norm}, lambda _: []) == []


def test_rules_that_match_nothing_are_reported_by_plan_and_convert(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    request = Handmade(TP3).write(tmp_path)
    flags = [*flags_of(request), "--rules", '{"ignore": ["step_n*", "debug.*"]}']
    says = "warning: rules that match no name of this checkpoint: ignore: debug.*\n"
    for command in (["plan", *(word for word in flags if word != "--multiprocess-off")], ["convert", *flags]):
        assert main(command) == 0
        assert says in capfd.readouterr().out
    assert main(["plan", *(word for word in flags if word != "--multiprocess-off"), "--stage", "0"]) == 0
    assert says not in capfd.readouterr().out, "another stage may have it"
