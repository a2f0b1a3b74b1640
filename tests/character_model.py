"""A tiny random Llama with a tokenizer of single characters: every length in a test can be counted by eye."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from helpers import save_tiny_model

PRINTABLE = [chr(code) for code in range(32, 126)]  # 94 of them, after <s> and <unk>: a vocabulary of 96


def character_tokenizer() -> Any:
    """One token a character, <s> in front, as Llama's tokenizer puts it."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1} | {character: index + 2 for index, character in enumerate(PRINTABLE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def tokenizer_without_ends() -> Any:
    """One token a character and not a single special one, of 95."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    unknown = "\N{REPLACEMENT CHARACTER}"
    vocabulary = {character: index for index, character in enumerate([*PRINTABLE, unknown])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def save_character_model(directory: Path, dtype: torch.dtype = torch.float16, **changes: Any) -> Path:
    """A complete Hugging Face directory: hidden 128, two blocks, context 256."""
    save_tiny_model(directory, dtype=dtype, **changes)
    character_tokenizer().save_pretrained(directory)
    return directory


def save_texts(path: Path) -> Path:
    """Eight documents for it, each longer than the one before."""
    path.write_text("".join(json.dumps({"text": f"document {i} " * (i + 1)}) + "\n" for i in range(8)))
    return path
