"""What a newer Megatron-LM saves beside tensors, as 0.6 would have saved it."""

from __future__ import annotations

from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.ptmeta.legacy import legacy_template
from ckpt2pt.formats.torchfile.pickles import Call, Global, Value, namespace


def test_only_what_06_knows_is_kept() -> None:
    enumeration = Call(Global("megatron.core.transformer.enums", "AttnBackend"), (1,))
    group: dict[Value, Value] = {"wd_mult": 0.0, "lr": 0.1}
    tree: dict[str, Value] = {
        "args": namespace({"seed": 7, "attention_backend": enumeration, "params_dtype": Global("torch", "bfloat16")}),
        "iteration": 3,
        "content_metadata": {"distrib_optim_sharding_type": "fully_reshardable"},
        "optimizer": {"optimizer": {"param_groups": [group, {"wd_mult": 1.0, "lr": 0.2}]}},
    }
    found = legacy_template(Template(path="x", tree=tree, storages={}), (True, False))
    assert found.args == {"seed": 7, "params_dtype": Global("torch", "bfloat16")}
    assert set(found.tree) == {"args", "iteration", "optimizer"}
    assert found.groups == [{"wd_mult": 1.0, "lr": 0.2}, {"wd_mult": 0.0, "lr": 0.1}]


def test_groups_that_do_not_tell_what_decays_stay_as_they_are() -> None:
    groups: list[Value] = [{"wd_mult": 1.0}, {"wd_mult": 1.0, "lr_mult": 2.0}]
    tree: dict[str, Value] = {"optimizer": {"optimizer": {"param_groups": groups}}}
    assert legacy_template(Template(path="x", tree=tree, storages={}), (True, False)).groups == groups
