"""marlin-generate: streams the tokens that transformers' generate makes, and names bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from character_model import character_tokenizer, save_character_model
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM, AutoTokenizer

from marlin_gptq import InputError, QuantizationConfig, quantize_model
from marlin_gptq.cli.generate import main
from marlin_gptq.eval.generation import Generation, Pieces, continue_text, end_tokens, prompt_ids
from marlin_gptq.eval.whole_model import load_whole

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_character_model(tmp_path_factory.mktemp("character-model"), eos_token_id=95)


@pytest.fixture(scope="module")
def quantized_dir(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("generate") / "out"
    quantize_model(tiny_llama, output, QuantizationConfig(method="rtn"), [], device=CPU)
    return output


def run(*arguments: Any, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in (*arguments, "--device", "cpu")], input=stdin)


def refused(*arguments: Any, stdin: str | None = None) -> str:
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    return result.stderr.strip().split("\n")[-1].removeprefix("error: ")


def test_a_quantized_model_writes_what_generate_writes(quantized_dir: Path, tmp_path: Path) -> None:
    prompt = "The history of the"
    result = run(quantized_dir, "-p", prompt, "--max-new-tokens", 12)
    assert result.exit_code == 0, result.output
    model, tokenizer = load_whole(quantized_dir, CPU), AutoTokenizer.from_pretrained(quantized_dir)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert prompt + result.stdout.removesuffix("\n") == tokenizer.decode(expected[0], skip_special_tokens=True)
    assert f"12 tokens after {ids.shape[1]}: first after" in result.stderr
    assert "tokens/s (reference path in plain torch (device cpu))" in result.stderr

    whole = run(quantized_dir, "-p", "-", "--max-new-tokens", 12, "--no-stream", stdin=prompt)
    assert whole.stdout == result.stdout
    (tmp_path / "prompt.txt").write_text(prompt)
    content = json.loads(
        run(quantized_dir, "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 12, "--json").stdout
    )
    assert content["text"] == result.stdout.removesuffix("\n") and content["prompt"] == prompt
    assert content["new_tokens"] == 12 and content["finish_reason"] == "length"
    assert content["tokens_per_second"] > 0 and content["prompt_tokens"] == ids.shape[1]


def test_draws_follow_the_seed(model_dir: Path) -> None:
    arguments = (model_dir, "-p", "abc", "--max-new-tokens", 20, "--temperature", 1.5, "--top-p", 0.9)
    one, again, other = (run(*arguments, "--seed", seed).stdout for seed in (1, 1, 2))
    assert one == again and one != other


def test_a_format_that_transformers_lacks_a_package_for(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> None:
            raise ImportError("Loading a GPTQ quantized model requires optimum")

    monkeypatch.setattr("marlin_gptq.eval.whole_model.auto_class_of", lambda _: Missing)
    result = run(model_dir, "-p", "abc")
    assert result.exit_code == 2
    assert f"requires optimum; marlin-convert {model_dir} -o OUT --to marlin makes" in result.stderr


def test_the_end_of_text_ends_it(model_dir: Path) -> None:
    model, tokenizer = load_whole(model_dir, CPU), AutoTokenizer.from_pretrained(model_dir)
    ids = [1, 5, 9]
    tokens = model.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0, 3:].tolist()
    stop = tokens[20]
    model.generation_config.eos_token_id = [stop, 3]
    assert end_tokens(model) == {stop, 3}
    account = Generation()
    pieces = list(continue_text(model, tokenizer, ids, 30, generation=account))
    before = tokens[: tokens.index(stop)]
    assert account.finish_reason == "stop" and account.new_tokens == len(before) + 1
    assert "".join(pieces) == account.text
    assert tokenizer.decode(ids + before, skip_special_tokens=True).endswith(account.text)


def test_the_context_limits_the_answer(model_dir: Path) -> None:
    result = run(model_dir, "-p", "x" * 250, "--max-new-tokens", 20, "--json")
    assert "note: the context leaves room for 5 new tokens, not 20" in result.stderr  # 256 − 250 − <s>
    assert json.loads(result.stdout)["new_tokens"] <= 5
    assert "prompt: got 301 tokens, the model's context (max_position_embeddings) holds 256" in refused(
        model_dir, "-p", "x" * 300
    )


def test_a_chat_template_is_used_if_there_is_one(model_dir: Path, tmp_path: Path) -> None:
    assert "its tokenizer has no chat template, or several and no default; leave --chat out" in refused(
        model_dir, "-p", "hi", "--chat"
    )
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "<s>Q:{{ messages[0]['content'] }}{% if add_generation_prompt %}A:{% endif %}"
    ids = prompt_ids(tokenizer, "hi", chat=True)
    assert tokenizer.decode(ids).replace(" ", "") == "<s>Q:hiA:" and ids.count(1) == 1
    chatty = tmp_path / "chatty"
    save_character_model(chatty)
    tokenizer.save_pretrained(chatty)
    lengths = [
        json.loads(run(chatty, "-p", "hi", "--max-new-tokens", 2, "--json", *more).stdout)["prompt_tokens"]
        for more in ((), ("--no-chat",))
    ]
    assert lengths == [len(ids), 3]


def test_characters_of_several_tokens_come_whole(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = "Zoë  said: 你好, мир!\n\n  Good\tbye — 🙂."
    prompt = tokenizer("Once upon").input_ids
    ids = tokenizer(f"Once upon {text}").input_ids[len(prompt) :]
    pieces = Pieces(tokenizer, prompt)
    shown = [pieces.add([token]) for token in ids] + [pieces.add([], last=True)]
    assert "".join(shown) == f" {text}" and not any("\ufffd" in piece for piece in shown)
    assert "" in shown  # some tokens were held back
    cut = Pieces(tokenizer, prompt)
    first_bytes = tokenizer("🙂", add_special_tokens=False).input_ids[:-1]
    assert cut.add(first_bytes) == "" and "\ufffd" in cut.add([], last=True)


def test_chat_templates_that_do_not_fit_a_single_turn(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = {"tool_use": "{{ messages[0]['content'] }}"}
    save_character_model(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert run(tmp_path, "-p", "hi", "--max-new-tokens", 1).exit_code == 0  # none of them is the default
    assert "or several and no default" in refused(tmp_path, "-p", "hi", "--chat")
    tokenizer.chat_template = "{{ raise_exception('a system turn is needed') }}"
    tokenizer.save_pretrained(tmp_path)
    assert refused(tmp_path, "-p", "hi").startswith("chat template: fails for a single turn of the user (a system turn")


def test_bad_inputs(model_dir: Path, tmp_path: Path) -> None:
    assert "prompt: got none or two, expected one of" in refused(model_dir)
    assert "prompt: got none or two, expected one of" in refused(model_dir, "-p", "a", "--prompt-file", "b")
    assert f"{tmp_path}/none: no such file" in refused(model_dir, "--prompt-file", tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert "bytes is no UTF-8 text but UTF-16; convert it" in refused(model_dir, "--prompt-file", tmp_path / "bytes")
    assert refused(model_dir, "-p", "caf\udce9") == "prompt is no UTF-8 text (byte 3); convert it first"
    assert "no such directory" in refused("./nowhere", "-p", "a")
    assert "--top-p" in refused(model_dir, "-p", "a", "--top-p", 2)
    small = tmp_path / "small"
    save_character_model(small, vocab_size=40)
    assert "tokenizer: made token" in refused(small, "-p", "xyz")
    with pytest.raises(InputError, match="prompt: got an empty one"):
        prompt_ids(lambda *_, **__: type("Encoding", (), {"input_ids": []}), "", chat=False)


def test_examples_stand_in_the_help() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0 and 'marlin-generate llama-2-7b-marlin -p "Once upon a time"' in result.output


def test_full_precision_models_run_too(model_dir: Path) -> None:
    content = json.loads(run(model_dir, "-p", "abc", "--max-new-tokens", 5, "--json").stdout)
    assert content["kernel"] == "full precision (no quantized layers)"
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer("abc", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)[0]
    whole = tokenizer.decode(expected, skip_special_tokens=True)
    assert whole == tokenizer.decode(ids[0], skip_special_tokens=True) + content["text"]
