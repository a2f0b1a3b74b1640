"""lm-eval's tasks on our models: loading, running, and what can go wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from character_model import character_tokenizer, save_character_model, tokenizer_without_ends
from helpers import save_tiny_model

from marlin_gptq.calibration import load_tokenizer
from marlin_gptq.config import QuantizationConfig
from marlin_gptq.errors import CheckpointError, InputError, MarlinGPTQError
from marlin_gptq.eval.harness import load_suite, open_model, run_suite
from marlin_gptq.eval.harness_model import marlin_model_class
from marlin_gptq.eval.original_checkpoint import load_original
from marlin_gptq.modeling.fused import Projection
from marlin_gptq.modeling.linear import MarlinLinear
from marlin_gptq.pipeline import quantize_model

CPU = torch.device("cpu")
CHOICE = """
task: {name}
custom_dataset: !function rows.{rows}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
GENERATE = """
task: copycat
custom_dataset: !function rows.short
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: prose
custom_dataset: !function rows.short
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
ROWS = """
import datasets

def _make(texts):
    rows = [{"question": text, "answer": n % 2} for n, text in enumerate(texts)]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})

def short(**_):
    return _make([f"Is {n} even? " for n in range(7)])

def long(**_):
    return _make(["short ", "x" * 300, "y" * 256])
