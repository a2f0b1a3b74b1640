"""Where a result may go, decided before any work: never over what a user brought, or over what is no model.

`--overwrite` replaces a model directory and nothing else: config.json and weights, with no file beside them but those
that writers of models make (tokenizer, templates, code, card, licence, logs) and copies of files of the source model.
"""

from __future__ import annotations

import filecmp
import os
import re
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path

from marlin_gptq.disk import standing
from marlin_gptq.errors import InputError

LOCK = "marlin-gptq.lock"
Inputs = Mapping[str, Path]  # what a run reads: how a sentence calls it → where it is

_WEIGHTS = re.compile(
    r"(model|pytorch_model|tf_model|flax_model|gptq_model[\w-]*|consolidated[\d.]*?)(-\d+-of-\d+)?(\.fp16|\.bf16)?"
    r"\.(safetensors|bin|pth|h5|msgpack)"
)
_OTHERS = re.compile(
    r"config\.json|configuration\.json|[\w.-]+_config\.json|[\w.-]+\.index\.json"
    r"|tokenizer\.json|tekken\.json|vocab\.(json|txt)|merges\.txt|(special_tokens_map|added_tokens|chat_template)\.json"
    r"|(tokenizer|spiece|sentencepiece[\w.]*)\.model(\.v\d+)?|[\w.-]+\.tiktoken|[\w.-]+\.jinja"
    r"|(configuration|modeling|tokenization|processing|image_processing|video_processing)_\w+\.py"
    r"|README\.md(\.writing)?|\.gitattributes|(LICEN[CS]E|NOTICE|USE_POLICY)[\w.-]*"
    r"|quantize_log\.json|quant_log\.csv|recipe\.yaml"
)
_TEMPLATES = "additional_chat_templates"
_MADE_BY_THE_DISK = "lost+found"


def conversion_inputs(path: Path, base: Path | None) -> dict[str, Path]:
    """What a conversion reads, as sentences call it; no output may take its place."""
    return {"the model": path} | ({} if base is None else {"the base model": base})


def real_path(path: Path) -> Path:
    """Where `path` leads: absolute, without links and `..`. InputError for links that lead in a circle."""
    found = Path(os.path.realpath(path))
    if found.is_symlink():
        raise InputError(f"{path}: a link that leads in a circle; give another --output")
    return found


def holds(directory: Path, path: Path) -> bool:
    """Whether `path` is `directory` or lies in it, however both are spelled (links, `..`, case, a second mount)."""
    inner, outer = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    if inner.is_relative_to(outer):
        return True
    return outer.exists() and any(above.exists() and above.samefile(outer) for above in (inner, *inner.parents))


def require_destination(output: Path, *, overwrite: bool, inputs: Inputs, file: bool = False) -> None:
    """InputError, before any work, for an output that may not be written, or cannot be.

    inputs  are not to be lost: `output` is none of them and holds none.
    file    `output` is one file (a torch state dict), not a directory.
    An empty directory may be written into, also a mount or the current directory. A link is followed. A new directory
    in that of the model may be made: it touches no file of the model.
    """
    _require_home_meant(output, "--output")
    place = real_path(output)
    shown = f"{output} (a link to {place})" if output.is_symlink() else str(output)
    for what, path in inputs.items():
        if path.exists() and holds(place, path):
            same = place.exists() and place.samefile(path)
            found = f"is {what} itself" if same else f"holds {what} ({path})"
            raise InputError(f"{shown}: {found}; give another --output")
    if not place.exists():
        return _require_right(shown, standing(place.parent))
    if file:
        return _require_replaceable_file(shown, place, overwrite, inputs)
    if not place.is_dir():
        raise InputError(f"{shown}: is a file; give a directory as --output")
    if is_empty(place):
        return _require_right(shown, place)
    if not overwrite:
        raise InputError(f"{shown}: exists already; give another --output, or --overwrite to replace it")
    reason = not_replaceable(place, inputs)
    if reason:
        raise InputError(f"{shown}: {reason}; --overwrite replaces only a model directory; give another --output")
    if is_mount(place):
        raise InputError(f"{shown}: is a mount point with files in it, which cannot be replaced; give a folder in it")
    if holds(place, Path.cwd()):
        raise InputError(f"{shown}: holds the current directory, so it cannot be replaced; start from another one")
    for directory in (place, place.parent):
        _require_right(shown, directory)
    above = place.parent.stat()
    if above.st_mode & stat.S_ISVTX and os.geteuid() not in (0, above.st_uid, place.stat().st_uid):  # as in /tmp
        raise InputError(f"{shown}: belongs to another user, so it cannot be replaced; give another --output")


