"""Model directories: found, here or on the hub, and their files read from them and from nowhere else."""

from __future__ import annotations

import codecs
import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from marlin_gptq.errors import CheckpointError, InputError
from marlin_gptq.near_names import near_path

SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
# What configs call the longest sequence that a model takes; the last is of MPT and DBRX.
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")
_LARGEST_JSON = 10**8  # bytes; an index of a million tensors has less
_ANSWER_SECONDS = 5
_DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_OLD_WEIGHTS = ["pytorch_model*.bin", "gptq_model*.bin"]
_NOT_DOWNLOADED = ["consolidated*", "original/*"]  # the weights once more, in a form of their makers
# Before config.json held them, the settings of GPTQ and AWQ had files of their own.
OLD_SETTINGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
ADAPTER = "adapter_config.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
# Folders that libraries read with a model: more chat templates, and what sentence-transformers puts behind it.
_FOLDERS = re.compile(r"additional_chat_templates|\d+_[A-Z]\w*")
MERGE = "merge it into the model with peft (merge_and_unload, then save_pretrained) and give the merged directory"


def resolve_model(model: str, revision: str | None = None, offline: bool = False, config_only: bool = False) -> Path:
    """The directory of a model: `model` itself if it is one, else a snapshot of that hub id.

    config_only  fetch config.json of a hub id and nothing else.
    Raises InputError if there is neither, or if a hub id is not in the local cache while `offline`.
    """
    local = local_directory(model)
    if local is not None:
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    meant = near_path(model, is_model)

    def snapshot(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                model, revision=revision, local_files_only=offline, allow_patterns=patterns,
                ignore_patterns=_NOT_DOWNLOADED,
            )
        )  # fmt: skip

    try:
        found = snapshot(["config.json"] if config_only else _DOWNLOADED)
        if not config_only and not any(found.glob("*.safetensors")):
            # An old repository: legacy weights only where there are no others.
            found = snapshot([*_DOWNLOADED, *_OLD_WEIGHTS])
    except HFValidationError as error:
        raise InputError(f"{model}: no such directory and no hub id{meant or '; give one of them'}") from error
    except LocalEntryNotFoundError as error:
        how = "run once without --offline" if offline else "check the network"
        raise InputError(
            f"{model}: no such directory and not in the local cache of the hub{meant or ';'} {how}"
        ) from error
    except HfHubHTTPError as error:
        raise InputError(
            f"{model}: no such directory, and refused by the hub ({error.__class__.__name__}){meant or ';'} check the "
            "name, the revision and your access"
        ) from error
    return found


def require_no_adapter(directory: Path) -> None:
    """InputError for a LoRA adapter beside a model: transformers applies it or not, as peft is installed or not."""
    if (directory / ADAPTER).exists():
        raise InputError(
            f"{directory}: holds a LoRA adapter ({ADAPTER}) beside the model, which would be left out of it; {MERGE}, "
            "or take adapter_* out of the directory"
        )


def local_directory(model: str) -> Path | None:
    """The model directory of that name here; None for what may be a hub id, InputError for what is neither."""
    path = Path(model)
    if model.strip() and path.is_dir():
        if not (path / "config.json").is_file():
            if (path / ADAPTER).is_file():
                raise InputError(f"{model}: holds a LoRA adapter and no model; {MERGE}")
            raise InputError(f"{model}: holds no config.json; a Hugging Face model directory is needed")
        return path
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1 or not model.strip():
        raise InputError(
            f"{model}: no such directory{near_path(model, is_model) or ';'} give a model directory or a hub id such as "
            "owner/name"
        )
    return None


def is_model(path: str) -> bool:
    """Whether a command can be given this path as MODEL: a directory with a config.json."""
    return (Path(path) / "config.json").is_file()


def hub_silence() -> str:
    """Why the Hugging Face hub does not answer, asked once; nothing where it does, whatever it says."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import get_session

    failures: Any = (OSError, *HfHubHTTPError.__bases__)  # of which one is the HTTP library's own
    try:
        get_session().head(constants.ENDPOINT, timeout=_ANSWER_SECONDS)
    except failures as error:
        return str(error).strip().split("\n")[0] or type(error).__name__
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError if it is missing, broken or something else, a key given twice too."""
    try:
        require_inside(path.parent, path.name)
        if path.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, more than a file of settings can have")
        raw = path.read_bytes()
        if raw.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # nor does transformers read it
            raise CheckpointError(f"{path}: begins with a byte order mark; save it as plain UTF-8 (without BOM)")
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except (OSError, ValueError, RecursionError) as error:  # broken UTF-8 and JSON are ValueErrors
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: got a JSON {type(content).__name__}, expected an object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return content


def companions(directory: Path) -> Iterator[str]:
    """Relative names of the files that belong to a model beside its weights: tokenizer, processor, templates, code.

    CheckpointError, as from `require_inside`, for one that leads outside.
    """
    for file in sorted(directory.iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
            require_inside(directory, file.name)
            yield file.name
        elif file.is_dir() and _FOLDERS.fullmatch(file.name):
            if not file.resolve().is_relative_to(directory.resolve()):
                raise CheckpointError(f"{file}: a link to {file.resolve()}, outside its directory; copy it into it")
            for inner in sorted(file.iterdir()):
                if inner.is_file():
                    require_inside(file, inner.name)
                    yield f"{file.name}/{inner.name}"


def require_inside(directory: Path, name: str) -> Path:
    """`directory`/`name`, if that is a regular file of this directory; FileNotFoundError if there is none.

    Nothing outside a checkpoint directory is read on its behalf: CheckpointError for a name with a folder in it, a
    link that leads outside, a pipe or a device. The one way out are the links that the hub's cache is made of, from
    snapshots/REVISION to blobs/ of the same model.
    """
    path = directory / name
    if name in ("", ".", "..") or "\0" in name or Path(name).name != name:
        raise CheckpointError(f"{directory}: names the file {name!r} outside its directory")
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            real, home = path.resolve(strict=True), directory.resolve()
            snapshot = next((above for above in (home, home.parent) if above.parent.name == "snapshots"), None)
            cached = snapshot is not None and real.parent == snapshot.parent.parent / "blobs"
            if not cached and not real.is_relative_to(home):
                raise CheckpointError(f"{path}: a link to {real}, outside its directory; copy the file into it")
            mode = real.stat().st_mode
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # too long, not encodable, a loop of links
        raise CheckpointError(
            f"{directory}: {name!r:.80} is no readable file of it ({type(error).__name__})"
        ) from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a regular file")
    return path


def holds_file(directory: Path, name: str) -> bool:
    """Whether the directory has that file; CheckpointError as from `require_inside`."""
    try:
        require_inside(directory, name)
    except FileNotFoundError:
        return False
    return True
