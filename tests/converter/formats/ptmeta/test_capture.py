"""pt_meta from a checkpoint: the maps of the patched Megatron, to the byte, and proofs that can fail."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ckpt2pt.core.buckets import Buffer
from ckpt2pt.core.extents import Extent, TensorRef
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import FormatError, InputError
from ckpt2pt.formats.folders import iteration_folder
from ckpt2pt.formats.megatron.distributed import StoredBucket
from ckpt2pt.formats.megatron.headers import MegatronRank, rank_folders, read_rank
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.ptmeta.capture import capture, lay_out_rank, prove_given
from ckpt2pt.formats.ptmeta.files import render
from ckpt2pt.formats.ptmeta.gpt import EMBEDDING
from ckpt2pt.formats.ptmeta.metadata import read_param_maps
from ckpt2pt.formats.torchfile.trees import namespace, with_attrs
from ckpt2pt.verification.compare import compare
from goldens import REPOSITORY, golden_sets
from handmade import Handmade
from layouts import LAYOUTS
from results import edit_tree, flip

SETS = golden_sets()


def golden(name: str) -> Path:
    return next(folder for folder in SETS if folder.name.startswith(name))


def checkpoint(tmp_path: Path, name: str = "a2_") -> Path:
    """A golden checkpoint to be damaged."""
    shutil.copytree(golden(name) / "A", tmp_path / "A", copy_function=shutil.copyfile)
    for path in tmp_path.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return tmp_path / "A"


def edit(path: Path, change: Any) -> None:
    tree = torch.load(path, weights_only=False)
    change(tree)
    torch.save(tree, path)


@pytest.mark.parametrize("folder", SETS, ids=lambda folder: folder.name)
def test_every_map_is_the_one_that_the_patched_megatron_wrote(folder: Path, tmp_path: Path) -> None:
    found = capture(folder / "A")
    maps = {path.name: path.read_bytes() for path in (folder / "A" / "param_map").glob("*_dp0*.json")}
    made = render(found.ranks, with_maps=found.with_maps)
    assert {name: content for name, content in made.items() if name.endswith(".json")} == maps
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
    # The reference saves numpy's arrays anew, under the name of numpy 2; the content is compared all the same.
    result = compare(tmp_path, folder / "pt_meta", ignore=("*/np_rng_state/1",))
    result.raise_differences()


@pytest.mark.parametrize("folder", SETS, ids=lambda folder: folder.name)
def test_the_evidence_counts_every_element(folder: Path) -> None:
    for place in rank_folders(iteration_folder(folder / "A")).values():
        rank = read_rank(place)
        count = sum(ref.numel for chunk in rank.chunks for _, ref in chunk)
        layout = lay_out_rank(rank, int(place.name.split("_")[3]) if place.name.count("_") > 2 else 0)
        assert f"{count} elements of distrib_optim.pt equal their weights" in layout.evidence
        assert "offsets equal" in layout.evidence


def test_a_changed_bucket_size_is_found_in_the_header() -> None:
    found = capture(golden("f_") / "A")
    assert "buckets of 22592 elements" in found.evidence[0]


def test_a_changed_bucket_size_is_found_where_the_usual_one_would_have_stopped_megatron() -> None:
    """In one bucket the shared embedding would begin at element 9, which 2 does not divide."""
    homes = {EMBEDDING: (10, 6), "language_model.a": (6, 4), "language_model.b": (0, 5)}
    args = namespace(
        {"data_parallel_size": 2, "context_parallel_size": 1, "pipeline_model_parallel_size": 2,
         "untie_embeddings_and_output_weights": False, "overlap_grad_reduce": True}
    )  # fmt: skip
    chunk = tuple(
        (name, TensorRef(name, "bfloat16", (numel,), (Extent("views", 2 * start, 2 * numel),)))
        for name, (start, numel) in homes.items()
    )
    stored = tuple(StoredBucket(numel=n + n % 2, numel_unpadded=n, tensors={}) for n in (5, 4, 6))
    rank = MegatronRank(
        folder=Path("here"),
        template=Template(path="", tree={"args": args}, storages={}),
        chunks=(chunk,),
        buffers=(stored,),
    )
    ((buffer,),) = (found := lay_out_rank(rank, 0, at_most=0)).buffers
    assert [(p.name, p.start) for p in buffer.placements] == [(n, start) for n, (start, _) in reversed(homes.items())]
    assert found.evidence.startswith("buckets of 4 elements")


def test_without_an_optimizer_file_the_offsets_of_the_weights_prove_the_layout(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    next(folder.rglob("distrib_optim.pt")).unlink()
    assert capture(folder).evidence == ("tp 0 pp 0: offsets equal those of the weights in the model file",)


def test_one_weight_that_differs_is_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)

    leaf = "/model/language_model/encoder/layers.1.input_norm.weight"
    flip(next(folder.rglob("model_optim_rng.pt")), leaf, 5)
    with pytest.raises(FormatError, match=r"layers\.1\.input_norm\.weight is not what the optimizer holds"):
        capture(folder)
    assert capture(folder, compare=False).ranks


def test_two_weights_in_another_order_are_noticed_by_their_offsets(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    next(folder.rglob("distrib_optim.pt")).unlink()

    def change(tree: Any) -> None:
        encoder = tree["model"]["language_model"]["encoder"]
        encoder.pairs = [*encoder.pairs[1:], encoder.pairs[0]]

    edit_tree(next(folder.rglob("model_optim_rng.pt")), change)
    with pytest.raises(FormatError, match="in another order"):
        capture(folder)


def test_buckets_that_no_size_explains_are_refused_with_the_numbers(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "f_")

    def change(tree: Any) -> None:
        for key in ("per_bucket_numel", "per_bucket_numel_unpadded"):
            sizes = next(iter(tree[key][0].values()))
            sizes[0], sizes[1] = sizes[0] - 2, sizes[1] + 2
        kinds = next(iter(tree[0].values()))
        for tensors in kinds.values():
            tensors[0], tensors[1] = tensors[0][:-2].clone(), torch.cat([tensors[0][-2:], tensors[1]])

    edit(next(folder.rglob("distrib_optim.pt")), change)
    with pytest.raises(FormatError, match="the buckets are"):
        capture(folder)


def test_a_run_without_the_distributed_optimizer_gives_names_alone(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)

    def change(tree: Any) -> None:
        tree["args"] = with_attrs(tree["args"], {"use_distributed_optimizer": False})

    edit_tree(next(folder.rglob("model_optim_rng.pt")), change)
    found = capture(folder)
    assert not found.with_maps
    assert found.ranks[0].names == capture(golden("a2_") / "A").ranks[0].names


def test_another_group_pads_the_buckets_anew() -> None:
    (rank,) = capture(golden("f_") / "A", target_data=7).ranks
    ((buffer,),) = rank.buffers
    assert [bucket.numel % 7 for bucket in buffer.buckets] == [0] * len(buffer.buckets)
    assert buffer.numel > sum(bucket.numel_unpadded for bucket in buffer.buckets)


@pytest.mark.parametrize("layout", ["virtual-several-buckets-dp3", "chunk-of-noops-alone", "biases"])
def test_what_convert_wrote_gives_the_map_that_convert_was_given(layout: str, tmp_path: Path) -> None:
    made = Handmade(**LAYOUTS[layout])
    made.convert(tmp_path)
    found = render(capture(tmp_path / "out").ranks, with_maps=True)
    maps = {path.name: path.read_bytes() for path in (tmp_path / "pt_meta").glob("*.json")}
    assert {name: content for name, content in found.items() if name.endswith(".json")} == maps


def test_the_documented_recipe_writes_maps_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code block of docs/pt-meta.md, run as it stands, in a Megatron that holds only what it touches."""
    module = torch.nn.Module()
    module.module = torch.nn.ModuleDict({name: torch.nn.Linear(2, 3, bias=False) for name in ("a", "b")})
    one, other = module.parameters()
    chunk = SimpleNamespace(
        module=module, buffers=[SimpleNamespace(param_index_map={other: (0, 6, 0), one: (8, 14, 1)})]
    )
    empty = SimpleNamespace(module=torch.nn.Module(), buffers=[])
    mpu: Any = ModuleType("megatron.core.mpu")
    mpu.get_data_parallel_rank = lambda with_context_parallel: 0
    mpu.get_tensor_model_parallel_rank, mpu.get_pipeline_model_parallel_rank = (lambda: 1), (lambda: 2)
    core, training, megatron = (ModuleType(f"megatron{end}") for end in (".core", ".training", ""))
    monkeypatch.setattr(core, "mpu", mpu, raising=False)
    monkeypatch.setattr(megatron, "training", training, raising=False)
    monkeypatch.setattr(megatron, "get_args", lambda: SimpleNamespace(save=str(tmp_path)), raising=False)
    monkeypatch.setattr(
        training, "setup_model_and_optimizer", lambda *_, **__: ([empty, chunk], "o", "s"), raising=False
    )
    for each in (megatron, core, training):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    (code,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "pt-meta.md").read_text(), re.DOTALL)
    exec(code, {})  # noqa: S102 - our own documentation
    assert training.setup_model_and_optimizer("provider", model_type=1)[1:] == ("o", "s")
    (buffer,) = read_param_maps(tmp_path / "param_map", tp=1, pp=2, divisor=8)
    assert [(p.name, p.shape, p.start) for p in buffer.placements] == [("b.weight", (3, 2), 0), ("a.weight", (3, 2), 8)]
    assert buffer.dtype == "float32"


def test_a_given_map_of_another_model_is_refused(tmp_path: Path) -> None:
    rank = read_rank(rank_folders(iteration_folder(golden("a2_") / "A"))[0, 0])
    ((buffer,),) = lay_out_rank(rank, 0).buffers
    assert prove_given(rank, [buffer], at_most=None, where=tmp_path).buffers == ((buffer,),)
    with pytest.raises(FormatError, match="0 param maps for 1 chunks"):
        prove_given(rank, [], at_most=None, where=tmp_path)
    other = Handmade(topology=Topology(num_layers=1))
    other.write_meta(tmp_path)
    strange: tuple[Buffer, ...] = read_param_maps(tmp_path, tp=0, pp=0, divisor=1)
    with pytest.raises(InputError, match="not in both"):
        prove_given(rank, strange, at_most=None, where=tmp_path)
