"""A mixture of experts in the shape of the largest that are trained, as sparse files: every header is there, every element is zero.

    experts.py build     FORMAT FOLDER TENSOR PIPELINE EXPERT EXPERTS LAYERS
    experts.py preflight FOLDER TARGET STAGES OUT TENSOR PIPELINE EXPERT EXPERTS LAYERS

``preflight`` is what a worker does before its first byte: headers are read, and each rank of STAGES (``all``, or a number) is planned.
It writes into OUT what the manifests of these stages list of the source.  The room on the volume, which nobody has, is not asked for.

A rank's files differ from those of most others in the states of random generators alone, which no plan reads: ranks of one shape
share their files by hard links, so that the 8,192 of 671 billion parameters take a few MB.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import measure
from ckpt2pt.core.extents import Shape
from ckpt2pt.core.foldernames import TRACKER, iteration_name
from ckpt2pt.core.index import Index
from ckpt2pt.core.params import is_buffer
from ckpt2pt.core.state import State
from ckpt2pt.core.tensor import ROLES, Key, Tensor
from ckpt2pt.core.topology import Rank, Topology
from ckpt2pt.discover import distinct
from ckpt2pt.formats.megatron.order import Style
from ckpt2pt.formats.megatron.write import McoreLayout
from ckpt2pt.formats.torch_dist.common_out import METADATA_JSON, write_common
from ckpt2pt.formats.torch_dist.keys import layers_of
from ckpt2pt.formats.torch_dist.metadata_out import write_metadata
from ckpt2pt.formats.torch_dist.slots import Division, tensors_of
from ckpt2pt.io.checksums import crc32, crc32_combine

if TYPE_CHECKING:
    from ckpt2pt.io.framing import Payload

ITERATION = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Sizes of DeepSeek-V3 (Hugging Face, deepseek-ai/DeepSeek-V3, config.json) but for its attention: queries, keys and values are
    one matrix of as many rows as heads have channels, where that model has two of low rank each.

    The first ``dense`` layers have one MLP; ``experts`` are in each other layer, beside a shared one.
    """

    tensor: int = 4
    pipeline: int = 16
    expert: int = 64
    experts: int = 256
    layers: int = 61
    dense: int = 3
    hidden: int = 7168
    heads: int = 128
    channels: int = 128
    ffn: int = 18432
    expert_ffn: int = 2048
    vocab: int = 129280

    @property
    def topology(self) -> Topology:
        """Stages of as many layers as possible, the last ones of fewer."""
        each = -(-self.layers // self.pipeline)
        counts = [min(each, max(0, self.layers - each * pp)) for pp in range(self.pipeline)]
        return Topology(
            num_layers=self.layers, tensor=self.tensor, pipeline=self.pipeline, layers_per_stage=tuple(counts)
        )

    def shapes(self) -> Iterator[tuple[str, Shape]]:
        """Every parameter by its canonical name, in natural axes."""
        inner = self.heads * self.channels
        yield "embedding.word_embeddings.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            root = f"decoder.layers.{layer}."
            yield f"{root}input_layernorm.weight", (self.hidden,)
            yield f"{root}self_attention.linear_qkv.weight", (3 * inner, self.hidden)
            yield f"{root}self_attention.linear_proj.weight", (self.hidden, inner)
            yield f"{root}pre_mlp_layernorm.weight", (self.hidden,)
            if layer < self.dense:
                yield from self._mlp(f"{root}mlp.", self.ffn)
                continue
            yield f"{root}mlp.router.weight", (self.experts, self.hidden)
            yield f"{root}mlp.router.expert_bias", (self.experts,)
            yield from self._mlp(f"{root}mlp.shared_experts.", self.expert_ffn)
            for number in range(self.experts):
                yield from self._mlp(f"{root}mlp.experts.local_experts.{number}.", self.expert_ffn)
        yield "decoder.final_layernorm.weight", (self.hidden,)
        yield "output_layer.weight", (self.vocab, self.hidden)

    def _mlp(self, root: str, ffn: int) -> Iterator[tuple[str, Shape]]:
        yield f"{root}linear_fc1.weight", (2, ffn, self.hidden)
        yield f"{root}linear_fc2.weight", (self.hidden, ffn)

    def index(self) -> Index:
        """All tensors, which lie nowhere."""
        found: dict[Key, Tensor] = {}
        for name, shape in self.shapes():
            fused = (shape[0] * shape[1], *shape[2:]) if len(shape) > 2 else shape
            for role in ROLES[:1] if is_buffer(name) else ROLES:
                dtype = "bfloat16" if role == "param" and not is_buffer(name) else "float32"
                found[Key(role, name)] = Tensor(Key(role, name), dtype, shape, fused, ())
        return found

    @property
    def state(self) -> State:
        """What its checkpoint holds beside tensors."""
        group = {"lr_mult": 1.0, "is_decoupled_lr": False, "max_lr": 2e-4, "min_lr": 2e-5, "lr": 2e-4, "betas": (0.9, 0.95),
                 "eps": 1e-8, "bias_correction": True, "weight_decay": 0.1, "is_expert_parallel": False}  # fmt: skip
        return State(
            where="the benchmark",
            iteration=ITERATION,
            samples=ITERATION,
            step=ITERATION,
            args={
                "num_attention_heads": self.heads, "hidden_size": self.hidden, "kv_channels": self.channels,
                "padded_vocab_size": self.vocab, "untie_embeddings_and_output_weights": True,
            },
            groups=({**group, "wd_mult": 1.0}, {**group, "wd_mult": 0.0}),
            scheduler={
                "max_lr": 2e-4, "lr_warmup_steps": 1, "num_steps": ITERATION, "lr_decay_style": "cosine", "lr_decay_steps": 1000,
                "min_lr": 2e-5, "start_wd": 0.1, "end_wd": 0.1, "wd_incr_style": "constant", "wd_incr_steps": 1000,
            },
        )  # fmt: skip


def build(form: str, folder: Path, model: Mixture) -> None:
    """Write its checkpoint: ``megatron`` (torch format) or ``torch_dist``."""
    inside = folder / iteration_name(ITERATION)
    inside.mkdir(parents=True)
    (_torch if form == "megatron" else _distributed)(inside, model)
    (folder / TRACKER).write_text(str(ITERATION))


def _torch(folder: Path, model: Mixture) -> None:
    layout = McoreLayout(
        index=model.index(),
        state=model.state,
        topology=model.topology,
        source_tensor=model.tensor,
        style=Style(),
        dtype="bfloat16",
        gradients="float32",
        rows=model.vocab,
        tied=False,
        full=True,
        data=1,
        expert=model.expert,
        where="the benchmark",
    )
    made: dict[tuple[object, ...], Path] = {}
    for rank in layout.ranks():
        tp, _, ep = layout.place(rank)
        here = folder / layout.directory(rank)
        here.mkdir()
        like = (min(tp, 1), min(ep, 1), shapes_of(layout, rank))
        if like not in made:
            made[like] = here
            for payload in layout.files(rank)[0]:
                _write(here / payload.name, payload)
            continue
        for path in made[like].iterdir():
            (here / path.name).hardlink_to(path)


def shapes_of(layout: McoreLayout, rank: Rank) -> object:
    """What the files of a rank hold."""
    return tuple((held.registered.spelled, held.part.shape) for chunk in layout.chunks(rank) for held in chunk)


def _distributed(folder: Path, model: Mixture) -> None:
    index = model.index()
    layers = layers_of(index, "the benchmark")
    division = Division(
        index=index,
        layers=layers,
        tensor=model.tensor,
        pipeline=model.pipeline,
        dtype="bfloat16",
        full=True,
        where="the benchmark",
    )
    files = {rank: division.file(rank)[0] for rank in division.ranks()}
    made: dict[tuple[object, ...], Path] = {}
    for (tp, _), file in files.items():
        path, like = folder / file.name, (min(tp, 1), tuple((part.dtype, part.shape) for part in file.parts))
        if like in made:
            path.hardlink_to(made[like])
        else:
            made[like] = path
            _write(path, file)
    sizes = {
        "num_layers": model.layers, "hidden_size": model.hidden, "num_experts": model.experts,
        "tensor_model_parallel_size": model.tensor, "pipeline_model_parallel_size": model.pipeline,
        "expert_model_parallel_size": model.expert,
    }  # fmt: skip
    (folder / "common.pt").write_bytes(write_common(model.state, sizes, full=True, chained=model.expert > 1))
    (folder / "metadata.json").write_bytes(METADATA_JSON)
    objects = {key: item for file in files.values() for key, item in file.items()}
    (folder / ".metadata").write_bytes(write_metadata(tensors_of(files.values(), str(folder)), objects))


def _write(path: Path, payload: Payload) -> None:
    layout = payload.lay_out()
    with path.open("wb") as file:
        os.truncate(file.fileno(), layout.nbytes)
        sizes = [layout.storage_nbytes(number) for number in range(layout.storages)]
        crcs = [_zeros(nbytes) for nbytes in sizes]
        first = layout.storages - len(payload.copied)
        for number, content in enumerate(payload.copied, first):
            assert isinstance(content, bytes)
            os.pwrite(file.fileno(), content, layout.storage_offset(number))
            crcs[number] = crc32(content, 0)
        layout.finish(file.fileno(), crcs)


@lru_cache(None)
def _zeros(nbytes: int) -> int:
    """CRC-32 of as many zeros."""
    if nbytes < 2:
        return crc32(bytes(nbytes), 0)
    half = nbytes // 2
    return crc32_combine(crc32_combine(_zeros(half), _zeros(half), half), _zeros(nbytes % 2), nbytes % 2)


def preflight(folder: Path, target: str, stages: str, out: Path, model: Mixture) -> None:
    from ckpt2pt.run.targets import mcore, torch_dist  # noqa: PLC0415 - numpy, which building needs not
    from ckpt2pt.run.targets.request import DistRequest, McoreRequest  # noqa: PLC0415 - the same

    sizes = Topology(num_layers=model.pipeline, tensor=model.tensor, pipeline=model.pipeline)
    asked = range(model.pipeline) if stages == "all" else [int(stages)]
    where, result = folder, folder / "never"
    if target == "megatron":
        layers = model.topology.layers_per_stage
        conversion = mcore.conversion_of(
            McoreRequest(topology=sizes, source=where, target=result, layers_per_stage=layers), asked
        )
    else:
        conversion = torch_dist.conversion_of(DistRequest(topology=sizes, source=where, target=result), asked)
    ranks = [(number, pp) for pp in asked for number in range(conversion.target.tensor)]
    nbytes = sum(conversion.plan(rank).nbytes for rank in ranks)
    listed = [json.dumps([*distinct(conversion.inputs[rank] for rank in ranks if rank[1] == pp)]) for pp in asked]
    told = {"ranks": len(ranks), "written_bytes": nbytes, "manifest_inputs_bytes": sum(map(len, listed))}
    out.write_text(json.dumps(told))


def experts(work: Path, say: Callable[[str], None]) -> dict[str, object]:
    """Plans of 256 experts on 64 ranks of experts, and of a quarter of both, where one worker's share is the same."""
    found: list[dict[str, object]] = []
    full, quarter = Mixture(), Mixture(expert=16, experts=64)
    cases = [(form, model, ("5",)) for form in ("megatron", "torch_dist") for model in (quarter, full)]
    for form, model, shares in cases:
        folder, out = work / "source", work / "told"
        sizes = [str(one) for one in (model.tensor, model.pipeline, model.expert, model.experts, model.layers)]
        measure.run([sys.executable, __file__, "build", form, folder, *sizes])
        for stages in shares:
            for target in ("megatron", "torch_dist"):
                sample = measure.run([sys.executable, __file__, "preflight", folder, target, stages, out, *sizes])
                row: dict[str, object] = {
                    "source": form, "target": target, "stages": stages, "experts": model.experts, "expert_parallel": model.expert,
                    "cpu": round(sample.cpu, 2), "wall": round(sample.wall, 2), "rss": sample.rss, **json.loads(out.read_text()),
                }  # fmt: skip
                found.append(row)
                say("  " + ", ".join(f"{key} {value}" for key, value in row.items()))
        shutil.rmtree(folder)
    return {"tensor": full.tensor, "pipeline": full.pipeline, "layers": full.layers, "plans": found}


def numbers(words: Iterable[str]) -> Mixture:
    tensor, pipeline, expert, experts, layers = map(int, words)
    return Mixture(tensor=tensor, pipeline=pipeline, expert=expert, experts=experts, layers=layers)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["build", form, folder, *words]:
            build(form, Path(folder), numbers(words))
        case ["preflight", folder, target, stages, out, *words]:
            preflight(Path(folder), target, stages, Path(out), numbers(words))
        case _:
            raise SystemExit(__doc__)
