"""A text or documents as windows of tokens to score."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from marlin_gptq.calibration import shuffled, token_ids
from marlin_gptq.errors import InputError
from marlin_gptq.text_sources import is_local, is_whole_text, load_documents

STREAMED_DOCUMENTS = 256


def text_windows(
    tokenizer: Any, dataset: str, seq_len: int, *, n_samples: int | None, seed: int, offline: bool
) -> tuple[list[Tensor], str]:
    """The windows to score, int64 [T] each with 2 <= T <= seq_len, and the protocol in one sentence."""
    documents: Iterable[str] = load_documents(dataset, split="evaluation", offline=offline)
    if is_whole_text(dataset):
        ids = token_ids(tokenizer, "\n\n".join(documents))
        count = len(ids) // seq_len
        if not count:
            raise InputError(
                f"dataset: {dataset} has {len(ids)} tokens, fewer than one window of {seq_len}; "
                "give more text or a smaller seq_len"
            )
        windows = list(ids[: count * seq_len].view(count, seq_len))
        protocol = (
            f"whole text of {len(ids)} tokens in {count} non-overlapping windows of {seq_len}, tail of "
            f"{len(ids) - count * seq_len} dropped, first token of each window not scored"
        )
        return windows, protocol

    if n_samples is None and not is_local(dataset):
        n_samples = STREAMED_DOCUMENTS
    if n_samples is not None:
        documents = islice(shuffled(documents, seed), n_samples)
    lengths, windows = [], []
    for text in documents:
        ids = token_ids(tokenizer, text)
        lengths.append(len(ids))
        windows += [window for window in ids.split(seq_len) if len(window) >= 2]
    if not lengths:
        raise InputError(f"dataset: {dataset} is empty; perplexity needs a document of 2 or more tokens")
    if not windows:
        raise InputError(
            f"dataset: {dataset} has {len(lengths)} documents of at most {max(lengths)} token(s); "
            "perplexity needs one of 2 or more"
        )
    chosen = f" chosen by seed {seed}" if n_samples is not None else ""
    protocol = (
        f"{len(lengths)} documents{chosen}, each in non-overlapping windows of at most {seq_len} tokens, "
        "first token of each window not scored, every scored token weighted alike"
    )
    return windows, protocol


def equal_length_batches(windows: list[Tensor], batch_size: int | None, tokens_per_batch: int) -> list[Tensor]:
    """Windows of one length side by side, int64 [B, T] each: nothing is ever padded."""
    by_length: dict[int, list[Tensor]] = {}
    for window in windows:
        by_length.setdefault(len(window), []).append(window)
    batches = []
    for length, alike in sorted(by_length.items(), key=lambda item: -item[0]):  # memory runs out early or never
        size = batch_size or max(1, tokens_per_batch // length)
        batches += [torch.stack(alike[start : start + size]) for start in range(0, len(alike), size)]
    return batches


def require_vocabulary(windows: list[Tensor], vocab_size: int) -> None:
    """InputError for a tokenizer that makes tokens the model has no embedding for."""
    largest = max(int(window.max()) for window in windows)
    if largest >= vocab_size:
        raise InputError(
            f"tokenizer: got token {largest}, the model's vocabulary has {vocab_size}; "
            "the tokenizer in the directory belongs to another model"
        )
