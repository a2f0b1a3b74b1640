#!/usr/bin/env python3
"""Say whether the compiled kernel is installed, for which GPUs, or why it is not.

With `--quiet` (for scripts) the exit code alone says it: 0 if it is, 1 if not. Without, the exit code is
always 0: the package works on a machine without a compiler too.
"""

from __future__ import annotations

import sys

from marlin_gptq.kernel import library


def main() -> int:
    status = library.status()
    if "--quiet" in sys.argv[1:]:
        return 0 if status.available else 1
    if status.available:
        print(f"kernel: compiled for {', '.join(status.architectures)}")
    else:
        print(f"kernel: not usable, the reference path runs: {status.reason} {status.hint}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
