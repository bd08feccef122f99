"""Measure ckpt2pt against cp and the reference's method, side by side in one run (README.md says how)."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import experts
import exports
import layouts
import repairs
import roads
import targets
from measure import Sample, commit, cool, host, memory_limit, run, summary, today, warm

HERE = Path(__file__).parent
METHODS = (sys.executable, HERE / "methods.py")
FILES = ("distrib_optim.pt", "model_optim_rng.pt")
MIB = 1 << 20
Words = list[str | Path]


@dataclass(frozen=True, slots=True)
class Case:
    """A synthetic checkpoint."""

    folder: Path
    layers: int
    hidden: int
    vocab: int = 8192
    tp: int = 1
    pp: int = 1

    @classmethod
    def of(cls, folder: Path, nbytes: float) -> Case:
        """The model whose Megatron files take about ``nbytes``: 14 for each parameter."""
        hidden = 256 if nbytes < 5e8 else 1024 if nbytes < 5e9 else 2048
        layer = hidden * hidden * 43 // 4
        return cls(folder, max(1, round((nbytes / 14 - 2 * 8192 * hidden) / layer)), hidden)

    def build(self, *, headers_only: bool = False) -> None:
        """Write it, in a process of its own."""
        numbers = (self.layers, self.hidden, self.vocab, self.tp, self.pp, int(headers_only))
        run([*METHODS, "build", self.folder, *map(str, numbers)])

    @property
    def sources(self) -> list[Path]:
        """Everything that a conversion reads."""
        return [*self.folder.glob("ms/*/*"), *self.folder.glob("pt_meta/*")]

    def command(self, name: str, out: Path, *more: str) -> Words:
        """``ckpt2pt convert`` or ``plan``."""
        flags = {
            "--num-layers": self.layers, "--tp-size": self.tp, "--pp-size": self.pp, "--ms-path": self.folder / "ms",
            "--param-map-path": self.folder / "pt_meta", "--megatron-path": out,
        }  # fmt: skip
        words: Words = [sys.executable, "-m", "ckpt2pt", name]
        for flag, value in flags.items():
            words += [flag, str(value)]
        return [*words, *more]

    def convert(self, out: Path, *more: str) -> Words:
        """Full mode, nothing read back: cp reads nothing back either."""
        return self.command("convert", out, "--verify", "none", "--progress", "none", *more)


def copy(pairs: Sequence[tuple[Path, Path]]) -> Words:
    """Coreutils' cp, then fsync (``sync FILE``)."""
    lines = "".join('cp "$1" "$2" && sync "$2" || exit 1; shift 2\n' for _ in pairs)
    return ["sh", "-c", lines, "sh", *(path for pair in pairs for path in pair)]


def dd(pairs: Sequence[tuple[Path, Path]]) -> Words:
    """The same through user space, in blocks of the size that ckpt2pt uses."""
    line = 'dd if="$1" of="$2" bs=512K conv=fsync status=none || exit 1; shift 2\n'
    return ["sh", "-c", line * len(pairs), "sh", *(path for pair in pairs for path in pair)]


def size_of(folder: Path) -> int:
    """Bytes of the checkpoint files below a folder."""
    return sum(path.stat().st_size for end in ("pt", "distcp") for path in folder.rglob(f"*.{end}"))


