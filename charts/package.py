"""The chart as it is published: a copy that names its registry, both images by digest, its source and what has changed.

    python3 charts/package.py --registry registry.example.com/team --operator sha256:... --worker sha256:... --source URL
    helm package dist/ckpt2pt

The chart in the repository names none of these, since they are true only where it is published.  Standard library only.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

CHART = Path(__file__).parent / "ckpt2pt"
CHANGELOG = CHART.parents[1] / "CHANGELOG.md"
KINDS = ("added", "changed", "deprecated", "removed", "fixed", "security")


def changes(text, version):
    """Kind and description of each change of this version, or of what is not released yet."""
    parts = re.split(r"(?m)^## \[(.+?)\].*\n", text)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    kind = ""
    for entry in re.findall(
        r"(?m)^### (\w+)|^- ((?:.+\n)(?: +.+\n)*)", sections.get(version) or sections["Unreleased"]
    ):
        kind = entry[0].lower() or kind
        if entry[1] and kind in KINDS:
            yield kind, re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", " ".join(entry[1].split()))


def values(text, registry, operator, worker):
    """values.yaml with the registry of both images, and the digest of each in its place."""
    text = text.replace('registry: ""', f"registry: {registry}", 1)
    for digest in (operator, worker):
        text = text.replace('digest: ""', f"digest: {digest}", 1)
    return text


def metadata(text, images, source):
    """Chart.yaml, whose last block are the annotations, with what is known now."""
    version = re.search(r"(?m)^version: (.+)$", text)[1]
    lines = [f"home: {source}", f"sources: [{source}]", text.rstrip(), "  artifacthub.io/images: |"]
    for name, image in images.items():
        lines += [f"    - name: {name}", f"      image: {image}", "      platforms: [linux/amd64, linux/arm64]"]
    lines.append("  artifacthub.io/changes: |")
    for kind, description in changes(CHANGELOG.read_text(), version):
        lines += [f"    - kind: {kind}", f"      description: {json.dumps(description, ensure_ascii=False)}"]
    return "\n".join(lines) + "\n"


def main():
    """Write the copy and print its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", required=True, help="registry of both images, with its path")
    parser.add_argument("--operator", required=True, metavar="DIGEST", help="of the operator's image")
    parser.add_argument("--worker", required=True, metavar="DIGEST", help="of the workers' image")
    parser.add_argument(
        "--source", required=True, metavar="URL", help="where the source that it was built from can be seen"
    )
    parser.add_argument("--to", type=Path, default=Path("dist"), help="folder that the copy is made in (default: dist)")
    given = parser.parse_args()
    for digest in (given.operator, given.worker):
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            parser.error(f"{digest!r} is no digest of an image: sha256: and 64 hexadecimal digits")
    copy = given.to / CHART.name
    if copy.exists():
        shutil.rmtree(copy)
    shutil.copytree(CHART, copy)
    images = {
        "operator": f"{given.registry}/ckpt2pt-operator@{given.operator}",
        "worker": f"{given.registry}/ckpt2pt@{given.worker}",
    }
    (copy / "values.yaml").write_text(
        values((copy / "values.yaml").read_text(), given.registry, given.operator, given.worker)
    )
    (copy / "Chart.yaml").write_text(metadata((copy / "Chart.yaml").read_text(), images, given.source))
    print(copy)


if __name__ == "__main__":
    main()
