"""Text in, text out: one prompt continued, piece by piece."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jinja2 import TemplateError

from marlin_gptq.errors import InputError
from marlin_gptq.modeling.architecture import context_length
from marlin_gptq.modeling.classes import text_config
from marlin_gptq.modeling.decoding import Decoder, why_not
from marlin_gptq.modeling.sampling import sample

WINDOW = 8  # tokens before the new ones that are decoded with them: a tokenizer may join or space them
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass
class Generation:
    """What `continue_text` has done so far.

    finish_reason: "stop" (the model ended its text), "length" (max_new_tokens, or the context is full), "" (running).
    prompt_seconds: to the first token; decode_seconds: for the tokens after it.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    finish_reason: str = ""
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    text: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first; 0 if there are none."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 and self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}


def prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Token ids of a prompt; with `chat` as the user's turn in the tokenizer's own template. InputError if empty."""
    if chat:
        turns = [{"role": "user", "content": prompt}]
        try:
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except (TemplateError, ValueError) as error:  # templates refuse turns that they do not know
            said = " ".join(str(error).split())
            raise InputError(f"chat template: fails for a single turn of the user ({said}); use --no-chat") from error
        ids = tokenizer(text, add_special_tokens=False).input_ids  # the template has written them
    else:
        ids = tokenizer(prompt).input_ids
    if not ids:
        raise InputError("prompt: got an empty one, at least one token is needed")
    return list(ids)


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template to use unasked: of several the one called `default`."""
    template = getattr(tokenizer, "chat_template", None)
    return "default" in template if isinstance(template, dict) else bool(template)


def room(model: Any, tokens: int, max_new_tokens: int) -> int:
    """How many of `max_new_tokens` the context has room for after a prompt of `tokens`; InputError for none."""
    context = context_length(text_config(model.config))
    if context is not None and tokens >= context:
        raise InputError(
            f"prompt: got {tokens} tokens, the model's context (max_position_embeddings) holds {context}, and the "
            "answer needs room too; use a shorter prompt"
        )
    return max_new_tokens if context is None else min(max_new_tokens, context - tokens)


def continue_text(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    graphs: bool = True,
    generation: Generation | None = None,
) -> Iterator[str]:
    """The continuation of the prompt `ids` in pieces, each as soon as it is certain; `generation` keeps account.

    Drawn by `temperature` and `top_p` (see `sample`) with `seed`. Decode steps are CUDA graphs where that works, if
    `graphs` is true. The end-of-text token ends it and is not part of it.
    """
    account = Generation() if generation is None else generation
    account.prompt_tokens = len(ids)
    device = next(model.parameters()).device
    length = len(ids) + max_new_tokens
    generator = torch.Generator(device).manual_seed(seed)
    recorded = graphs and not why_not(model, length, graphs=True, compiled=False)
    decoder = Decoder(model, 1, length, graphs=recorded)
    pieces = Pieces(tokenizer, ids)
    ends = end_tokens(model)

    started = time.perf_counter()
    logits = decoder.prefill(torch.tensor([ids], device=device))
    while True:
        if temperature:
            decoder.tokens.copy_(sample(logits, temperature, top_p, generator))
        token = int(decoder.tokens)  # waits for the device
        now = time.perf_counter()
        if account.new_tokens == 0:
            account.prompt_seconds, first = now - started, now
        account.decode_seconds = now - first
        account.new_tokens += 1
        if token in ends:
            account.finish_reason = "stop"
        elif account.new_tokens == max_new_tokens:
            account.finish_reason = "length"
        piece = pieces.add([] if token in ends else [token], last=bool(account.finish_reason))
        account.text += piece
        if piece:
            yield piece
        if account.finish_reason:
            return
        logits = decoder.step()


def end_tokens(model: Any) -> set[int]:
    """Ids that end a text, from generation_config.json or config.json."""
    for holder in (getattr(model, "generation_config", None), model.config):
        found = getattr(holder, "eos_token_id", None)
        if found is not None:
            return set(found) if isinstance(found, list) else {found}
    return set()


class Pieces:
    """Token ids to text as they come. A character that takes several tokens appears when it is whole, and spaces
    between tokens are those of the whole text, because a few tokens before are decoded along."""

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._shown = len(prompt)  # tokens whose text is out

    def add(self, ids: list[int], last: bool = False) -> str:
        """The text that these tokens make certain; with `last` all that is left."""
        self._ids += ids
        start = max(0, self._shown - WINDOW)
        before, whole = self._text(start, self._shown), self._text(start, len(self._ids))
        if not last and whole.endswith(INCOMPLETE):
            return ""
        self._shown = len(self._ids)
        return whole[len(before) :]

    def _text(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(
            self._ids[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
