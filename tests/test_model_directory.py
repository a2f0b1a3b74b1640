"""model_directory.py: what is a model directory and what is not, from here and from the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import save_tiny_model
from safetensors.torch import save_file

from marlin_gptq import QuantizationConfig, quantize_model
from marlin_gptq.errors import CheckpointError, InputError
from marlin_gptq.model_directory import companions, read_json, resolve_model
from marlin_gptq.modeling.architecture import read_config


def test_read_json_wants_an_object(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="got a JSON list, expected an object"):
        read_json(tmp_path / "config.json")
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "config.json").write_text("{}", encoding)
        with pytest.raises(CheckpointError, match="begins with a byte order mark; save it as plain UTF-8"):
            read_json(tmp_path / "config.json")


def test_models_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        resolve_model(str(tmp_path))
    for name in ("/no/such/place", "./nowhere", "a/b/c", ""):
        with pytest.raises(InputError, match="no such directory; give a model directory or a hub id"):
            resolve_model(name)
    with pytest.raises(InputError, match="not in the local cache of the hub; run once without --offline"):
        resolve_model("nobody/nothing", offline=True)
    with pytest.raises(InputError, match="no such directory and no hub id"):
        resolve_model("a b/c", offline=True)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


def test_hub_models_fetch_legacy_weights_only_where_there_are_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot_download(model: str, **options: object) -> str:
        asked.append(options["allow_patterns"])
        assert (model, options["revision"], options["local_files_only"]) == ("owner/name", "v2", False)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model("owner/name", revision="v2") == tmp_path
    assert ["pytorch_model*.bin" in patterns for patterns in asked] == [False, True]
    asked.clear()
    save_file({"t": torch.zeros(1)}, tmp_path / "model.safetensors")
    resolve_model("owner/name", revision="v2")
    assert len(asked) == 1


def test_adapters_beside_a_model_and_without_one_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds a LoRA adapter and no model; merge it into the model with peft"):
        resolve_model(str(tmp_path))
    save_tiny_model(tmp_path)
    with pytest.raises(InputError, match=r"holds a LoRA adapter \(adapter_config\.json\) beside the model.*; merge it"):
        read_config(tmp_path)
    with pytest.raises(InputError, match="holds a LoRA adapter"):
        quantize_model(tmp_path, tmp_path / "out", QuantizationConfig(method="rtn"), [], device=torch.device("cpu"))


def test_companions_are_all_that_belongs_to_a_model_beside_its_weights(tmp_path: Path) -> None:
    model = tmp_path / "hub" / "snapshots" / "0123"
    names = ["chat_template.jinja", "chat_template.json", "merges.txt", "modeling_own.py", "preprocessor_config.json"]
    more = ["1_Pooling/config.json", "additional_chat_templates/tool_use.jinja", *names]
    for name in [*more, "model.safetensors", "pytorch_model.bin", "original/params.json", "checkpoint-5/config.json"]:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(name)
    assert sorted(companions(model)) == sorted(more)
    blobs = tmp_path / "hub" / "blobs"  # files of the hub's cache are links to these
    blobs.mkdir()
    (model / more[1]).rename(blobs / "abc")
    (model / more[1]).symlink_to(blobs / "abc")
    assert more[1] in companions(model)
    (model / "2_Dense").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match=r"2_Dense: a link to .*, outside its directory"):
        list(companions(model))
