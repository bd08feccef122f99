"""The built-in order of a legacy GPT model: names and shapes that Megatron itself wrote, and layouts without golden data."""

from __future__ import annotations

from typing import Any

import pytest

from ckpt2pt.core.names import TIED_HEAD
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import UsageError
from ckpt2pt.formats.folders import iteration_folder
from ckpt2pt.formats.megatron.headers import rank_folders, read_rank
from ckpt2pt.formats.ptmeta.gpt import EMBEDDING, chunk_parameters
from conversions import topology_of
from goldens import golden_sets

SIZES: dict[str, Any] = {
    "hidden_size": 8, "num_attention_heads": 4, "kv_channels": 2, "ffn_hidden_size": 16, "padded_vocab_size": 32,
    "max_position_embeddings": 16, "untie_embeddings_and_output_weights": True, "position_embedding_type": "rope",
    "normalization": "RMSNorm", "add_bias_linear": False,
}  # fmt: skip


def names(topology: Topology, pp: int = 0, vpp: int = 0, **more: Any) -> list[str]:
    found = chunk_parameters(SIZES | more, topology, pp=pp, vpp=vpp, dtype="bfloat16")
    return [parameter.name for parameter in found]


@pytest.mark.parametrize("folder", golden_sets(), ids=lambda folder: folder.name)
def test_order_and_shapes_are_those_of_megatrons_own_files(folder: Any) -> None:
    cut = topology_of(folder)
    for (tp, pp), place in rank_folders(iteration_folder(folder / "A")).items():
        rank = read_rank(place)
        args: Any = rank.template.args
        for vpp, chunk in enumerate(rank.chunks):
            made = chunk_parameters(args, cut, pp=pp, vpp=vpp, dtype="bfloat16")
            assert [(p.name, p.shape, p.dtype) for p in made] == [(n, ref.shape, ref.dtype) for n, ref in chunk], (
                tp,
                pp,
            )


def test_tied_embeddings_over_a_pipeline_are_shared_and_the_copy_comes_last() -> None:
    cut = Topology(num_layers=2, pipeline=2)
    tied = {"untie_embeddings_and_output_weights": False}
    first = chunk_parameters(SIZES | tied, cut, pp=0, vpp=0, dtype="bfloat16")
    last = chunk_parameters(SIZES | tied, cut, pp=1, vpp=0, dtype="bfloat16")
    assert [p.name for p in first if p.shared] == [EMBEDDING] == [first[0].name]
    assert [p.name for p in last if p.shared] == [TIED_HEAD] == [last[-1].name]
    alone = chunk_parameters(SIZES | tied, Topology(num_layers=2), pp=0, vpp=0, dtype="bfloat16")
    assert not any(p.shared for p in alone)
    assert TIED_HEAD not in [p.name for p in alone]


def test_a_noop_layer_has_no_parameters_and_keeps_its_number() -> None:
    slots = {name.split(".")[3] for name in names(Topology(num_layers=3, noop=frozenset({1}))) if ".layers." in name}
    assert slots == {"0", "2"}


def test_biases_of_the_attention_alone() -> None:
    found = names(Topology(num_layers=1), add_qkv_bias=True)
    assert [name for name in found if name.endswith(".bias")] == [
        "language_model.encoder.layers.0.self_attention.query_key_value.bias"
    ]


def test_a_shape_that_the_arguments_do_not_give_is_asked_for() -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "ffn_hidden_size"}
    with pytest.raises(UsageError, match=r"layers\.0\.mlp"):
        chunk_parameters(sizes, Topology(num_layers=1), pp=0, vpp=0, dtype="bfloat16")