class Contest:
    """The methods on one checkpoint, A B C A B C …"""

    def __init__(self, work: Path, case: Case) -> None:
        self.case, self.out = case, work / "out"
        made = work / "made"
        run(case.convert(made))
        # What cp copies: our own output, so that bytes are equal to the last one.
        self.ready = work / "ready"
        self.ready.mkdir()
        for path in made.rglob("*.pt"):
            path.replace(self.ready / path.name)
        shutil.rmtree(made)
        self.nbytes = {name: (self.ready / name).stat().st_size for name in FILES}
        pairs = [(self.ready / name, self.out / name) for name in FILES]
        method: Words = [case.folder, str(case.layers), self.out]
        self.methods: dict[str, tuple[Words, list[Path]]] = {
            "cp optim": (copy(pairs[:1]), [self.ready / FILES[0]]),
            "ckpt2pt optim": ([*METHODS, "optim", *method], case.sources),
            "cp both": (copy(pairs), [self.ready / name for name in FILES]),
            "dd both": (dd(pairs), [self.ready / name for name in FILES]),
            "ckpt2pt both": (case.convert(self.out), case.sources),
            "ckpt2pt digest": (case.command("convert", self.out, "--progress", "none"), case.sources),
            "ckpt2pt full": (case.command("convert", self.out, "--progress", "none", "--verify", "full"), case.sources),
            "prealloc": ([*METHODS, "prealloc", *method], case.sources),
            "reference": ([*METHODS, "grow", *method], case.sources),
        }

    def once(self, name: str, *, cold: bool) -> Sample:
        """One method on a clean field."""
        command, sources = self.methods[name]
        shutil.rmtree(self.out, ignore_errors=True)
        if command[0] == "sh":
            self.out.mkdir()
        left = None
        if cold:
            left = cool(sources)
        else:
            os.sync()
            warm(sources)
        sample = run(command)
        wanted = self.nbytes[FILES[0]] if name.endswith("optim") else sum(self.nbytes.values())
        if abs(size_of(self.out) - wanted) > wanted // 1000:
            raise SystemExit(f"{name} wrote {size_of(self.out)} bytes, not {wanted}")
        shutil.rmtree(self.out)
        return replace(sample, resident_before=left)

    def rounds(self, count: int, names: Sequence[str], *, cold: bool) -> dict[str, dict[str, object]]:
        """Interleaved rounds; medians of each method."""
        samples: dict[str, list[Sample]] = {name: [] for name in names}
        for number in range(count):
            for name in names:
                samples[name].append(self.once(name, cold=cold))
                last = samples[name][-1]
                say(f"  {'cold' if cold else 'warm'} {number + 1}: {name:14} {last.wall:8.2f} s {last.cpu:8.2f} s CPU")
        return {name: summary(found) for name, found in samples.items()}


def say(line: str) -> None:
    print(line, flush=True)


def number(found: Mapping[str, object], key: str) -> float:
    value = found[key]
    assert isinstance(value, int | float)
    return value


def ratios(medians: Mapping[str, Mapping[str, object]]) -> dict[str, float]:
    """Medians over those of cp of the same bytes; how many times the reference takes what ckpt2pt takes."""
    found: dict[str, float] = {}
    for name in medians:
        if name.startswith("cp"):
            continue
        base = "cp optim" if name.endswith("optim") else "cp both"
        for key in ("wall", "cpu"):
            found[f"{name} / {base}, {key}"] = round(number(medians[name], key) / number(medians[base], key), 2)
    if "reference" in medians:
        for key in ("wall", "cpu"):
            ratio = number(medians["reference"], key) / number(medians["ckpt2pt both"], key)
            found[f"reference / ckpt2pt both, {key}"] = round(ratio, 1)
    return found


def table(title: str, medians: Mapping[str, Mapping[str, object]]) -> None:
    say(f"\n{title:20} {'wall s':>9} {'CPU s':>9} {'peak MiB':>9} {'wall/cp':>8} {'CPU/cp':>8}")
    for name, found in medians.items():
        base = medians["cp optim" if name.endswith("optim") else "cp both"]
        times = [number(found, key) / number(base, key) for key in ("wall", "cpu")]
        say(
            f"{name:20} {number(found, 'wall'):9.2f} {number(found, 'cpu'):9.2f} {number(found, 'rss') / MIB:9.1f} "
            f"{times[0]:8.2f} {times[1]:8.2f}"
        )


