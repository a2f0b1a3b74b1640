"""conversion/zero_points.py: the version of GPTQ files that do not name it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from foreign import Plain, change_config, change_tensors, save_foreign, tensors_of
from helpers import save_tiny_model
from safetensors.torch import load_file
from torch import Tensor

import marlin_gptq
from marlin_gptq import CheckpointError
from marlin_gptq.checkpoint import CheckpointWarning
from marlin_gptq.conversion.describe import describe_checkpoint
from marlin_gptq.conversion.source import Source


def forget_version(directory: Path, **changes: object) -> None:
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    del settings["checkpoint_format"]
    change_config(directory, quantization_config=settings | changes)


def asymmetric(weight: Tensor, group_size: int = 32) -> Plain:
    """Rounded to nearest between the smallest and the largest weight of each group, as such tools do."""
    groups = weight.float().reshape(weight.shape[0], -1, group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = (groups / scales.float()[..., None]).round().add(zeros[..., None]).clamp(0, 15)
    g_idx = torch.arange(weight.shape[1]) // group_size
    return Plain(codes.reshape(weight.shape).long(), zeros.long(), scales, g_idx)


def save_asymmetric(directory: Path, version: int) -> Path:
    """A GPTQ directory of real roundings without checkpoint_format; returns the model it was made from."""
    base = save_tiny_model(directory.parent / f"{directory.name}-base")
    save_foreign(directory, "gptq", version=version, symmetric=False)
    weights = load_file(base / "model.safetensors")
    for name in [name.removesuffix(".weight") for name in weights if "_proj.weight" in name]:
        linear = tensors_of(asymmetric(weights[f"{name}.weight"]), "gptq", version, False, False)
        change_tensors(directory, {f"{name}.{own}": tensor for own, tensor in linear.items()})
    forget_version(directory)
    return base


@pytest.mark.parametrize("version", [1, 2])
def test_symmetric_files_tell_their_version(tmp_path: Path, version: int) -> None:
    save_foreign(tmp_path / "source", "gptq", version=version)
    for sym in (True, None):
        forget_version(tmp_path / "source", checkpoint_format=None, sym=sym)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            source = Source.of_directory(tmp_path / "source")
        assert source.layout.version == version and source.linear(source.linears[0]).weight.zeros is None


@pytest.mark.parametrize("version", [1, 2])
def test_codes_tell_the_version_of_other_files_and_verify_proves_it(tmp_path: Path, version: int) -> None:
    base = save_asymmetric(tmp_path / "source", version)
    with pytest.warns(CheckpointWarning, match=rf"checkpoint_format: missing.*version {version} is assumed, because"):
        described = describe_checkpoint(tmp_path / "source", original=base)
    assert max(one.relative_error for one in described.verified) < 0.02
    settings = json.loads((tmp_path / "source" / "config.json").read_text())["quantization_config"]
    wrong = {1: "gptq_v2", 2: "gptq"}[version]
    change_config(tmp_path / "source", quantization_config=settings | {"checkpoint_format": wrong})
    with pytest.raises(CheckpointError, match="its zero points are of another GPTQ version than is assumed; name it"):
        describe_checkpoint(tmp_path / "source", original=base)


def test_what_nothing_tells_is_doubted_aloud(tmp_path: Path) -> None:
    save_foreign(tmp_path / "source", "gptq", symmetric=False)  # codes without a mean near their zero points
    held = load_file(tmp_path / "source" / "model.safetensors")
    threes = {name: torch.full_like(held[name], 0x33333333) for name in held if name.endswith(".qzeros")}
    change_tensors(tmp_path / "source", threes)
    forget_version(tmp_path / "source")
    with pytest.warns(CheckpointWarning, match=r"version 1 is assumed, as of .*the codes do not tell.*--verify MODEL"):
        marlin_gptq.load(tmp_path / "source")


def test_fifteens_of_version_1_are_doubted(tmp_path: Path) -> None:
    save_foreign(tmp_path / "source", "gptq", symmetric=False)
    name = "model.layers.1.self_attn.q_proj.qzeros"
    change_tensors(tmp_path / "source", {name: torch.full((4, 16), -1, dtype=torch.int32)})
    with pytest.warns(CheckpointWarning, match="512 zero points are stored as 15 in version 1, which"):
        marlin_gptq.load(tmp_path / "source")
