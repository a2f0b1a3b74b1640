"""Malformed checkpoints: more than 10,000 mutated settings, configs, indexes, headers and pickles.

Each works or ends in a clear sentence, and none in a crash, a hang, or a look outside the directory. Every case follows
from its number, so that a failure can be repeated.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import save_foreign
from safetensors.torch import load_file, save_file

import marlin_gptq
from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.conversion import source as source_module
from marlin_gptq.conversion.layouts import layout_of
from marlin_gptq.conversion.original import open_source, read_state_dict
from marlin_gptq.conversion.settings import stored_settings
from marlin_gptq.conversion.source import Source, require_possible
from marlin_gptq.conversion.survey import survey
from marlin_gptq.errors import CheckpointError, InputError, MarlinGPTQError
from marlin_gptq.model_directory import read_json, require_inside

KINDS = ("gptq", "awq", "compressed-tensors")
SECONDS = 5.0  # one case takes milliseconds; more than this is a hang
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 3, 4.0, 128.0, 2**31, 2**63, -(2**63), 10**30, 1e300, float("nan"), float("inf"), "",
    "gptq", "4", "../../etc/passwd", "\0", "x" * 10_000, "(a+)+$", [], [[]], {}, {"a": {}}, [None], [-1], ["(a|ab)*c"],
]  # fmt: skip


def mutated(content: Any, chance: random.Random) -> Any:
    """A copy of a JSON value with one to three places removed, replaced, added or moved."""
    content = copy.deepcopy(content)
    for _ in range(chance.randint(1, 3)):
        places = list(containers(content))
        if not places:
            return content
        place = chance.choice(places)
        keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
        action = chance.choice(("remove", "replace", "replace", "replace", "add", "swap"))
        if action == "add" or not keys:
            if isinstance(place, dict):
                place[chance.choice(["bits", "skip", "dynamic", "num_hidden_layers", "x"])] = odd(chance)
            else:
                place.append(odd(chance))
        elif action == "remove":
            del place[chance.choice(keys)]
        elif action == "replace":
            key = chance.choice(keys)
            old = place[key]
            near = [old * 2, old + 1, -old, old * 10**9] if type(old) is int else []
            place[key] = chance.choice(near) if near and chance.random() < 0.3 else odd(chance)
        else:
            one, other = chance.choice(keys), chance.choice(keys)
            place[one], place[other] = place[other], place[one]
    return content


def odd(chance: random.Random) -> Any:
    return copy.deepcopy(chance.choice(ODD))


def containers(content: Any) -> Iterator[Any]:
    if isinstance(content, dict):
        yield content
        for value in content.values():
            yield from containers(value)
    elif isinstance(content, list):
        yield content
        for value in content:
            yield from containers(value)


def survives(case: int, work: Any) -> str:
    """Run `work`: it may succeed or end in an error of ours with one clear sentence; the sentence, or ''."""
    started = time.monotonic()
    try:
        work()
        said = ""
    except MarlinGPTQError as error:
        said = str(error)
        assert said.strip() and len(said) < 3_000, f"case {case}: {said[:200]!r}"
    assert time.monotonic() - started < SECONDS, f"case {case}: hangs"
    return said


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of every kind, whole."""
    folder = tmp_path_factory.mktemp("good")
    for kind in KINDS:
        save_foreign(folder / kind, kind, num_hidden_layers=1)
    marlin_gptq.convert_checkpoint(folder / "gptq", folder / "marlin", "marlin")
    return {kind: folder / kind for kind in (*KINDS, "marlin")}


# ---- settings and configs: 8,000 cases


@pytest.mark.parametrize("kind", [*KINDS, "marlin"])
def test_mutated_settings(good: dict[str, Path], kind: str) -> None:
    settings = read_json(good[kind] / "config.json")["quantization_config"]
    refused = 0
    for case in range(1_500):
        changed = mutated(settings, random.Random(f"settings {kind} {case}"))
        refused += survives(case, lambda changed=changed: layout_of(changed)) != ""
    assert 300 < refused < 1_500, "some mutations must matter, and some must not"


