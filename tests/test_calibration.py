"""Text sources and calibration samples: every kind of dataset, bad inputs, and documents of natural lengths."""

from __future__ import annotations

import gzip
import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from character_model import character_tokenizer, tokenizer_without_ends

from marlin_gptq.calibration import (
    CalibrationWarning,
    calibration_samples,
    load_documents,
    load_tokenizer,
    sequence_length,
    shuffled,
)
from marlin_gptq.errors import InputError
from marlin_gptq.text_files import articles
from marlin_gptq.text_sources import require_source

DATA = Path(__file__).resolve().parents[1] / "marlin_gptq" / "data"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return character_tokenizer()


def jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def read(dataset: str, split: Any = "calibration", **options: Any) -> list[str]:
    return list(load_documents(dataset, split=split, **options))


# ---- embedded texts


def test_the_embedded_documents_fit_the_demo_model(tiny_llama: Path) -> None:
    documents = read("demo")
    lengths = [len(ids) for ids in load_tokenizer(tiny_llama)(documents, verbose=False).input_ids]
    assert len(documents) == 256
    assert min(lengths) >= 2 and max(lengths) <= 2048
    assert len(set(lengths)) > 200, "natural lengths, not windows"


def test_the_embedded_texts_are_the_described_ones() -> None:
    described = (DATA / "SOURCES.md").read_text()
    for name in ("calibration_demo.jsonl", "wikitext2_test.txt"):
        content = (DATA / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() in described
        assert len(content) < 2_000_000
    sources = {json.loads(line)["meta"]["source"] for line in (DATA / "calibration_demo.jsonl").open()}
    assert sources <= {"eltec-eng", "gutenberg", "speeches", "openstax", "factbook", "peps", "eips"}


def test_the_embedded_wikitext_is_one_text_of_joined_rows() -> None:
    (text,) = read("wikitext2", "evaluation")
    assert text.startswith("\n\n = Robert Boulter = \n")
    assert len(text) > 1_200_000


# ---- local files


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_files_of_rows(tmp_path: Path, suffix: str) -> None:
    path, texts = tmp_path / f"texts{suffix}", ["one", "zwei drei", "", "läßt"]
    lines = "".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) + "\n" for text in texts)
    if suffix == ".jsonl":
        path.write_text(lines + "\n", encoding="utf-8")
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"id": [1] * 4, "text": texts}), path)
    assert read(str(path)) == texts


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one\n\ntwo\n")
    assert read(str(path)) == ["one\n\ntwo\n"]


def test_byte_order_marks_line_ends_and_halves_of_characters(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "half \\ud83d of \\ud83d\\ude00"}')
    texts = read(str(tmp_path / "a.jsonl"))
    assert texts == ["one", "half \N{REPLACEMENT CHARACTER} of \N{GRINNING FACE}"]
    assert len(calibration_samples(tokenizer, str(tmp_path / "a.jsonl"), n_samples=2, seq_len=64, seed=0)) == 2
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r")
    assert read(str(tmp_path / "a.txt")) == ["one\n\ntwo\n"]


