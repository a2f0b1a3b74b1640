"""Texts for calibration and evaluation: named datasets, local files, and datasets of the Hugging Face hub.

    load_documents("c4", split="calibration") -> documents, one string each, in the order of their source

Network sources are streamed by `datasets` and read no further than asked. `offline=True` never touches the
network: it reads the files that an earlier `hf download` left in the hub's cache.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from marlin_gptq.errors import InputError
from marlin_gptq.model_directory import hub_silence
from marlin_gptq.near_names import near, near_path
from marlin_gptq.text_files import (
    SUFFIXES,
    articles,
    file_documents,
    is_text_file,
    json_documents,
    text_documents,
    text_of,
)

Split = Literal["calibration", "evaluation"]

NAMED = ("demo", "wikitext2", "c4", "redpajama")
WANTED = f"expected {', '.join(NAMED)}, a file (.txt, .jsonl, .jsonl.gz, .parquet) or a hub id (owner/name)"
MAX_SHARDS = 16


@dataclass(frozen=True)
class HubFiles:
    """Files of a hub dataset with a column `text`; `half`, 0 or 1, keeps that side of a fixed split."""

    repository: str
    files: str | None = None
    revision: str | None = None
    half: int | None = None


def require_source(dataset: str, *, split: Split, offline: bool = False) -> None:
    """InputError, before any work, for what `load_documents` will not read: unknown, missing, on a hub out of reach."""
    load_documents(dataset, split=split, offline=offline)
    local = dataset == "demo" or (dataset, split) == ("wikitext2", "evaluation") or Path(dataset).exists()
    if not local and not offline:
        _require_hub(dataset)


def load_documents(dataset: str, *, split: Split, offline: bool = False) -> Iterator[str]:
    """The documents of `dataset`, lazily, in a fixed order.

    demo       embedded documents (both splits are the same)
    wikitext2  calibration: articles of the train split; evaluation: the embedded test text, one document
    c4         the first file of the English train split; the first of its validation split
    redpajama  RedPajama-Data-1T-Sample; no held-out split, so a checksum deals each text to one side
    a file     .txt is one document, .jsonl / .jsonl.gz / .parquet hold one in "text" per row
    owner/name column "text" of the split "train" of that hub dataset

    Raises InputError (some of it on the first `next`) for what is unknown, unreadable or without texts.
    """
    if dataset == "demo":
        return json_documents(_embedded("calibration_demo.jsonl"))
    if dataset == "wikitext2":
        if split == "evaluation":
            return text_documents(_embedded("wikitext2_test.txt"))
        return articles(hub_documents(HubFiles("Salesforce/wikitext", "wikitext-2-raw-v1/train-*.parquet"), offline))
    if dataset == "c4":
        part = "train.00000-of-01024" if split == "calibration" else "validation.00000-of-00008"
        return hub_documents(HubFiles("allenai/c4", f"en/c4-{part}.json.gz"), offline)
    if dataset == "redpajama":
        # The dataset itself is a loading script, which `datasets` 4 refuses; the hub keeps it as parquet too.
        revision, half = "refs/convert/parquet", int(split == "evaluation")
        source = HubFiles("togethercomputer/RedPajama-Data-1T-Sample", None, revision, half)
        return hub_documents(source, offline)
    if Path(dataset).exists() or dataset.lower().endswith(SUFFIXES):
        return file_documents(Path(dataset))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) and not dataset.startswith("."):
        return hub_documents(HubFiles(dataset), offline)
    raise InputError(f"dataset: got {dataset!r}{near(dataset, NAMED)}; {WANTED}")


def is_whole_text(dataset: str) -> bool:
    """Whether evaluation takes the dataset as one running text (the GPTQ papers' protocol), not documents."""
    return dataset == "wikitext2" or dataset.lower().endswith(".txt")


def is_local(dataset: str) -> bool:
    """Whether the dataset is finite and at hand: embedded, or a file."""
    return dataset == "demo" or Path(dataset).exists()


def hub_documents(source: HubFiles, offline: bool) -> Iterator[str]:
    """The texts of a hub dataset's files: streamed, or from the local cache when `offline`."""
    texts = _cached(source) if offline else _streamed(source)
    for text in texts:
        if source.half is None or zlib.crc32(text.encode()) % 2 == source.half:
            yield text


def _require_hub(dataset: str) -> None:
    """InputError at once where the hub does not answer: `datasets` asks it for minutes before it gives up."""
    silence = hub_silence()
    if silence:
        known = "" if dataset in NAMED else near_path(dataset, is_text_file)
        raise InputError(
            f"dataset: {dataset} comes from the Hugging Face hub, which does not answer ({silence}){known or ';'} use "
            "--dataset demo (embedded), a file (.txt, .jsonl, .parquet), or --offline if the hub's cache has it"
        )


def _streamed(source: HubFiles) -> Iterator[str]:
    _require_hub(source.repository)
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    # What a wrong name, a gated dataset or a broken connection raises. DatasetsError is no OSError, and the
    # HTTP library of the hub (its error is the base of HfHubHTTPError) has its own.
    failures = (
        OSError,
        ValueError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
        *HfHubHTTPError.__bases__,
    )
    try:
        files = {"train": source.files} if source.files else None
        rows = datasets.load_dataset(
            source.repository, data_files=files, revision=source.revision, split="train", streaming=True
        )
        for row in _interleaved(rows):
            yield text_of(row, source.repository)
    except InputError:
        raise
    except failures as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"dataset: {source.repository} could not be read from the hub ({reason})"
            f"{near_path(source.repository, is_text_file) or ';'} check its name and the network, or use the dataset "
            "demo or a local file"
        ) from error


def _interleaved(rows: Any) -> Iterator[dict[str, Any]]:
    """Rows taken in turn from up to 16 shards spread over the dataset: shards are often sorted by origin."""
    count = rows.num_shards
    chosen = [index * count // min(count, MAX_SHARDS) for index in range(min(count, MAX_SHARDS))]
    shards = [iter(rows.shard(num_shards=count, index=index)) for index in chosen]
    while shards:
        for shard in list(shards):
            row = next(shard, None)
            if row is None:
                shards.remove(shard)
            else:
                yield row


def _cached(source: HubFiles) -> Iterator[str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(source.repository, repo_type="dataset", revision=source.revision, local_files_only=True)
        )
        found = sorted(folder.glob(source.files or "**/*"))
    except LocalEntryNotFoundError:
        found = []
    found = [file for file in found if file.name.lower().endswith(SUFFIXES)]
    if not source.files:
        found = [file for file in found if "train" in str(file.relative_to(folder))] or found
    if not found:
        include = f" --include '{source.files}'" if source.files else ""
        revision = f" --revision {source.revision}" if source.revision else ""
        raise InputError(
            f"dataset: {source.repository} is not in the hub's cache and the network is switched off; run "
            f"`hf download --repo-type dataset {source.repository}{revision}{include}` where there is one, "
            "or use the dataset demo"
        )
    for file in found:
        yield from file_documents(file)


def _embedded(name: str) -> Path:
    # Beside this file, also in an editable install, where the package has several folders.
    return Path(__file__).parent / "data" / name
