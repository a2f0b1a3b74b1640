"""marlin-eval report: the page, the figures beside it, and the model card."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from character_model import save_character_model
from click.testing import CliRunner, Result
from test_mmlu import write_subject

from marlin_gptq.cli import quantize
from marlin_gptq.cli.evaluate import main
from marlin_gptq.errors import InputError
from marlin_gptq.eval import divergence
from marlin_gptq.eval.report import empty_report, finish, read_quantization, read_throughput
from marlin_gptq.eval.report_html import page
from marlin_gptq.output_directory import BEGIN, END, fill_card

Inputs = tuple[str, Path, Path]
VOID = {"meta", "br", "hr", "img", "link", "input"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_character_model(tmp_path_factory.mktemp("character-model"), max_position_embeddings=512)


@pytest.fixture
def quantized_dir(model_dir: Path, tmp_path: Path) -> Path:
    output = tmp_path / "quantized-model"
    arguments = [str(model_dir), "-o", str(output), "--dataset", "demo", "--n-samples", "4", "--seq-len", "512"]
    arguments += ["--preset", "marlin"]
    result = CliRunner().invoke(quantize.main, arguments)
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    """(text, MMLU folder, throughput file)"""
    (tmp_path / "text.txt").write_text("All happy families are alike; every unhappy family is so in its way. " * 8)
    for subject in ("anatomy", "astronomy"):
        write_subject(tmp_path / "mmlu", subject, 4)
    speeds = tmp_path / "speed.json"
    speeds.write_text(json.dumps({"device": "H200", "rows": [{"shape": "4096x4096", "m": 1, "microseconds": 8.4}]}))
    return str(tmp_path / "text.txt"), tmp_path / "mmlu", speeds


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["report", *(str(argument) for argument in arguments)])


class Checker(HTMLParser):
    """Every tag closed in its turn; collects ids, references and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.references.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_whole_report(quantized_dir: Path, model_dir: Path, inputs: Inputs, tmp_path: Path) -> None:
    text, mmlu, speeds = inputs
    output = tmp_path / "report.html"
    arguments = (
        quantized_dir, "--baseline", model_dir, "--datasets", f"{text},demo", "--seq-len", 64, "--limit", 3,
        "--data-dir", mmlu, "--throughput", speeds, "-o", output, "--device", "cpu",
    )  # fmt: skip
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["complete"] is True and content["missing"] == []
    assert [entry["dataset"] for entry in content["perplexity"]] == [text, "demo"]
    assert content["perplexity"][0]["divergence"]["kl_nats"] > 0
    assert content["quantization"]["seconds"] > 0 and len(content["quantization"]["records"]) == 14
    assert content["tasks"]["comparison"][0]["task"] == "mmlu"
    assert content["versions"]["torch"] and content["settings"]["limit"] == 3

    html = output.read_text("utf-8")
    checked = Checker(html)
    assert all(reference.startswith("#") for reference in checked.references)  # nothing is fetched
    assert not re.search(r"@import|url\((?!#)|<script|<link|<img", html)
    assert len(checked.ids) == len(set(checked.ids)), "the two plots must not share names"
    assert {reference[1:] for reference in checked.references} <= set(checked.ids)
    assert html.count("<svg") == 2 and "@media print" in html
    for entry in content["perplexity"]:
        assert f"{entry['model']['perplexity']:.4f}" in checked.text
        assert f"{entry['baseline']['perplexity']:.4f}" in checked.text
        assert f"{entry['divergence']['kl_nats']:.5f}" in checked.text
    for wanted in ("mmlu_anatomy", "McNemar, exact", "4096x4096", "damp percent", "LIMITED run", "q_proj", "Versions"):
        assert wanted in checked.text, wanted
    assert str(tmp_path) not in json.dumps(content["quantization"]) and str(model_dir) not in html

    card = (quantized_dir / "README.md").read_text("utf-8")
    assert card.count(BEGIN) == card.count(END) == card.count("## Evaluation") == 1
    assert f"{content['perplexity'][0]['model']['perplexity']:.4f}" in card and "Not measured yet" not in card
    assert "| mmlu, acc, 0-shot (LIMITED) |" in card and "## Load it" in card
    assert run(*arguments, "--no-card").exit_code == 0
    assert (quantized_dir / "README.md").read_text("utf-8") == card