def compare(work: Path, options: argparse.Namespace) -> dict[str, object]:
    """Time, warm and cold."""
    case = Case.of(work / "case", options.size_gb * 1e9)
    case.build()
    contest = Contest(work, case)
    result: dict[str, object] = {
        "layers": case.layers,
        "hidden": case.hidden,
        "source_bytes": sum(path.stat().st_size for path in case.sources),
        "output_bytes": contest.nbytes,
    }
    for state in ("warm", "cold"):
        slow = ("prealloc", "reference") if options.reference not in (state, "both") else ()
        names = [name for name in contest.methods if name not in slow]
        medians = contest.rounds(options.rounds, names, cold=state == "cold")
        table(state, medians)
        result[state] = {"medians": medians, "ratios": ratios(medians)}
    shutil.rmtree(contest.ready)
    shutil.rmtree(case.folder)
    return result


def measured(case: Case, out: Path, *more: str, inside: Path | None = None) -> dict[str, object]:
    """One conversion, for its memory."""
    sample = run(case.convert(out, *more), inside=inside)
    nbytes = size_of(out)
    found: dict[str, object] = {"output_bytes": nbytes, "wall": round(sample.wall, 2), "rss": sample.rss}
    shutil.rmtree(out)
    say(f"  {nbytes / 1e9:6.2f} GB  {sample.wall:7.2f} s  peak {sample.rss / MIB:5.1f} MiB")
    return found


def memory(work: Path, options: argparse.Namespace) -> dict[str, object]:
    """Peak memory by size, by workers and inside a cgroup.  Sources are sparse: real sizes, no room."""
    say("\npeak memory by size of the output")
    sizes: list[dict[str, object]] = []
    limited: object = "no memory cgroup could be made here"
    for nbytes in (1e8, 1e9, options.memory_gb * 1e9):
        case = Case.of(work / "sparse", nbytes)
        case.build(headers_only=True)
        sizes.append(measured(case, work / "out"))
        sizes += [
            {"target_format": name} | measured(case, work / "out", "--target-format", name) for name in targets.FORMATS
        ]
        if nbytes == options.memory_gb * 1e9:
            say("the largest inside a memory cgroup of 128 MiB, which holds the page cache as well")
            with memory_limit(128 * MIB) as group:
                if group:
                    limited = {"limit": 128 * MIB} | measured(case, work / "out", inside=group)
        shutil.rmtree(case.folder)
    say("one process for each of 2 and 4 ranks, the largest of any process")
    crews: list[dict[str, object]] = []
    for workers in (2, 4):
        case = replace(Case.of(work / "sparse", 1e9), tp=2, pp=2)
        case = replace(case, layers=case.layers + case.layers % 2)
        case.build(headers_only=True)
        crews.append({"workers": workers} | measured(case, work / "out", "--process-limit", str(workers)))
        shutil.rmtree(case.folder)
    imports = run([*METHODS, "import"])
    say(f"importing the engine alone: {imports.wall:.2f} s, {imports.rss / MIB:.1f} MiB")
    return {
        "sizes": sizes,
        "cgroup": limited,
        "workers": crews,
        "imports": {"wall": round(imports.wall, 3), "rss": imports.rss},
    }


