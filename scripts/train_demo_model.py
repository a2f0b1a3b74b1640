#!/usr/bin/env python3
"""Train a small Llama from scratch, with the recipe that made examples/tiny-llama (one GPU, minutes).

    prepare   .jsonl files, one {"text": ...} a line, and a SentencePiece model → flat uint16 token files
    train     one of the PRESETS on train.bin → a Hugging Face checkpoint (fp16) and train_log.json

    python scripts/train_demo_model.py prepare --tokenizer tokenizer.model \\
        --jsonl train.jsonl val.jsonl --data build/tokens
    python scripts/train_demo_model.py train --model tiny --data build/tokens --out build/tiny-llama

Plain PyTorch: fp32 master weights, bf16 autocast, AdamW, linear warm-up and cosine decay over a fixed
wall-clock budget.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from demo_llama import Llama, Shape
from torch import Tensor, nn


@dataclass(frozen=True)
class Preset:
    shape: Shape
    learning_rate: float
    batch: int


PRESETS = {  # every linear has in_features % 128 == 0 and out_features % 256 == 0: no kernel has to pad
    "tiny": Preset(Shape(hidden=256, intermediate=768, layers=4, heads=4, kv_heads=4), 3e-3, 64),
    "small": Preset(Shape(hidden=512, intermediate=1536, layers=8, heads=8, kv_heads=4), 1.8e-3, 64),
}


def encode(job: tuple[str, list[str]]) -> np.ndarray:
    """<s> text </s> for each line of a .jsonl file, joined: uint16 [tokens]."""
    import sentencepiece

    model, lines = job
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=model)
    ids: list[int] = []
    for line in lines:
        ids += [tokenizer.bos_id(), *tokenizer.encode(json.loads(line)["text"]), tokenizer.eos_id()]
    return np.asarray(ids, dtype=np.uint16)


def prepare(arguments: argparse.Namespace) -> None:
    arguments.data.mkdir(parents=True, exist_ok=True)
    with Pool(os.cpu_count()) as pool:
        for path in arguments.jsonl:
            lines = path.read_text("utf-8").splitlines()
            jobs = [(str(arguments.tokenizer), lines[i : i + 64]) for i in range(0, len(lines), 64)]
            tokens = np.concatenate(pool.map(encode, jobs, chunksize=1))
            tokens.tofile(arguments.data / f"{path.stem}.bin")
            print(f"{path.stem}: {len(lines)} documents, {len(tokens) / 1e6:.2f} M tokens", flush=True)


def read_tokens(path: Path) -> Tensor:
    return torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int32))


def batches(tokens: Tensor, length: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless; every epoch takes all non-overlapping windows from a random offset, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    span = torch.arange(length + 1, device=tokens.device)
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        order = torch.randperm((len(tokens) - offset - 1) // length, generator=generator)
        for chosen in order.split(batch)[: len(order) // batch]:
            window = tokens[(offset + chosen.to(tokens.device) * length)[:, None] + span].long()
            yield window[:, :-1], window[:, 1:]


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, length: int, device: torch.device, batch: int = 16) -> float:
    """GPTQ's protocol: non-overlapping windows, the first token of each unscored, float32 arithmetic."""
    windows = tokens[: len(tokens) // length * length].view(-1, length).long()
    total = sum(float(model(w[:, :-1], w[:, 1:])) * len(w) for w in windows.to(device).split(batch))
    return math.exp(total / len(windows))


def save(model: Llama, out: Path) -> None:
    """fp16 safetensors and config.json, as LlamaForCausalLM reads them."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    shape = model.shape
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        rms_norm_eps=shape.eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    target = LlamaForCausalLM(config)
    missing, unexpected = target.load_state_dict(model.state_dict(), strict=False)
    if unexpected or missing != ["lm_head.weight"]:  # the head is the embedding
        raise RuntimeError(f"state dict: missing {missing}, unexpected {unexpected}")
    target.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2)
    target.half().save_pretrained(out)


def learning_rate_factor(progress: float) -> float:
    """Warm-up over the first 2 %, then a cosine down to 2 %."""
    return min(1.0, (progress + 1e-4) / 0.02) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))


def train_step(
    model: Llama, optimizer: torch.optim.Optimizer, compiled: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """The function (ids, targets, learning rate) → loss that does one step."""
    device_type = next(model.parameters()).device.type

    def step(ids: Tensor, targets: Tensor, learning_rate: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        with torch.autocast(device_type, torch.bfloat16):
            loss = compiled(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    preset, length = PRESETS[arguments.model], arguments.length
    tokens = read_tokens(arguments.data / "train.bin").to(device)
    model = Llama(preset.shape).to(device)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=device.type == "cuda")
    step = train_step(model, optimizer, torch.compile(model) if device.type == "cuda" else model)
    source = batches(tokens, length, preset.batch, arguments.seed)

    step(*next(source), preset.learning_rate * 1e-4).item()  # compiles, outside the budget of time
    started, steps, progress, average, log = time.perf_counter(), 1, 0.0, math.nan, []
    while progress < 1:
        loss = step(*next(source), preset.learning_rate * learning_rate_factor(progress))
        steps += 1
        if steps % 100 == 0 or device.type == "cpu":
            average = loss.item() if math.isnan(average) else 0.9 * average + 0.1 * loss.item()
            if not math.isfinite(average):
                raise RuntimeError(f"step {steps}: the training loss is {average}")
            log.append({"step": steps, "seconds": round(time.perf_counter() - started, 1), "loss": round(average, 4)})
            print(json.dumps(log[-1]), flush=True)
        progress = (time.perf_counter() - started) / arguments.seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    save(model, arguments.out)

    torch.set_float32_matmul_precision("highest")
    validation = read_tokens(arguments.data / "val.bin")
    report = {
        "model": arguments.model,
        "shape": asdict(preset.shape),
        "learning_rate": preset.learning_rate,
        "batch": preset.batch,
        "length": length,
        "steps": steps,
        "tokens": steps * preset.batch * length,
        "seconds": time.perf_counter() - started,
        "validation_perplexity_fp32": perplexity(model, validation, length, device),
        "log": log,
    }
    (arguments.out / "train_log.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "log"}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("prepare")
    one.add_argument("--tokenizer", type=Path, required=True, help="a SentencePiece model with <s> and </s>")
    one.add_argument("--jsonl", type=Path, nargs="+", required=True, help="train.jsonl and val.jsonl")
    one.add_argument("--data", type=Path, required=True, help="folder for the token files")
    one.set_defaults(run=prepare)
    two = commands.add_parser("train")
    two.add_argument("--model", choices=PRESETS, default="tiny")
    two.add_argument("--data", type=Path, required=True, help="folder with train.bin and val.bin")
    two.add_argument("--out", type=Path, required=True, help="the checkpoint; copy tokenizer.model beside it")
    two.add_argument("--seconds", type=float, default=205, help="training time (205 s on one H200 made tiny-llama)")
    two.add_argument("--length", type=int, default=2048, help="tokens per window")
    two.add_argument("--seed", type=int, default=0)
    two.set_defaults(run=train)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
