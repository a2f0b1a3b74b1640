"""What a conversion did, for programs and for people."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did. Sizes in bytes; dtype that of scales and activations; warnings one sentence each."""

    source: str
    output: str
    source_format: str
    format: str
    linears: int
    group_size: int
    symmetric: bool
    act_order: bool
    dtype: str
    bytes_before: int
    bytes_after: int
    seconds: float
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def conversion_card(report: ConversionReport, source_card: str = "") -> str:
    """Markdown: what the directory is, where it came from, how to load it; the recipe, where `source_card` has it."""
    table_found = re.search(r"^\| setting or figure \|.*?(?=^$)", source_card, flags=re.MULTILINE | re.DOTALL)
    recipe = f"\n## How it was quantized\n\n{table_found[0]}" if table_found else ""
    rows = [
        ("format", report.format),
        ("converted from", f"{report.source} ({report.source_format}), codes and scales unchanged"),
        ("bits, group size", f"4, {'whole row' if report.group_size == -1 else report.group_size}"),
        ("zero points", "none (symmetric)" if report.symmetric else "yes"),
        ("act-order", "yes" if report.act_order else "no"),
        ("dtype of scales and activations", report.dtype),
        ("size of the weights", f"{report.bytes_after / 1e6:.1f} MB"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
library_name: transformers
tags: [{report.format.split()[0]}, 4-bit, marlin-gptq]
---

# {report.source}, 4 bits as {report.format}

Converted by marlin-gptq. The licence is that of the source.

| property | value |
|---|---|
{table}

```python
import marlin_gptq

model = marlin_gptq.load("PATH_OF_THIS_DIRECTORY")
```
{recipe}"""
