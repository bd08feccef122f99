"""The rules of the house, executable.  A rule that fails says what to do."""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from ckpt2pt import __version__, errors
from ckpt2pt.cli.commands import build_parser
from goldens import REPOSITORY

MODULES = sorted(path for folder in ("converter", "operator") for path in (REPOSITORY / folder).rglob("*.py"))
COMMANDS = REPOSITORY / "converter" / "ckpt2pt" / "cli" / "commands.py"
MAX_IN_A_ROOM, MAX_LINES, MAX_FUNCTION_LINES, MAX_BYTES = 20, 450, 60, 500_000

WITHOUT_MIRROR: frozenset[str] = frozenset()
"""Modules that have no test of their own yet, as ``converter/ckpt2pt/run/pool.py``.  A debt: it may only shrink."""


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


each_module = pytest.mark.parametrize("module", MODULES, ids=name_of)


@cache
def tree_of(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"), filename=str(module))


@cache
def pyproject() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


@cache
def project_files() -> tuple[Path, ...]:
    """Every file that is, or would be, committed."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    )
    found = (REPOSITORY / name for name in listing.stdout.decode().split("\0") if name)
    return tuple(path for path in found if path.is_file())


def text_files() -> Iterator[tuple[Path, str]]:
    for path in project_files():
        data = path.read_bytes()
        if b"\0" not in data:
            yield path, data.decode("utf-8")


# ------------------------------------------------------------------------------------------------------------- layout


def test_folders_that_are_no_packages_have_no_init() -> None:
    """operator/__init__.py replaces the standard library's module (docs/adr/0001)."""
    roots = [REPOSITORY / "converter" / "__init__.py", REPOSITORY / "operator" / "__init__.py"]
    wrong = [name_of(path) for path in (*roots, *(REPOSITORY / "tests").rglob("__init__.py")) if path.exists()]
    assert not wrong, f"remove {wrong}"


@pytest.mark.parametrize("room", sorted({path.parent for path in MODULES}), ids=name_of)
def test_a_room_holds_no_more_than_can_be_seen_at_a_glance(room: Path) -> None:
    modules = [path for path in MODULES if path.parent == room]
    assert len(modules) <= MAX_IN_A_ROOM, (
        f"{len(modules)} modules: find those that belong together and give them a room"
    )


@each_module
def test_module_is_short_enough_to_be_read_in_one_go(module: Path) -> None:
    lines = module.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES, f"{lines} lines: split it along a seam that has a name"


@each_module
def test_functions_fit_on_a_screen(module: Path) -> None:
    functions = (node for node in ast.walk(tree_of(module)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    long = {f.name: n for f in functions if (n := (f.end_lineno or 0) - f.lineno + 1) > MAX_FUNCTION_LINES}
    assert not long, f"split {long}"


@each_module
def test_module_says_what_it_is_for(module: Path) -> None:
    docstring = ast.get_docstring(tree_of(module)) or ""
    assert len(docstring.split()) >= 4, "begin with a docstring that says what the module is for"


def mirror_of(module: Path) -> Path:
    """``converter/ckpt2pt/core/buckets.py`` -> ``tests/converter/core/test_buckets.py``."""
    root, _, *rooms = module.relative_to(REPOSITORY).parts
    return REPOSITORY.joinpath("tests", root, *rooms[:-1], f"test_{module.name}")


@pytest.mark.parametrize("module", [path for path in MODULES if not path.stem.startswith("__")], ids=name_of)
def test_module_has_its_mirror_among_the_tests(module: Path) -> None:
    mirror = mirror_of(module)
    # A large subject may have several files: test_pickles.py, test_pickles_abuse.py.
    there = any(mirror.parent.glob(f"{mirror.stem}*.py"))
    if name_of(module) in WITHOUT_MIRROR:
        assert not there, f"take {name_of(module)} out of WITHOUT_MIRROR"
    else:
        assert there, f"write {name_of(mirror)}"


# --------------------------------------------------------------------------------------------------------------- code


@each_module
def test_no_global_statement(module: Path) -> None:
    lines = [node.lineno for node in ast.walk(tree_of(module)) if isinstance(node, ast.Global)]
    assert not lines, f"lines {lines}: pass the value, or make it an attribute"


@pytest.mark.parametrize("module", [path for path in MODULES if path != COMMANDS], ids=name_of)
def test_only_the_command_line_prints(module: Path) -> None:
    calls = (node for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call))
    lines = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not lines, f"lines {lines}: return it, log it, or raise"


def is_broad(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or (isinstance(kind, ast.Name) and kind.id.endswith("Exception")) for kind in kinds)


@each_module
def test_broad_except_raises_again(module: Path) -> None:
    handlers = (node for node in ast.walk(tree_of(module)) if isinstance(node, ast.ExceptHandler))
    silent = [h for h in handlers if is_broad(h) and not any(isinstance(n, ast.Raise) for n in ast.walk(h))]
    if module == COMMANDS:  # at the edge a bug becomes an exit code, once, and its traceback is shown
        silent = [h for h in silent if "traceback.print_exc()" not in ast.unparse(h)]
    assert not silent, f"lines {[h.lineno for h in silent]}: name the exceptions, or raise again"


@pytest.mark.parametrize(
    ("code", "broad"),
    [
        pytest.param("except: ...", True, id="bare"),
        pytest.param("except Exception: ...", True, id="exception"),
        pytest.param("except (OSError, BaseException): ...", True, id="hidden-in-a-tuple"),
        pytest.param("except (OSError, ValueError): ...", False, id="named"),
    ],
)
def test_the_rule_on_broad_excepts_sees_them(code: str, broad: bool) -> None:
    handler = next(node for node in ast.walk(ast.parse(f"try: ...\n{code}")) if isinstance(node, ast.ExceptHandler))
    assert is_broad(handler) is broad


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = {"numpy", "torch", "mindspore", "yaml", "isal", "rich", "jsonschema", "json", "multiprocessing"}
    code = "import sys, ckpt2pt; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert not heavy & set(loaded.split())


# -------------------------------------------------------------------------------------------------------------- errors


def all_errors(base: type[errors.Ckpt2ptError] = errors.Ckpt2ptError) -> list[type[errors.Ckpt2ptError]]:
    return [kind for child in base.__subclasses__() for kind in (child, *all_errors(child))]


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_every_error_is_in_one_module_and_has_an_exit_code(kind: type[errors.Ckpt2ptError]) -> None:
    assert kind.__module__ == errors.__name__
    assert kind.exit_code in errors.EXIT_CODES
    assert kind.exit_code not in {0, errors.Ckpt2ptError.exit_code}, "70 is for bugs, and a bug is no error of ours"


def test_every_exit_code_but_success_has_one_fate_in_a_job() -> None:
    fates = [errors.FAILS_JOB, errors.FAILS_STAGE, errors.RETRIED]
    assert sorted(code for fate in fates for code in fate) == sorted(set(errors.EXIT_CODES) - {0})


def test_readme_lists_the_exit_codes_of_the_code() -> None:
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|([^|]*)\|$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    fates = {0: ""}
    for codes, fate in (
        (errors.FAILS_JOB, "fails"),
        (errors.FAILS_STAGE, "fails the stage"),
        (errors.RETRIED, "tries again"),
    ):
        fates |= dict.fromkeys(codes, fate)
    assert {int(code): fate.strip() for code, _, fate in rows} == fates


# -------------------------------------------------------------------------------------------------- versions and locks


def test_one_version_everywhere() -> None:
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)
    assert newest, "CHANGELOG.md has no version"
    assert newest.group(1) == __version__ == pyproject()["project"]["version"]


LOCKS = sorted((REPOSITORY / "requirements").glob("*.txt"))


def locked(lock: Path) -> dict[str, str]:
    """Distribution -> the rest of its entry, with every continued line."""
    entries = re.sub(r"#.*", "", lock.read_text()).replace("\\\n", " ").splitlines()
    return {line.split("==")[0].strip().lower(): line for line in entries if line.strip()}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_lock_pins_and_hashes_everything_and_names_no_host(lock: Path) -> None:
    assert not re.search(r"://|^\s*--?(index|extra|find|f |i )", lock.read_text(), re.MULTILINE), "make lock"
    for entry in locked(lock).values():
        assert "==" in entry, entry
        assert "--hash=sha256:" in entry, entry


# What installs the rest, and what the project does not depend on: judges.
JUDGES = ("megatron-", "transformers-")
OTHERS = {"bootstrap.txt", "mindformers.txt", *(path.name for path in LOCKS if path.name.startswith(JUDGES))}


@pytest.mark.parametrize("lock", [path for path in LOCKS if path.name not in OTHERS], ids=lambda path: path.name)
def test_lock_knows_the_dependencies_of_the_project(lock: Path) -> None:
    project, groups = pyproject()["project"], pyproject()["dependency-groups"]
    wanted = list(project["dependencies"])
    wanted += project["optional-dependencies"].get(lock.stem, [])
    if lock.stem in {"test", "dev"}:
        wanted += groups["test"] + groups["check"] + groups["build"]
    names = {re.split(r"[\[<>=;~ ]", requirement)[0].lower() for requirement in wanted}
    assert names <= set(locked(lock)), "make lock"


# --------------------------------------------------------------------------------------------------------------- files


def test_no_file_holds_a_machine_path_or_the_host_of_a_registry() -> None:
    # Put together here, so that this file does not hold them.
    machine = [f"{REPOSITORY}/", *(f"/{top}/" for top in ("work", "root"))]
    hosts = [".".join(name) for name in (("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"), ("crates", "io"))]
    spelled = [rf"(?<![\w.$}}]){re.escape(path)}" for path in machine] + [re.escape(host) for host in hosts]
    pattern = re.compile("|".join(spelled))
    found = [
        f"{name_of(path)}:{number}"
        for path, text in text_files()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"take the path or the host out of {found}"


def test_no_text_names_an_entry_of_a_package_index_that_does_not_exist() -> None:
    # The name is free for anybody to take.  A checkout or a file of ours is installed instead.
    pattern = re.compile(
        r"(?:pip install|pipx install|uv tool install|pipx run|uvx)[^\n]*?[ '\"`]ckpt2pt(?![-/\w.])(?:\[\w+\])?"
    )
    here = Path(__file__).name
    found = [
        f"{name_of(path)}: {line.strip()}"
        for path, text in text_files()
        if path.suffix in {".md", ".py", ".txt", ".yaml", ".toml"} and path.name != here
        for line in text.splitlines()
        if pattern.search(line)
    ]
    assert not found, "name a checkout ('.[extra]') instead"


def test_large_files_are_golden_data() -> None:
    large = [name_of(path) for path in project_files() if path.stat().st_size > MAX_BYTES]
    assert not [name for name in large if not name.startswith("tests/golden/")]


def test_text_files_end_with_a_line_feed_and_have_no_carriage_return() -> None:
    wrong = [name_of(path) for path, text in text_files() if text and (not text.endswith("\n") or "\r" in text)]
    assert not [name for name in wrong if not name.startswith("tests/golden/")]


def test_yaml_files_parse() -> None:
    for path in project_files():
        if path.suffix in {".yaml", ".yml"} and "templates" not in path.parts:
            list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def test_links_between_documents_lead_somewhere() -> None:
    documents = [path for path in project_files() if path.suffix == ".md"]
    links = [(path, link) for path in documents for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())]
    assert links
    dead = [f"{name_of(path)} -> {link}" for path, link in links if not (path.parent / link).exists()]
    assert not dead


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


def test_the_door_lists_every_target() -> None:
    listed = subprocess.run(
        ["make", "--no-print-directory"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert {line.split()[1] for line in listed.stdout.splitlines()} == make_targets()


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", ".ci/run", ".pre-commit-config.yaml"])
def test_targets_that_are_named_exist(path: str) -> None:
    named = set(re.findall(r"(?:`|^|entry: )make ([a-z0-9-]+)", (REPOSITORY / path).read_text(), re.MULTILINE))
    assert named
    assert named <= make_targets()


def test_continuous_integration_goes_through_the_door() -> None:
    script = REPOSITORY / ".ci" / "run"
    commands = [line for line in script.read_text().splitlines() if line.startswith("make ")]
    assert commands == [
        "make check",
        "make test",
        "make test-mindspore",
        "make test-megatron",
        "make test-transformers",
        "make e2e",
    ]
    assert script.stat().st_mode & 0o111


# ---------------------------------------------------------------------------------------------------- names of options

EDGES = ("io/flags",)
"""Modules that read a command line, beside the rooms of :data:`EDGE_ROOMS` and what writes a worker's."""
EDGE_ROOMS = ("cli", "kube", "hooks", "show")
OF_OTHERS = frozenset(
    {
        "ckpt-format", "dist-ckpt-optim-fully-reshardable", "no-load-optim", "no-load-rng", "overlap-grad-reduce", "override-opt", "use-dist-ckpt",
        "use-distributed-optimizer",  # Megatron-LM
        "vfs-cache-mode",  # rclone
        "termination-log",  # what a Job adds to the command of a worker, which is looked for in bare words
    }
)  # fmt: skip
"""Flags of other programs that texts tell to use."""
COMMAND_LINE = re.compile(r"ckpt2pt [a-z][a-z-]+(?: (?!--)[^\s;,]+| --[a-z-]+| \{[^}]*\})*")
"""A whole command line of ours, which is the same whatever command was called."""
SPELLED = re.compile(r"(?<![\w-])--([a-z][a-z-]*)|(?<![\w.])spec\.[a-z][\w.]*")


def spelled_in(code: str) -> list[str]:
    """Flags and spec paths in the texts of a module."""
    tree = ast.parse(code)
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
            return
        if isinstance(node, ast.JoinedStr):
            texts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            look("".join(map(str, texts)))
            for part in node.values:
                if isinstance(part, ast.FormattedValue):
                    visit(part.value)
            return
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            look(node.value)
        for child in ast.iter_child_nodes(node):
            visit(child)

    def look(text: str) -> None:
        rest = COMMAND_LINE.sub("", text)
        found.extend(match[0] for match in SPELLED.finditer(rest) if match[1] not in OF_OTHERS)

    visit(tree)
    return found


INNER = [
    module
    for module in MODULES
    if (name := name_of(module).removeprefix("converter/ckpt2pt/")) != name_of(module)
    and name.removesuffix(".py") not in EDGES
    and name.partition("/")[0] not in EDGE_ROOMS
]


@pytest.mark.parametrize("module", INNER, ids=name_of)
def test_only_the_edges_spell_flags_and_fields(module: Path) -> None:
    found = spelled_in(module.read_text(encoding="utf-8"))
    assert not found, f"{found}: name the option by ckpt2pt.errors.ref"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        pytest.param('x = "check --tp-size"', ["--tp-size"], id="a flag"),
        pytest.param("x = f'{y}: check spec.source.path'", ["spec.source.path"], id="a field"),
        pytest.param('x = f"check {z} (--noop {y})"', ["--noop"], id="in parentheses"),
        pytest.param('x = f"run ckpt2pt pt-meta --ms-path {y} --noop 3"', [], id="a command line"),
        pytest.param('"""Of ``--tp-size``."""\ndef f():\n    """And --noop."""', [], id="a docstring"),
        pytest.param('x = "save with --use-dist-ckpt"', [], id="a flag of Megatron"),
        pytest.param("x = ref('source.path')", [], id="a marker"),
    ],
)
def test_the_rule_on_flags_sees_them(code: str, found: list[str]) -> None:
    assert spelled_in(code) == found


def test_command_lines_in_texts_are_real() -> None:
    lines = {
        line for module in INNER for line in COMMAND_LINE.findall(module.read_text(encoding="utf-8")) if "--" in line
    }
    assert lines
    [commands] = [a.choices for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    for line in lines:
        _, command, *words = line.split()
        flags = {word.rstrip("\\\"'") for word in words if word.startswith("--")}
        assert flags <= {*commands[command]._option_string_actions}, line
