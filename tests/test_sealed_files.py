"""sealed_files.py: files that are there whole, and JSON that shows its damage."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from marlin_gptq.errors import CheckpointError
from marlin_gptq.sealed_files import read_sealed, sealed, write_whole


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "run.json", b"old")
    write_whole(tmp_path / "run.json", b"new")
    assert (tmp_path / "run.json").read_bytes() == b"new"

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "run.json", b"newer")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_bytes() == b"new"


def test_a_changed_bit_of_sealed_json_shows(tmp_path: Path) -> None:
    content, file = {"b": [1, 2.5, None], "a": {"ä": "ß"}}, tmp_path / "run.json"
    file.write_bytes(sealed(content))
    assert read_sealed(file) == content
    file.write_bytes(sealed(content).replace(b"2.5", b"3.5"))
    with pytest.raises(CheckpointError, match=r"^run\.json: damaged, its checksum differs$"):
        read_sealed(file)
    for broken in (b"", b"[]", b"{}", sealed(content)[:-9], b"\xff"):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"^run\.json: damaged \("):
            read_sealed(file)
    with pytest.raises(CheckpointError, match=r"^none\.json: No such file or directory$"):
        read_sealed(tmp_path / "none.json")
