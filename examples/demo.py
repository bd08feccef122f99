"""The main job from beginning to end: build a checkpoint, convert it, verify every element, show where it lies.

    benchmarks/synthetic.py --> demo-output/{ms,pt_meta} --ckpt2pt run--> demo-output/megatron_pt --ckpt2pt verify--> proved

The checkpoint has the real formats (pp=4, tp=2, weights and optimizer) and made-up values.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARK = ".made-by-the-demo"
TENSOR, PIPELINE = 2, 4
READERS = {"own": "ckpt2pt's own reader, which shares no code with the writer,", "torch": "torch"}
SIZES = {"hidden": 768, "heads": 12, "groups": 6, "ffn": 2048, "vocab": 8192}

DOCUMENT = """\
apiVersion: ckpt2pt.dev/v1alpha1
kind: CheckpointConversion
metadata: {{name: demo}}
spec:
  mode: Full
  model: {{numLayers: {layers}}}
  parallelism: {{tensor: {tensor}, pipeline: {pipeline}}}
  source: {{volume: {{persistentVolumeClaim: {{claimName: training}}}}, path: ms}}
  metadata: {{path: pt_meta}}
  target: {{path: megatron_pt}}
  verify: Digest
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "demo-output", help="made anew; an earlier demo is removed"
    )
    parser.add_argument("--size-gb", type=float, default=1.0, help="least size of the MindSpore checkpoint")
    has_torch = importlib.util.find_spec("torch") is not None
    parser.add_argument(
        "--reader",
        choices=("own", "torch"),
        default="torch" if has_torch else "own",
        help="what reads the result to verify it: ckpt2pt's own reader, or torch (the default where it is installed)",
    )
    options = parser.parse_args()
    if options.reader == "torch" and not has_torch:
        print("torch is not installed: make demo TORCH=1 installs it, and make demo does without it.")
        return 1
    folder: Path = options.folder.absolute()
    if not prepare(folder, options.size_gb):
        return 1

    layers = build(folder, options.size_gb)
    document = folder / "conversion.yaml"
    document.write_text(DOCUMENT.format(layers=layers, tensor=TENSOR, pipeline=PIPELINE))
    flags = f"--num-layers {layers} --tp-size {TENSOR} --pp-size {PIPELINE}".split()
    paths = {
        "--ms-path": folder / "ms",
        "--param-map-path": folder / "pt_meta",
        "--megatron-path": folder / "megatron_pt",
    }
    steps = (
        ("2. Convert it", ["run", "-f", str(document), "--volume", f"training={folder}"]),
        (
            f"3. Verify it: {READERS[options.reader]} reads the result, and every element is compared with its source",
            ["verify", "--reader", options.reader, *flags, *(str(word) for pair in paths.items() for word in pair)],
        ),
    )
    for title, words in steps:
        print(f"\n{title}\n   ckpt2pt {' '.join(words)}\n", flush=True)
        began = time.monotonic()
        code = subprocess.run([sys.executable, "-m", "ckpt2pt", *words], check=False).returncode
        if code:
            print(f"\nckpt2pt ended with exit code {code}; the files are in {folder}")
            return code
        print(f"   {time.monotonic() - began:.1f} s")
    show(folder)
    return 0


def prepare(folder: Path, gigabytes: float) -> bool:
    """An empty folder with room enough; only what an earlier demo made is removed."""
    if folder.exists():
        if any(folder.iterdir()) and not (folder / MARK).exists():
            print(f"{folder} holds files that are not the demo's; give another with --folder.")
            return False
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
    needed, free = 2.6e9 * gigabytes, shutil.disk_usage(folder).free
    if free < needed:
        print(f"{folder} has {free / 1e9:.1f} GB free, the demo needs {needed / 1e9:.1f}; give another with --folder.")
        return False
    return True


def build(folder: Path, gigabytes: float) -> int:
    """Write the checkpoint and its pt_meta; the number of layers that makes it large enough."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import synthetic  # noqa: PLC0415 - beside the package, not in it
    from ckpt2pt.core.topology import Topology  # noqa: PLC0415

    layers = PIPELINE
    while checkpoint_bytes(layers) < gigabytes * 1e9:
        layers += PIPELINE
    print(
        f"1. Build a MindSpore checkpoint: {layers} layers, tp={TENSOR}, pp={PIPELINE}, weights and optimizer",
        flush=True,
    )
    began = time.monotonic()
    synthetic.build(
        folder, synthetic.Model(topology=Topology(num_layers=layers, tensor=TENSOR, pipeline=PIPELINE), **SIZES)
    )
    print(f"   {size_of(folder / 'ms') / 1e9:.2f} GB in {folder / 'ms'}, {time.monotonic() - began:.1f} s")
    return layers


def checkpoint_bytes(layers: int) -> int:
    """Three float32 numbers for each parameter."""
    hidden, ffn = SIZES["hidden"], SIZES["ffn"]
    heads = SIZES["heads"] + 2 * SIZES["groups"]
    layer = hidden * (hidden // SIZES["heads"] * heads + hidden + 3 * ffn)
    return 12 * (layers * layer + 2 * SIZES["vocab"] * hidden)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def show(folder: Path) -> None:
    result = folder / "megatron_pt"
    print(f"\nThe MindSpore checkpoint   {folder / 'ms'}")
    print(f"The conversion             {folder / 'conversion.yaml'}")
    print(f"The Megatron checkpoint    {result}  ({size_of(result) / 1e9:.2f} GB)")
    for path in sorted(path for path in result.rglob("*") if path.is_file() and ".ckpt2pt" not in path.parts):
        print(f"  {path.stat().st_size:>13,}  {path.relative_to(result)}")
    command = Path(sys.executable).with_name("ckpt2pt")
    print(f"\nLook inside: {command} inspect {result}\nRemove it:   rm -rf {folder}")


if __name__ == "__main__":
    sys.exit(main())
