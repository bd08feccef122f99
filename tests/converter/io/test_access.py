"""Refusals of the operating system: each has a kind, true words, and an exit code that says whether it may pass."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ckpt2pt import errors
from ckpt2pt.io.access import access_error


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file"


WORDS = {
    errno.EACCES: (errors.PermissionDeniedError, "permission denied: the file file belongs to uid"),
    errno.EPERM: (errors.PermissionDeniedError, "permission denied"),
    errno.EROFS: (errors.ReadOnlyVolumeError, "mounted read-only"),
    errno.ENOSPC: (errors.NoSpaceError, "No space left on device"),
    errno.EDQUOT: (errors.NoSpaceError, "Disk quota exceeded"),
    errno.EFBIG: (errors.VolumeTooSmallError, "larger than"),
    errno.EMFILE: (errors.TooManyFilesError, "files open"),
    errno.ENFILE: (errors.FileAccessError, "the machine has too many files open"),
    errno.ESPIPE: (errors.UnsupportedFileSystemError, "Illegal seek"),
    errno.EOPNOTSUPP: (errors.UnsupportedFileSystemError, "cannot do this"),
    errno.ENOSYS: (errors.UnsupportedFileSystemError, "cannot do this"),
    errno.EIO: (errors.FileAccessError, "the device or the server behind this mount reported an error"),
    errno.ESTALE: (errors.FileAccessError, "removed or replaced on the server"),
    errno.ENOTCONN: (errors.FileAccessError, "the process that serves this mount has ended"),
    errno.ETIMEDOUT: (errors.FileAccessError, "does not answer"),
    errno.ETXTBSY: (errors.FileAccessError, "a running program uses the file"),
    errno.ENOMEM: (errors.TryAgainError, "Cannot allocate memory"),
    errno.EINVAL: (errors.FileAccessError, "Invalid argument"),
    errno.ENOENT: (errors.FileAccessError, "No such file"),
    errno.ENOTDIR: (errors.UsageError, "Not a directory"),
    errno.EEXIST: (errors.UsageError, "File exists"),
    errno.ELOOP: (errors.UsageError, "Too many levels"),
    errno.ENAMETOOLONG: (errors.UsageError, "File name too long"),
}


@pytest.mark.parametrize("number", WORDS, ids=errno.errorcode.get)
def test_every_refusal_of_an_output_has_a_kind_and_true_words(number: int, path: Path) -> None:
    kind, words = WORDS[number]
    error = access_error(OSError(number, os.strerror(number)), path, "writing")
    assert type(error) is kind
    assert error.what.startswith("writing failed: ")
    assert words in error.what
    assert error.where == str(path)
    assert ("permission" in error.what) == (number in {errno.EACCES, errno.EPERM})
    assert ("uid" in error.hint) == (number in {errno.EACCES, errno.EPERM}), (
        "nobody is reported to change users in vain"
    )


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOENT, errors.MissingInputError),
        (errno.ENOTDIR, errors.MissingInputError),
        (errno.EACCES, errors.PermissionDeniedError),
        (errno.EPERM, errors.PermissionDeniedError),
        (errno.EIO, errors.FileAccessError),
        (errno.ESTALE, errors.FileAccessError),
        (errno.ELOOP, errors.MissingInputError),
        (errno.ENAMETOOLONG, errors.MissingInputError),
        (errno.EISDIR, errors.UsageError),
    ],
    ids=errno.errorcode.get,
)
def test_every_refusal_of_an_input_has_a_kind(path: Path, number: int, kind: type[errors.Ckpt2ptError]) -> None:
    error = access_error(OSError(number, os.strerror(number)), path, "reading", option="--ms-path")
    assert type(error) is kind
    assert error.where == str(path)


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_no_number_is_left_untranslated(number: int, path: Path) -> None:
    for option in ("", "--ms-path"):
        error = access_error(OSError(number, os.strerror(number)), path, "reading", option=option)
        assert error.what
        assert error.exit_code in {64, 66, 74, 75}


def test_an_error_without_a_number_keeps_its_words(path: Path) -> None:
    assert "odd" in access_error(OSError("odd"), path, "reading").what


def test_a_target_that_is_not_there_yet_is_denied_by_the_folder_above(tmp_path: Path) -> None:
    error = access_error(PermissionError(errno.EACCES, "x"), tmp_path / "a" / "b", "making the folder")
    assert f"the folder {tmp_path.name} belongs to uid {os.getuid()}" in error.what
    assert f"give this user write access to {tmp_path}" in error.hint
