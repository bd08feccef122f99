"""What is said of differences: the error, the table and the document."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ckpt2pt.errors import VerificationError
from ckpt2pt.verification.report import Difference, Report


def report_of(*differences: Difference) -> Report:
    return Report(folder="out", level="full", differences=differences, checked_tensors=3, checked_bytes=2048)


ONE = Difference(
    file="mp_rank_00/distrib_optim.pt", tensor="exp_avg of w", problem="1 of 9 elements differ from the source w",
    index=4, expected="1 (0x3f800000)", found="2 (0x40000000)",
)  # fmt: skip


def test_the_error_names_file_tensor_element_and_both_values() -> None:
    with pytest.raises(VerificationError) as caught:
        report_of(ONE).raise_differences()
    assert caught.value.exit_code == 76
    assert (
        "mp_rank_00/distrib_optim.pt: exp_avg of w: 1 of 9 elements differ from the source w, first at element 4: "
        "expected 1 (0x3f800000), found 2 (0x40000000)"
    ) in caught.value.what


def test_the_error_names_only_the_first_few() -> None:
    with pytest.raises(VerificationError) as caught:
        report_of(*(replace(ONE, index=n) for n in range(40))).raise_differences()
    assert caught.value.what.count("exp_avg of w") == 5
    assert caught.value.what.endswith("and 35 more")


def test_the_document_is_json_and_the_table_has_the_same_facts() -> None:
    report = report_of(ONE)
    document = json.loads(json.dumps(report.document(), allow_nan=False))
    assert document["equal"] is False
    assert document["differences"][0]["index"] == 4
    lines = report.render().splitlines()
    assert lines[0].split()[:2] == ["file", "tensor"]
    assert "exp_avg of w" in lines[1]
    assert lines[-1] == "out: 1 rank, 3 tensors and every other key, 2.0 KiB read: 1 difference"
    assert report_of().render() == "out: 1 rank, 3 tensors and every other key, 2.0 KiB read: no difference"
