"""Checkpoints of other programs, or in other forms, that are not read: what tells them, and what their owner does next.

A format that becomes readable leaves :data:`FAMILIES` and enters the table of ``registry``.

Signs: peft ``config.py`` and ``utils/save_and_load.py`` (LoRA); transformers ``utils/quantization_config.py`` and the tensor names
of AutoGPTQ, AWQ, bitsandbytes and compressed-tensors; DeepSpeed ``runtime/engine.py`` (``_get_ckpt_name``, ``_copy_recovery_script``);
Megatron-LM core/dist_checkpointing/core.py (``CheckpointingConfig``) and strategies/zarr.py; mindformers 2.0.0
``checkpoint/utils.py``; MindSpeed-Core-MS feature-0.1, the names of its ``MoELayer``; ggml ``gguf.h``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import cast

from ckpt2pt.core.foldernames import is_rank, iterations, mindformers_iteration_of
from ckpt2pt.core.moves import MODEL_FILE
from ckpt2pt.errors import Ckpt2ptError, UnsupportedFormatError, ref
from ckpt2pt.formats.mindformers.folder import file_kind
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.formats.torch_dist.metadata import is_distributed
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.msadapter import is_msadapter
from ckpt2pt.io.inputs import read_head
from ckpt2pt.io.jsontext import parse_json
from ckpt2pt.io.paths import is_file, is_there, listing, status

OPTION = ref("source.path")
_CONFIG_NBYTES = 1 << 20
_WEIGHTS = (".safetensors", ".ckpt")

_LORA = re.compile(r"(?:^|[._])lora_(?:[abAB]|embedding)\b|delta_lora_[ab]")
_QUANTISED = re.compile(
    r"\.(?:qweight|qzeros|g_idx|SCB|weight_scale(?:_inv)?|weight_packed|weight\.(?:absmax|quant_map|quant_state\.\w+))$"
)
_HUGGING_FACE = re.compile(
    r"(?:model\.)?layers\.\d+\.(?:self_attn|mlp|input_layernorm|post_attention_layernorm)\.|model\.(?:embed_tokens|norm)\."
    r"|(?:transformer\.)?h\.\d+\.(?:attn|mlp|ln_[12])\.|lm_head\.weight$"
)
_MINDFORMERS = re.compile(r"adam_[mv]\.(?:decoder|embedding|output_layer)\.")
_CORE_MS_EXPERTS = re.compile(r"language_model\.\S*\.mlp\.(?:experts|local_experts)\.")
_HUGGING_FACE_FILE = re.compile(r"(?:model|consolidated)\S*\.safetensors")
_PICKLED_FILE = re.compile(r"pytorch_model\S*\.bin")
_DEEPSPEED_FILE = re.compile(r"[\w-]+[_-](?:model|optim)_states\.pt")
_GLOBAL_STEP = re.compile(r"global_step\d+")


class Seen:
    """A file or a folder, looked at once and only as far as it is asked; without ``contents`` no file of weights is opened."""

    def __init__(self, path: Path, *, contents: bool = True) -> None:
        self.path, self.contents = path, contents

    @cached_property
    def names(self) -> frozenset[str]:
        """What lies in the folder."""
        return frozenset(path.name for path in listing(self.path, option=OPTION))

    @cached_property
    def places(self) -> list[Path]:
        """The folder itself, and those of its iterations, the newest first."""
        return [self.path, *reversed(iterations(listing(self.path, option=OPTION)))]

    @cached_property
    def rank_file(self) -> Path | None:
        """The first checkpoint file in the folder of a rank."""
        for place in self.places:
            for folder in listing(place, option=OPTION):
                for file in listing(folder, option=OPTION) if is_rank(folder.name) else ():
                    if file.suffix in {".pt", *_WEIGHTS}:
                        return file
        return None

    @property
    def suffix(self) -> str:
        """Its suffix; empty where there is none."""
        return self.rank_file.suffix if self.rank_file else ""

    @cached_property
    def tensors(self) -> frozenset[str]:
        """Names of tensors in the file, or in that of the first rank; none where it is no file of weights, or is damaged."""
        file = self.path if is_file(self.path, OPTION) else self.rank_file
        if not file or not self.contents or file.suffix not in _WEIGHTS:
            return frozenset()
        return _names_in(*_version(file))

    @cached_property
    def of_msadapter(self) -> bool:
        """Whether MSAdapter wrote the model file of the first rank."""
        file = self.rank_file
        if not file or not self.contents or file.suffix != ".pt":
            return False
        model = file.with_name(MODEL_FILE)
        return _is_of_msadapter(*_version(model if is_file(model, OPTION) else file))

    @property
    def of_mindformers(self) -> bool:
        """Whether it is an iteration of MindFormers, holds such, or ranks in its older form."""
        names = self.names
        return (
            any(map(file_kind, names))
            or any(mindformers_iteration_of(one) is not None for one in names)
            or self.holds(_MINDFORMERS)
        )

    @property
    def of_huggingface(self) -> bool:
        """Whether it is a model of transformers in safetensors."""
        return self.has("model.safetensors.index.json") or (
            self.has("config.json") and self.matches(_HUGGING_FACE_FILE)
        )

    def has(self, *names: str) -> bool:
        """Whether one of these lies in the folder."""
        return not self.names.isdisjoint(names)

    def matches(self, pattern: re.Pattern[str]) -> bool:
        """Whether the whole name of something that lies there matches."""
        return any(map(pattern.fullmatch, self.names))

    def holds(self, pattern: re.Pattern[str]) -> bool:
        """Whether the name of a tensor matches, from its start or where the pattern says so."""
        return any(map(pattern.search, self.tensors))

    def stated(self, name: str) -> Mapping[str, object]:
        """What a small JSON file says; nothing where there is none."""
        path, found = self.path / name, None
        with suppress(ValueError, RecursionError):
            found = parse_json(read_head(path, OPTION, _CONFIG_NBYTES)) if is_file(path, OPTION) else None
        return cast("dict[str, object]", found) if isinstance(found, dict) else {}


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of checkpoint that is not read: its name after "this is", its sign, and what its owner does next."""

    name: str
    is_here: Callable[[Seen], bool]
    hint: str