def write_bad_files(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"], "id": [1]}), folder / "other.parquet")
    (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    (folder / "other.jsonl").write_text('{"text": "a"}\n{"content": "b", "id": 2}\n')
    (folder / "broken.jsonl").write_text('{"text": "a"}\nplain words\n')
    (folder / "numbers.jsonl").write_text('{"text": 5}\n')
    (folder / "list.jsonl").write_text("[1, 2]\n")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    (folder / "plain.jsonl.gz").write_text('{"text": "a"}\n')
    (folder / "latin.txt").write_bytes("läßt".encode("latin-1"))
    (folder / "latin.jsonl").write_bytes('{"text": "a"}\n{"text": "läßt"}\n'.encode("latin-1"))
    (folder / "wide.jsonl").write_text('{"text": "a"}\n', "utf-16")
    (folder / "wide.txt").write_text("a", "utf-16")
    (folder / "cut.jsonl").write_text('{"text": "a"}\n\n{"text": "b')
    (folder / "deep.jsonl").write_text("[" * 100_000)
    (folder / "notes.md").write_text("words")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other.parquet", r'other.parquet has no column "text"; it has content, id'),
        ("broken.parquet", r"broken.parquet is no whole parquet file"),
        ("other.jsonl", r'other.jsonl, line 2 has no field "text"; it has content, id'),
        ("broken.jsonl", r"broken.jsonl, line 2: not JSON .*one object a line is needed"),
        ("numbers.jsonl", r'numbers.jsonl, line 1: "text" holds a int, expected a string'),
        ("list.jsonl", r"list.jsonl, line 1: got a list, expected an object"),
        ("cut.jsonl.gz", r"cut.jsonl.gz is no whole gzip file"),
        ("plain.jsonl.gz", r"plain.jsonl.gz is no whole gzip file"),
        ("latin.txt", r"latin.txt is no UTF-8 text \(byte 1\)"),
        ("latin.jsonl", r"latin.jsonl, line 2 is no UTF-8 text \(byte 11\)"),
        ("wide.jsonl", r"wide.jsonl, line 1 is no UTF-8 text but UTF-16; convert it first \(iconv -f UTF-16"),
        ("wide.txt", r"wide.txt is no UTF-8 text but UTF-16"),
        ("cut.jsonl", r"cut.jsonl, line 3: not JSON \(Unterminated string"),
        ("deep.jsonl", r"deep.jsonl, line 1: not JSON \(maximum recursion"),
        ("notes.md", r"notes.md has the suffix '.md', expected one of .txt, .parquet, .jsonl"),
        ("", r"is a directory; give one of its files"),
        ("othr.jsonl", r"no such file: .*othr.jsonl, did you mean .*other.jsonl"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, message: str) -> None:
    write_bad_files(tmp_path)
    with pytest.raises(InputError, match=message):
        read(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "near"), [("wikitext", "did you mean wikitext2?"), ("redpyjama", "redpajama?"), ("zzz", "expected demo")]
)
def test_unknown_names_get_near_matches(name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"dataset: got '{name}'") as caught:
        read(name)
    assert near in str(caught.value)
    assert "hub id (owner/name)" in str(caught.value)


# ---- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Stands for the hub: `rows` are what it streams in three shards, `asked` is what was asked of it."""
    import datasets

    state: dict[str, Any] = {"rows": [{"text": f"document {i}", "meta": i} for i in range(12)], "asked": None}

    def load_dataset(path: str, **options: Any) -> Any:
        state["asked"] = (path, options)
        return datasets.Dataset.from_list(state["rows"]).to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    yield state


def test_a_hub_dataset_is_streamed_and_its_shards_take_turns(hub: dict[str, Any]) -> None:
    documents = read("owner/name")
    assert hub["asked"] == ("owner/name", {"data_files": None, "revision": None, "split": "train", "streaming": True})
    assert sorted(documents) == sorted(row["text"] for row in hub["rows"])
    assert documents[:4] == ["document 0", "document 4", "document 8", "document 1"]


@pytest.mark.parametrize(
    ("dataset", "split", "repository", "files"),
    [
        ("c4", "calibration", "allenai/c4", "en/c4-train.00000-of-01024.json.gz"),
        ("c4", "evaluation", "allenai/c4", "en/c4-validation.00000-of-00008.json.gz"),
        ("wikitext2", "calibration", "Salesforce/wikitext", "wikitext-2-raw-v1/train-*.parquet"),
    ],
)
def test_named_datasets_ask_for_their_files(
    hub: dict[str, Any], dataset: str, split: str, repository: str, files: str
) -> None:
    read(dataset, split)
    assert hub["asked"][0] == repository
    assert hub["asked"][1]["data_files"] == {"train": files}


def test_redpajama_comes_from_its_parquet_revision_and_keeps_a_held_out_half(hub: dict[str, Any]) -> None:
    calibration, evaluation = read("redpajama"), read("redpajama", "evaluation")
    assert hub["asked"][0] == "togethercomputer/RedPajama-Data-1T-Sample"
    assert hub["asked"][1]["revision"] == "refs/convert/parquet"
    assert calibration and evaluation and not set(calibration) & set(evaluation)
    assert len(calibration) + len(evaluation) == 12


def test_a_hub_dataset_without_a_text_column(hub: dict[str, Any]) -> None:
    hub["rows"] = [{"content": "a", "id": 1}] * 3
    with pytest.raises(InputError, match='owner/name has no field "text"; it has content, id'):
        read("owner/name")


@pytest.mark.parametrize("kind", ["missing", "network", "script"])
def test_hub_failures_name_the_dataset_and_the_way_out(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    import datasets

    failure: Exception = {
        "missing": datasets.exceptions.DatasetNotFoundError("doesn't exist on the Hub"),
        "network": ConnectionError("cannot reach it"),
        "script": RuntimeError("Dataset scripts are no longer supported"),
    }[kind]

    def load_dataset(*_: Any, **__: Any) -> Any:
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"owner/name could not be read from the hub \(.+\).*dataset demo"):
        read("owner/name")


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub_silence() -> str:
        asked.append(True)
        return "name or service not known"

    monkeypatch.setattr("marlin_gptq.text_sources.hub_silence", hub_silence)
    for dataset, split in (("redpajama", "calibration"), ("wikitext2", "calibration"), ("owner/name", "evaluation")):
        sentence = (
            rf"{dataset} comes from the .* hub, which does not answer \(name or .*\); use --dataset demo .*--offline"
        )
        with pytest.raises(InputError, match=sentence):
            require_source(dataset, split=split)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not answer"):
        read("c4")
    assert len(asked) == 4
    require_source("redpajama", split="calibration", offline=True)
    require_source("demo", split="calibration")
    require_source("wikitext2", split="evaluation")
    assert len(asked) == 4, "what is here needs no hub"


def test_a_file_that_is_nearly_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "calib.jsonl").write_text('{"text": "a"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("marlin_gptq.text_sources.hub_silence", lambda: "no route")
    for given in ("texts/calb.jsonl", "text/calib.jsonl", "texts/calib.json"):
        with pytest.raises(InputError, match=r"did you mean texts/calib\.jsonl\?"):
            require_source(given, split="calibration")
    with pytest.raises(InputError, match="got 'redpyjama', did you mean redpajama"):
        require_source("redpyjama", split="calibration")


def test_offline_reads_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (tmp_path / "en").mkdir()
    name = "c4-train.00000-of-01024.json.gz"
    (tmp_path / "en" / name).write_bytes(gzip.compress(b'{"text": "cached"}\n'))
    assert read("c4", offline=True) == ["cached"]
    assert asked["repository"] == "allenai/c4"
    assert asked["local_files_only"] is True and asked["repo_type"] == "dataset"
    with pytest.raises(InputError, match=r"not in the hub's cache .* --include 'en/c4-validation"):
        read("c4", "evaluation", offline=True)


def test_offline_without_a_cache_says_how_to_fill_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("nothing there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(InputError, match=r"hf download --repo-type dataset .* --revision refs/convert/parquet"):
        read("redpajama", offline=True)


def test_wikitext_rows_become_articles() -> None:
    rows = ["", " = One = \n", "", " first . \n", " = = Part = = \n", " more . \n", " = Two = \n", " second . \n"]
    one, two = articles(rows)
    assert "first" in one and "= = Part = =" in one and "second" not in one
    assert two == " = Two = \n\n\n second . \n"


# ---- shuffling and samples


def test_shuffling_depends_on_the_seed_alone_and_loses_nothing() -> None:
    documents = [str(i) for i in range(100)]
    for buffer in (7, 1000):
        first, again = (list(shuffled(documents, 3, buffer)) for _ in range(2))
        assert first == again != documents
        assert sorted(first) == sorted(documents)
        assert list(shuffled(documents, 4, buffer)) != first


def test_samples_are_whole_documents_of_their_own_lengths(tmp_path: Path, tokenizer: Any) -> None:
    texts = ["a" * length for length in (1, 5, 9, 10, 30)]
    dataset = jsonl(tmp_path / "t.jsonl", texts)
    with pytest.warns(CalibrationWarning, match="3 samples of 9: 5 documents were read, 1 to 30 tokens long"):
        samples = calibration_samples(tokenizer, dataset, n_samples=9, seq_len=11, seed=0)
    assert sorted(len(sample) for sample in samples) == [5, 9, 10]  # 1 is too short, 30 exceeds seq_len
    for sample in samples:
        assert sample.dtype.is_signed and sample.dim() == 1
        assert [1, *sample.tolist()] == tokenizer("a" * len(sample)).input_ids  # <s> stays away


@pytest.mark.parametrize(("wanted", "longest"), [(5, 30), (90, 30), (70, 11), (200, 30)])
def test_documents_tokenized_together_are_those_drawn_one_by_one(
    tmp_path: Path, tokenizer: Any, wanted: int, longest: int
) -> None:
    texts = ["ab" * (i % 19) + "c" for i in range(150)]
    expected: list[list[int]] = []
    drawn = 0
    for text in shuffled(texts, 3):
        if len(expected) == wanted:
            break
        drawn += 1
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if 2 <= len(ids) <= longest:
            expected.append(ids)

    seen: list[str] = []

    def counting(batch: list[str], **options: Any) -> Any:
        seen.extend(batch)
        return tokenizer(batch, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        samples = calibration_samples(
            counting, jsonl(tmp_path / "t.jsonl", texts), n_samples=wanted, seq_len=longest, seed=3
        )
    assert [sample.tolist() for sample in samples] == expected
    assert all(sample.dtype == torch.int64 for sample in samples)
    assert len(seen) == drawn, "no document is tokenized in vain"


def test_special_tokens_come_when_asked_for(tmp_path: Path, tokenizer: Any) -> None:
    dataset = jsonl(tmp_path / "t.jsonl", ["a" * length for length in (1, 5, 9, 10, 30)])
    with pytest.warns(CalibrationWarning, match="4 samples of 9: 5 documents were read, 2 to 31 tokens long"):
        samples = calibration_samples(tokenizer, dataset, n_samples=9, seq_len=11, seed=0, special_tokens=True)
    assert sorted(len(sample) for sample in samples) == [2, 6, 10, 11]
    for sample in samples:
        assert sample.tolist() == tokenizer("a" * (len(sample) - 1)).input_ids


def test_special_tokens_of_a_tokenizer_that_has_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n')
    (sample,) = calibration_samples(
        tokenizer_without_ends(), str(tmp_path / "a.jsonl"), n_samples=1, seq_len=64, seed=0, special_tokens=True
    )
    assert len(sample) == 3


def test_samples_stop_at_the_number_asked_for_and_follow_the_seed(tmp_path: Path, tokenizer: Any) -> None:
    dataset = jsonl(tmp_path / "t.jsonl", ["a" * length for length in range(1, 40)])

    def lengths(seed: int) -> list[int]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            samples = calibration_samples(tokenizer, dataset, n_samples=8, seq_len=64, seed=seed)
        return [len(sample) for sample in samples]

    assert len(lengths(0)) == 8
    assert lengths(0) == lengths(0) != lengths(1)


def test_a_long_text_file_is_cut_at_blank_lines(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "book.txt"
    path.write_text("aaaa\n\nbb\n \ncccccc\n")
    whole = calibration_samples(tokenizer, str(path), n_samples=1, seq_len=64, seed=0)
    assert len(whole) == 1
    parts = calibration_samples(tokenizer, str(path), n_samples=3, seq_len=8, seed=0)
    assert sorted(len(part) for part in parts) == [2, 4, 7]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], r"is empty; calibration needs documents of 2 to 8 tokens"),
        (["", ""], r"no usable sample: 2 documents were read, 0 to 0 tokens long, 2 of them shorter than 2"),
        (["a" * 20, "b" * 30], r"all too long: 2 documents were read, 20 to 30 tokens long; .*raise seq_len"),
    ],
)
def test_datasets_without_a_usable_sample(tmp_path: Path, tokenizer: Any, texts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        calibration_samples(tokenizer, jsonl(tmp_path / "t.jsonl", texts), n_samples=4, seq_len=8, seed=0)


def test_samples_refuse_senseless_numbers(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="n_samples: got 0, expected at least 1"):
        calibration_samples(tokenizer, "demo", n_samples=0, seq_len=8, seed=0)
    with pytest.raises(InputError, match="seq_len: got 1, expected at least 2"):
        calibration_samples(tokenizer, "demo", n_samples=1, seq_len=1, seed=0)


def test_sequence_length_is_clipped_only_if_nobody_asked() -> None:
    assert sequence_length(None, 2048) == 2048
    assert sequence_length(None, 131072) == sequence_length(None, None) == 4096
    assert sequence_length(512, 2048) == 512
    with pytest.raises(InputError, match=r"seq_len: got 4096, the model's context .* holds 2048 tokens"):
        sequence_length(4096, 2048)


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="no tokenizer that transformers can load"):
        load_tokenizer(tmp_path)
