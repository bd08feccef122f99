"""Members of enumerations as Python 3.11.0 to 3.11.3 pickles them, ``getattr(<class>, "NAME")``: taken so and in no other form."""

from __future__ import annotations

import enum
import pickle
import signal
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from archives import take_apart, write_archive
from ckpt2pt.errors import Ckpt2ptError, FormatError, UnsafePickleError
from ckpt2pt.formats.ptmeta.capture import capture
from ckpt2pt.formats.torchfile.pickles import read_pickle, write_pickle
from ckpt2pt.formats.torchfile.trees import Call, Global, Value, enum_member, namespace_attrs, with_attrs
from ckpt2pt.run.conversion import run
from ckpt2pt.verification.leaves import Symbol, open_pt
from ckpt2pt.verification.torch_reader import open_with_torch
from conversions import Quiet, request_for
from goldens import golden_sets
from imports import import_request, run_all
from torchload import megatron_names

MEMBER = "megatron.core.enums.ModelType.encoder_or_decoder"
SETS = golden_sets()


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


GETATTR = named("__builtin__", "getattr")
CLASS = named("megatron.core.enums", "ModelType")


def member(kind: bytes = CLASS, name: bytes = text("encoder_or_decoder"), getter: bytes = GETATTR) -> bytes:
    return getter + kind + name + b"\x86R"


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", [CLASS, named("signal", "Signals")], ids=["megatron", "signal"])
def test_a_member_by_its_name_is_kept_as_it_is(kind: bytes, protocol: int) -> None:
    class Member(enum.Enum):
        one = 1

        def __reduce_ex__(self, _: object) -> tuple[Any, ...]:
            return getattr, (Member, "one")

    data = b"\x80\x02" + member(kind) + b"."
    found = read_pickle(data, where="test")
    assert enum_member(found) == ".".join([*kind.decode()[1:].split(), "encoder_or_decoder"])
    assert read_pickle(write_pickle(found), where="test").args == found.args  # type: ignore[union-attr]
    # What a real Pickler makes of getattr, in both spellings.
    Member.__module__, Member.__qualname__ = "megatron.core.enums", "Member"
    with megatron_names():
        import sys

        vars(sys.modules["megatron.core.enums"])["Member"] = Member
        written = pickle.dumps({"a": Member.one, "b": Member.one}, protocol=protocol)
        tree = read_pickle(written, where="test")
        assert isinstance(tree, dict)
        assert enum_member(tree["a"]) == "megatron.core.enums.Member.one"
        assert pickle.loads(write_pickle(tree)) == {"a": Member.one, "b": Member.one}


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(GETATTR + b".", id="the-function-itself"),
        pytest.param(GETATTR + b"0N.", id="mentioned-and-dropped"),
        pytest.param(b"]" + GETATTR + b"a.", id="in-a-list"),
        pytest.param(member() + b"0" + b"}" + GETATTR + b"Ns.", id="as-a-key"),
        pytest.param(b"(" + member() + GETATTR + b"t.", id="beside-a-good-call"),
        pytest.param(member(name=text("__class__")), id="dunder"),
        pytest.param(member(name=text("__init__")), id="init"),
        pytest.param(member(name=text("_member_map_")), id="sunder"),
        pytest.param(member(name=text("_private")), id="private"),
        pytest.param(member(name=text("a.b")), id="dotted"),
        pytest.param(member(name=text("")), id="empty"),
        pytest.param(member(name=text("a\n")), id="with-a-newline"),
        pytest.param(member(name=text("Ｆoo")), id="not-ascii"),
        pytest.param(member(name=text("a b")), id="with-a-space"),
        pytest.param(member(name=b"K\x01"), id="number-for-a-name"),
        pytest.param(member(name=b"C\x01a"), id="bytes-for-a-name"),
        pytest.param(member(kind=member()), id="nested"),
        pytest.param(member(kind=text("os")), id="of-a-text"),
        pytest.param(member(kind=b"}"), id="of-a-dict"),
        pytest.param(member(kind=named("argparse", "Namespace")), id="of-a-standard-class"),
        pytest.param(member(kind=named("builtins", "object")), id="of-object"),
        pytest.param(member(kind=named("__builtin__", "str"), name=text("format")), id="of-str"),
        pytest.param(member(kind=named("torch", "Tensor"), name=text("numpy")), id="of-a-tensor"),
        pytest.param(member(kind=named("pathlib", "Path"), name=text("touch")), id="of-a-path"),
        pytest.param(member(kind=GETATTR), id="of-itself"),
        pytest.param(GETATTR + CLASS + text("a") + text("b") + b"\x87R", id="with-a-default"),
        pytest.param(GETATTR + CLASS + b"\x85R", id="without-a-name"),
        pytest.param(GETATTR + b")R", id="of-nothing"),
        pytest.param(member(getter=named("builtins", "getattr"), name=text("__subclasses__")), id="protocol-4-name"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nothing_else_goes_through_getattr(data: bytes) -> None:
    whole = b"\x80\x02" + data + (b"" if data.endswith(b".") else b".")
    with pytest.raises(UnsafePickleError, match=r"(__builtin__|builtins)\.getattr") as caught:
        read_pickle(whole, where="args_tp00_pp000.pt")
    assert caught.value.where == "args_tp00_pp000.pt"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(GETATTR + CLASS + text("a") + b"\x86\x81", id="made-new"),
        pytest.param(member() + b"}b", id="given-state"),
        pytest.param(member() + b"(K\x01e", id="given-items"),
        pytest.param(member() + b"K\x01K\x02s", id="given-pairs"),
        pytest.param(member() + b")R", id="called"),
        pytest.param(b"]" + member() + b")\x81a", id="made-an-instance-of"),
    ],
)
def test_a_member_is_only_held(data: bytes) -> None:
    with pytest.raises(Ckpt2ptError) as caught:
        read_pickle(b"\x80\x02" + data + b".", where="test")
    assert isinstance(caught.value, (FormatError, UnsafePickleError))


