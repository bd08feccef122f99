"""Parameters of a model that was wrapped in others: ``module.language_model...`` is taken as one rule for all names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt2pt.core.names import NameTable, SourceName, common_prefix
from ckpt2pt.core.topology import Topology
from ckpt2pt.discover import discover, prepare_all, target_of
from ckpt2pt.discover.request import Pace
from ckpt2pt.errors import UnmappedNameError
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.formats.ptmeta.capture import capture
from ckpt2pt.show.preview import preview
from ckpt2pt.verification.compare import compare
from ckpt2pt.verification.prove import verify_target
from ckptfiles import Tensor
from conversions import topology_of
from goldens import golden_sets
from handmade import PREFIX, Handmade
from imports import import_request, run_all
from torchload import megatron_names

NAME = "language_model.encoder.final_norm.weight"


def prefixed(made: Handmade, prefix: str, *, moments: tuple[str, str] = ("exp_avg.", "exp_avg_sq.")) -> Handmade:
    """The same with ``prefix`` before each parameter's own name, behind the optimizer's."""
    spelled = dict(zip((PREFIX["exp_avg"], PREFIX["exp_avg_sq"]), moments, strict=True))
    for entries in made.entries.values():
        for name in list(entries):
            role = next((role for role in spelled if name.startswith(role)), "")
            plain = name.removeprefix(role)
            if plain.startswith(("language_model.", "word_embeddings")):
                old = entries.pop(name)
                new = f"{spelled.get(role, '')}{prefix}{plain}"
                entries[new] = Tensor(new, old.dtype, old.shape, old.data)
    return made


def small(**more: Any) -> Handmade:
    return Handmade(topology=Topology(num_layers=4, pipeline=2), **more)


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.module."])
@pytest.mark.parametrize("moments", [("exp_avg.", "exp_avg_sq."), ("adam_m.", "adam_v.")])
def test_a_prefix_of_all_names_is_left_out_with_one_warning(
    prefix: str, moments: tuple[str, str], tmp_path: Path
) -> None:
    made = prefixed(small(), prefix, moments=moments)
    outcome = made.convert(tmp_path)
    made.check(outcome)
    assert outcome.warnings == (f"all parameters carry the prefix {prefix} in their names, which is left out",)
    request = made.request(tmp_path)
    assert verify_target(request, (0, 1), level="full", reader="own").differences == ()
    chosen = discover(request)
    ranks = prepare_all(request, chosen, (0, 1))
    document = preview(request, chosen, target_of(request, chosen), ranks, names=True)
    assert document["warnings"] == list(outcome.warnings)


def test_tied_embeddings_are_found_behind_a_prefix(tmp_path: Path) -> None:
    made = prefixed(small(tied=True, data=2), "module.")
    made.check(made.convert(tmp_path))


def test_names_without_a_prefix_have_no_warning(tmp_path: Path) -> None:
    assert small().convert(tmp_path).warnings == ()


@pytest.mark.parametrize("role", ["", "exp_avg."])
def test_a_mixture_is_refused_with_both_names(role: str, tmp_path: Path) -> None:
    made = prefixed(small(), "module.")
    entries = made.entries[0, 1]
    old = entries.pop(f"{role}module.{NAME}")
    entries[role + NAME] = Tensor(role + NAME, old.dtype, old.shape, old.data)
    with pytest.raises(
        UnmappedNameError, match=r"module\.language_model.* has the prefix module\. and .* has not"
    ) as caught:
        made.convert(tmp_path)
    assert f"{role}{NAME} has not" in caught.value.what


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        ([], ""),
        (["language_model.a"], ""),
        (["model.adapter.weight", "language_model.a"], ""),
        (["module.language_model.a", "module.word_embeddings.weight", "module.adapter.b"], "module."),
        (["modules.language_model.a"], ""),
    ],
)
def test_only_what_stands_before_a_known_model_is_a_prefix(names: list[str], prefix: str) -> None:
    assert common_prefix({name: name for name in names}, where="x") == prefix


@pytest.mark.parametrize("other", ["model.language_model.b", "module.module.language_model.b", "language_model.b"])
def test_two_prefixes_are_a_mixture(other: str) -> None:
    with pytest.raises(UnmappedNameError, match=other.replace(".", r"\.")):
        common_prefix({"module.language_model.a": "module.language_model.a", other: other}, where="x")


def test_what_is_no_parameter_keeps_its_name() -> None:
    found, prefix = NameTable().classify_all(["module.language_model.a", "step_num"], where="x")
    assert (prefix, found["module.language_model.a"]) == ("module.", SourceName("param", "language_model.a"))
    assert found["step_num"].role == "ignored"


@pytest.mark.parametrize("form", ["flat", "nested"])
def test_a_megatron_checkpoint_with_a_prefix_is_imported_as_without(form: str, tmp_path: Path) -> None:
    golden = next(folder for folder in golden_sets() if "tied" in folder.name)
    for folder in ("plain", "A"):  # both saved anew: Pythons before 3.11.4 write enumerations otherwise
        shutil.copytree(golden / "A", tmp_path / folder)
        for path in (tmp_path / folder).rglob("model_optim_rng.pt"):
            with megatron_names():
                tree = torch.load(path, weights_only=False)
                model = tree["model"]
                if folder == "A":
                    flat = {f"module.{key}": value for key, value in model.items()}
                    tree["model"] = flat if form == "flat" else {"module": model}
                torch.save(tree, path)
    pace = Pace(in_process=True)
    for name, source in (("one", tmp_path / "plain"), ("other", tmp_path / "A")):
        outcome = run_all(
            import_request(source=source, target=tmp_path / name, data=topology_of(golden).data, pace=pace)
        )
        assert any("prefix module." in text for text in outcome.warnings) == (name == "other")
    compare(tmp_path / "one", tmp_path / "other").raise_differences()
    (one,), (other,) = ((tmp_path / name / "rank_0").iterdir() for name in ("one", "other"))
    assert list(index_file(one)) == list(index_file(other))
    assert capture(tmp_path / "A").ranks[0].names == capture(golden / "A").ranks[0].names
