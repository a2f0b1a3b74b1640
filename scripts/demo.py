#!/usr/bin/env python3
"""The whole road on the embedded model, with the two commands a user would type; needs no network and no GPU.

    quantize examples/tiny-llama to 4 bits → build/demo/tiny-llama-4bit
    measure the WikiText-2 perplexity of both, over the whole test set

The last column of the table says what computed: the CUDA kernel on a GPU, the reference path elsewhere.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL, OUTPUT = "examples/tiny-llama", "build/demo/tiny-llama-4bit"
STEPS = [
    (
        "Quantize: preset marlin (best tunes for long without a GPU), 64 of the 256 embedded documents",
        f"marlin-quantize {MODEL} --wbits 4 -o {OUTPUT} --preset marlin --dataset demo --n-samples 64 --overwrite",
    ),
    (
        "Measure: WikiText-2 perplexity of the 4-bit model and of the original, windows of 1024 tokens",
        f"marlin-eval perplexity {OUTPUT} --baseline {MODEL} --dataset wikitext2 --seq-len 1024 --no-divergence",
    ),
]


def main() -> int:
    started = time.perf_counter()
    for title, line in STEPS:
        print(f"\n# {title}\n$ {line}", flush=True)
        name, *arguments = shlex.split(line)
        beside = Path(sys.executable).parent / name  # the environment may not be activated
        command = [str(beside) if beside.exists() else shutil.which(name) or name, *arguments]
        code = subprocess.run(command, cwd=ROOT).returncode
        if code:
            print(f"demo: {name} failed with exit code {code}", file=sys.stderr)
            return code
    print(f"\ndemo: finished in {time.perf_counter() - started:.0f} s; the 4-bit model is in {OUTPUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
