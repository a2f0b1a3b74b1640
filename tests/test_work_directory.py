"""work_directory.py: every recipe goes on where it was, and comes to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_samples, save_tiny_model
from helpers_work_directory import BLOCKS, CPU, SAMPLES, Killed, blocks_of, content_of, run

from marlin_gptq import CheckpointError, QuantizationConfig
from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.config import Override
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.install import install_block
from marlin_gptq.report import ProgressEvent


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "source", num_hidden_layers=BLOCKS, attention_bias=True)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("expected") / "out"
    run(source, output, None)
    return content_of(output)


def test_a_run_in_one_piece_keeps_every_block(source: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    run(source, tmp_path / "out", tmp_path / "work")
    assert content_of(tmp_path / "out") == expected
    assert blocks_of(tmp_path / "work") == [f"block-{index:05d}.json" for index in range(BLOCKS)]
    assert not list((tmp_path / "work").glob("*.writing"))
    assert run(source, tmp_path / "out", tmp_path / "work") is None  # finished
    run(source, tmp_path / "elsewhere", tmp_path / "work")
    assert content_of(tmp_path / "elsewhere") == expected


@pytest.mark.parametrize(
    "config",
    [
        QuantizationConfig(true_sequential=True),
        QuantizationConfig(method="rtn"),
        QuantizationConfig(skip=("q_",)),
        QuantizationConfig(correct_target=0.5, signed_scales=True, act_order="groups", refine_sweeps=1),
        QuantizationConfig(pack=True, act_order="columns", token_cap=4.0, clip_hessian="plain"),
        QuantizationConfig(beam_width=3, equal_samples=True, true_sequential=True),
        QuantizationConfig(two_sided=True, correct_target=0.5),
        QuantizationConfig(
            correct_target=0.5, tune_block_steps=4, tune_codes=True, skip=("q_",), overrides=(Override("down", 4, 32),)
        ),
    ],
)
def test_every_recipe_goes_on(source: Path, tmp_path: Path, config: QuantizationConfig) -> None:
    samples = [] if config.method == "rtn" else SAMPLES
    run(source, tmp_path / "whole", None, config, samples=samples)

    def kill(event: ProgressEvent) -> None:
        if event.block == 2:
            raise Killed

    with pytest.raises(Killed):
        run(source, tmp_path / "out", tmp_path / "work", config, samples=samples, progress=kill)
    assert len(blocks_of(tmp_path / "work")) == 2
    run(source, tmp_path / "out", tmp_path / "work", config, samples=samples)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")


def test_tuned_blocks_of_a_float32_model_go_on(tmp_path: Path) -> None:
    """Norm weights are stored rounded: those that moved go on so, and those that did not as they were."""
    source = save_tiny_model(tmp_path / "source", num_hidden_layers=2, dtype=torch.float32, initializer_range=0.1)
    config = QuantizationConfig(
        damp_percent=1.0, clip=False, tune_block_steps=20, tune_codes=True, tune_rate=2e-3, tune_scale_rate=1e-3
    )
    samples = random_samples(60, longest=128)
    whole = run(source, tmp_path / "whole", None, config, samples=samples)
    assert whole is not None and whole.tuned_blocks[0].kept

    def kill(event: ProgressEvent) -> None:
        if event.block == 1:
            raise Killed

    with pytest.raises(Killed):
        run(source, tmp_path / "out", tmp_path / "work", config, samples=samples, progress=kill)
    run(source, tmp_path / "out", tmp_path / "work", config, samples=samples)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")


def test_a_block_is_put_back_as_it_was_left(source: Path, tmp_path: Path) -> None:
    """Weights of float32 whose rounding is stored stay unrounded; tuned ones take the stored value."""
    run(source, tmp_path / "out", None)
    store = TensorStore(tmp_path / "out")
    stream = BlockStream(source, device=CPU)
    prefix = "model.layers.1"
    with stream.block(1) as block:
        linears = {f"{prefix}.mlp.up_proj": block.mlp.up_proj}
        tensors = {name: store.get(name) for name in store.names if name.startswith(prefix)}
        names = [f"{prefix}.{own}" for own in block.state_dict()]
        tensors |= {name: stream.store.get(name).clone() for name in names if name not in tensors}
        unrounded = block.input_layernorm.weight + 1e-6
        block.input_layernorm.weight.copy_(unrounded)
        tuned = tensors[f"{prefix}.post_attention_layernorm.weight"] * 2
        tensors[f"{prefix}.post_attention_layernorm.weight"] = tuned
        install_block(block, prefix, linears, tensors, {f"{prefix}.mlp.up_proj": 128})
        assert torch.equal(block.input_layernorm.weight, unrounded)
        assert torch.equal(block.post_attention_layernorm.weight, tuned.float())
        del tensors[f"{prefix}.mlp.up_proj.scales"]
        with pytest.raises(CheckpointError, match=r"up_proj\.scales: missing among the stored tensors of its block"):
            install_block(block, prefix, linears, tensors, {f"{prefix}.mlp.up_proj": 128})
