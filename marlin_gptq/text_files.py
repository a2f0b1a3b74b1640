"""Documents in local files: .txt, JSON lines (also gzipped), parquet."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from marlin_gptq.errors import InputError
from marlin_gptq.near_names import near_path

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz")
SUFFIXES = (".txt", ".parquet", *JSON_SUFFIXES)
_SURROGATE = re.compile("[\ud800-\udfff]")


def file_documents(path: Path) -> Iterator[str]:
    """The documents of a local file, by its suffix."""
    if path.is_dir():
        raise InputError(f"dataset: {path} is a directory; give one of its files ({', '.join(SUFFIXES)})")
    if not path.exists():
        raise InputError(f"dataset: no such file: {path}{near_path(str(path), is_text_file)}")
    name = path.name.lower()
    if name.endswith(".txt"):
        return text_documents(path)
    if name.endswith(".parquet"):
        return parquet_documents(path)
    if name.endswith(JSON_SUFFIXES):
        return json_documents(path)
    raise InputError(f"dataset: {path} has the suffix {path.suffix!r}, expected one of {', '.join(SUFFIXES)}")


def is_text_file(path: str) -> bool:
    """Whether documents can be read from it, by its suffix."""
    return path.lower().endswith(SUFFIXES) and Path(path).is_file()


def text_documents(path: Path) -> Iterator[str]:
    """A .txt file: one document, or none if there is nothing but white space in it."""
    text = utf8(path.read_bytes(), f"dataset: {path}")
    if text.strip():
        yield text


def json_documents(path: Path) -> Iterator[str]:
    """JSON lines, also gzipped: the field "text" of every line; blank lines are skipped."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, raw in enumerate(lines, 1):
                where = f"{path}, line {number}"
                line = utf8(raw, f"dataset: {where}")
                if line.strip():
                    yield text_of(_json(line, where), where)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"dataset: {path} is no whole gzip file ({error}); fetch it again") from error


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and endless brackets
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"dataset: {where}: not JSON ({reason}); one object a line is needed") from error


def utf8(content: bytes, where: str) -> str:
    """Text of bytes, its lines ended by \\n, without the byte order mark of some editors; InputError for no UTF-8."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{where} is no UTF-8 text but UTF-16; convert it first (iconv -f UTF-16 -t UTF-8)")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is no UTF-8 text (byte {error.start}); convert it first") from error


def whole_characters(text: str) -> str:
    """`text` with U+FFFD for every lone surrogate: half of a character, which JSON can write and no tokenizer takes."""
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def parquet_documents(path: Path) -> Iterator[str]:
    """The column "text" of a parquet file, a batch of rows at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if "text" not in columns:
                raise InputError(f'dataset: {path} has no column "text"; it has {", ".join(columns)}')
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    yield text_of({"text": text}, str(path))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"dataset: {path} is no whole parquet file ({error}); fetch it again") from error


def articles(rows: Iterable[str]) -> Iterator[str]:
    """WikiText rows joined to articles, one for each top-level heading (` = Title = `)."""
    article: list[str] = []
    for row in rows:
        if re.fullmatch(r" = [^=]+ = \s*", row) and any(part.strip() for part in article):
            yield "\n\n".join(article)
            article = []
        article.append(row)
    if any(part.strip() for part in article):
        yield "\n\n".join(article)


def paragraphs(text: str) -> list[str]:
    """`text` cut at blank lines."""
    return [part for part in re.split(r"\n\s*\n", text) if part.strip()]


def text_of(row: Any, where: str) -> str:
    if not isinstance(row, dict):
        raise InputError(f'dataset: {where}: got a {type(row).__name__}, expected an object with the field "text"')
    if "text" not in row:
        raise InputError(f'dataset: {where} has no field "text"; it has {", ".join(row) or "none"}')
    text = row["text"]
    if not isinstance(text, str | None):
        raise InputError(f'dataset: {where}: "text" holds a {type(text).__name__}, expected a string')
    return whole_characters(text or "")