@pytest.mark.parametrize("kind", [*KINDS, "marlin"])
def test_mutated_configs_as_text(good: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """Broken JSON, odd values anywhere: reading, settings and the check of sizes, before any model is made."""
    text = (good[kind] / "config.json").read_text()
    config = json.loads(text)

    def read() -> None:
        found = read_json(tmp_path / "config.json")
        settings = stored_settings(tmp_path, found)
        require_possible(tmp_path, found, 50)
        if settings is not None:
            layout_of(settings)

    refused = 0
    for case in range(500):
        chance = random.Random(f"config {kind} {case}")
        if chance.random() < 0.5:
            content = json.dumps(mutated(config, chance)).encode()
        else:
            content = broken_bytes(text.encode(), chance)
        (tmp_path / "config.json").write_bytes(content)
        refused += survives(case, read) != ""
    assert 100 < refused < 500


def broken_bytes(content: bytes, chance: random.Random) -> bytes:
    """Bytes cut, overwritten, repeated or nested."""
    position = chance.randrange(max(1, len(content)))
    action = chance.randrange(5)
    if action == 0:
        return content[:position]
    if action == 1:
        return content[:position] + chance.randbytes(chance.randint(1, 8)) + content[position + 4 :]
    if action == 2:
        return content[:position] + content[position // 2 :]
    if action == 3:
        return b"[" * chance.choice([1, 100, 100_000]) + content
    return content.replace(b"1", b"9" * chance.choice([1, 20, 5_000]), 1)


# ---- safetensors headers: 3,000 cases


def test_mutated_headers(good: dict[str, Path], tmp_path: Path) -> None:
    """Wrong shapes, dtypes, offsets, negative and huge sizes, cut and random bytes; what opens is then surveyed."""
    for kind in (*KINDS, "marlin"):
        shutil.copytree(good[kind], tmp_path / kind)
    known = {kind: source_module.architecture(good[kind], TensorStore(good[kind]).names) for kind in (*KINDS, "marlin")}
    refused = 0
    for case in range(3_000):
        chance = random.Random(f"header {case}")
        kind = chance.choice((*KINDS, "marlin"))
        file = tmp_path / kind / "model.safetensors"
        file.write_bytes(broken_file((good[kind] / "model.safetensors").read_bytes(), chance))

        def look(kind: str = kind) -> None:
            opened = Source.of_directory(tmp_path / kind)
            survey(opened)
            for name in opened.linears:
                opened.linear(name)

        with pytest.MonkeyPatch.context() as patch:  # the model is the same in every case: made once
            patch.setattr(source_module, "architecture", lambda *_, kind=kind: known[kind])
            refused += survives(case, look) != ""
    assert refused > 1_500


def broken_file(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file with its header, or its bytes, changed."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    action = chance.randrange(8)
    if action == 0:
        return broken_bytes(content[: 8 + length], chance) + data
    if action == 1:
        return struct.pack("<Q", chance.choice([0, 1, length - 1, length + 1, 2**40, 2**63, 2**64 - 1])) + content[8:]
    if action == 2:
        return content[: chance.randrange(len(content))]
    parsed = json.loads(header)
    names = [name for name in parsed if name != "__metadata__"]
    entry = parsed[chance.choice(names)]
    if action == 3:
        sizes = [-1, 0, 2**31, 2**63, 1.5, "8", None]
        entry["shape"] = chance.choice(
            [[], [chance.choice(sizes)], [0, 2**62, 4], entry["shape"][::-1], [1, *entry["shape"]]]
        )
    elif action == 4:
        entry["dtype"] = chance.choice(
            ["F16", "BF16", "F32", "I32", "I64", "U8", "BOOL", "F8_E4M3", "F4", "X", None, 7]
        )
    elif action == 5:
        entry["data_offsets"] = chance.choice([[0, 0], [-1, 4], [0, 2**63], [4, 0], [0], None, [0, len(data)]])
    elif action == 6:
        del parsed[chance.choice(names)]
    else:
        parsed = mutated(parsed, chance)
    changed = json.dumps(parsed).encode()
    return struct.pack("<Q", len(changed)) + changed + data


# ---- indexes: 1,500 cases, and what lies outside


def test_mutated_indexes_never_look_outside(good: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    directory = tmp_path / "model"
    shutil.copytree(good["gptq"], directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held}, directory / file)
    secret = tmp_path / "secret.safetensors"
    save_file(tensors, secret)
    (directory / "link.safetensors").symlink_to(secret)
    (directory / "folder.safetensors").mkdir()
    weight_map = {name: file for file, held in halves.items() for name in held}
    files = [
        "../secret.safetensors", str(secret), "link.safetensors", "folder.safetensors", "./model-1.safetensors", "",
        "..", ".", "model-2.safetensors", "no.safetensors", "config.json", "a/../model-1.safetensors", "\0", "model-1",
        "//model-1.safetensors", "~/x.safetensors", "model-1.safetensors/", "\ud800", "x" * 300,
    ]  # fmt: skip
    opened: list[str] = []
    real = marlin_gptq.checkpoint.safe_open
    monkeypatch.setattr(
        marlin_gptq.checkpoint,
        "safe_open",
        lambda file, **kw: opened.append(os.path.realpath(file)) or real(file, **kw),
    )
    refused = 0
    for case in range(1_500):
        chance = random.Random(f"index {case}")
        index: Any = {"metadata": {"total_size": 1}, "weight_map": dict(weight_map)}
        action = chance.randrange(4)
        if action == 0:
            for name in chance.sample(names, chance.randint(1, 3)):
                index["weight_map"][name] = chance.choice(files)
        elif action == 1:
            for name in chance.sample(names, chance.randint(1, 3)):
                index["weight_map"][chance.choice([f"{name}x", "", "a.B"])] = index["weight_map"].pop(name)
        elif action == 2:
            index = mutated({"weight_map": {name: weight_map[name] for name in names[:4]}}, chance)
        content = json.dumps(index).encode()
        if action == 3:
            content = broken_bytes(content, chance)
        (directory / "model.safetensors.index.json").write_bytes(content)
        refused += survives(case, lambda: TensorStore(directory)) != ""
    assert refused > 600
    assert opened and all(Path(file).parent == directory.resolve() for file in opened)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "", ".", "..", "a\0b"])
def test_names_that_lead_outside(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="outside its directory"):
        require_inside(tmp_path, name)


def test_links_pipes_and_the_cache_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    model = tmp_path / "models--a--b" / "snapshots" / "1234"
    blobs = tmp_path / "models--a--b" / "blobs"
    model.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text('{"a": 1}')
    (model / "config.json").symlink_to("../../blobs/abc")
    assert read_json(model / "config.json") == {"a": 1}, "links of the hub's cache are followed"
    (model / "inside").symlink_to("config.json")
    (model / "outside.json").symlink_to(tmp_path / "secret")
    (model / "other.json").symlink_to("../../blobs/../../secret")
    (model / "loop.json").symlink_to("loop.json")
    os.mkfifo(model / "pipe.json")
    for name in ("outside.json", "other.json"):
        with pytest.raises(CheckpointError, match=r"a link to .*secret, outside its directory; copy the file into it"):
            read_json(model / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_json(model / "pipe.json")
    with pytest.raises(CheckpointError):
        read_json(model / "loop.json")
    with pytest.raises(CheckpointError, match="missing"):
        read_json(model / "nothing.json")


def test_companions_are_not_copied_from_outside(good: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(good["gptq"], tmp_path / "model")
    (tmp_path / "key").write_text("secret")
    (tmp_path / "model" / "tokenizer.json").symlink_to(tmp_path / "key")
    with pytest.raises(CheckpointError, match="outside its directory"):
        marlin_gptq.convert_checkpoint(tmp_path / "model", tmp_path / "out", "awq")
    assert not (tmp_path / "out").exists()


def test_a_tensor_in_two_shards_and_a_key_given_twice(good: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(good["gptq"] / "model.safetensors")
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:5]}, tmp_path / "a.safetensors")
    save_file({name: tensors[name] for name in names[4:]}, tmp_path / "b.safetensors")
    weight_map = dict.fromkeys(names[:5], "a.safetensors") | dict.fromkeys(names[5:], "b.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"two shards hold .*, a\.safetensors and b\.safetensors; only one may"):
        TensorStore(tmp_path)
    index.write_text('{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}')
    with pytest.raises(CheckpointError, match="the key 'x' stands there twice"):
        TensorStore(tmp_path)


# ---- whole loads, and state dicts


def test_mutated_configs_make_no_model(good: dict[str, Path], tmp_path: Path) -> None:
    """Through transformers' own config and model classes: whatever they raise becomes a sentence."""
    directory = tmp_path / "model"
    shutil.copytree(good["gptq"], directory)
    config = read_json(directory / "config.json")
    refused = 0
    for case in range(400):
        (directory / "config.json").write_text(json.dumps(mutated(config, random.Random(f"model {case}"))))
        refused += survives(case, lambda: Source.of_directory(directory)) != ""
    assert 100 < refused < 400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: got 1000000000, expected at most"),
        ({"num_hidden_layers": 1000}, r"num_hidden_layers: got 1000, but the files hold \d+ tensors"),
        ({"head_dim": 10**12}, "head_dim: got 1000000000000, expected at most 16777216"),
        ({"hidden_size": -128}, "config.json: "),
        ({"num_attention_heads": 0}, "config.json: "),
        ({"quantization_config": 7}, "quantization_config: got a JSON int, expected an object"),
    ],
)
def test_sizes_that_cannot_be(good: dict[str, Path], tmp_path: Path, changes: dict, message: str) -> None:
    shutil.copytree(good["gptq"], tmp_path / "model")
    config = read_json(tmp_path / "model" / "config.json") | changes
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises((InputError, CheckpointError), match=message):
        marlin_gptq.load(tmp_path / "model")


def test_mutated_state_dicts(good: dict[str, Path], tmp_path: Path) -> None:
    """Pickles with bytes cut and overwritten: never executed, never a crash."""
    file = tmp_path / "x.marlin"
    torch.save({"a.B": torch.zeros(8, 128, dtype=torch.int32), "a.s": torch.ones(1, 64).half()}, file)
    content = file.read_bytes()
    refused = 0
    for case in range(400):
        file.write_bytes(broken_bytes(content, random.Random(f"pickle {case}")))
        refused += survives(case, lambda: read_state_dict(file)) != ""
    assert refused > 200
    torch.save({"a.w": torch.zeros(2)}, file)
    with pytest.raises(InputError, match="a state dict has no config"):
        open_source(file)
    with pytest.raises(InputError, match="is quantized itself"):
        open_source(file, good["gptq"])
