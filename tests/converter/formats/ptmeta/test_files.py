"""The files of pt_meta: what torch makes of them, and what is not overwritten."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch

from ckpt2pt.core.extents import Extent
from ckpt2pt.core.layout import Parameter, lay_out
from ckpt2pt.errors import FileAccessError, TryAgainError, UsageError
from ckpt2pt.formats.ptmeta.files import RankFiles, origin, publish, render
from ckpt2pt.formats.ptmeta.metadata import require
from ckpt2pt.formats.torchfile.trees import namespace, tensor

BUFFERS = lay_out([Parameter(name="w", shape=(2,), dtype="bfloat16")], divisor=1, bucket_numel=None)


def rank(**more: object) -> RankFiles:
    tree = {
        "args": namespace({"seed": 7}),
        "iteration": 3,
        "model": "left out",
        "rng_state": tensor("uint8", "k", 4, 0, (4,)),
    }
    options: dict[str, object] = {
        "tp": 1, "pp": 2, "tree": tree, "storages": {"k": b"\1\2\3\4"}, "buffers": (BUFFERS, (), BUFFERS), "names": (("model.w",),),
    }  # fmt: skip
    return RankFiles(**(options | more))  # type: ignore[arg-type]


def test_maps_are_numbered_by_the_buffers_there_are() -> None:
    assert sorted(render([rank()], with_maps=True)) == [
        "args_tp01_pp002.pt", "param_map_buffer0_dp0tp1pp2vpp0.json", "param_map_buffer0_dp0tp1pp2vpp1.json",
    ]  # fmt: skip


def test_no_temporary_folder_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")  # as in a pod whose root is read-only
    assert render([rank()], with_maps=True)


def test_torch_loads_the_arguments(tmp_path: Path) -> None:
    publish(tmp_path, render([rank()], with_maps=False), overwrite=False)
    tree = torch.load(tmp_path / "args_tp01_pp002.pt", weights_only=False)
    assert list(tree) == ["args", "iteration", "rng_state", "param_name_list"]
    assert (tree["args"].seed, tree["param_name_list"]) == (7, [["model.w"]])
    assert tree["rng_state"].tolist() == [1, 2, 3, 4]


def test_publishing_twice_writes_once(tmp_path: Path) -> None:
    files = render([rank()], with_maps=True)
    assert sorted(publish(tmp_path, files, overwrite=False)) == sorted(files)
    assert publish(tmp_path, files, overwrite=False) == ()


def test_what_differs_is_kept_unless_stated_otherwise(tmp_path: Path) -> None:
    files = render([rank()], with_maps=True)
    name = "param_map_buffer0_dp0tp1pp2vpp0.json"
    older = {**files, name: b"{}"}
    publish(tmp_path / "ours", older, overwrite=False)
    with pytest.raises(UsageError, match="is there and differs"):
        publish(tmp_path / "ours", files, overwrite=False)
    assert publish(tmp_path / "ours", files, overwrite=True) == (name,)
    assert publish(tmp_path / "ours", older, overwrite=True) == (name,)


@pytest.mark.parametrize("name", ["param_map_buffer0_dp0tp1pp2vpp0.json", "args_tp07_pp000.pt"])
def test_what_this_command_did_not_write_is_never_replaced(name: str, tmp_path: Path) -> None:
    files = render([rank()], with_maps=True)
    (tmp_path / name).write_text("{}")
    for overwrite, words in ((False, "is there and differs|another model"), (True, "which ckpt2pt did not write")):
        with pytest.raises(UsageError, match=words):
            publish(tmp_path, files, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_listed_file_that_was_changed_since_is_not_ours(tmp_path: Path) -> None:
    files = render([rank()], with_maps=True)
    publish(tmp_path, files, overwrite=False)
    (tmp_path / next(iter(files))).write_text("edited")
    with pytest.raises(UsageError, match="changed since"):
        publish(tmp_path, {**files, next(iter(files)): b"{}"}, overwrite=True)


def test_equal_files_of_others_do_not_become_ours(tmp_path: Path) -> None:
    files = render([rank()], with_maps=True)
    first, *_ = files
    (tmp_path / first).write_bytes(files[first])
    assert first not in publish(tmp_path, files, overwrite=False)
    with pytest.raises(UsageError, match="did not write"):
        publish(tmp_path, {**files, first: b"{}"}, overwrite=True)


def test_metadata_that_was_half_written_is_not_converted_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = render([rank()], with_maps=True)
    publish(tmp_path, {**files, next(iter(files)): b"{}"}, overwrite=False)
    with monkeypatch.context() as patch:
        patch.setattr("ckpt2pt.formats.ptmeta.files.Ledger.publish", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(tmp_path, files, overwrite=True)
    with pytest.raises(TryAgainError, match="is being written"):
        require(tmp_path, source=tmp_path, target=tmp_path)
    publish(tmp_path, files, overwrite=True)
    require(tmp_path, source=tmp_path, target=tmp_path)


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_metadata_of_another_cut_must_not_stay_beside(tmp_path: Path) -> None:
    publish(tmp_path, {"args_tp07_pp000.pt": b"older"}, overwrite=False)
    (tmp_path / "notes.txt").write_text("anything")
    files = render([rank()], with_maps=True)
    with pytest.raises(UsageError, match="another model or cut"):
        publish(tmp_path, files, overwrite=False)
    publish(tmp_path, files, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".ckpt2pt", *files, "notes.txt"])


def test_a_storage_that_ends_early_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"12")
    with pytest.raises(FileAccessError, match="ended at byte 2"):
        render([rank(storages={"k": Extent(str(tmp_path / "short"), 0, 4)})], with_maps=True)


def test_the_origin_says_what_was_assumed() -> None:
    document = json.loads(origin(way="description", evidence=["seen"], assumed={"order": "built-in"}))
    assert (document["from"], document["evidence"], document["assumed"]) == (
        "description",
        ["seen"],
        {"order": "built-in"},
    )
