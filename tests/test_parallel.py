"""conversion/parallel.py: which linears engines can split, by hand-worked shapes."""

from __future__ import annotations

from types import SimpleNamespace

from marlin_gptq.conversion.parallel import fused_names, split_problems, warnings_for


def llama(hidden: int, intermediate: int, heads: int, kv_heads: int, layers: int = 2) -> tuple[dict, SimpleNamespace]:
    head = hidden // heads
    shapes = {}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.self_attn.q_proj": (hidden, hidden),
            f"{name}.self_attn.k_proj": (kv_heads * head, hidden),
            f"{name}.self_attn.v_proj": (kv_heads * head, hidden),
            f"{name}.self_attn.o_proj": (hidden, hidden),
            f"{name}.mlp.gate_proj": (intermediate, hidden),
            f"{name}.mlp.up_proj": (intermediate, hidden),
            f"{name}.mlp.down_proj": (hidden, intermediate),
        }
    return shapes, SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads)


def test_models_people_serve() -> None:
    shapes, config = llama(4096, 14336, 32, 8)  # Llama-3-8B
    assert split_problems(shapes, (), 128, config) == {}
    shapes, config = llama(4096, 11008, 32, 32)  # Llama-2-7B: 11008 / 8 = 1376 is no multiple of 128
    found = split_problems(shapes, (), 128, config)
    assert found == {
        4: ["model.layers.{0-1}.mlp.down_proj: K = 11008 / 4 = 2752 is no multiple of 128"],
        8: ["model.layers.{0-1}.mlp.down_proj: K = 11008 / 8 = 1376 is no multiple of 128"],
    }
    assert warnings_for(found)[0] == f"tensor parallel 4: {found[4][0]}"


def test_groups_must_fall_whole_to_every_gpu() -> None:
    shapes, config = llama(1024, 1280, 16, 16)
    found = split_problems(shapes, (), 64, config)
    assert found[4] == ["model.layers.{0-1}.mlp.down_proj: K = 1280 / 4 = 320 is no multiple of 128"]
    odd = {"model.layers.0.mlp.down_proj": (128, 384)}
    none = SimpleNamespace(num_attention_heads=None)
    assert split_problems(odd, (), 256, none)[1] == [
        "model.layers.0.mlp.down_proj: K = 384 is no multiple of the group size 256"
    ]


def test_fewer_key_heads_than_gpus_are_copied() -> None:
    """8 heads of 64, 2 key heads, 4 GPUs: q 128 + k 64 + v 64 on each."""
    shapes, config = llama(512, 4096, 8, 2)
    assert split_problems(shapes, (), 128, config) == {
        8: ["model.layers.{0-1}.self_attn.o_proj: K = 512 / 8 = 64 is no multiple of 128"]
    }


def test_heads_and_uneven_sizes() -> None:
    shapes, config = llama(768, 2050, 12, 12, layers=1)
    found = split_problems(shapes, (), -1, config)
    assert "model.layers.0.mlp.down_proj: K = 2050 is no multiple of 128" in found[1]
    assert "all attention layers: 12 attention heads do not divide by 8" in found[8]
    assert "model.layers.0.mlp.gate_proj/up_proj: N = 2050 does not divide by 4" in found[4]


def test_half_of_a_fused_linear_in_16_bits() -> None:
    shapes, config = llama(4096, 14336, 32, 8, layers=4)
    kept = tuple(f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1, 3))
    for name in kept:
        del shapes[name]
    (line,) = warnings_for(split_problems(shapes, kept, 128, config))
    assert line.startswith("model.layers.{0-1,3}.self_attn.v_proj: left in 16 bits, but vLLM and SGLang run it as one")
    whole = tuple(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up"))
    for name in whole:
        del shapes[name]
    assert len(warnings_for(split_problems(shapes, kept + whole, 128, config))) == 1


def test_long_lists_are_cut() -> None:
    lines = warnings_for({2: [f"layer {i}: wrong" for i in range(9)], 4: ["layer 0: wrong", "layer 9: wrong"]}, most=6)
    assert lines[6] == "tensor parallel 2: and 3 more" and lines[7:] == ["tensor parallel 4: layer 9: wrong"]


def test_experts_of_many_blocks_are_named_once() -> None:
    shapes = {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}": shape
        for layer in range(2)
        for expert in range(4)
        for name, shape in {"w1": (96, 128), "w2": (128, 96), "w3": (96, 128)}.items()
    }
    found = split_problems(shapes, (), -1, SimpleNamespace(num_attention_heads=None))
    named = "model.layers.{0-1}.block_sparse_moe.experts.{0-3}"
    assert found[2] == [
        f"{named}.w1/w3: N = 96 on each of 2 is no multiple of 64",
        f"{named}.w2: K = 96 / 2 = 48 is no multiple of 128",
    ]


def test_engines_ask_about_fused_names() -> None:
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    whole = [f"{attention}.{own}_proj" for own in "qkv"] + [f"{mlp}.down_proj"]
    assert fused_names(whole, [f"{mlp}.gate_proj", f"{mlp}.up_proj"]) == [f"{attention}.qkv_proj"]
    assert fused_names(whole[:1], whole[1:]) == []  # half of it: no name says that
    experts = [f"{mlp}.experts.{index}.{own}_proj" for index in range(3) for own in ("gate", "up", "down")]
    assert fused_names(experts, whole) == [f"{mlp}.experts"]
    assert fused_names(experts[:3], experts[3:]) == []
    (line,) = split_problems(dict.fromkeys(experts[3:], (128, 128)), tuple(experts[:3]), -1, None)[0]
    assert line.startswith(f"{mlp}.experts.0.gate_proj, ") and "cannot load the model; skip all of them or none" in line
