"""Results that we write, loaded by the code of Megatron-LM itself: `make test-megatron`.

The releases up to 0.16 hold no ``load_checkpoint``: their models and optimizers take the files one by one.  In 0.18 and 0.19 it is the real one,
with arguments, scheduler and random states.  Not seen here: the values of random states, a training step, Transformer Engine itself (a stand-in has its names and
order) and legacy models, which no wheel holds.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch

from ckpt2pt.cli.commands import main
from ckpt2pt.core.params import EMBEDDING, HEAD
from ckpt2pt.core.tensor import Key, Role
from ckpt2pt.formats.megatron.scaler import stored_scaler
from ckpt2pt.formats.registry import read
from ckpt2pt.verification.gather import Files, gathered
from goldens import REPOSITORY
from mcore import Array
from mcoresets import joined, script_of, sizes_of
from msadapter import rewrite
from trainings import (
    BUCKETS,
    CUT,
    EXPERTS,
    FP16,
    FUSED,
    NOOP,
    ODD,
    SETS,
    SHARDS,
    TIED,
    Training,
    as_float,
    fp16_training,
)  # fmt: skip

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.timeout(600),
]  # each release is imported once, and judges all its cases then

RELEASES = ("0.8.0", "0.12.3", "0.15.3", "0.16.1", "0.18.2", "0.19.2")
PRETRAIN = RELEASES[-2:]
Rank = tuple[dict[str, Any], Any]
"""What a rank said and its arrays."""

# ---------------------------------------------------------------------------------------------------------------- cases


class Case(NamedTuple):
    """A result, and the layout at which a release loads it."""

    release: str
    name: str
    form: str
    tp: int
    pp: int
    dp: int = 1
    damage: str = ""
    save: str = ""
    """The form in which Megatron saves again what it loaded."""
    ep: int = 1

    def __str__(self) -> str:
        experts = f"ep{self.ep}" if self.ep > 1 else ""
        more = "".join(f"-{one}" for one in (self.damage, self.save) if one)
        return f"{self.release}-{self.name}-{self.form}-tp{self.tp}pp{self.pp}dp{self.dp}{experts}{more}"

    @property
    def training(self) -> Training:
        return SETS[self.name]


LOCAL = ("--transformer-impl", "local")
"""No Transformer Engine is there."""
MEGATRON = [
    (FUSED, 1, 1, 2), (FUSED, 2, 2, 1), (FP16, 1, 1, 1), (FP16, 2, 1, 1),
    (TIED, 1, 2, 1), (TIED, 2, 1, 2), (CUT, 2, 2, 1), (CUT, 1, 1, 1), (NOOP, 2, 1, 1), (BUCKETS, 1, 1, 2), (SHARDS, 1, 2, 1), (ODD, 1, 1, 2), (ODD, 2, 2, 1),
]  # fmt: skip
TORCH_DIST = [
    (TIED, 1, 2, 1),
    (CUT, 2, 1, 1),
    (CUT, 1, 1, 2),
    (NOOP, 1, 2, 1),
    (SHARDS, 2, 1, 1),
    (ODD, 1, 1, 1),
    (ODD, 2, 1, 1),
    (FP16, 2, 1, 1),
    (FUSED, 1, 2, 1),
]
FROM_MEGATRON = {BUCKETS}
"""Sets of which the files of Megatron 0.6 are converted, and not those of MindSpore."""
DAMAGES = {
    "bit": "exp_avg decoder.layers.0.mlp.linear_fc2.weight: 1 differ",
    "missing": "refused",
    "step": "step: 3, and 2 in the source",
    "scale": "grad_scaler: ",
}
"""What is done to a result, and what has to be said of it."""


def cases() -> list[Case]:
    """0.8 and 0.12 know no fully_reshardable state, and their optimizers refuse tied embeddings on two stages (param_gbuf_map)."""
    found: list[Case] = []
    for release in RELEASES:
        old = release in RELEASES[:2]
        for name, tp, pp, dp in MEGATRON:
            if not (old and pp > 1 and name in {TIED, ODD, FUSED}):
                found.append(Case(release, name, "megatron", tp, pp, dp))
        if not old:
            found += [Case(release, name, "torch_dist", tp, pp, dp) for name, tp, pp, dp in TORCH_DIST]
    # Sets of the whole collection, at their own layout and at another.
    for name in sorted(SETS.keys() - {TIED, CUT, NOOP, BUCKETS, SHARDS, ODD, FP16, FUSED} - EXPERTS.keys()):
        tp, pp = sizes_of(SETS[name].folder).values()
        found += [Case("0.12.3", name, "megatron", tp, pp), Case("0.19.2", name, "megatron", 3 - tp, 1)]
        found += [Case("0.19.2", name, "torch_dist", 3 - tp, 1)]
        repaired = {"0.12.3": "0.12.3", "0.19.0": "0.19.2"}.get(SETS[name].folder.parent.name)
        found += [Case(repaired, name, "torch", tp, pp)] if repaired and "vpp" not in name else []
    return [*found, *cases_of_experts()]


def cases_of_experts() -> list[Case]:
    """More and fewer ranks of experts, and other layouts, in the first release that has a set's model and in the last; one of the sets in all."""
    found = [Case("0.8.0", name, "torch", 1, 1, 2, ep=2) for name in EXPERTS if name == "0.8.0-moe_ep2"]
    for name, (stages, since) in EXPERTS.items():
        mixed = RELEASES[RELEASES.index(since) :] if name.endswith("_mixed") else ()
        for release in dict.fromkeys((since, *mixed, "0.19.2")):
            sizes = [(1, 1, 2, 2)]
            if release == since:
                sizes = [(1, 1, 4, 4), (1, stages, 2, 2)]
            if release == "0.19.2":
                sizes = [(1, 1, 1, 1), (2, 1, 2, 2), (1, stages, 2, 2)]
            found += [Case(release, name, "megatron", *size[:3], ep=size[3]) for size in sizes]
            if release not in RELEASES[:2]:
                found += [Case(release, name, "torch_dist", *size[:3], ep=size[3]) for size in sizes]
    return found


