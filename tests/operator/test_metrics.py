"""Metrics: names that stay, labels that are bounded."""

from __future__ import annotations

from prometheus_client import generate_latest

from ckpt2pt_operator.metrics import Metrics

LABELS = {"phase", "result", "reason", "verb", "resource", "code", "version", "le"}


def test_every_metric_has_our_prefix_a_help_and_only_labels_that_no_user_chooses() -> None:
    metrics = Metrics("1.2.3")
    families = list(metrics.registry.collect())
    process = {family.name for family in families if family.name.startswith("process_")}
    assert {"process_resident_memory_bytes", "process_cpu_seconds", "process_open_fds"} <= process
    for family in (family for family in families if family.name not in process):
        assert family.name.startswith("ckpt2pt_operator_")
        assert family.documentation.endswith(".")
        for sample in family.samples:
            assert set(sample.labels) <= LABELS


def test_the_version_is_reported() -> None:
    assert b'ckpt2pt_operator_build_info{version="1.2.3"} 1.0' in generate_latest(Metrics("1.2.3").registry)


def test_two_operators_in_one_process_do_not_share_numbers() -> None:
    one, other = Metrics("0"), Metrics("0")
    one.status_writes.inc()
    assert other.registry.get_sample_value("ckpt2pt_operator_status_writes_total") == 0