def require_work_directory(work: Path, output: Path, model: Path, option: str = "--work-dir") -> None:
    """InputError, before any work, for a work directory in `output` or around it, or around `model`."""
    _require_home_meant(work, option)
    found = ""
    if holds(output, work):
        found = "is --output itself" if holds(work, output) else f"lies in --output {output}"
    elif holds(work, output):
        found = f"holds --output {output}"
    elif model.exists() and holds(work, model):
        found = "is the model itself" if holds(model, work) else f"holds the model {model}"
    if found:
        raise InputError(f"{option} {work}: {found}; give a directory of its own")


def not_replaceable(directory: Path, inputs: Inputs) -> str:
    """Why `directory` may not be replaced: what it holds beside a model, or that it is no model; "" if it may.

    A file of another kind is no reason where the same file lies beside an input: it is a copy.
    """
    names = sorted(entry.name for entry in directory.iterdir())
    strange = [name for name in names if not _is_of_a_model(directory / name, inputs)]
    more = f" and {len(strange) - 3} more" if strange[3:] else ""
    listed = ", ".join(strange[:3]) + more
    if "config.json" not in names or not any(map(_WEIGHTS.fullmatch, names)):
        return f"holds {listed or names[0]} and is no model directory (config.json and weights)"
    return f"holds {listed} beside a model" if strange else ""


def is_empty(directory: Path) -> bool:
    """Whether nothing is there but what a disk has of itself, and what runs have there that write into it."""
    return all(entry.name == _MADE_BY_THE_DISK or is_partial(entry, directory.name) for entry in directory.iterdir())


def is_partial(folder: Path, name: str) -> bool:
    """Whether a run writes, or wrote until it was killed, in this folder what becomes the directory or file `name`."""
    pattern = re.escape(f".{name}.partial-") + r"[a-z0-9_]{8}"
    return re.fullmatch(pattern, folder.name) is not None and (folder / LOCK).is_file() and not folder.is_symlink()


def is_mount(directory: Path) -> bool:
    """Whether something is mounted there, also a directory of the same disk (Linux tells)."""
    try:
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        lines = []
    octal = re.compile(r"\\([0-7]{3})")
    points = {octal.sub(lambda found: chr(int(found[1], 8)), line.split()[4]) for line in lines}  # proc(5)
    return os.path.ismount(directory) or str(directory) in points


def _is_of_a_model(path: Path, inputs: Inputs) -> bool:
    if path.is_dir():
        inside = path.name == _TEMPLATES and not path.is_symlink()
        return inside and all(file.suffix == ".jinja" and file.is_file() for file in path.iterdir())
    if _WEIGHTS.fullmatch(path.name) or _OTHERS.fullmatch(path.name):
        return True
    copies = [source / path.name for source in inputs.values() if source.is_dir()]
    return any(copy.is_file() and path.is_file() and filecmp.cmp(path, copy, shallow=False) for copy in copies)


def _require_replaceable_file(shown: str, place: Path, overwrite: bool, inputs: Inputs) -> None:
    if place.is_dir():
        raise InputError(f"{shown}: is a directory; the original format is one file (OUT.marlin.g128)")
    if not overwrite:
        raise InputError(f"{shown}: exists already; give another --output, or --overwrite to replace it")
    for what, path in inputs.items():
        if holds(path, place):
            raise InputError(f"{shown}: is a file of {what}; give another --output")
    if not is_state_dict(place):
        raise InputError(f"{shown}: is no torch state dict; --overwrite replaces nothing else; give another --output")
    _require_right(shown, place.parent)


def is_state_dict(file: Path) -> bool:
    """Whether torch.save wrote this file: a zip archive with a pickle in it."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _require_home_meant(path: Path, option: str) -> None:
    """InputError for a ~ that the shell left as it is: a directory of this name is removed together with the home."""
    if path.parts[:1] == ("~",):
        raise InputError(
            f"{option} {path}: the shell left ~ as it is (quotes, or {option}=~); write {path.expanduser()}"
        )


def _require_right(shown: str, directory: Path) -> None:
    if not directory.is_dir():
        raise InputError(f"{shown}: cannot be made, {directory} is a file; give another --output")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InputError(f"{shown}: cannot be made, {directory} cannot be written to; give another --output")
