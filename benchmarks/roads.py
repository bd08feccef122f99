"""What `run.py` measures on the other roads, and the methods for it that are no command of ours, each a process of its own.

    shards   data-parallel shards to Megatron: fused, or combined and converted; combine against cp and the reference
    import   Megatron to MindSpore: against cp and the reference

    roads.py cut     FOLDER RANKS OUT    cut FOLDER/ms/rank_0 into the shards of RANKS data-parallel ranks
    roads.py merge   SHARDS OUT          the reference's combine: load all shards, join them, copy each parameter, save
    roads.py import  MEGATRON MAPS OUT   the reference's convert_pt2ckpt: torch.load, slice each parameter, save

``merge`` and ``import`` are code of ours after MindSpeed-Core-MS feature-0.1 (tools/converter).  They read through our index
or torch and write with plain file calls, without mindspore: the comparison errs in their favour.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from measure import Sample, run, summary, warm

if TYPE_CHECKING:
    from ckpt2pt.core.extents import TensorRef

Words = list[str | Path]
HERE = Path(__file__)
RANKS = 4
BUCKET_NUMEL = 40_000_000
KINDS = ("", "exp_avg.", "exp_avg_sq.")


class Case(Protocol):
    """What :class:`run.Case` gives."""

    @property
    def folder(self) -> Path:
        """Where it is built."""
        ...

    def build(self) -> None:
        """Write it."""
        ...

    def convert(self, out: Path, *more: str) -> Words:
        """The command that converts it."""
        ...


def ours(*words: str | Path) -> Words:
    """A command of ours, without reading back what it wrote: cp reads nothing back either."""
    return [sys.executable, "-m", "ckpt2pt", *words, "--progress", "none", "--verify", "none"]


def combine(source: Path, out: Path) -> Words:
    """``ckpt2pt combine``."""
    places = ("--checkpoint-dir", source, "--strategy-dir", source / "opt_shard_info", "--output-dir", out)
    return ours("combine", *places)


def copied(files: list[Path], out: Path) -> Words:
    """cp of the bytes that the command writes, then fsync."""
    line = 'mkdir -p "$2" && cp "$1" "$2/$3" && sync "$2/$3" || exit 1; shift 3\n'
    words = [word for path in files for word in (path, out / path.parent.name, path.name)]
    return ["sh", "-c", line * len(files), "sh", *words]


def measure(
    methods: Mapping[str, Words], sources: list[Path], out: Path, rounds: int, say: Callable[[str], None]
) -> dict[str, dict[str, object]]:
    """Interleaved rounds, sources warm; medians of each method."""
    samples: dict[str, list[Sample]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, words in methods.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            warm(sources)
            samples[name].append(last := run(words))
            say(
                f"  {name:20} {last.wall:7.2f} s  {last.cpu:7.2f} s CPU  peak {last.rss / 2**20:8.1f} MiB  "
                f"read {last.read / 1e9:6.2f} GB, written {last.written / 1e9:6.2f} GB"
            )
    shutil.rmtree(out, ignore_errors=True)
    return {name: summary(found) for name, found in samples.items()}


def shards(work: Path, case: Case, rounds: int, say: Callable[[str], None]) -> dict[str, object]:
    """Fused conversion against combine and convert, and combine itself."""
    case.build()
    source, merged, out = work / "shards", work / "merged", work / "out"
    run([sys.executable, HERE, "cut", case.folder, str(RANKS), source])
    shutil.rmtree(case.folder / "ms")
    run(combine(source, merged))
    files = list(merged.glob("rank_*/*"))

    def convert(given: Path, ranks: int) -> Words:
        words = case.convert(out, "--dp-size", str(ranks))
        words[words.index("--ms-path") + 1] = str(given)
        return words

    text = " && ".join(shlex.join(map(str, words)) for words in (combine(source, out / "m"), convert(out / "m", RANKS)))
    methods: dict[str, Words] = {
        "fused": convert(source, RANKS),
        "combine, convert": ["sh", "-c", text],
        "cp": copied(files, out),
        "combine": combine(source, out),
        "reference": [sys.executable, HERE, "merge", source, out],
    }
    sources = [*source.glob("rank_*/*"), *files]
    return {
        "data_parallel": RANKS,
        "shard_bytes": sum(path.stat().st_size for path in source.glob("rank_*/*")),
        "merged_bytes": sum(path.stat().st_size for path in files),
        "medians": measure(methods, sources, out, rounds, say),
    }


def back(work: Path, case: Case, rounds: int, say: Callable[[str], None]) -> dict[str, object]:
    """``import`` against cp of what it writes and the reference's method."""
    case.build()
    megatron, ready, out = work / "megatron", work / "ready", work / "out"
    run(case.convert(megatron))
    shutil.rmtree(case.folder / "ms")
    run(ours("import", "--megatron-path", megatron, "--ms-path", ready))
    files = list(ready.glob("rank_*/*"))
    (iteration,) = megatron.glob("iter_*")
    methods: dict[str, Words] = {
        "cp": copied(files, out),
        "import": ours("import", "--megatron-path", megatron, "--ms-path", out),
        "reference": [sys.executable, HERE, "import", iteration, case.folder / "pt_meta", out],
    }
    sources = [*iteration.glob("mp_rank_*/*"), *files]
    return {
        "megatron_bytes": sum(path.stat().st_size for path in iteration.glob("mp_rank_*/*")),
        "mindspore_bytes": sum(path.stat().st_size for path in files),
        "medians": measure(methods, sources, out, rounds, say),
    }