def names(work: Path, options: argparse.Namespace) -> dict[str, object]:
    """`ckpt2pt plan` on a checkpoint of very many small tensors."""
    layers = -(-options.tensors // 18)
    case = Case(work / "small", layers, 64, vocab=64)
    case.build(headers_only=True)
    samples = [run(case.command("plan", work / "out", "--output", "json")) for _ in range(options.rounds)]
    shutil.rmtree(case.folder)
    found = summary(samples) | {"tensors": layers * 18 + 9}
    say(f"\n{layers * 18 + 9} tensors indexed and planned: {found['wall']} s")
    return found


def shards(work: Path, options: argparse.Namespace) -> dict[str, object]:
    """Shards, fused and merged."""
    return roads.shards(work, Case.of(work / "case", options.size_gb * 1e9), options.rounds, say)


def back(work: Path, options: argparse.Namespace) -> dict[str, object]:
    """The road back."""
    return roads.back(work, Case.of(work / "case", options.size_gb * 1e9), options.rounds, say)


def layout(work: Path, options: argparse.Namespace) -> dict[str, object]:
    """Into another parallel layout."""
    return layouts.layout(work, Case.of(work / "case", options.size_gb * 1e9), options.rounds, say)


def formats(work: Path, options: argparse.Namespace) -> dict[str, object]:
    """Into the formats of today's Megatron-LM."""
    return targets.targets(work, Case.of(work / "case", options.size_gb * 1e9), options.rounds, say)


def repair(work: Path, options: argparse.Namespace) -> dict[str, object]:
    """Files of MSAdapter into files of torch."""
    return repairs.repairs(work, options.size_gb * 1e9, options.rounds, say)


def export(work: Path, options: argparse.Namespace) -> dict[str, object]:
    """Weights for Hugging Face transformers."""
    return exports.exports(work, Case.of(work / "case", options.size_gb * 1e9), options.rounds, say)


def checksums(work: Path, options: argparse.Namespace) -> dict[str, object]:
    """What the source's own checksum costs: the same conversion of files with and without one."""
    case, out = Case.of(work / "case", options.size_gb * 1e9), work / "out"
    case.build()
    run([*METHODS, "seal", case.folder])
    variants = {"ckpt": "ms", "ckpt, crc_num": "ms-crc", "safetensors": "safe", "safetensors, crc_num": "safe-crc"}
    methods: dict[str, Words] = {}
    for name, folder in variants.items():
        words = case.convert(out)
        words[words.index("--ms-path") + 1] = str(case.folder / folder)
        methods[name] = words
    say("\nthe source's own checksum")
    sources = [path for folder in variants.values() for path in case.folder.glob(f"{folder}/*/*")]
    medians = roads.measure(methods, sources, out, options.rounds, say)
    found = {
        f"{kind}, {key}": round(number(medians[f"{kind}, crc_num"], key) / number(medians[kind], key), 3)
        for kind in ("ckpt", "safetensors")
        for key in ("wall", "cpu")
    }
    nbytes = sum(path.stat().st_size for path in case.sources)
    shutil.rmtree(case.folder)
    return {"source_bytes": nbytes, "medians": medians, "with / without": found}


def mixture(work: Path, _: argparse.Namespace) -> dict[str, object]:
    """Plans of a mixture of experts of 671 billion parameters."""
    say("\nplans of mixtures of experts")
    return experts.experts(work, say)


THEMES: dict[str, Callable[[Path, argparse.Namespace], dict[str, object]]] = {
    "convert": compare,
    "memory": memory,
    "names": names,
    "shards": shards,
    "import": back,
    "layout": layout,
    "targets": formats,
    "checksums": checksums,
    "experts": mixture,
    "repair": repair,
    "export": export,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("themes", nargs="*", choices=[*THEMES, []], help="default: all")
    parser.add_argument("--size-gb", type=float, default=2.2, help="output of the timed conversions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-gb", type=float, default=10, help="output of the largest conversion for memory")
    parser.add_argument("--tensors", type=int, default=100_000)
    parser.add_argument(
        "--reference", choices=("warm", "both", "none"), default="warm", help="when to run the slow methods"
    )
    parser.add_argument("--work", type=Path, help="folder on the disk to measure; default that for temporary files")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    facts = host()
    options.results.mkdir(exist_ok=True)
    hardware = re.sub(r"[^a-z0-9]+", "-", f"{facts['cpu']} {facts['cpus']}cpu".lower()).strip("-")
    for theme in options.themes or THEMES:
        with tempfile.TemporaryDirectory(prefix="ckpt2pt-bench-", dir=options.work) as work:
            found = THEMES[theme](Path(work), options)
        document = {
            "theme": theme,
            "date": today(),
            "commit": commit(),
            "host": facts,
            "rounds": options.rounds,
            **found,
        }
        path = options.results / f"{theme}_{hardware}_{today()}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        say(f"written: benchmarks/results/{path.name}")


if __name__ == "__main__":
    main()