"""


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.py").write_text(ROWS)
    (folder / "even.yaml").write_text(CHOICE.format(name="evenness", rows="short"))
    (folder / "long.yaml").write_text(CHOICE.format(name="long_winded", rows="long"))
    (folder / "copycat.yaml").write_text(GENERATE)
    (folder / "prose.yaml").write_text(ROLLING)
    (folder / "hub.yaml").write_text(
        CHOICE.format(name="from_the_hub", rows="short").replace(
            "custom_dataset: !function rows.short", "dataset_path: some/dataset"
        )
    )
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_character_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def quantized_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quantized") / "out"
    config = QuantizationConfig(method="rtn", group_size=64)
    quantize_model(
        model_dir, output, config, [], device=CPU, dtype=None, shard_size=10**9, overwrite=False, calibration={},
        progress=None,
    )  # fmt: skip
    return output


@pytest.fixture(scope="module")
def lm(model_dir: Path) -> Any:
    return open_model(model_dir, device=CPU)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 60)[None]).logits


def test_a_run_scores_each_question_by_its_likelihood(lm: Any, model_dir: Path, tasks_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    steps: list[tuple[int, int]] = []
    told: list[str] = []
    suite = load_suite(["evenness"], tasks_dir)
    (result,) = run_suite(lm, suite, progress=lambda *step: steps.append(step), finished=lambda r: told.append(r.task))
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(model_dir)
    scores = []
    for n in range(7):
        sums = []
        for choice in ("yes", "no"):
            # lm-eval keeps the blank at the end of a prompt with the answer
            prompt, whole = (tokenizer(text).input_ids for text in (f"Is {n} even?", f"Is {n} even?  {choice}"))
            ids = torch.tensor(whole)
            with torch.no_grad():
                logs = plain(ids[None, :-1]).logits[0].log_softmax(-1)
            sums.append(float(logs.gather(1, ids[1:, None])[len(prompt) - 1 :].sum()))
        scores.append(float(sums.index(max(sums)) == n % 2))
    assert result.scores["acc,none"] == scores
    assert result.metrics["acc,none"]["value"] == pytest.approx(sum(scores) / 7)
    assert result.metrics["acc,none"]["higher_is_better"] is True
    assert (result.questions, result.num_fewshot, result.truncated_prompts) == (7, 0, 0)
    assert told == ["evenness"] and steps == sorted(steps) and steps[-1] == (7, 7)


def test_few_shot_limit_and_seed(lm: Any, tasks_dir: Path) -> None:
    suite = load_suite(["evenness"], tasks_dir)
    (result,) = run_suite(lm, suite, num_fewshot=2, limit=3, seed=5)
    assert (result.questions, result.num_fewshot) == (3, 2)
    prompts = [instance.args[0] for instance in suite.tasks["evenness"].instances]
    assert all(prompt.count("even?") == 3 for prompt in prompts)
    run_suite(lm, suite, num_fewshot=2, limit=3, seed=5)
    assert prompts == [instance.args[0] for instance in suite.tasks["evenness"].instances]
    run_suite(lm, suite, num_fewshot=2, limit=3, seed=6)
    assert prompts != [instance.args[0] for instance in suite.tasks["evenness"].instances]


def test_generation_and_rolling_likelihood(lm: Any, tasks_dir: Path) -> None:
    results = run_suite(lm, load_suite(["copycat", "prose"], tasks_dir), limit=2)
    assert results[0].metrics["exact_match,none"]["value"] in (0, 0.5, 1)
    assert results[1].metrics["word_perplexity,none"]["value"] > 1
    assert "word_perplexity,none" not in results[1].scores  # no mean over questions: nothing to pair


def test_a_quantized_model_computes_what_perplexity_computes(quantized_dir: Path) -> None:
    """The same float32 arithmetic on a CPU as the block stream."""
    from marlin_gptq.modeling.blocks import BlockStream

    lm = open_model(quantized_dir, device=CPU)
    assert lm.kernel_name() == "reference path in plain torch (device cpu)"
    stream = BlockStream(quantized_dir, device=CPU)
    hidden = stream.embed(torch.arange(2, 60)[None])
    for index in range(stream.n_blocks):
        with stream.block(index):
            hidden = stream.run(index, hidden)
    torch.testing.assert_close(logits(lm.model), stream.head(hidden), rtol=1e-4, atol=1e-4)


def test_unknown_tasks_get_near_matches(tasks_dir: Path) -> None:
    with pytest.raises(InputError, match=r"task: got 'evennes', did you mean evenness"):
        load_suite(["evennes"], tasks_dir)
    with pytest.raises(InputError, match=r"task: no such file: none.yaml"):
        load_suite(["none.yaml"], tasks_dir)
    with pytest.raises(InputError, match="no such directory"):
        load_suite(["evenness"], tasks_dir / "nowhere")
    assert set(load_suite(["evenn*"], tasks_dir).tasks) == {"evenness"}
    assert set(load_suite([str(tasks_dir / "even.yaml")], tasks_dir).tasks) == {"evenness"}


def test_a_task_that_needs_the_network(tasks_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'some/dataset' on the Hub (offline)")

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", unreachable)
    with pytest.raises(InputError, match=r"from_the_hub: its dataset could not be read \(Couldn't reach .*--data-dir"):
        load_suite(["from_the_hub"], tasks_dir)


def test_prompts_longer_than_the_context(lm: Any, model_dir: Path, tasks_dir: Path) -> None:
    suite = load_suite(["long_winded"], tasks_dir)
    (result,) = run_suite(lm, suite)
    assert result.truncated_prompts == 2  # 300 and 256 characters and <s>; both choices share a prompt
    strict = open_model(model_dir, device=CPU, truncate=False)
    with pytest.raises(InputError, match=r"prompt: one has \d+ tokens, the model's context leaves room for 256"):
        run_suite(strict, suite)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    directory = save_character_model(tmp_path / "model", vocab_size=64)
    with pytest.raises(InputError, match="tokenizer: its largest token is 95, the model's vocabulary has 64"):
        open_model(directory, device=CPU)


def test_out_of_memory_names_the_batch_that_fits(
    model_dir: Path, tasks_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = open_model(model_dir, device=CPU, batch_size="8")
    forward = type(lm.model).forward
    room = 2

    def small(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(input_ids) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(lm.model), "forward", small)
    suite = load_suite(["evenness"], tasks_dir)
    with pytest.raises(MarlinGPTQError, match=r"memory: 8 sequences of \d+ tokens do not fit, 2 would: use --b"):
        run_suite(lm, suite)
    room = 0
    with pytest.raises(MarlinGPTQError, match="do not fit, nor does one"):
        run_suite(lm, suite)


def original_state_dict(model: Any) -> dict[str, torch.Tensor]:
    """As the original repository saves it: `B` and `s` for each quantized linear."""
    renamed = {"qweight": "B", "scales": "s"}
    content = {}
    for name, tensor in model.state_dict().items():
        owner, _, own = name.rpartition(".")
        quantized = isinstance(model.get_submodule(owner), (MarlinLinear, Projection))
        content[f"{owner}.{renamed[own]}" if quantized and own in renamed else name] = tensor
    content["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)  # old transformers kept it
    return content


@pytest.mark.parametrize("tied", [False, True])
def test_an_original_marlin_state_dict(model_dir: Path, quantized_dir: Path, tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    quantized = AutoModelForCausalLM.from_pretrained(quantized_dir)
    content = original_state_dict(quantized)
    base = model_dir
    if tied:
        base = tmp_path / "tied"
        base.mkdir()
        for file in model_dir.iterdir():
            (base / file.name).write_bytes(file.read_bytes())
        config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": True}
        (base / "config.json").write_text(json.dumps(config))
        quantized.lm_head.weight = quantized.model.embed_tokens.weight
        del content["lm_head.weight"]
    file = tmp_path / "checkpoint.marlin.g64"
    torch.save(content, file)
    loaded = load_original(base, file)
    layers = [module for module in loaded.modules() if isinstance(module, MarlinLinear)]
    assert len(layers) == 14 and {layer.group_size for layer in layers} == {64}
    torch.testing.assert_close(logits(loaded), logits(quantized), rtol=0, atol=0)
    lm = open_model(base, device=CPU, marlin_checkpoint=file)
    assert lm.kernel_name().startswith("reference path")
    torch.testing.assert_close(logits(lm.model), logits(quantized).float(), rtol=0.02, atol=0.02)


def test_state_dicts_that_do_not_fit(model_dir: Path, quantized_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    good = original_state_dict(AutoModelForCausalLM.from_pretrained(quantized_dir))
    q = "model.layers.0.self_attn.q_proj"
    file = tmp_path / "checkpoint"

    def refused(change: dict[str, Any], kind: type[Exception] = CheckpointError) -> str:
        content = {name: value for name, value in (good | change).items() if value is not None}
        torch.save(content, file)
        with pytest.raises(kind) as caught:
            load_original(model_dir, file)
        return str(caught.value)

    assert f"{q}.B has no {q}.s beside it" in refused({f"{q}.s": None})
    small = torch.zeros(4, 4, dtype=torch.int32)
    assert f"{q}.B: got [4, 4] torch.int32, expected [8, 256]" in refused({f"{q}.B": small})
    assert "got 3 groups, which do not divide 128" in refused({f"{q}.s": torch.zeros(3, 128, dtype=torch.float16)})
    assert "lacks model.norm.weight" in refused({"model.norm.weight": None})
    assert "holds model.extra, which the base model has not" in refused({"model.extra": torch.zeros(1)})
    assert "the base model has no linear model.layers.9.x" in refused({"model.layers.9.x.B": torch.zeros(1)})
    assert "expected [128] from the base" in refused({"model.norm.weight": torch.zeros(64)})
    torch.save({"a": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="holds no quantized linear"):
        load_original(model_dir, file)
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match="got a list, expected a dictionary of tensors"):
        load_original(model_dir, file)
    file.write_bytes(b"not a zip")
    with pytest.raises(CheckpointError, match="not a torch state dict that can be read safely"):
        load_original(model_dir, file)
    torch.save({"a": character_tokenizer()}, file)
    with pytest.raises(CheckpointError, match="not a torch state dict that can be read safely"):
        load_original(model_dir, file)
    with pytest.raises(InputError, match="no such file"):
        load_original(model_dir, tmp_path / "nowhere")
    with pytest.raises(InputError, match="is quantized already"):
        load_original(quantized_dir, file)


def test_the_model_is_registered_once() -> None:
    from lm_eval.api.registry import get_model

    assert get_model("marlin") is marlin_model_class() is marlin_model_class()


def test_tokenizers_without_bos_and_eos_and_halves_of_characters(tmp_path: Path, tasks_dir: Path) -> None:
    save_tiny_model(tmp_path, vocab_size=95, bos_token_id=None, eos_token_id=None)  # no row for a token to pad with
    tokenizer_without_ends().save_pretrained(tmp_path)
    lm = open_model(tmp_path, device=CPU)
    for file in ("even.yaml", "copycat.yaml"):
        (result,) = run_suite(lm, load_suite([str(tasks_dir / file)]))
        assert result.questions == 7
    with pytest.raises(InputError, match="tokenizer: has neither a bos nor an eos token to put before a text"):
        run_suite(lm, load_suite([str(tasks_dir / "prose.yaml")]))
    assert lm.tok_encode("a\ud83d") == lm.tok_encode("a\N{REPLACEMENT CHARACTER}") and len(lm.tok_encode("abc")) == 3
