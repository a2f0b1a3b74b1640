"""Which version of the GPTQ layout files are in whose settings do not name it: version 1 stores zero points less one.

Symmetric files tell by what is stored: 7 everywhere is version 1, 8 everywhere version 2. Others tell by their codes.
Weights of a layer have a mean of nearly zero, so the mean code lies at the zero point: at what is stored in version 2,
one above it in version 1. Where it lies at neither, nothing tells.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from marlin_gptq.conversion.linears import ZERO_CODE
from marlin_gptq.conversion.reading import Tensors
from marlin_gptq.conversion.settings import Layout
from marlin_gptq.formats import gptq

SAMPLED = 8  # linears whose codes are looked at
NEAR = 0.2  # steps between the mean code and the zero point


def with_version(store: Tensors, names: tuple[str, ...], layout: Layout) -> tuple[Layout, str | None]:
    """The layout with its version, and the doubt about it in a sentence, if there is one.

    Tensors that are not what they should be are passed over: reading them says more.
    """
    stored: set[int] = set()
    for name in names:
        if _is_packed(store, f"{name}.qzeros"):
            stored |= set(gptq.unpack_zeros(store.get(f"{name}.qzeros"), version=2).unique().tolist())
    if layout.sym or stored in ({ZERO_CODE - 1}, {ZERO_CODE}):
        return replace(layout, version=2 if stored == {ZERO_CODE} else 1), None
    above = _mean_code_above_stored(store, names)
    version = 2 if above is not None and abs(above) < NEAR else 1
    if above is None or min(abs(above), abs(above - 1)) >= NEAR:
        reason = "as of files from before there was one; the codes do not tell"
    else:
        reason = (
            f"because the mean code lies {round(above, 2) + 0:.2f} above what is stored, where {2 - version} is due"
        )
    return replace(layout, version=version), (
        f"checkpoint_format: missing, so that nothing says whether zero points are stored less one (version 1, 'gptq') "
        f"or as they are (version 2, 'gptq_v2'); version {version} is assumed, {reason}. A wrong version moves every "
        "weight by a step: compare with the model it was made from (marlin-inspect DIR --verify MODEL), and name the "
        "other one as checkpoint_format in its settings if it is that"
    )


def _mean_code_above_stored(store: Tensors, names: tuple[str, ...]) -> float | None:
    apart = []
    for name in names[:: max(1, len(names) // SAMPLED)]:
        if _is_packed(store, f"{name}.qweight") and _is_packed(store, f"{name}.qzeros"):
            codes = gptq.unpack_codes(store.get(f"{name}.qweight"))
            zeros = gptq.unpack_zeros(store.get(f"{name}.qzeros"), version=2)
            apart.append(float(codes.float().mean() - zeros.float().mean()))
    return sum(apart) / len(apart) if apart else None


def _is_packed(store: Tensors, name: str) -> bool:
    return name in store and store.dtype(name) == torch.int32 and len(store.shape(name)) == 2
