#!/usr/bin/env python3
"""Write kernel/csrc/ptx/wgmma_shapes.cuh: one wrapper around wgmma.mma_async for each width of the product.

The instruction names every accumulator register, 64 of them at 128 columns, which nobody should type. A test compares
what this script prints with the committed file.

    python scripts/make_wgmma.py            # writes the file
    python scripts/make_wgmma.py --print    # prints it
"""

from __future__ import annotations

import argparse
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "kernel" / "csrc" / "ptx" / "wgmma_shapes.cuh"
WIDTHS = (16, 32, 64, 128)
TYPES = {"f16": "f16", "bf16": "bf16"}

HEAD = """\
// Written by scripts/make_wgmma.py: change that, not this.
//
// d[64 x kN] (+)= a[64 x 16] b[16 x kN]: a in registers (four of this thread's, as in mma.m16n8k16, warp w having rows
// 16w..16w+15), b in shared memory behind a descriptor, d in FP32. Asynchronous: see ptx/wgmma.cuh.
#pragma once

#include <cstdint>

#include "core/config.h"

namespace marlin_gptq::ptx {

// `accumulate`: 0 starts from zero, whatever d holds.
template <DType kDtype, int kN>
struct Wgmma;
"""


def wrapper(width: int, dtype: str, ptx_type: str) -> str:
    count = width // 2
    registers = [f"%{i}" for i in range(count)]
    lines = [", ".join(registers[i : i + 16]) for i in range(0, count, 16)]
    listing = ', "\n            "'.join(lines)
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    return f"""
template <>
struct Wgmma<DType::{dtype}, {width}> {{
    static __device__ __forceinline__ void multiply(float (&d)[{count}], const uint32_t (&a)[4], uint64_t b,
                                                    int accumulate) {{
        asm volatile(
            "{{\\n"
            ".reg .pred p;\\n"
            "setp.ne.b32 p, %{count + 5}, 0;\\n"
            "wgmma.mma_async.sync.aligned.m64n{width}k16.f32.{ptx_type}.{ptx_type} "
            "{{{listing}}}, "
            "{{{a}}}, %{count + 4}, p, 1, 1, 0;\\n"
            "}}\\n"
            : {outputs}
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
    }}
}};
"""


def text() -> str:
    wrappers = [wrapper(width, dtype, name) for width in WIDTHS for dtype, name in TYPES.items()]
    return HEAD + "".join(wrappers) + "\n}  // namespace marlin_gptq::ptx\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print instead of writing")
    if parser.parse_args().print:
        print(text(), end="")
    else:
        TARGET.write_text(text())


if __name__ == "__main__":
    main()