def test_a_class_of_a_fork_has_to_be_listed() -> None:
    data = b"\x80\x02" + member(named("fork.enums", "Kind")) + b"."
    with pytest.raises(UnsafePickleError, match=r"fork\.enums\.Kind") as caught:
        read_pickle(data, where="test")
    assert "pickle_globals" in caught.value.hint
    assert (
        enum_member(read_pickle(data, where="test", allow={"fork.enums.Kind"})) == "fork.enums.Kind.encoder_or_decoder"
    )


def test_listing_getattr_allows_no_more_of_it() -> None:
    for listed in ("builtins.getattr", "__builtin__.getattr"):
        with pytest.raises(UnsafePickleError):
            read_pickle(b"\x80\x02" + member(name=text("__class__")) + b".", where="test", allow={listed})


def by_name(source: Path, target: Path) -> Path:
    """A file of torch with ``args.model_type`` as Python 3.11.2 writes it."""
    parts = take_apart(source)
    tree: Any = read_pickle(parts.pickle, where="test")
    kind = Call(Global("__builtin__", "getattr"), (Global("megatron.core.enums", "ModelType"), "encoder_or_decoder"))
    changed: Value = tree | {"args": with_attrs(tree["args"], {"model_type": kind})}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_archive(target, parts.stem, write_pickle(changed), parts.payloads)
    return target


def test_a_file_of_such_a_python_is_shown_and_read_by_torch_alike(tmp_path: Path) -> None:
    source = by_name(next(SETS[0].glob("pt_meta/args_tp00_pp000.pt")), tmp_path / "args_tp00_pp000.pt")
    for found in (open_pt(source), open_with_torch(source)):
        assert found["/args/model_type"] == Symbol(MEMBER)


@pytest.mark.parametrize("verify", ["digest", "full"])
def test_a_conversion_with_such_a_template_ends_in_files_that_every_python_reads(verify: str, tmp_path: Path) -> None:
    for path in (SETS[0] / "pt_meta").iterdir():
        if path.suffix == ".pt":
            by_name(path, tmp_path / "meta" / path.name)
        else:
            (tmp_path / "meta").mkdir(exist_ok=True)
            (tmp_path / "meta" / path.name).write_bytes(path.read_bytes())
    request = request_for(SETS[0], tmp_path / "out", metadata=tmp_path / "meta", verify=verify)
    assert run(request, range(request.topology.pipeline), Quiet()).published
    for path in (tmp_path / "out").rglob("model_optim_rng.pt"):
        with megatron_names():
            tree = torch.load(path, weights_only=False)
            assert (tree["args"].model_type.name, tree["args"].model_type.value) == ("encoder_or_decoder", 1)
        assert open_with_torch(path)["/args/model_type"] == Symbol(MEMBER)


def test_a_checkpoint_of_such_a_python_is_imported_and_gives_its_pt_meta(tmp_path: Path) -> None:
    iteration = next(SETS[0].glob("A/iter_*"))
    for path in iteration.rglob("*.pt"):
        place = tmp_path / "A" / path.relative_to(SETS[0] / "A")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    for path in (tmp_path / "A").rglob("model_optim_rng.pt"):
        by_name(path, path)
    assert capture(tmp_path / "A" / iteration.name).with_maps
    request = import_request(source=tmp_path / "A" / iteration.name, target=tmp_path / "ms")
    assert run_all(request).published
    (args,) = (tmp_path / "ms" / "pt_meta").glob("args_*.pt")
    tree: Any = read_pickle(take_apart(args).pickle, where="test")
    assert enum_member(namespace_attrs(tree["args"])["model_type"]) == MEMBER


def test_signals_are_enums_here_as_well() -> None:
    assert isinstance(signal.Signals.SIGTERM, enum.Enum)
    data = b"\x80\x02" + member(named("signal", "Signals"), text("SIGTERM")) + b"."
    assert pickle.loads(write_pickle(read_pickle(data, where="test"))) is signal.SIGTERM