LORA = Family(
    "a LoRA adapter, which holds changes of weights and not the weights",
    lambda seen: (
        seen.has(
            "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "mindformers_adapter_config.json"
        )
        or seen.holds(_LORA)
    ),
    "merge it into its base model with the program that trained it (peft: merge_and_unload), and give the merged checkpoint",
)
QUANTISED = Family(
    "a quantised checkpoint",
    lambda seen: (
        "quantization_config" in seen.stated("config.json")
        or seen.has("quantize_config.json")
        or seen.holds(_QUANTISED)
    ),
    "give the checkpoint from before it was quantised, in bf16, fp16 or fp32",
)
PICKLED = Family(
    "a Hugging Face model in pickles (pytorch_model.bin)",
    lambda seen: (
        not seen.of_huggingface
        and (seen.has("pytorch_model.bin.index.json") or (seen.has("config.json") and seen.matches(_PICKLED_FILE)))
    ),
    "save it as safetensors (transformers: save_pretrained), and give that folder",
)
FAMILIES: tuple[Family, ...] = (
    Family(
        "a GGUF file (llama.cpp), which holds weights for inference",
        lambda seen: any(name.endswith(".gguf") for name in (seen.path.name, *seen.names)),
        "give the checkpoint that it was made from",
    ),
    Family(
        "a DeepSpeed checkpoint",
        lambda seen: (
            seen.has("zero_to_fp32.py")
            or any(
                Seen(place).matches(_DEEPSPEED_FILE)
                for place in (seen.path, *(seen.path / name for name in seen.names if _GLOBAL_STEP.fullmatch(name)))
            )
        ),
        "load it in the training that wrote it, save it there with Megatron-LM's own optimizer and checkpoint (without DeepSpeed), "
        "and give that; zero_to_fp32.py beside it makes whole weights of it",
    ),
    Family(
        "a distributed checkpoint in zarr",
        lambda seen: any(map(_is_zarr, seen.places)),
        "load it with the Megatron-LM that wrote it and save it again with --ckpt-format torch_dist",
    ),
    LORA,
    QUANTISED,
    PICKLED,
    Family(
        "a mixture of experts of MindSpeed-Core-MS, whose ranks number experts of their own",
        lambda seen: seen.holds(_CORE_MS_EXPERTS),
        "train it with MindSpeed-Core-MS r0.2.0 or newer, which saves checkpoints of Megatron-LM by MSAdapter, and give such a one",
    ),
)
"""In the order in which they are looked for: a LoRA adapter or a quantised model may lie in a Hugging Face folder."""


def family_of(path: Path, *, contents: bool = True) -> Family | None:
    """The family of a file or a folder; None for one that is read, or that nothing tells.  ``contents`` as in :class:`Seen`."""
    if not is_there(path, OPTION):
        return None
    seen = Seen(path, contents=contents)
    return next((family for family in FAMILIES if family.is_here(seen)), None)


def refuse_unsupported(path: Path, *, contents: bool = True) -> None:
    """Raise :class:`UnsupportedFormatError` for a checkpoint of a family that is not read, with what to do next."""
    family = family_of(path, contents=contents)
    if family:
        raise UnsupportedFormatError(f"this is {family.name}; ckpt2pt does not read it", where=path, hint=family.hint)


def kind_of_tensors(names: Iterable[str]) -> str:
    """What a single file of weights holds, by the names of its tensors."""
    kinds = {_LORA: "LoRA adapter", _QUANTISED: "quantised weights", _HUGGING_FACE: "Hugging Face weights"}
    for pattern, kind in (*kinds.items(), (_MINDFORMERS, "MindFormers checkpoint")):
        if any(map(pattern.search if pattern in {_LORA, _QUANTISED} else pattern.match, names)):
            return kind
    return "MindSpore checkpoint"


def _is_zarr(place: Path) -> bool:
    """One array is one folder with a ``.zarray``; ``metadata.json`` names the format."""
    stated = Seen(place).stated("metadata.json")
    named = stated.get("sharded_backend") == "zarr" and not is_distributed(place)
    return named or bool(listing(place, "*/.zarray", OPTION))


Version = tuple[Path, tuple[int, int, int] | None]


def _version(path: Path) -> Version:
    """A file, and what tells it from one that is written there later."""
    seen = status(path, OPTION)
    return path, (seen.st_ino, seen.st_size, seen.st_mtime_ns) if seen else None


@lru_cache(8)
def _names_in(path: Path, _: object) -> frozenset[str]:
    with suppress(Ckpt2ptError):
        return frozenset(index_file(path, partial=True))
    return frozenset()


@lru_cache(8)
def _is_of_msadapter(path: Path, _: object) -> bool:
    with suppress(Ckpt2ptError):
        return is_msadapter(Archive.open(path).pickle)
    return False
