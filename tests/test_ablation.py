"""scripts/ablation.py and scripts/make_outlier_model.py: what their figures rest on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import torch
from helpers import save_tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from marlin_gptq import QuantizationConfig


def script(repository: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, repository / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_outliers_leave_the_function_and_spoil_the_rounding(repository: Path, tmp_path: Path) -> None:
    outlier_script = script(repository, "make_outlier_model")
    source = save_tiny_model(tmp_path / "source", dtype=torch.float32, tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    changed = outlier_script.outliers(tensors, config, spread=1.0, seed=0)
    assert changed.keys() == tensors.keys()
    one, other = (AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32) for _ in range(2))
    missing = other.load_state_dict(changed, strict=False)
    assert not missing.unexpected_keys
    ids = torch.randint(0, 96, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(one(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-5)
    name = "model.layers.0.self_attn.q_proj.weight"
    size = changed[name].norm(dim=0) / tensors[name].norm(dim=0)
    assert float(size.max() / size.min()) > 16


def test_every_variant_is_a_valid_recipe_and_presets_are_among_them(repository: Path) -> None:
    ablation = script(repository, "ablation")
    configs = {
        name: QuantizationConfig.from_preset(preset, **changes) for name, (preset, changes) in ablation.VARIANTS.items()
    }
    assert len(set(configs.values())) == len(configs)
    for preset in ("best", "fast", "marlin"):
        assert configs[preset] == QuantizationConfig.from_preset(preset)
    assert configs["pass of best"].tune_steps == 0


def test_texts_to_choose_on_and_to_report_on_share_nothing(repository: Path, tmp_path: Path) -> None:
    ablation = script(repository, "ablation")
    file = tmp_path / "texts.jsonl"
    texts = [f"document {number}" for number in range(50)]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    drawn = set(texts[:20])
    choose, report = (ablation.held_out(file, drawn, part, 10) for part in (0, 1))
    assert len(choose) == len(report) == 10
    assert not set(choose) & set(report) and not (set(choose) | set(report)) & drawn
    elsewhere = ablation.held_out(file, set(texts[20:40]), 0, 50)
    assert not set(elsewhere) & set(report)


def test_the_table_gives_mean_and_spread(repository: Path, tmp_path: Path) -> None:
    ablation = script(repository, "ablation")
    results = [
        {
            "model": "m", "variant": "marlin", "seed": seed, "seconds": 10.0, "peak_gpu_bytes": 2 * 10**9,
            "figures": {
                text: {"kl": kl, "top1": 90.0, "gap": 0.1} for text in ("wikitext2", "held-out", "validation")
            },
        }
        for seed, kl in enumerate((0.01, 0.02))
    ]  # fmt: skip
    (row,) = ablation.table(results).splitlines()[2:]
    assert row.startswith("| m | marlin | 2 | 0.0150 ± 0.0071 | 0.0150 ± 0.0071 | 0.100 ± 0.000 |")
    assert row.endswith("| 10 ± 0 | 2.0 |")
