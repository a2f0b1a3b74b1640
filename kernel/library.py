"""Find and load the compiled kernel, and say what is missing where there is none."""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ABI_VERSION = 3  # of kernel/csrc/capi.h
LIBRARY_NAME = "libmarlin_gptq.so"
BUILD_INFO_NAME = "build_info.json"
_REINSTALL = (
    "Reinstall from the source tree on Linux x86-64 with a C++ compiler (apt install g++): "
    "pip install --force-reinstall --no-deps ."
)


@dataclass(frozen=True)
class KernelStatus:
    """Whether the compiled kernel is there. `reason` and `hint` are sentences, empty when it is."""

    available: bool
    path: Path | None = None
    reason: str = ""
    hint: str = ""
    architectures: list[str] = field(default_factory=list)


class PlanStruct(ctypes.Structure):
    """marlin_gptq_plan_t of capi.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("family", "tile_m", "tile_n", "tile_k", "stages")),
        *((name, ctypes.c_int32) for name in ("grouped", "ctas_per_sm", "grid", "cluster", "threads")),
        *((name, ctypes.c_int32) for name in ("m_tiles", "n_tiles", "k_tiles", "shared_bytes")),
        ("units", ctypes.c_int64),
        ("reason", ctypes.c_char_p),
    ]


class BlockedPlanStruct(ctypes.Structure):
    """marlin_gptq_blocked_plan_t of capi.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("variant", "tile_m", "tile_n", "grid")),
        *((name, ctypes.c_int32) for name in ("m_tiles", "n_tiles", "k_tiles", "split_tiles", "split_blocks")),
        ("slot_bytes", ctypes.c_int64),
        ("microseconds", ctypes.c_double),
        ("reason", ctypes.c_char_p),
    ]


class BlockedChoice(ctypes.Structure):
    """marlin_gptq_blocked_choice_t of capi.h: what to force, for tests and tuning; -1 leaves it to the plan."""

    _fields_ = [(name, ctypes.c_int32) for name in ("variant", "split_tiles", "split_blocks")]


def status() -> KernelStatus:
    """What this installation has. Never raises, never touches a GPU."""
    return _open()[1]


def loaded() -> ctypes.CDLL | None:
    """The library with its signatures declared, or None where `status().available` is false."""
    return _open()[0]


def error_string(code: int) -> str:
    """What an error code of the library means."""
    library = loaded()
    return f"code {code}" if library is None else library.marlin_gptq_error_string(code).decode()


def plan(
    m: int, n: int, k: int, group_size: int, *, sms: int, shared_bytes_per_sm: int, compute_capability: int = 80
) -> dict[str, int | str]:
    """How the kernel would run a problem on such a GPU; needs the library. ValueError for a bad shape."""
    library = loaded()
    if library is None:
        raise RuntimeError(f"the kernel is not available: {status().reason}")
    result = PlanStruct()
    device = (sms, shared_bytes_per_sm, compute_capability)
    code = library.marlin_gptq_plan(m, n, k, group_size, *device, ctypes.byref(result))
    if code:
        raise ValueError(f"plan of m={m} n={n} k={k} group_size={group_size}: {error_string(code)}")
    values = {name: getattr(result, name) for name, *_ in PlanStruct._fields_}
    return values | {"reason": result.reason.decode()}


def plan_blocked(
    m: int, n: int, k: int, group_size: int, *, asymmetric: bool = False, sms: int, choice: BlockedChoice | None = None
) -> dict[str, int | float | str]:
    """How `gemm_blocked` would run a problem; needs the library. ValueError for a bad shape or choice."""
    library = loaded()
    if library is None:
        raise RuntimeError(f"the kernel is not available: {status().reason}")
    result = BlockedPlanStruct()
    chosen = None if choice is None else ctypes.byref(choice)
    code = library.marlin_gptq_plan_blocked(m, n, k, group_size, asymmetric, sms, chosen, ctypes.byref(result))
    if code:
        raise ValueError(f"plan of m={m} n={n} k={k} group_size={group_size}: {error_string(code)}")
    values = {name: getattr(result, name) for name, *_ in BlockedPlanStruct._fields_}
    return values | {"reason": result.reason.decode()}


@functools.cache
def _open() -> tuple[ctypes.CDLL | None, KernelStatus]:
    return open_in(_folders())


def open_in(folders: list[Path]) -> tuple[ctypes.CDLL | None, KernelStatus]:
    """Load the library from the first of `folders` that holds it. Never raises."""
    info = _build_info(folders)
    path = next((folder / LIBRARY_NAME for folder in folders if (folder / LIBRARY_NAME).is_file()), None)
    if path is None:
        reason = f"{LIBRARY_NAME} is not beside marlin_gptq.kernel: the package was not built."
        # What the build found missing, where there was one.
        return None, KernelStatus(False, None, info.get("reason", reason), info.get("hint", _REINSTALL))
    try:
        library = ctypes.CDLL(str(path))
        version = library.marlin_gptq_abi_version()
    except (OSError, AttributeError) as error:
        return None, KernelStatus(False, path, f"{path} does not load: {error}.", _REINSTALL)
    if version != ABI_VERSION:
        reason = f"{path} has interface version {version}, expected {ABI_VERSION}: it is of another release."
        return None, KernelStatus(False, path, reason, _REINSTALL)
    _declare(library)
    return library, KernelStatus(True, path, architectures=list(info.get("architectures", [])))


def _folders() -> list[Path]:
    # An editable install keeps the Python files in the source tree and the library in site-packages: both
    # are on the package's path.
    package = "marlin_gptq.kernel"
    folders = [Path(folder) for folder in sys.modules[package].__path__]
    resources = importlib.resources.files(package)
    if isinstance(resources, Path):
        folders.append(resources)
    return folders


def _build_info(folders: list[Path]) -> dict[str, Any]:
    for folder in folders:
        try:
            info = json.loads((folder / BUILD_INFO_NAME).read_text())
        except (OSError, ValueError):
            continue
        if isinstance(info, dict):
            return info
    return {}


def _declare(library: ctypes.CDLL) -> None:
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    library.marlin_gptq_error_string.argtypes = [ctypes.c_int]
    library.marlin_gptq_error_string.restype = ctypes.c_char_p
    library.marlin_gptq_plan.argtypes = [i64, i64, i64, i64, i32, i32, i32, ctypes.POINTER(PlanStruct)]
    library.marlin_gptq_gemm.argtypes = [*[pointer] * 6, *[i64] * 5, i32, i32, pointer, i32, i32]
    library.marlin_gptq_decode_blocks.argtypes = [*[pointer] * 5, *[i64] * 5, i32, i32, i32, pointer, i32, i32]
    choice = ctypes.POINTER(BlockedChoice)
    library.marlin_gptq_plan_blocked.argtypes = [*[i64] * 4, i32, i32, choice, ctypes.POINTER(BlockedPlanStruct)]
    library.marlin_gptq_gemm_blocked.argtypes = [*[pointer] * 5, *[i64] * 5, *[i32] * 3, pointer, i32, choice]
    library.marlin_gptq_dirty_tickets.argtypes = [i32, ctypes.POINTER(i64), ctypes.POINTER(i32)]
