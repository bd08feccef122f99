"""What a newer Megatron-LM saved, as 0.6 would have saved it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.formats.megatron.headers import read_rank
from ckpt2pt.formats.ptmeta.legacy import as_legacy
from coresets import ODD, renamed


def test_a_result_of_06_does_not_name_classes_of_a_newer_megatron(tmp_path: Path) -> None:
    assert main(["convert", "--source", str(ODD), "--source-format", "megatron", "--target", str(tmp_path / "06")]) == 0
    content = next(tmp_path.rglob("model_optim_rng.pt")).read_bytes()
    assert b"AttnBackend" not in content
    assert b"numpy._core" not in content


def test_a_model_with_q_and_k_layernorm_has_no_legacy_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = renamed(
        ODD, tmp_path / "copied", lambda name: name.replace("pre_mlp_layernorm", "self_attention.q_layernorm")
    )
    target = tmp_path / "target"
    flags = ["convert", "--source", str(folder), "--source-format", "megatron", "--target", str(target)]
    assert main(flags) == 65
    assert "Megatron-LM 0.6 has no decoder.layers.0.self_attention.q_layernorm.weight" in capsys.readouterr().err
    assert main([*flags, "--target-tp-size", "2"]) == 65
    assert "Megatron-LM 0.6 has no decoder.layers.0.self_attention.q_layernorm.weight" in capsys.readouterr().err
    assert not list(target.rglob("*.pt"))


def test_parameters_stand_in_the_order_of_a_legacy_model() -> None:
    rank = as_legacy(read_rank(next(ODD.glob("iter_*/mp_rank_00"))))
    names = [name.removeprefix("language_model.encoder.layers.0.") for name, _ in rank.chunks[0]]
    assert [name for name in names if not name.startswith("language_model.")] == [
        "input_norm.weight", "input_norm.bias", "self_attention.query_key_value.weight", "self_attention.query_key_value.bias",
        "self_attention.dense.weight", "self_attention.dense.bias", "post_attention_norm.weight", "post_attention_norm.bias",
        "mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias", "mlp.dense_4h_to_h.weight", "mlp.dense_4h_to_h.bias",
    ]  # fmt: skip
    assert as_legacy(rank).chunks == rank.chunks


def test_a_rank_of_06_stays_as_it_is(golden: Path) -> None:
    rank = read_rank(next((golden / "megatron06" / "a2_tp1pp1_tied_bias" / "A").glob("iter_*/mp_rank_*")))
    assert as_legacy(rank) is rank