def damaged_cases() -> list[Case]:
    found = [(damage, FP16 if damage == "scale" else ODD) for damage in DAMAGES]
    return [
        Case(release, name, "torch_dist", 1, 1, 1, damage) for release in ("0.16.1", "0.19.2") for damage, name in found
    ]


def saved_cases() -> list[Case]:
    """Forms in which releases keep the state of the optimizer.  What 0.19 saves of an fp16 training has its loss scale."""
    flat, buckets = "fully_sharded_model_space", "dp_reshardable"
    rows = [
        ("0.12.3", flat, 1, 1, 2), ("0.15.3", flat, 2, 1, 2), ("0.15.3", buckets, 2, 1, 2), ("0.19.2", buckets, 1, 2, 2), ("0.19.2", "torch", 1, 2, 1),
    ]  # fmt: skip
    found = [Case(release, ODD, "megatron", tp, pp, dp, save=save) for release, save, tp, pp, dp in rows]
    forms = ("torch", buckets, "fully_reshardable")
    return found + [Case("0.19.2", FP16, "megatron", 1, 1, save=form) for form in forms]


def converted(case: Case, folder: Path) -> Path:
    """The result of the command, made once for all releases that load it."""
    one, words = case.training, list[object]()
    target = folder / f"{case.name}-{case.form}"
    if case.name in EXPERTS and case.form != "torch":
        # 0.12 and older have an optimizer less where a stage has no experts.
        old = case.form == "megatron" and case.release in RELEASES[:2]
        target = target.with_name(f"{target.name}-{case.ep}{'-old' if old else ''}")
        words += ["--target-ep-size", case.ep, *(["--megatron-version", "0.12"] if old else [])]
        words += LOCAL if case.form == "megatron" else ()
    if case.form == "megatron":
        target = target.with_name(f"{target.name}-{case.tp}{case.pp}{case.dp}")
        words += [
            "--target-tp-size",
            case.tp,
            "--target-pp-size",
            case.pp,
            "--target-dp-size",
            case.dp,
            "--target-vpp-size",
            1,
            *(["--transformer-impl", "transformer_engine"] if one.transformer_engine else []),
        ]
    if not target.exists():
        if case.form == "torch":
            words += ["--source", rewrite(one.folder, folder / f"{case.name}.msadapter", "msadapter")]
        elif one.fp16:
            words += ["--source", fp16_training(folder)]
        elif one.recent and case.form == "megatron" and (one.folder / "ms").exists():
            place, sizes = folder / f"{target.name}.run", sizes_of(one.folder)
            place.mkdir()
            words += ["--source", one.folder / "ms", "--tp-size", sizes["tp"], "--pp-size", sizes["pp"]]
            words += ["--param-map-path", script_of(one.folder, place)]
        elif one.recent or case.name in FROM_MEGATRON:
            words += ["--source", one.folder if one.recent else one.folder / "A"]
        else:
            words += ["--source", one.folder / "ms", "--param-map-path", one.folder / "pt_meta"]
        words += ["--target", target, "--target-format", case.form, "--progress", "none", "--multiprocess-off"]
        assert main(["convert", *map(str, words)]) == 0, words
    return damaged(target, case.damage) if case.damage else target