def test_a_report_without_a_baseline_says_so(quantized_dir: Path, inputs: Inputs, tmp_path: Path) -> None:
    output = tmp_path / "alone.html"
    result = run(quantized_dir, "--datasets", inputs[0], "--seq-len", 64, "-o", output, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content == json.loads((tmp_path / "alone.json").read_text())
    assert [sentence.split(" ")[0] for sentence in content["missing"]] == ["No", "No", "Throughput"]
    text = Checker(output.read_text("utf-8")).text
    assert all(sentence in text for sentence in content["missing"])
    assert content["throughput"] is None and content["tasks"] is None


def test_a_model_without_a_log(model_dir: Path, inputs: Inputs, tmp_path: Path) -> None:
    output = tmp_path / "base.html"
    assert run(model_dir, "--datasets", inputs[0], "--seq-len", 64, "-o", output, "--device", "cpu").exit_code == 0
    assert "has no quantize_log.json" in output.read_text("utf-8")
    assert not (model_dir / "README.md").exists()


def test_an_interrupted_report_holds_what_was_finished(
    quantized_dir: Path, model_dir: Path, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = divergence.compare_models

    def interrupted(model: Path, baseline: Path, dataset: str, *rest: Any, **more: Any) -> Any:
        if dataset == "demo":
            raise KeyboardInterrupt
        return before(model, baseline, dataset, *rest, **more)

    monkeypatch.setattr(divergence, "compare_models", interrupted)
    output = tmp_path / "report.html"
    result = run(
        quantized_dir, "--baseline", model_dir, "--datasets", f"{inputs[0]},demo", "--seq-len", 64, "-o", output,
        "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 2 and f"interrupted: {output} holds what was finished" in result.stderr
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["complete"] is False and len(content["perplexity"]) == 1
    assert "The run was interrupted" in output.read_text("utf-8")
    assert "Not measured yet" in (quantized_dir / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "figures.json"), "give a page: report.html"),
        (("-o", "no/where/report.html"), "its directory does not exist"),
        (("-o", "README.md"), "README.md: exists and is no result of marlin-eval, so it stays"),
        (("--datasets", "wikitext"), "dataset: got 'wikitext', did you mean wikitext2?"),
        (("--throughput", "no.json"), "no.json: no such file"),
        (("--subjects", "anatomy"), "--subjects: chooses among the files of --data-dir"),
    ],
)
def test_bad_inputs(model_dir: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    chosen = arguments if "-o" in arguments else (*arguments, "-o", tmp_path / "report.html")
    result = run(model_dir, *chosen, "--device", "cpu")
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (tmp_path / "report.html").exists()


def test_the_figures_do_not_replace_the_measurements(quantized_dir: Path, tmp_path: Path) -> None:
    speeds = tmp_path / "speed.json"
    speeds.write_text('[{"m": 1}]')
    result = run(quantized_dir, "--throughput", speeds, "-o", tmp_path / "speed.html")
    assert result.exit_code == 2 and "the file of --throughput; give another --output" in result.stderr
    assert speeds.read_text() == '[{"m": 1}]'


def test_throughput_files(tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    row = {"m": 1, "microseconds": 8.4}
    for content in ([row], {"rows": [row], "device": "x"}, row, [row | {"nested": [1, 2]}]):
        file.write_text(json.dumps(content))
        assert read_throughput(file) == [row]
    for text in ("[]", "[1]", "3", "{]"):
        file.write_text(text)
        with pytest.raises(InputError, match=r"expected a list of objects|not a JSON file"):
            read_throughput(file)


def test_a_log_that_is_none(tmp_path: Path) -> None:
    assert read_quantization(tmp_path) is None
    (tmp_path / "quantize_log.json").write_text("{}")
    with pytest.raises(InputError, match="holds no list `records`"):
        read_quantization(tmp_path)


def test_names_are_escaped() -> None:
    content = empty_report("a<script>&", None, {"device": "cpu"}, {})
    finish(content, complete=True)
    assert "<script>" not in page(content) and "a&lt;script&gt;&amp;" in page(content)
    Checker(page(content))


def test_a_card_is_filled_again_and_again(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    fill_card(tmp_path, "one")
    fill_card(tmp_path, "two")
    assert card.read_text() == f"# Title\n\n{BEGIN}\ntwo\n{END}\n\nafter\n"
    card.write_text("# Older card\n")
    fill_card(tmp_path, "figures")
    assert card.read_text() == f"# Older card\n\n## Evaluation\n\n{BEGIN}\nfigures\n{END}\n"
    card.unlink()
    fill_card(tmp_path, "figures")
    assert card.read_text().startswith("# test_a_card") and list(tmp_path.iterdir()) == [card]
