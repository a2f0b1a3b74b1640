"""Write marlin_gptq/data: the embedded calibration documents and the embedded WikiText-2 test text.

    python scripts/make_demo_data.py --calibration calib.jsonl --wikitext2 test_joined.txt \
        --tokenizer tiny-llama --output marlin_gptq/data

Calibration: only rows whose source may be redistributed (`LICENCES`). Documents of 2 to `--max-tokens` tokens
are taken whole. Longer ones give one excerpt each: whole paragraphs from the document's beginning, up to a
length drawn from the documents that fitted, so that lengths stay as mixed as in the source.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

EMAIL = re.compile(r"\s*<?\b[\w.+-]+@[\w-]+\.[\w.-]+\b>?")

# source -> (origin, licence); a source that is not listed is not embedded
LICENCES = {
    "eltec-eng": ("COST-ELTeC/ELTeC-eng, level 1 (English novels)", "text public domain, markup CC BY 4.0"),
    "gutenberg": ("Project Gutenberg books", "public domain (US)"),
    "speeches": (
        "nltk_data: state_union, inaugural (speeches of US presidents)",
        "public domain (US government)",
    ),
    "openstax": (
        "OpenStax: U.S. History, Psychology, College Physics, Introduction to Philosophy (Rice University)",
        "CC BY 4.0",
    ),
    "factbook": ("CIA World Factbook (factbook/factbook.json)", "CC0 / public domain"),
    "peps": ("Python Enhancement Proposals (python/peps)", "public domain or CC0-1.0"),
    "eips": ("Ethereum Improvement Proposals (ethereum/EIPs)", "CC0-1.0"),
}

SOURCES_MD = """# Embedded texts

Made by `scripts/make_demo_data.py`; do not edit by hand.

## {demo_name}

{count} documents, `{{"text", "meta": {{"source", "id", "excerpt"}}}}`, {tokens:,} tokens of the demo model's
tokenizer, each 2 to {max_tokens} tokens long; sha256
`{demo_sha}`.
`marlin-quantize --dataset demo` calibrates with them, without any network.

Chosen from a collection of held-out documents (none is in the training text of the demo model) of which only
sources that are public domain, CC0 or CC BY were taken. Changes: {whole} documents are whole, {excerpts}
(`"excerpt": true`) are the first paragraphs of longer ones, cut at a paragraph; the order is shuffled (seed
{seed}); e-mail addresses were removed. Some host names inside documents were neutralised in the collection.

| source | documents | from | licence |
| --- | --- | --- | --- |
{rows}

Attribution (CC BY 4.0): the `openstax` documents are from textbooks by OpenStax, Rice University, free at
openstax.org; the `eltec-eng` documents are from the European Literary Text Collection, COST Action CA16204
(Distant Reading). Licence text: creativecommons.org/licenses/by/4.0.

## {wikitext_name}

The raw test split of WikiText-2 (Merity et al., "Pointer Sentinel Mixture Models", 2016), rows joined
by blank lines: `"\\n\\n".join(rows["text"])` of `Salesforce/wikitext`, `wikitext-2-raw-v1`, split `test`.
This is the text that the GPTQ papers' perplexity encodes. {wikitext_bytes:,} bytes, sha256
`{wikitext_sha}`.
Licence: CC BY-SA 3.0 and GFDL; the text was written by the contributors of English Wikipedia
(en.wikipedia.org) and is redistributed unchanged under the same licence
(creativecommons.org/licenses/by-sa/3.0).
The Apache-2.0 licence of this project does not cover the texts in this folder.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True, help='JSON lines {"text", "meta": {"source"}}')
    parser.add_argument("--wikitext2", type=Path, required=True, help="joined raw test text")
    parser.add_argument("--tokenizer", required=True, help="model whose tokens count")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)

    def count(text: str) -> int:
        return len(tokenizer(text, verbose=False).input_ids)

    lines = arguments.calibration.read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["meta"]["source"] in LICENCES]
    rows = [row | {"text": EMAIL.sub("", row["text"])} for row in rows]
    documents = choose(rows, count, arguments.documents, arguments.max_tokens, random.Random(arguments.seed))
    demo = arguments.output / "calibration_demo.jsonl"
    text = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    demo.write_text(text, encoding="utf-8", newline="\n")
    wikitext = arguments.output / "wikitext2_test.txt"
    wikitext.write_bytes(arguments.wikitext2.read_bytes())

    sources = [document["meta"]["source"] for document in documents]
    excerpts = sum(document["meta"]["excerpt"] for document in documents)
    description = SOURCES_MD.format(
        demo_name=demo.name,
        count=len(documents),
        tokens=sum(count(document["text"]) for document in documents),
        max_tokens=arguments.max_tokens,
        demo_sha=hashlib.sha256(demo.read_bytes()).hexdigest(),
        whole=len(documents) - excerpts,
        excerpts=excerpts,
        seed=arguments.seed,
        rows="\n".join(
            f"| {source} | {sources.count(source)} | {origin} | {licence} |"
            for source, (origin, licence) in LICENCES.items()
        ),
        wikitext_name=wikitext.name,
        wikitext_bytes=wikitext.stat().st_size,
        wikitext_sha=hashlib.sha256(wikitext.read_bytes()).hexdigest(),
    )
    (arguments.output / "SOURCES.md").write_text(description, encoding="utf-8", newline="\n")
    print(f"{demo}: {len(documents)} documents, {demo.stat().st_size:,} bytes")


def choose(
    rows: list[dict[str, Any]], count: Any, documents: int, longest: int, rng: random.Random
) -> list[dict[str, Any]]:
    """All documents of 2..`longest` tokens, then excerpts of longer ones, `documents` in all, shuffled."""
    rng.shuffle(rows)
    lengths = [count(row["text"]) for row in rows]
    fitting = [length for length in lengths if 2 <= length <= longest]
    whole = [entry(row, row["text"], False) for row, n in zip(rows, lengths, strict=True) if 2 <= n <= longest]
    excerpts = []
    for row, length in zip(rows, lengths, strict=True):
        if length > longest:
            text = beginning(row["text"], rng.choice(fitting), count)
            if 2 <= count(text) <= longest:
                excerpts.append(entry(row, text, True))
    chosen = (whole + excerpts)[:documents]
    rng.shuffle(chosen)
    return chosen


def entry(row: dict[str, Any], text: str, excerpt: bool) -> dict[str, Any]:
    meta = {"source": row["meta"]["source"], "id": row["meta"]["id"], "excerpt": excerpt}
    return {"text": text, "meta": meta}


def beginning(text: str, tokens: int, count: Any) -> str:
    """The first paragraphs of `text` that together reach `tokens` tokens."""
    taken = ""
    for piece in re.split(r"(\n\s*\n)", text):
        taken += piece
        if count(taken) >= tokens:
            break
    return taken.rstrip()


if __name__ == "__main__":
    main()
