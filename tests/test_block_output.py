"""modeling/block_output.py and asides.py: what stands in for a block returns the kind of thing that the block does."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from marlin_gptq.errors import InputError
from marlin_gptq.modeling.block_output import hidden_of, output_like
from marlin_gptq.modeling.blocks import BlockStream

CPU = torch.device("cpu")
Pair = namedtuple("Pair", ["states", "weights"])
KINDS = {
    "tensor": lambda hidden: hidden,
    "tuple of one": lambda hidden: (hidden,),
    "tuple": lambda hidden: (hidden, None, torch.zeros(3)),
    "list": lambda hidden: [hidden, None],
    "named tuple": lambda hidden: Pair(hidden, None),
    "ModelOutput": lambda hidden: BaseModelOutput(last_hidden_state=hidden),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stand_in_is_of_the_same_kind(kind: str) -> None:
    example, hidden = KINDS[kind](torch.ones(1)), torch.zeros(2)
    made = output_like(example, hidden)
    assert type(made) is type(example) and hidden_of(made) is hidden
    if not isinstance(example, Tensor | dict):
        assert len(made) == len(example)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_such_blocks_is_streamed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six of them: a tensor taken for a tuple loses an axis at each, which two blocks do not show."""
    directory = save_tiny_model(tmp_path / "model", dtype=torch.float32, num_hidden_layers=6)
    ids = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids).logits
    own, kept = LlamaDecoderLayer.forward, type(KINDS[kind](torch.ones(1)))

    def forward(
        model: Any, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPast:
        hidden = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        turns = model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        for block in model.layers:
            output = block(hidden, position_embeddings=turns)
            assert type(output) is kept
            hidden = hidden_of(output)
        return BaseModelOutputWithPast(last_hidden_state=model.norm(hidden))

    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda *args, **kwargs: KINDS[kind](own(*args, **kwargs)))
    monkeypatch.setattr(LlamaModel, "forward", forward)
    stream = BlockStream(directory, device=CPU)
    hidden = stream.embed(ids)
    for index in range(stream.n_blocks):
        with stream.block(index):
            hidden = stream.run(index, hidden)
    torch.testing.assert_close(stream.head(hidden), expected)
    torch.testing.assert_close(BlockStream(directory, device=CPU).head(hidden), expected)  # no block was entered yet


def test_blocks_that_hand_each_other_more_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = LlamaDecoderLayer.forward

    def forward(model: Any, inputs_embeds: Tensor, **_: Any) -> None:
        hidden, beside = inputs_embeds, None
        for block in model.layers:
            hidden, beside = block(hidden, beside, position_embeddings=model.rotary_emb(hidden, torch.arange(2)[None]))

    def block(layer: Any, hidden: Tensor, beside: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return own(layer, hidden, **kwargs), hidden

    monkeypatch.setattr(LlamaModel, "forward", forward)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", block)
    stream = BlockStream(save_tiny_model(tmp_path / "model"), device=CPU)
    with stream.block(0), pytest.raises(InputError, match="its decoder blocks hand each other more than hidden states"):
        stream.run(0, torch.zeros(1, 2, 128))


def test_blocks_that_get_more_of_a_token_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Gemma 3n, which embeds each token once more for every block."""

    def forward(model: Any, inputs_embeds: Tensor, **_: Any) -> None:
        model.layers[0](inputs_embeds, per_layer_input=2 * inputs_embeds)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    directory = save_tiny_model(tmp_path / "model")
    with pytest.raises(InputError, match="get more of each token than its hidden state"):
        BlockStream(directory, device=CPU)


def test_a_model_may_ask_where_its_embedding_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Llama 4, which moves the ids to the device of the embedding before it calls that."""
    own = LlamaModel.forward

    def forward(model: Any, input_ids: Tensor, **settings: Any) -> Any:
        embedded = model.embed_tokens(input_ids.to(model.embed_tokens.weight.device))
        return own(model, **(settings | {"inputs_embeds": embedded}))

    directory = save_tiny_model(tmp_path / "model", dtype=torch.float32)
    ids = torch.randint(0, 96, (1, 20), generator=torch.Generator().manual_seed(0))
    wanted = AutoModelForCausalLM.from_pretrained(directory).get_input_embeddings()(ids)
    stream = BlockStream(directory, device=CPU)
    monkeypatch.setattr(LlamaModel, "forward", forward)
    torch.testing.assert_close(stream.embed(ids), wanted)
