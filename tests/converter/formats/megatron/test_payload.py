"""The trees of both files, before their bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.core.extents import Extent
from ckpt2pt.core.topology import Topology
from ckpt2pt.discover import Prepared, discover, prepare
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.megatron.payload import Template, model_payload, payloads
from ckpt2pt.formats.torchfile.pickles import read_pickle
from ckpt2pt.formats.torchfile.trees import namespace_attrs
from handmade import Handmade


def prepared(folder: Path) -> Prepared:
    request = Handmade(topology=Topology(num_layers=2, virtual=2), data=2).write(folder)
    return prepare(request, discover(request), (0, 0))


def tree(found: Prepared, **more: Any) -> dict[Any, Any]:
    value = read_pickle(model_payload(found.plan, found.meta.template, **more).pickle, where="model")
    assert isinstance(value, dict)
    return dict(value)


def test_weights_follow_the_iteration_and_the_rest_keeps_its_order(tmp_path: Path) -> None:
    assert list(tree(prepared(tmp_path))) == [
        "args", "checkpoint_version", "iteration", "model0", "model1", "optimizer", "opt_param_scheduler", "rng_state",
    ]  # fmt: skip


@pytest.mark.parametrize(("reference", "samples"), [(False, 48), (True, 0)])
def test_the_time_is_put_wherever_megatron_looks_for_it(reference: bool, samples: int, tmp_path: Path) -> None:
    found = tree(prepared(tmp_path), reference_samples=reference)
    args = namespace_attrs(found["args"])
    assert (found["iteration"], args["iteration"], args["consumed_train_samples"]) == (12, 12, samples)
    assert found["opt_param_scheduler"]["num_steps"] == 48
    assert [group["step"] for group in found["optimizer"]["optimizer"]["param_groups"]] == [12, 12]


def test_storages_of_the_template_come_after_those_of_the_weights(tmp_path: Path) -> None:
    found = prepared(tmp_path)
    model, optimizer = payloads(found.plan, found.meta.template)
    assert len(model.copied) == 3
    assert model.storages[-3:] == (5056, 16, 16) == tuple(one.nbytes for one in model.copied if isinstance(one, Extent))
    assert len(model.storages) == len(list(found.plan.weights)) + 3
    assert (len(optimizer.storages), optimizer.copied) == (6, ())


def test_an_optimizer_of_another_kind_stays_as_it_is(tmp_path: Path) -> None:
    """A full conversion refuses it before (pt/resume.py); beside weights alone nothing reads it."""
    found = prepared(tmp_path)
    template = Template(
        path="p", tree=found.meta.template.tree | {"optimizer": {"state": 1}}, storages=found.meta.template.storages
    )
    assert read_pickle(model_payload(found.plan, template).pickle, where="p")["optimizer"] == {"state": 1}  # type: ignore[index,call-overload]


def test_a_storage_that_the_template_does_not_hold_is_refused(tmp_path: Path) -> None:
    found = prepared(tmp_path)
    with pytest.raises(FormatError, match="does not hold"):
        model_payload(found.plan, replace(found.meta.template, storages={}))
