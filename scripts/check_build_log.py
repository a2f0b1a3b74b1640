#!/usr/bin/env python3
"""Read the log of a build of the kernel, print its registers, and fail where the compiler gave way.

    check_build_log.py LOG [--archs 80,90a]

Exit code 1: spilled registers, arrays in local memory, notes C75xx (serialised wgmma, ignored setmaxnreg), or a kernel
or architecture that the build should have compiled and the log does not show. The kernels expected are those of
kernel/csrc/dispatch/variants.h and, for sm_90a, of kernel/csrc/sm90/wgmma_variants.h; the architectures those of the
nvcc commands in the log, or of --archs.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

VARIANTS = Path(__file__).resolve().parents[1] / "kernel" / "csrc" / "dispatch" / "variants.h"
WGMMA_VARIANTS = VARIANTS.parents[1] / "sm90" / "wgmma_variants.h"  # for WGMMA_ARCHITECTURE alone
WGMMA_ARCHITECTURE = "sm_90a"
DTYPES = ("f16", "bf16")  # in the order of DType in core/config.h
GROUPS = ("column", "unit", "part")  # in the order of Groups in sm90/config.h
SOURCES = ("marlin", "blocks")  # in the order of Source in sm90/config.h

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_NOTE = re.compile(r".*\bC75\d\d\b.*")
_GENCODE = re.compile(r"-gencode[= ]\S*code=(sm_\w+)")
_NAME = re.compile(r"ConfigILNS_5DTypeE(\d)ELi(\d+)ELi(\d+)ELb([01])ELi(\d+)E")
_DECODE = re.compile(r"DecodeConfigILNS_5DTypeE(\d)ELNS\d?_\d?6SourceE(\d)ELi(\d+)ELNS\d?_\d?6GroupsE(\d)E")
_WGMMA = re.compile(r"WgmmaConfigILNS_5DTypeE(\d)ELi(\d+)ELi(\d+)ELi(\d+)ELNS\d?_\d?6GroupsE(\d)ELb([01])E")


@dataclass
class Kernel:
    """One compiled kernel for one architecture."""

    name: str
    architecture: str
    registers: int = -1
    spilled_bytes: int = -1
    stack_bytes: int = 0
    static_shared_bytes: int = 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--archs", help="architectures that must be there, e.g. 80,90a")
    options = parser.parse_args(arguments)
    text = options.log.read_text(errors="replace")
    kernels = parse(text)
    if options.archs:
        architectures = {f"sm_{arch}" for arch in options.archs.split(",")}
    else:
        architectures = set(_GENCODE.findall(text))
    print_table(kernels)
    expected = expected_kernels(VARIANTS.read_text())
    problems = find_problems(text, kernels, architectures, expected, expected_wgmma(WGMMA_VARIANTS.read_text()))
    for problem in problems:
        print(f"build log: {problem}", file=sys.stderr)
    if not problems:
        print(f"build log: {len(kernels)} kernels, no spills, no serialisation notes")
    return 1 if problems else 0


def parse(text: str) -> list[Kernel]:
    """The kernels of a log of `ptxas -v`, in its order."""
    kernels: list[Kernel] = []
    for line in text.splitlines():
        if entry := _ENTRY.search(line):
            kernels.append(Kernel(readable(entry[1]), entry[2]))
        elif kernels and (spills := _SPILLS.search(line)):
            kernels[-1].spilled_bytes = int(spills[2]) + int(spills[3])
            kernels[-1].stack_bytes = int(spills[1])
        elif kernels and (used := _USED.search(line)):
            kernels[-1].registers = int(used[1])
            kernels[-1].static_shared_bytes = int(used[2] or 0)
    return kernels


def readable(mangled: str) -> str:
    """The variant behind a mangled kernel name; other names stay as they are."""
    if decode := _DECODE.search(mangled):
        dtype, source, tile_m, groups = (int(part) for part in decode.groups())
        return decode_name(DTYPES[dtype], SOURCES[source], tile_m, GROUPS[groups])
    if wgmma := _WGMMA.search(mangled):
        dtype, tile_m, row_tiles, pairs, groups, zeros = (int(part) for part in wgmma.groups())
        return wgmma_name(DTYPES[dtype], tile_m, row_tiles, pairs, GROUPS[groups], bool(zeros))
    found = _NAME.search(mangled)
    if not found:
        return mangled
    dtype, tile_m, stages, grouped, _ = (int(part) for part in found.groups())
    return variant_name(DTYPES[dtype], tile_m, stages, bool(grouped))


def variant_name(dtype: str, tile_m: int, stages: int, grouped: bool) -> str:
    return f"gemm {dtype} m{tile_m} stages{stages} {'grouped' if grouped else 'per-column'}"


def decode_name(dtype: str, source: str, tile_m: int, groups: str) -> str:
    return f"decode {dtype} m{tile_m} {groups} from {source}"


def wgmma_name(dtype: str, tile_m: int, row_tiles: int, pairs: int, groups: str, zeros: bool) -> str:
    return f"wgmma {dtype} m{tile_m} rows{row_tiles} pairs{pairs} {groups} {'zeros' if zeros else 'symmetric'}"


def expected_wgmma(variants: str) -> set[str]:
    """The names of every variant in the table of wgmma_variants.h: each tile, for every kind of weight."""
    return {
        wgmma_name(dtype, int(tile_m), int(row_tiles), int(pairs), groups, zeros)
        for tile_m, row_tiles, pairs in re.findall(r"X\((\d+), (\d+), (\d+), __VA_ARGS__\)", variants)
        for dtype in DTYPES
        for groups in GROUPS
        for zeros in (False, True)
    }


def expected_kernels(variants: str) -> set[str]:
    """The names of every variant in the table of variants.h."""
    rows = re.findall(r"X\(dtype, (\d+), (\d+), (true|false), \d+\)", variants)
    dtypes = re.findall(r"^\s+MARLIN_GPTQ_TILES\(X, (\w+)\)", variants, re.MULTILINE)
    decode_rows = re.findall(r"X\(dtype, source, (\d+), (\w+)\)", variants)
    sources = re.findall(r"^\s+MARLIN_GPTQ_DECODE_TILES\(X, dtype, (\w+)\)", variants, re.MULTILINE)
    decode_dtypes = re.findall(r"^\s+MARLIN_GPTQ_DECODE_SOURCES\(X, (\w+)\)", variants, re.MULTILINE)
    return {
        variant_name(dtype, int(tile_m), int(stages), grouped == "true")
        for dtype in dtypes
        for tile_m, stages, grouped in rows
    } | {
        decode_name(dtype, source, int(tile_m), groups)
        for dtype in decode_dtypes
        for source in sources
        for tile_m, groups in decode_rows
    }


def find_problems(
    text: str, kernels: list[Kernel], architectures: set[str], expected: set[str], wgmma: set[str]
) -> list[str]:
    """Everything that is wrong, one sentence each; empty for a good build."""
    problems = [line.strip() for line in text.splitlines() if _NOTE.match(line)]
    if not architectures:
        problems.append("no nvcc command names an architecture: is this the verbose log of a build?")
    if not expected or not wgmma:
        problems.append(f"no variants found in {VARIANTS.name}")
    compiled = {(kernel.name, kernel.architecture) for kernel in kernels}
    for architecture in sorted(architectures):
        wanted = expected | wgmma if architecture == WGMMA_ARCHITECTURE else expected
        missing = sorted(name for name in wanted if (name, architecture) not in compiled)
        if missing:
            problems.append(f"{architecture}: not compiled: {', '.join(missing)}")
    for kernel in kernels:
        where = f"{kernel.name} on {kernel.architecture}"
        if kernel.spilled_bytes > 0:
            problems.append(f"{where}: {kernel.spilled_bytes} bytes of registers spilled")
        if kernel.stack_bytes > 0:
            problems.append(f"{where}: an array of {kernel.stack_bytes} bytes in local memory")
        if kernel.registers < 0 or kernel.spilled_bytes < 0:
            problems.append(f"{where}: the log does not say what it uses")
    return problems


def print_table(kernels: list[Kernel]) -> None:
    """Registers, one row a kernel, one column an architecture."""
    architectures = list(dict.fromkeys(kernel.architecture for kernel in kernels))
    names = list(dict.fromkeys(kernel.name for kernel in kernels))
    registers = {(kernel.name, kernel.architecture): str(kernel.registers) for kernel in kernels}
    width = max((len(name) for name in names), default=0)
    print("registers".ljust(width), *(f"{architecture:>8}" for architecture in architectures))
    for name in names:
        print(name.ljust(width), *(f"{registers.get((name, arch), '-'):>8}" for arch in architectures))


if __name__ == "__main__":
    sys.exit(main())
