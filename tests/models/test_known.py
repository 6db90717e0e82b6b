"""Models by name: the same for all commands, and those that are not supported named with what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from typer.testing import CliRunner

from dualparal.cli.main import app
from dualparal.config.transformer_file import TransformerFile
from dualparal.models.folder import folder_of
from dualparal.models.json_files import ModelError
from dualparal.models.registry import FAMILIES, family_in, hub_id_of, known_models, model_sizes


def test_every_known_model_has_sizes_and_a_hub_id_that_means_it() -> None:
    for family in FAMILIES.values():
        assert set(family.hub_ids) == set(family.named_sizes())
        assert not set(family.others) & set(family.hub_ids)
    for name, hub_id in known_models().items():
        assert hub_id_of(name) == hub_id_of(hub_id) == hub_id_of(name.upper()) == hub_id
        assert model_sizes(name) is model_sizes(hub_id)


def test_a_name_is_had_from_the_hub_as_its_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    for name in ("wan2.1-t2v-1.3b", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-1.3B", "someone/else"):
        assert folder_of(name) == tmp_path
    assert asked == ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"] * 3 + ["someone/else"] * 2
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wan2.1-t2v-1.3b").mkdir()  # a folder of that name is what was meant
    assert folder_of("wan2.1-t2v-1.3b") == Path("wan2.1-t2v-1.3b") and len(asked) == 5


def test_a_hub_id_is_refused_before_its_weights_come_and_these_are_left_out_where_files_stand_for_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda _, **how: asked.append(how) or str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "LTXPipeline"}))
    with pytest.raises(ModelError, match=r"'LTXPipeline' is not supported; supported: WanPipeline"):
        folder_of("someone/else")
    assert asked == [{"allow_patterns": ["model_index.json"]}]
    folder_of("wan2.2-t2v-a14b", [TransformerFile("a.safetensors", "low")])
    assert asked[1]["ignore_patterns"] == ["transformer_2/*.safetensors*"]
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "diffusion_pytorch_model-00001-of-00007.safetensors").touch()
    with pytest.raises(ModelError, match=r"holds weights alone.*give them with --transformer"):
        family_in(tmp_path)


@pytest.mark.parametrize("name", ["wan2.1-vace-14b", "Wan-AI/Wan2.1-VACE-1.3B-diffusers"])
def test_a_model_that_is_not_supported_is_named_with_what_it_is(name: str) -> None:
    words = r"video from control.*not supported; supported are: wan2.1-t2v-1.3b \(Wan"
    for read in (folder_of, model_sizes):
        with pytest.raises(ModelError, match=words):
            read(name)


def test_a_pipeline_that_is_not_supported_is_named_with_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanVACEPipeline"}))
    with pytest.raises(ModelError, match=r"WanVACEPipeline is video from control signals.*Wan2.2-T2V-A14B-Diffusers"):
        family_in(tmp_path)


def test_the_command_lists_them() -> None:
    lines = CliRunner().invoke(app, ["models"]).output.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [
        ["moving-shapes", "ships with this package"],
        *([name, hub_id] for name, hub_id in known_models().items()),
    ]
    assert len({line.index(line.split(maxsplit=1)[1]) for line in lines}) == 1  # one column, long names too


def test_generate_takes_loras_and_says_which_file_is_not_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["generate", "--prompt", "a", "--lora", f"{tmp_path}/none.safetensors:0.5",
                                      "--out", f"{tmp_path}/a.mp4"])  # fmt: skip
    assert isinstance(result.exception, ValueError) and "none.safetensors: there is no such file" in str(
        result.exception
    )