def damaged(result: Path, damage: str) -> Path:
    """A copy of a torch_dist result with one fault."""
    target = result.with_name(f"{result.name}-{damage}")
    if target.exists():
        return target
    shutil.copytree(result, target)
    [iteration] = target.glob("iter_*")
    if damage == "bit":
        tensor = read(target).index[Key("exp_avg", "decoder.layers.0.mlp.linear_fc2.weight")]
        extent = tensor.views[0].storage[0]
        data = bytearray(Path(extent.path).read_bytes())
        data[extent.offset + 4 * tensor.views[0].first] ^= 1
        Path(extent.path).write_bytes(data)
    elif damage == "missing":
        index = pickle.loads((iteration / ".metadata").read_bytes())
        del index.state_dict_metadata["optimizer.state.exp_avg.embedding.word_embeddings.weight"]
        (iteration / ".metadata").write_bytes(pickle.dumps(index))
    else:
        common: Any = torch.load(iteration / "common.pt", weights_only=False)
        if damage == "scale":
            common["optimizer"]["grad_scaler"]["scale"] *= 2
        for group in common["optimizer"]["optimizer"]["param_groups"] if damage == "step" else ():
            group["step"] += 1
        torch.save(common, iteration / "common.pt")
    return target


# ------------------------------------------------------------------------------------------------------------- verdicts


def load(wanted: dict[Case, Path], out: Path) -> None:
    """Have one release load its cases, each into a folder of ``out``."""
    release = next(iter(wanted)).release
    asked = [
        {
            "checkpoint": str(checkpoint), "out": str(out / str(case)), "args": [*case.training.words, *(LOCAL if case.name in EXPERTS else ())],
            "tp": case.tp, "pp": case.pp, "dp": case.dp, "ep": case.ep, "save": case.save,
            "pretrain": release in PRETRAIN and not case.training.transformer_engine,
        }
        for case, checkpoint in wanted.items()
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(REPOSITORY / "tests" / "support" / "megatron_load.py")],
        input="\n".join(map(json.dumps, asked)),
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / ".venv-megatron" / release), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def differences(case: Case, out: Path) -> list[str]:
    """What Megatron holds that the source did not, or why it holds nothing."""
    refused = [path.read_text() for path in sorted(out.glob("*.refused"))]
    kept = [(out / f"{rank}.json", out / f"{rank}.npz") for rank in range(case.tp * case.pp * case.dp)]
    if refused or not all(path.exists() for pair in kept for path in pair):
        return [f"refused: {refused[0] if refused else 'nothing was loaded'}"]
    ranks = [(json.loads(said.read_text()), np.load(arrays)) for said, arrays in kept]
    return [*of_runs(case, ranks), *of_tensors(case, ranks), *(of_saved(case, out / "saved") if case.save else ())]


def of_runs(case: Case, ranks: Sequence[Rank]) -> Iterator[str]:
    """Differences of the numbers that are no tensors."""
    source = case.training.run
    for said, arrays in ranks:
        flat = {"iteration", "consumed_train_samples"} & said["run"].keys()
        pairs = [(name, said["run"][name], source[name]) for name in flat]
        scheduler = said["run"].get("scheduler", {})
        pairs += [(name, value, source["scheduler"].get(name, value)) for name, value in scheduler.items()]
        pairs += [("grad_scaler", said["run"].get("scaler"), source.get("scaler"))]
        for name, held in said["held"].items():
            wd_mult = 0.0 if arrays[f"param/{name}"].ndim == 1 else 1.0
            [group] = [group for group in source["groups"] if group["wd_mult"] == wd_mult]
            pairs += [(f"{name} {key}", value, group[key]) for key, value in held["group"].items()]
        for name, found, wanted in pairs:
            if found != (list(wanted) if isinstance(wanted, tuple) else wanted):
                yield f"{name}: {found}, and {wanted} in the source"


