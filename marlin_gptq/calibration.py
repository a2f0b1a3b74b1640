"""Calibration samples: whole documents of their natural lengths, as token ids.

The seed recipe feeds each document alone, with its own length: no padding (padded positions would enter the
Hessian), no concatenation (attention would cross documents), no truncation. Longer documents are left out.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlin_gptq.errors import InputError
from marlin_gptq.text_files import paragraphs
from marlin_gptq.text_sources import Split, load_documents

__all__ = [
    "DEFAULT_SEQ_LEN",
    "CalibrationWarning",
    "Split",
    "all_token_ids",
    "calibration_samples",
    "load_documents",
    "load_tokenizer",
    "sequence_length",
    "shuffled",
    "token_ids",
]

DEFAULT_SEQ_LEN = 4096
SHUFFLE_BUFFER = 4096
TRIES_PER_SAMPLE = 64
# Documents tokenized by one call, which spreads them over the cores: what a tokenizer returns takes a lot of memory.
AT_ONCE = 64


class CalibrationWarning(UserWarning):
    """Fewer samples than asked for."""


def calibration_samples(
    tokenizer: Any,
    dataset: str,
    *,
    n_samples: int,
    seq_len: int,
    seed: int,
    special_tokens: bool = False,
    offline: bool = False,
) -> list[Tensor]:
    """`n_samples` documents of 2..`seq_len` tokens, shuffled by `seed`: int64 tensors [T], each T its own.

    Each document is tokenized whole, without the special tokens that the tokenizer would add (a <s> in front, say)
    unless `special_tokens` (why: docs/benchmarks.md). A .txt file is
    one document; one that exceeds `seq_len` is cut at its blank lines. Warns (CalibrationWarning) when there are
    fewer; raises InputError when there are none.
    """
    if n_samples < 1:
        raise InputError(f"n_samples: got {n_samples}, expected at least 1")
    if seq_len < 2:
        raise InputError(f"seq_len: got {seq_len}, expected at least 2 tokens")
    documents = load_documents(dataset, split="calibration", offline=offline)
    if dataset.lower().endswith(".txt"):
        documents = _fitting(tokenizer, documents, seq_len, special_tokens)

    samples: list[Tensor] = []
    lengths: list[int] = []
    # A stream in which hardly anything fits would otherwise be read to its end.
    tries = max(SHUFFLE_BUFFER, TRIES_PER_SAMPLE * n_samples)
    order = shuffled(documents, seed)
    # Never more at once than are still wanted, so that no document is read or tokenized in vain.
    while wanted := min(n_samples - len(samples), tries - len(lengths), AT_ONCE):
        found = all_token_ids(tokenizer, list(islice(order, wanted)), special_tokens)
        if not found:
            break
        lengths += map(len, found)
        samples += (ids for ids in found if 2 <= len(ids) <= seq_len)
    if len(samples) < n_samples:
        _complain(dataset, lengths, len(samples), n_samples, seq_len)
    return samples


def shuffled(documents: Iterable[str], seed: int, buffer: int = SHUFFLE_BUFFER) -> Iterator[str]:
    """The documents in an order that depends on `seed` alone.

    Up to `buffer` documents wait; each next one of the stream takes the place of one of them, at random. A
    source of at most `buffer` documents is shuffled perfectly.
    """
    rng = random.Random(seed)
    waiting: list[str] = []
    for document in documents:
        if len(waiting) < buffer:
            waiting.append(document)
            continue
        place = rng.randrange(buffer)
        yield waiting[place]
        waiting[place] = document
    rng.shuffle(waiting)
    yield from waiting


def token_ids(tokenizer: Any, text: str, special_tokens: bool = True) -> Tensor:
    """int64 [T]: `text` tokenized whole, with the special tokens that the tokenizer adds or without."""
    # verbose: a warning that the text exceeds the model's context means nothing, it is cut or left out.
    return torch.tensor(tokenizer(text, add_special_tokens=special_tokens, verbose=False).input_ids, dtype=torch.int64)


def all_token_ids(tokenizer: Any, texts: list[str], special_tokens: bool = True) -> list[Tensor]:
    """`token_ids` of each text, by one call: tokenizers written in Rust take as many cores as there are."""
    if not texts:
        return []
    ids = tokenizer(texts, add_special_tokens=special_tokens, verbose=False).input_ids
    return [torch.tensor(one, dtype=torch.int64) for one in ids]


def load_tokenizer(model_dir: Path) -> Any:
    """The tokenizer of a model directory; InputError if there is none that transformers can use."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{model_dir}: no tokenizer that transformers can load ({reason}); "
            "tokenizer.json or tokenizer.model is needed"
        ) from error


def sequence_length(asked: int | None, context: int | None) -> int:
    """`asked`, or 4096 clipped to the model's `context`; InputError for less than 2 or too many."""
    if asked is None:
        return min(DEFAULT_SEQ_LEN, context or DEFAULT_SEQ_LEN)
    if asked < 2:
        raise InputError(f"seq_len: got {asked}, expected at least 2 tokens")
    if context is not None and asked > context:
        raise InputError(f"seq_len: got {asked}, the model's context (max_position_embeddings) holds {context} tokens")
    return asked


def _fitting(tokenizer: Any, documents: Iterator[str], seq_len: int, special_tokens: bool) -> Iterator[str]:
    for text in documents:
        if len(token_ids(tokenizer, text, special_tokens)) <= seq_len:
            yield text
        else:
            yield from paragraphs(text)


def _complain(dataset: str, lengths: list[int], found: int, n_samples: int, seq_len: int) -> None:
    if not lengths:
        raise InputError(f"dataset: {dataset} is empty; calibration needs documents of 2 to {seq_len} tokens")
    count = "one document was" if len(lengths) == 1 else f"{len(lengths)} documents were"
    seen = f"{count} read, {min(lengths)} to {max(lengths)} tokens long"
    too_long = sum(length > seq_len for length in lengths)
    if too_long == len(lengths):
        raise InputError(f"dataset: {dataset}: all too long: {seen}; calibration needs 2 to {seq_len}, raise seq_len")
    if not found:
        raise InputError(
            f"dataset: {dataset}: no usable sample: {seen}, {len(lengths) - too_long} of them shorter than "
            f"2; calibration needs documents of 2 to {seq_len} tokens"
        )
    message = f"calibration: {found} samples of {n_samples}: {seen}, those of 2 to {seq_len} tokens are used"
    warnings.warn(message, CalibrationWarning, stacklevel=3)
