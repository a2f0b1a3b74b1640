"""Finding the compiled library, and what is said where there is none."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from marlin_gptq.kernel import library


def write_info(folder: Path, info: object) -> None:
    (folder / library.BUILD_INFO_NAME).write_text(json.dumps(info))


def test_status_never_raises() -> None:
    status = library.status()
    assert status.available == (library.loaded() is not None)
    if status.available:
        assert status.path is not None and status.path.name == library.LIBRARY_NAME
        assert (status.reason, status.hint) == ("", "")
        assert all(name.startswith(("sm_", "compute_")) for name in status.architectures)
    else:
        assert status.reason and status.hint


def test_nothing_built(tmp_path: Path) -> None:
    handle, status = library.open_in([tmp_path, tmp_path / "nowhere"])
    assert handle is None and not status.available and status.path is None
    assert status.reason == "libmarlin_gptq.so is not beside marlin_gptq.kernel: the package was not built."
    assert "pip install" in status.hint


def test_the_reason_of_the_build_is_told(tmp_path: Path) -> None:
    write_info(tmp_path, {"kernel": False, "reason": "no C++ compiler was found.", "hint": "Install one."})
    _, status = library.open_in([tmp_path / "nowhere", tmp_path])
    assert (status.reason, status.hint) == ("no C++ compiler was found.", "Install one.")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_broken_build_info_is_no_error(tmp_path: Path, text: str) -> None:
    (tmp_path / library.BUILD_INFO_NAME).write_text(text)
    _, status = library.open_in([tmp_path])
    assert not status.available and "was not built" in status.reason


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    (tmp_path / library.LIBRARY_NAME).write_bytes(b"\x7fELF and no more")
    _, status = library.open_in([tmp_path])
    assert not status.available and status.path == tmp_path / library.LIBRARY_NAME
    assert re.search(r"libmarlin_gptq\.so does not load: .+\.$", status.reason)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize(
    "source, reason",
    [
        ("int marlin_gptq_abi_version(void) { return 999; }", "has interface version 999, expected 3"),
        ("int something_else(void) { return 1; }", "does not load: .*undefined symbol"),
    ],
)
def test_a_library_of_another_release(tmp_path: Path, source: str, reason: str) -> None:
    (tmp_path / "a.c").write_text(source)
    target = tmp_path / library.LIBRARY_NAME
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", target, tmp_path / "a.c"], check=True)
    handle, status = library.open_in([tmp_path])
    assert handle is None and not status.available
    assert re.search(reason, status.reason)


def test_the_interface_has_one_version(repository: Path) -> None:
    header = (repository / "kernel/csrc/capi.h").read_text()
    build = (repository / "CMakeLists.txt").read_text()
    assert re.findall(r"#define MARLIN_GPTQ_ABI_VERSION (\d+)", header) == [str(library.ABI_VERSION)]
    assert re.findall(r"set\(ABI_VERSION (\d+)\)", build) == [str(library.ABI_VERSION)]


@pytest.mark.skipif(library.loaded() is None, reason="needs the compiled kernel")
def test_errors_are_explained() -> None:
    assert library.error_string(0) == "success"
    assert library.error_string(-2) == "group_size: needs -1, k, or 32, 64 or 128 dividing k"
    assert library.error_string(2) == "out of memory"
    assert library.error_string(-99) == "unknown error code"
