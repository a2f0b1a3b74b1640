"""Linears that are none to their model: it multiplies by their weight itself, so that no other layer can stand there.

Mamba's dt_proj is such: `self.dt_proj.weight @ time_step`. What decides is the source of the module's class, so that a
model is understood alike when it is quantized and when its result is loaded, without a forward.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap

from torch import nn


def uncalled_linears(block: nn.Module) -> set[str]:
    """Names of the linears whose weight the module around them multiplies by, or reads without ever calling them."""
    return {
        f"{name}.{child}" if name else child
        for name, module in block.named_modules()
        for child in _used_alone(type(module))  # type: ignore[arg-type]  # a class has a hash
        if isinstance(getattr(module, child, None), nn.Linear)
    }


@functools.cache
def _used_alone(kind: type[nn.Module]) -> frozenset[str]:
    """Names x for which the class has `self.x.weight @ …`, or `self.x.weight` and nowhere `self.x(…)`."""
    multiplied: set[str] = set()
    read: set[str] = set()
    called: set[str] = set()
    for each in kind.__mro__:
        if not issubclass(each, nn.Module) or each.__module__.startswith("torch."):
            continue
        try:
            nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(each)))))
        except (OSError, SyntaxError):  # no source: nothing is known of it
            continue
        products = [node for node in nodes if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)]
        multiplied |= {_weight_of(side) for product in products for side in (product.left, product.right)}
        read |= {_weight_of(node) for node in nodes}
        called |= {_own(node.func) for node in nodes if isinstance(node, ast.Call)}
    return frozenset((multiplied | (read - called)) - {""})


def _weight_of(node: ast.AST) -> str:
    """x of `self.x.weight`, else nothing."""
    return _own(node.value) if isinstance(node, ast.Attribute) and node.attr == "weight" else ""


def _own(node: ast.AST) -> str:
    """x of `self.x`, else nothing."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return ""
