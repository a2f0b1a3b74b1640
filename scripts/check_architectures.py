"""Tiny random models of transformers' decoder architectures, quantized with each preset: which work, which are refused.

    python scripts/check_architectures.py                   # rewrites docs/architectures.md; 10 minutes on a core
    python scripts/check_architectures.py --only llama opt  # prints these; exit code 1 if one fails

An architecture works if the quantized model's logits are those of stock transformers with the same weights decoded,
its perplexity block by block that of one forward, and its greedy text with a cache that of whole forwards; else it is
refused in a sentence, or FAIL. `tests/test_architectures.py` holds some of them to it.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from marlin_gptq import MarlinLinear, quantize_model, split_projections
from marlin_gptq.config import QuantizationConfig
from marlin_gptq.errors import MarlinGPTQError
from marlin_gptq.eval.perplexity import stream_nll
from marlin_gptq.modeling.architecture import decoder_blocks
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.decoding import Decoder
from marlin_gptq.requirements import within_reach

TABLE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
VOCABULARY, LAYERS, TOKENS = 96, 4, 24
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
HEAD = {"head_dim": 32}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128}
SHARED = {"shared_expert_intermediate_size": 128}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 128, "kv_lora_rank": 128, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
    "num_key_value_heads": 4,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2,
}  # fmt: skip
HYBRID = {"layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 128, **LOCAL, **MAMBA}
PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 128, **HEAD, **SLIDING}
# Architecture → its configuration's class in transformers, and settings beside SIZES.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("ApertusConfig", {}),
    "arcee": ("ArceeConfig", {}),
    "bamba": ("BambaConfig", {"attn_layer_indices": [1, 3], **MAMBA}),
    "bloom": ("BloomConfig", {}),
    "codegen": ("CodeGenConfig", {"rotary_dim": 16}),
    "cohere": ("CohereConfig", {}),
    "cohere with norms": ("CohereConfig", {"use_qk_norm": True}),
    "cohere2": ("Cohere2Config", SLIDING),
    "dbrx": (
        "DbrxConfig",
        {
            "max_seq_len": 256, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"hidden_size": 128, "ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "deepseek-v2": ("DeepseekV2Config", ROUTED | LATENT | {"topk_method": "greedy"}),
    "deepseek-v2-lite": ("DeepseekV2Config", ROUTED | LATENT | {"topk_method": "greedy", "q_lora_rank": None}),
    "deepseek-v3": ("DeepseekV3Config", ROUTED | LATENT),
    "dots1": ("Dots1Config", ROUTED),
    "ernie4.5": ("Ernie4_5Config", HEAD),
    "ernie4.5-moe": (
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 128, "moe_layer_start_index": 1},
    ),
    "exaone4": ("Exaone4Config", HEAD | SLIDING),
    "falcon 7B": ("FalconConfig", {"multi_query": True, "parallel_attn": True}),
    "falcon 40B": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon with alibi": ("FalconConfig", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon-h1": ("FalconH1Config", {"mamba_d_ssm": 256, **HEAD, **MAMBA}),
    "gemma": ("GemmaConfig", HEAD | {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", HEAD | {"sliding_window": 16, "query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3TextConfig", HEAD | SLIDING | {"query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
    "gemma3n": ("Gemma3nTextConfig", PER_LAYER | {"num_kv_shared_layers": 2, "laurel_rank": 128}),
    "gemma4": ("Gemma4TextConfig", PER_LAYER | {"global_head_dim": 32, "num_kv_shared_layers": 0}),
    "glm": ("GlmConfig", HEAD),
    "glm4": ("Glm4Config", HEAD),
    "glm4-moe": ("Glm4MoeConfig", HEAD | ROUTED),
    "gpt-bigcode (StarCoder)": ("GPTBigCodeConfig", {}),
    "gpt-j": ("GPTJConfig", {"rotary_dim": 16}),
    "gpt-neo": ("GPTNeoConfig", {"attention_types": [[["global", "local"], 2]], "window_size": 16}),
    "gpt-neox (Pythia)": ("GPTNeoXConfig", {}),
    "gpt-oss": ("GptOssConfig", HEAD | SLIDING | LOCAL),
    "gpt2": ("GPT2Config", {}),
    "granite": ("GraniteConfig", {}),
    "granitemoe": ("GraniteMoeConfig", LOCAL),
    "granitemoe hybrid": ("GraniteMoeHybridConfig", HYBRID),
    "granitemoe shared": ("GraniteMoeSharedConfig", LOCAL | {"shared_intermediate_size": 128}),
    "helium": ("HeliumConfig", HEAD),
    "hunyuan": ("HunYuanDenseV1Config", HEAD),
    "hunyuan-moe": ("HunYuanMoEV1Config", HEAD | {"num_experts": 4, "moe_topk": 2}),
    "jamba": (
        "JambaConfig",
        {
            "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
            "expert_layer_offset": 1, "use_mamba_kernels": False,
        },
    ),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}),
    "llama": ("LlamaConfig", {}),
    "llama, tied, biased": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama4": ("Llama4TextConfig", HEAD | LOCAL | {"intermediate_size_mlp": 256, "interleave_moe_layer_step": 2}),
    "mamba": ("MambaConfig", {"state_size": 16}),
    "mamba2": ("Mamba2Config", {"state_size": 16, "num_heads": 4, "head_dim": 64, "n_groups": 1}),
    "minimax": ("MiniMaxConfig", HEAD | LOCAL | {"layer_types": ["linear_attention", "full_attention"] * 2}),
    "minimax-m2": ("MiniMaxM2Config", HEAD | LOCAL),
    "ministral": ("MinistralConfig", HEAD | {"sliding_window": 16}),
    "ministral3": ("Ministral3Config", HEAD),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "mixtral": ("MixtralConfig", LOCAL),
    "mpt": ("MptConfig", {"max_seq_len": 256}),
    "nemotron": ("NemotronConfig", {}),
    "olmo": ("OlmoConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", SLIDING),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128}),
    "opt": ("OPTConfig", {"word_embed_proj_dim": 128, "ffn_dim": 256}),
    "opt 350M": ("OPTConfig", {"word_embed_proj_dim": 64, "ffn_dim": 256, "do_layer_norm_before": False}),
    "persimmon": ("PersimmonConfig", {}),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}),
    "phi3": ("Phi3Config", {}),
    "phimoe": ("PhimoeConfig", LOCAL),
    "qwen2": ("Qwen2Config", {}),
    "qwen2 with windows": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen2-moe": ("Qwen2MoeConfig", MOE | SHARED),
    "qwen3": ("Qwen3Config", HEAD),
    "qwen3-moe": ("Qwen3MoeConfig", MOE | HEAD),
    "qwen3-next": ("Qwen3NextConfig", MOE | SHARED | HEAD | LINEAR),
    "qwen3.5": ("Qwen3_5TextConfig", HEAD | LINEAR),
    "recurrentgemma": (
        "RecurrentGemmaConfig",
        {"lru_width": 128, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
    ),
    "seed-oss": ("SeedOssConfig", HEAD | {"attention_bias": True}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1, 0]}),
    "solar-open": ("SolarOpenConfig", HEAD | ROUTED),
    "stablelm": ("StableLmConfig", {"use_qkv_bias": True}),
    "stablelm, parallel": ("StableLmConfig", {"use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("Starcoder2Config", {"use_bias": True, "sliding_window": 16}),
}  # fmt: skip


def save_model(name: str, directory: Path) -> type:
    """Save a random model of this architecture, of which every weight matters; returns its class."""
    config_class, settings = ARCHITECTURES[name]
    kind = getattr(transformers, config_class)
    known, renamed = inspect.signature(kind).parameters, getattr(kind, "attribute_map", {})
    general = {renamed.get(key, key): value for key, value in SIZES.items()}
    torch.manual_seed(0)
    config = kind(**{key: value for key, value in general.items() if key in known} | settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for own, tensor in model.named_parameters():
            if tensor.dim() >= 2 and not any(part in own for part in ("conv", "A_log")):
                tensor.normal_(std=1.0 if len(tensor) == VOCABULARY else tensor.shape[-1] ** -0.5)
            elif own.endswith(("bias", "norm.weight", "layernorm.weight")):
                tensor.add_(0.05 * torch.randn(tensor.shape))
    model.to(torch.bfloat16).save_pretrained(directory)
    return type(model)


def load(kind: Any, directory: Path, **settings: Any) -> Any:
    """A model in float32."""
    return nn.Module.float(kind.from_pretrained(directory, **settings)).eval()


def judge(name: str, preset: str, folder: Path) -> str:
    """`works: 98 %` of the values in its blocks quantized, `refused: …` or `FAIL: …`."""
    kind, output = save_model(name, folder / "model"), folder / "out"
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(3, VOCABULARY, (40,), generator=generator) for _ in range(8)]
    cpu = torch.device("cpu")
    try:
        config, _ = within_reach(folder / "model", QuantizationConfig.from_preset(preset), cpu)  # as the command does
        quantize_model(folder / "model", output, config, samples, device=cpu)
    except MarlinGPTQError as error:
        return f"refused: {str(error).replace(str(folder), '…')}"
    ids = torch.stack(samples[:2])[:, :TOKENS]
    quantized, model = load(kind, output), load(kind, folder / "model", dtype=torch.float32)
    wanted = put_back(model, quantized)
    with torch.no_grad():
        apart = float((quantized(ids).logits - wanted(ids).logits).norm() / wanted(ids).logits.norm())
        if not apart < 1e-4:
            return f"FAIL: logits {apart:.2g} from those of the decoded weights"
    if wrong := wrongly_measured(quantized, output, ids) or wrongly_written(quantized, ids):
        return f"FAIL: {wrong}"
    packed = sum(layer.in_features * layer.out_features for layer in packed_layers(quantized).values())
    inside = sum(matrix.numel() for matrix in decoder_blocks(model, model.config)[1].parameters() if matrix.dim() >= 2)
    return f"works: {100 * packed / inside:.0f} %"


def packed_layers(model: nn.Module) -> dict[str, MarlinLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, MarlinLinear)}


@torch.no_grad()
def put_back(model: Any, quantized: nn.Module) -> Any:
    """Give the full-precision model the decoded weights of the quantized one, and its others: norms may be tuned."""
    split_projections(quantized)
    own = dict(model.named_parameters())
    for name, parameter in quantized.named_parameters():
        if name in own:
            own[name].copy_(parameter)
    for name, layer in packed_layers(quantized).items():
        weight = layer.dequantize()
        layers, _, expert = name.partition(".experts.")
        if not expert:
            model.get_submodule(name).weight.copy_(weight)
            continue
        number, own = expert.split(".")
        position = quantized.get_submodule(f"{layers}.experts.{number}").names.index(own)  # gate, up, down
        experts: Any = model.get_submodule(f"{layers}.experts")
        whole = experts.down_proj if position == 2 else experts.gate_up_proj
        rows = slice(None) if position == 2 else slice(position * len(weight), (position + 1) * len(weight))
        whole[int(number), rows] = weight
    return model


@torch.no_grad()
def wrongly_measured(model: Any, directory: Path, ids: Tensor) -> str:
    """How the loss block by block differs from that of one forward; empty if it does not."""
    streamed = stream_nll(BlockStream(directory, device=torch.device("cpu")), list(ids))
    logs = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    whole = -float(logs.gather(-1, ids[:, 1:, None]).double().sum())
    return "" if abs(streamed / whole - 1) < 1e-4 else f"the loss is {streamed:.5f} block by block, {whole:.5f} in one"


@torch.no_grad()
def wrongly_written(model: Any, ids: Tensor, count: int = 6) -> str:
    """The greedy text with a cache and without, if they differ."""
    decoder = Decoder(model, len(ids), ids.shape[1] + count)
    decoder.prefill(ids)
    found = [decoder.tokens.clone()]
    while len(found) < count:
        decoder.step()
        found.append(decoder.tokens.clone())
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    written, wanted = torch.stack(found, dim=1).tolist(), ids[:, -count:].tolist()
    return "" if written == wanted else f"the text with a cache is {written}, without {wanted}"


def table(results: dict[str, dict[str, str]]) -> str:
    """The table of docs/architectures.md, and below it the sentences of what is refused, by number."""
    said = [result.removeprefix("refused: ") for row in results.values() for result in row.values()]
    refusals = [sentence for sentence in dict.fromkeys(said) if not sentence.startswith(("works: ", "FAIL: "))]

    def cell(result: str) -> str:
        sentence = result.removeprefix("refused: ")
        return f"refused [{refusals.index(sentence) + 1}]" if sentence in refusals else result.removeprefix("works: ")

    lines = ["| architecture | `marlin` | `fast` |", "|---|---|---|"]
    lines += [f"| {name} | {' | '.join(cell(result) for result in row.values())} |" for name, row in results.items()]
    return "\n".join([*lines, "", *(f"[{number}] `{sentence}`\n" for number, sentence in enumerate(refusals, 1))])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", nargs="+", metavar="NAME", choices=[*ARCHITECTURES], help="print these alone")
    only = options.parse_args().only
    logging.getLogger("marlin_gptq").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    results: dict[str, dict[str, str]] = {}
    for name in only or ARCHITECTURES:
        results[name] = {}
        for preset in ("marlin", "fast"):
            folder = Path(tempfile.mkdtemp())
            try:
                results[name][preset] = judge(name, preset, folder)
            except Exception as error:  # whatever it is belongs into the table
                results[name][preset] = f"FAIL: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            finally:
                shutil.rmtree(folder)
            print(f"{name}, {preset}: {results[name][preset]}", flush=True)
    if not only:
        text = TABLE.read_text("utf-8")
        TABLE.write_text(re.sub(r"\| architecture .*", lambda _: table(results), text, flags=re.DOTALL), "utf-8")
    sys.exit(any(result.startswith("FAIL") for row in results.values() for result in row.values()))


if __name__ == "__main__":
    main()
