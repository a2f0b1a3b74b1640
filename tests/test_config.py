"""config.py: what it accepts, refuses and writes."""

from __future__ import annotations

import json

import pytest

from marlin_gptq.config import DEFAULT_PRESET, PRESETS, QuantizationConfig
from marlin_gptq.errors import InputError


def test_defaults_are_the_seed_recipe() -> None:
    config = QuantizationConfig()
    assert (config.bits, config.group_size, config.damp_percent, config.block_size) == (4, 128, 0.1, 128)
    assert (config.method, config.preset, config.clip, config.true_sequential) == (
        "gptq",
        "marlin",
        True,
        False,
    )


def test_presets_name_themselves_and_take_changes() -> None:
    assert QuantizationConfig.from_preset("marlin") == QuantizationConfig()
    assert QuantizationConfig.from_preset().preset == DEFAULT_PRESET
    best = QuantizationConfig.from_preset("best")
    assert best.preset == "best" and best.tune_steps > 0 and best.tune_codes and best.signed_scales
    fast = QuantizationConfig.from_preset("fast")
    assert fast.tunes_blocks and not fast.tunes and not fast.correct_target, "one block at a time, wherever it fits"
    changed = QuantizationConfig.from_preset("fast", tune_steps=3, group_size=64)
    assert (changed.preset, changed.tune_steps, changed.group_size, changed.pack) == ("fast", 3, 64, True)
    with pytest.raises(InputError, match="preset: got 'slow', expected one of best, fast, marlin"):
        QuantizationConfig.from_preset("slow")
    for preset in PRESETS:
        config = QuantizationConfig.from_preset(preset)
        assert config.beam_width == 1 and not config.equal_samples, "only where asked for"
        assert QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_round_trip_through_json() -> None:
    config = QuantizationConfig(
        group_size=32, clip=False, skip=("down_proj$", "layers.0"), beam_width=4, equal_samples=True
    )
    text = json.dumps(config.to_dict())
    assert QuantizationConfig.from_dict(json.loads(text)) == config
    assert config.to_dict()["quant_method"] == "marlin_gptq"
    assert config.to_dict()["checkpoint_format"] == "marlin"


def test_skip_matches_anywhere_in_the_name() -> None:
    config = QuantizationConfig(skip=("down_proj$", r"layers\.0\."))
    assert config.skips("model.layers.3.mlp.down_proj")
    assert config.skips("model.layers.0.mlp.up_proj")
    assert not config.skips("model.layers.10.mlp.up_proj")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "bits: got 8, the Marlin format holds 4-bit codes only"),
        ({"group_size": 100}, "group_size: got 100, expected one of 128, 64, 32 or -1"),
        ({"sym": False}, "sym: got false"),
        ({"desc_act": True}, "desc_act: got true"),
        ({"method": "awq"}, "method: got 'awq', expected 'gptq' or 'rtn'"),
        ({"preset": "other"}, "preset: got 'other', expected one of best, fast, marlin"),
        ({"act_order": True}, "act_order: got True, expected one of none, groups, columns"),
        ({"act_order": "columns", "clip": False}, "act_order: got 'columns' without clip"),
        ({"clip_hessian": "both"}, "clip_hessian: got 'both', expected one of conditional, plain"),
        ({"correct_target": 1.5}, "correct_target: got 1.5, expected a number from 0 to 1"),
        ({"token_cap": -1}, "token_cap: got -1, expected a number from 0"),
        ({"beam_width": 0}, "beam_width: got 0, expected a whole number from 1 to 64"),
        ({"beam_width": 2.0}, "beam_width: got 2.0, expected a whole number from 1 to 64"),
        ({"equal_samples": 1}, "equal_samples: got 1, expected true or false"),
        ({"two_sided": "yes"}, "two_sided: got 'yes', expected true or false"),
        ({"refine_sweeps": 1.5}, "refine_sweeps: got 1.5, expected a whole number from 0 to 100"),
        ({"tune_steps": True}, "tune_steps: got True, expected a whole number"),
        ({"tune_rate": 0}, "tune_rate: got 0, expected a number from 1e-07 to 1"),
        ({"damp_percent": 0}, "damp_percent: got 0, expected a number above 0"),
        ({"damp_percent": "a"}, "damp_percent: got a"),
        ({"block_size": 100}, "block_size: got 100, expected a positive multiple of 32"),
        ({"skip": "("}, "expected a list"),
        ({"skip": ("(",)}, r"skip: '\(' is not a regular expression"),
        ({"skip": (7,)}, "skip: 7 is not a regular expression"),
        ({"skip": 7}, "skip: got 7, expected a list of strings"),
        ({"skip": ("(a+)+$",)}, "can take very long: it repeats what repeats"),
        ({"skip": ("(?:ab|cd)*e",)}, "can take very long"),
        ({"skip": (".*.*.*.*.*x",)}, "more than 4 repetitions"),
        ({"clip": "yes"}, "clip: got 'yes', expected true or false"),
        ({"group_size": 128.0}, "group_size: got 128.0"),
        ({"preset": "none"}, "preset: got 'none', expected one of best, fast, marlin"),
    ],
)
def test_bad_settings_are_named(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuantizationConfig(**changes)


@pytest.mark.parametrize(
    ("config", "name", "recipe"),
    [
        (QuantizationConfig.from_preset("best"), "best", "gptq, preset best"),
        (QuantizationConfig.from_preset("best", group_size=64, skip=("x",)), "best", "gptq, preset best"),
        (
            QuantizationConfig.from_preset("best", tune_steps=0, tune_rate=0.5),
            "best, changed: tune_steps 0",
            "gptq, preset best, changed: tune_steps 0",
        ),
        (
            QuantizationConfig(clip=False, damp_percent=0.05),
            "marlin, changed: damp_percent 0.05, clip false",
            "gptq, preset marlin, changed: damp_percent 0.05, clip false",
        ),
        (QuantizationConfig(method="rtn", clip=False), "marlin", "rtn"),
        (QuantizationConfig(method="imported", preset="none"), "none", "imported"),
    ],
)
def test_files_name_what_was_done(config: QuantizationConfig, name: str, recipe: str) -> None:
    assert (config.preset_name, config.recipe) == (name, recipe)
    assert config.to_dict()["preset"] == name
    assert QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    older = config.to_dict() | {"preset": config.preset}  # as they were written before
    assert QuantizationConfig.from_dict(older) == config


def test_foreign_checkpoints_are_refused() -> None:
    with pytest.raises(InputError, match="quant_method: got 'gptq', expected 'marlin_gptq'"):
        QuantizationConfig.from_dict({"quant_method": "gptq"})
    with pytest.raises(InputError, match="checkpoint_format: got 'other', expected 'marlin'"):
        QuantizationConfig.from_dict({"checkpoint_format": "other"})
    assert QuantizationConfig.from_dict({"bits": 4, "written_by_a_later_version": 1}) == QuantizationConfig()


def test_zero_points_and_moved_groups_come_with_imports_only() -> None:
    config = QuantizationConfig(method="imported", preset="none", sym=False, desc_act=True)
    assert QuantizationConfig.from_dict(config.to_dict()) == config
    for changes in ({"sym": False}, {"desc_act": True}):
        with pytest.raises(InputError, match="import"):
            QuantizationConfig(**changes)


def test_usual_patterns_are_quick_enough() -> None:
    patterns = ("down_proj$", r"^model\.layers\.\d+\.mlp\..*", "(q|k|v)_proj", r"layers\.(0|1)\.", "lm_head?")
    assert QuantizationConfig(skip=patterns).skip == patterns
