"""Model directories: found, here or on the hub, and their files read from them and from nowhere else."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from marlin_gptq.errors import CheckpointError, InputError

SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
# What configs call the longest sequence that a model takes; the last is of MPT and DBRX.
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")
_LARGEST_JSON = 10**8  # bytes; an index of a million tensors has less
_DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve_model(model: str, revision: str | None = None, offline: bool = False, config_only: bool = False) -> Path:
    """The directory of a model: `model` itself if it is one, else a snapshot of that hub id.

    config_only  fetch config.json of a hub id and nothing else.
    Raises InputError if there is neither, or if a hub id is not in the local cache while `offline`.
    """
    path = Path(model)
    if model.strip() and path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{model}: holds no config.json; a Hugging Face model directory is needed")
        return path
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1 or not model.strip():
        raise InputError(f"{model}: no such directory; give a model directory or a hub id such as owner/name")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def snapshot(patterns: list[str]) -> Path:
        return Path(snapshot_download(model, revision=revision, local_files_only=offline, allow_patterns=patterns))

    try:
        found = snapshot(["config.json"] if config_only else _DOWNLOADED)
        if not config_only and not any(found.glob("*.safetensors")):
            # An old repository: legacy weights only where there are no others.
            found = snapshot([*_DOWNLOADED, "pytorch_model*.bin"])
    except HFValidationError as error:
        raise InputError(f"{model}: no such directory and no hub id; give one of them") from error
    except LocalEntryNotFoundError as error:
        how = "run once without --offline" if offline else "check the network"
        raise InputError(f"{model}: no such directory and not in the local cache of the hub; {how}") from error
    except HfHubHTTPError as error:
        raise InputError(
            f"{model}: refused by the hub ({error.__class__.__name__}); check the name, the revision and your access"
        ) from error
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError if it is missing, broken or something else, a key given twice too."""
    try:
        require_inside(path.parent, path.name)
        if path.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, more than a file of settings can have")
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
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
            cached = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
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