# ------------------------------------------------------------------------------------------------- processes of their own


def cut(folder: Path, ranks: int, out: Path) -> None:
    """Shards of ``ranks`` data-parallel ranks, and what describes them."""
    from ckpt2pt.formats.mindspore import index_file  # noqa: PLC0415
    from synthetic import _entry  # noqa: PLC0415

    (path,) = folder.glob("ms/rank_0/*.ckpt")
    index = index_file(path)
    names = [name for name in index if f"exp_avg.{name}" in index]
    places: dict[str, object] = {}
    buckets: dict[str, list[int]] = {}
    begin = 0
    with ExitStack() as stack:
        files: list[BinaryIO] = []
        for rank in range(ranks):
            place = out / f"rank_{rank}" / path.name.replace("rank_0", f"rank_{rank}")
            place.parent.mkdir(parents=True)
            files.append(stack.enter_context(place.open("wb")))
        while names:
            chosen, numel = list[str](), 0
            while names and numel < BUCKET_NUMEL:
                chosen.append(name := names.pop(0))
                where = [0, len(buckets), begin + numel, begin + numel + index[name].numel]
                places[name] = {"range_map": where, "shape": list(index[name].shape), "dtype": "bfloat16"}
                numel += index[name].numel
            size = -(-numel // ranks) * ranks
            for kind in KINDS:
                data = b"".join(map(payload, (index[kind + name] for name in chosen))).ljust(4 * size, b"\0")
                share = len(data) // ranks
                for number, file in enumerate(files):
                    name = f"{kind}buffer_0_bucket_{len(buckets)}"
                    file.write(_entry(name, "Float32", (share // 4,), share) + data[number * share :][:share])
            buckets[str(len(buckets))] = [size, numel]
            begin += size
        for file in files:
            for name in ("epoch_num", "step_num", "num_steps"):
                file.write(_entry(name, "Int64", (), 8) + payload(index[name]))
            file.flush()
            os.fsync(file.fileno())
    info = out / "opt_shard_info" / "rank_0" / "dist_opt_shard_info_rank_0-0_0.json"
    info.parent.mkdir(parents=True)
    buffer = {"buckets": buckets, "buffer_size": begin, "bucket_num": len(buckets)}
    document = {"dp_rank_list": list(range(ranks)), "param_info": places, "buffer_info": {"0": buffer}}
    info.write_text(json.dumps(document))


def payload(ref: TensorRef) -> bytes:
    """The bytes of a tensor."""
    found = bytearray()
    for extent in ref.extents:
        with Path(extent.path).open("rb") as file:
            file.seek(extent.offset)
            found += file.read(extent.nbytes)
    return bytes(found)


def merge(source: Path, out: Path) -> None:
    import numpy as np  # noqa: PLC0415

    from ckpt2pt.formats.mindspore import index_file  # noqa: PLC0415

    (path,) = source.glob("opt_shard_info/*/*.json")
    strategy = json.loads(path.read_text())
    loaded: list[dict[str, np.ndarray]] = []
    for rank in sorted(strategy["dp_rank_list"]):
        (file,) = (source / f"rank_{rank}").iterdir()
        loaded.append({name: np.frombuffer(payload(ref), "<u1") for name, ref in index_file(file).items()})
    state: dict[str, np.ndarray] = {}
    for buffer, info in strategy["buffer_info"].items():
        whole = {kind: np.zeros(info["buffer_size"], "<f4") for kind in KINDS}
        at = 0
        for bucket in range(info["bucket_num"]):
            for kind in KINDS:
                name = f"{kind}buffer_{buffer}_bucket_{bucket}"
                data = np.concatenate([each.pop(name) for each in loaded]).view("<f4")
                whole[kind][at : at + data.size] = data
            at += data.size
        for name, param in strategy["param_info"].items():
            _, _, start, stop = param["range_map"]
            for kind in KINDS:
                state[kind + name] = whole[kind][start:stop].reshape(param["shape"]).copy()
    _save(state, out / "rank_0" / "network_dp_merged.ckpt")


def import_back(iteration: Path, maps: Path, out: Path) -> None:
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    state: dict[str, np.ndarray] = {}
    for folder in iteration.glob("mp_rank_*"):
        tree = torch.load(folder / "distrib_optim.pt", map_location="cpu")
        torch.load(folder / "model_optim_rng.pt", map_location="cpu", weights_only=False)
        places = json.loads((maps / "param_map_buffer0_dp0tp0pp0vpp0.json").read_text())
        ((_, held),) = tree[0].items()
        for name, (_, shape, start, stop, bucket) in places.items():
            for kind in ("param", "exp_avg", "exp_avg_sq"):
                values = held[kind][bucket][start:stop]
                state[f"{kind}.{name}"] = values.float().detach().cpu().numpy().reshape(shape).copy()
    _save(state, out / "rank_0" / "network.ckpt")


def _save(state: Mapping[str, object], path: Path) -> None:
    import numpy as np  # noqa: PLC0415

    from synthetic import _entry  # noqa: PLC0415

    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        for name, values in state.items():
            assert isinstance(values, np.ndarray)
            data = values.tobytes()
            file.write(_entry(name, "Float32", values.shape, len(data)) + data)
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["cut", folder, ranks, out]:
            cut(Path(folder), int(ranks), Path(out))
        case ["merge", source, out]:
            merge(Path(source), Path(out))
        case ["import", megatron, maps, out]:
            import_back(Path(megatron), Path(maps), Path(out))
        case _:
            raise SystemExit(__doc__)
