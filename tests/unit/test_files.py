"""Files appear complete or not at all."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from strata.files import open_atomic, sha256_of, write_atomic


def test_the_hash_is_that_of_the_content(tmp_path: Path):
    path = tmp_path / "file"
    write_atomic(path, b"x" * 100_000)
    assert sha256_of(path) == hashlib.sha256(b"x" * 100_000).hexdigest()


def test_after_an_error_the_old_content_stays_and_no_temporary_file_is_left(tmp_path: Path):
    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises(TypeError), open_atomic(path) as target:
        target.write("text where bytes are due")  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_files_have_the_permissions_of_the_umask(tmp_path: Path):
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", "text")
        # It replaces the file by one of its own, which only its owner can read.
        with open_atomic(tmp_path / "tensors") as out:
            save_file({"x": np.zeros(2)}, out.name)
    finally:
        os.umask(before)
    for name in ("file", "tensors"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640
