"""4-bit checkpoints as other tools write them, packed word by word from the published layouts: no code of the package.

The slow, obvious twin of marlin_gptq.formats and marlin_gptq.conversion.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers import save_tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
LINEARS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]


@dataclass
class Plain:
    """One linear: codes and zeros [N, K] and [N, groups] as integers, scales [N, groups], group of each feature [K]."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    g_idx: Tensor

    def dense(self) -> Tensor:
        """float32 [N, K], element by element."""
        groups = self.g_idx.long()
        return self.scales.float()[:, groups] * (self.codes - self.zeros[:, groups]).float()


def words(nibbles: Tensor) -> Tensor:
    """[..., 8] values → [...] int32, value i in the bits [4i, 4i+4)."""
    total = torch.zeros(nibbles.shape[:-1], dtype=torch.int64)
    for i in range(8):
        total += nibbles[..., i].long() << (4 * i)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def along(values: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """[R, 8·c] → int32 [R, c]: a word holds eight neighbours of a row, nibble i its value order[i]."""
    eights = values.reshape(values.shape[0], -1, 8)
    return words(torch.stack([eights[..., j] for j in order], dim=-1))


def tensors_of(linear: Plain, kind: str, version: int, symmetric: bool, act_order: bool) -> dict[str, Tensor]:
    """The tensors of one linear in a format."""
    if kind == "gptq":
        stored = (linear.zeros - 1) % 16 if version == 1 else linear.zeros
        return {
            "qweight": along(linear.codes).t().contiguous(),
            "qzeros": along(stored.t().contiguous()),
            "scales": linear.scales.t().contiguous(),
            "g_idx": linear.g_idx.to(torch.int32),
        }
    if kind == "awq":
        return {
            "qweight": along(linear.codes.t().contiguous(), AWQ_COLUMN_OF_NIBBLE),
            "qzeros": along(linear.zeros.t().contiguous(), AWQ_COLUMN_OF_NIBBLE),
            "scales": linear.scales.t().contiguous(),
        }
    tensors = {
        "weight_packed": along(linear.codes),
        "weight_scale": linear.scales,
        "weight_shape": torch.tensor(linear.codes.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = along(linear.zeros.t().contiguous()).t().contiguous()
    if act_order:
        tensors["weight_g_idx"] = linear.g_idx.to(torch.int32)
    return tensors


def settings_of(kind: str, group_size: int, version: int, symmetric: bool, act_order: bool) -> dict[str, Any]:
    """The quantization_config that such tools write."""
    if kind == "gptq":
        form = "gptq" if version == 1 else "gptq_v2"
        settings = {"bits": 4, "group_size": group_size, "desc_act": act_order, "sym": symmetric}
        return settings | {"quant_method": "gptq", "checkpoint_format": form, "damp_percent": 0.05}
    if kind == "awq":
        settings = {"bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
        return settings | {"quant_method": "awq"}
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group_size}
    if group_size == -1:
        weights |= {"strategy": "channel", "group_size": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights | {"actorder": None}}},
        "ignore": ["lm_head"],
    }


def random_linear(n: int, k: int, group_size: int, symmetric: bool, act_order: bool, seed: int) -> Plain:
    """Codes of all values, scales of both signs, zero points 1 to 15."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else -(-k // group_size)  # the last may not be full
    codes = torch.randint(0, 16, (n, k), generator=generator)
    zeros = torch.randint(1, 16, (n, groups), generator=generator)
    sign = torch.randint(0, 2, (n, groups), generator=generator) * 2 - 1
    scales = ((torch.rand(n, groups, generator=generator) + 0.5) * sign / 200).half()
    g_idx = torch.arange(k) // (k if group_size == -1 else group_size)
    if act_order:
        g_idx = g_idx[torch.randperm(k, generator=generator)]
    return Plain(codes, torch.full_like(zeros, 8) if symmetric else zeros, scales, g_idx)


def save_foreign(
    directory: Path,
    kind: str,
    *,
    group_size: int = 32,
    version: int = 1,
    symmetric: bool = True,
    act_order: bool = False,
    seed: int = 0,
    **changes: Any,
) -> dict[str, Plain]:
    """A tiny model whose decoder linears are such; returns them by full name."""
    save_tiny_model(directory, seed=seed, **changes)
    tensors = load_file(directory / "model.safetensors")
    linears: dict[str, Plain] = {}
    for name in [name.removesuffix(".weight") for name in tensors if "_proj.weight" in name]:
        n, k = tensors.pop(f"{name}.weight").shape
        linears[name] = random_linear(n, k, group_size, symmetric, act_order, seed + len(linears))
        for own, tensor in tensors_of(linears[name], kind, version, symmetric, act_order).items():
            tensors[f"{name}.{own}"] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    change_config(directory, quantization_config=settings_of(kind, group_size, version, symmetric, act_order))
    return linears


def change_config(directory: Path, **changes: Any) -> None:
    """Replace keys of config.json; None removes one."""
    file = directory / "config.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def change_tensors(directory: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace tensors of model.safetensors; None removes one."""
    tensors = {**load_file(directory / "model.safetensors"), **changes}
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


def dense_model(directory: Path, linears: dict[str, Plain]) -> Any:
    """transformers' own float32 model with the dequantized weights in its linears."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_file(directory / "model.safetensors")
    state = {name: tensor.float() for name, tensor in tensors.items() if name in model.state_dict()}
    state |= {f"{name}.weight": linear.dense() for name, linear in linears.items()}
    missing, _ = model.load_state_dict(state, strict=False)
    assert not missing
    return model.eval()