def of_tensors(case: Case, ranks: Sequence[Rank]) -> Iterator[str]:
    """Differences of elements, bit by bit; each element of the optimizer's state has to be on one data parallel rank."""
    source, gated = case.training.expected, "--swiglu" in case.training.words
    parts: dict[Key, dict[int, Array]] = defaultdict(dict)
    numbers: dict[Key, int] = defaultdict(int)
    for said, arrays in ranks:
        for role, name in (place.split("/", 1) for place in arrays.files):
            key, data, shape = Key(cast("Role", role), name), arrays[f"{role}/{name}"], arrays[f"param/{name}"].shape
            start, stop = (0, data.size) if role == "param" else said["held"][name]["place"]
            part = parts[key].setdefault(said["tp"], np.full(shape, np.nan, "<f4"))
            part.reshape(-1)[start:stop] = as_float(data).reshape(-1)
            numbers[key] += stop - start
    for key, found in parts.items():
        tied = key.name == HEAD and key not in source
        wanted = source.get(Key(key.role, EMBEDDING) if tied else key)
        values = joined(key.name, [found[tp] for tp in sorted(found)], gated=gated).reshape(-1)
        if key.role != "param" and numbers[key] != sum(part.size for part in found.values()):
            yield f"{key.role} {key.name}: {numbers[key]} elements on all ranks"
        if wanted is None or values.size != wanted.size:
            yield f"{key.role} {key.name}: {values.size} elements, and {wanted is not None and wanted.size} in the source"
        elif values.tobytes() != wanted.tobytes():
            yield f"{key.role} {key.name}: {int((values.view('<u4') != wanted.reshape(-1).view('<u4')).sum())} differ"
    yield from (f"{key.role} {key.name}: not in the model" for key in source.keys() - parts.keys())


def of_saved(case: Case, folder: Path) -> Iterator[str]:
    """Differences of what Megatron saved, as our reader finds it."""
    found, source = read(folder), case.training.expected
    with Files() as files:
        for key, tensor in found.index.items():
            data = np.array(gathered(tensor).block(files, 0, tensor.numel))
            values = as_float(data.view({"bfloat16": "<u2", "float16": "<f2"}.get(tensor.dtype, "<f4")))
            if key not in source or values.tobytes() != source[key].tobytes():
                yield f"saved {key}: differs"
    yield from (f"saved {key}: not there" for key in source.keys() - found.index.keys())
    scaler = stored_scaler(found.template) if found.template else None
    if scaler != case.training.run.get("scaler"):
        yield f"saved loss scale: {scaler}"


Verdicts = dict[Case, list[str]]


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Verdicts:
    """Differences of every case that was selected; the releases load at the same time."""
    folder = tmp_path_factory.mktemp("results")
    batches: dict[str, dict[Case, Path]] = defaultdict(dict)
    for item in request.session.items:
        case = (
            item.callspec.params.get("case")
            if isinstance(item, pytest.Function) and hasattr(item, "callspec")
            else None
        )
        if isinstance(case, Case):
            batches[case.release][case] = converted(case, folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda batch: load(batch, folder / "kept"), batches.values()))
    return {case: differences(case, folder / "kept" / str(case)) for batch in batches.values() for case in batch}


@pytest.mark.parametrize("case", cases(), ids=str)
def test_megatron_holds_what_the_source_held(case: Case, verdicts: Verdicts) -> None:
    assert verdicts[case] == []


@pytest.mark.parametrize("case", saved_cases(), ids=str)
def test_what_megatron_saves_is_read(case: Case, verdicts: Verdicts) -> None:
    assert verdicts[case] == []


@pytest.mark.parametrize("case", damaged_cases(), ids=str)
def test_a_damaged_result_is_refused_or_differs(case: Case, verdicts: Verdicts) -> None:
    assert verdicts[case]
    assert all(DAMAGES[case.damage] in each for each in verdicts[case])
