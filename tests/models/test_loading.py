"""What a rank reads of a model's files, what it refuses, and what it shares with a pipeline that is loaded."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from counted_reads import noting
from dualparal.models import files as model_files
from dualparal.models import linear, weights
from dualparal.models.files import ModelFiles
from dualparal.models.json_files import ModelError
from dualparal.models.linear import placed
from dualparal.models.loaded import LoadedPipeline
from dualparal.models.source import resolve_model
from dualparal.models.wan.tiny import build_tiny_pipeline
from dualparal.models.weights import WeightFiles
from dualparal.schedule.layout import split_layers

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def pipeline(wan21: Path) -> Any:
    return WanPipeline.from_pretrained(wan21)


@pytest.fixture
def copy(wan21: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(wan21, tmp_path / "model"))


def _rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _values(slice_: Any) -> list[torch.Tensor]:
    """Every tensor of a slice, in a fixed order."""
    found: list[torch.Tensor] = []

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for key in sorted(value):
                walk(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)
        elif type(value).__name__ == "_Layer":
            walk(vars(value))

    for name in ("_layers", "_tables", "_condition", "_patch", "_head"):
        walk(getattr(slice_, name))
    return found


# Reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("experts", [1, 2])
def test_a_stage_reads_its_own_tensors_and_all_stages_the_whole_model(
    wan21: Path, wan22: Path, monkeypatch: pytest.MonkeyPatch, stages: int, experts: int
) -> None:
    files = ModelFiles(wan21 if experts == 1 else wan22)
    read: Counter[str] = Counter()

    def note(path: Path, entry: Any) -> None:
        read[f"{path.parent.name}/{entry.key}"] += 1

    monkeypatch.setattr(weights, "_open", noting(weights._open, note))
    files.check_weights()
    assert not read
    everything: Counter[str] = Counter()
    parts = split_layers(files.spec.num_layers, stages)
    for index, layers in enumerate(parts):
        read.clear()
        slices = files.load_slices(layers, torch.float32, CPU)
        assert [s.num_layers for s in slices] == [len(layers)] * experts
        numbers = {int(name.split(".")[1]) for name in read if "/blocks." in name}
        assert numbers == set(layers)
        assert set(read.values()) == {1}
        ends = {name.split("/")[1].split(".")[0] for name in read} - {"blocks", "condition_embedder"}
        expected = ({"patch_embedding"} if index == 0 else set()) | (
            {"proj_out", "scale_shift_table"} if index == stages - 1 else set()
        )
        assert ends == expected
        everything += Counter(dict.fromkeys(read, 1))
    folders = ["transformer", "transformer_2"][:experts]
    assert set(everything) == {f"{f}/{n}" for f in folders for n in load_file(files.path / f / WEIGHTS)}
    # Time and text are embedded by every stage for itself; everything else is read once.
    assert {n for n, count in everything.items() if count > 1} == (
        {n for n in everything if "/condition_embedder." in n} if stages > 1 else set()
    )


def test_weights_of_one_layer_at_a_time_are_there_twice(wan21: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While Q, K and V are joined, which copies them."""
    alive: list[int] = []
    matrices: list[weakref.ref[torch.Tensor]] = []

    def noted(*args: Any) -> dict[str, torch.Tensor]:
        made = placed(*args)
        matrices.extend(weakref.ref(t) for name, t in made.items() if re.search(r"attn1\.to_[qkv]\.weight", name))
        return made

    def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
        if len(tensors) == 3 and tensors[0].ndim == 2:
            alive.append(sum(ref() is not None for ref in matrices))
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

    monkeypatch.setattr(model_files, "placed", noted)
    monkeypatch.setattr(linear, "_joined", joined)
    ModelFiles(wan21).load_slices(range(4), torch.bfloat16, CPU)
    assert alive == [12, 9, 6, 3]


def test_shards_hold_the_same_model_as_one_file(wan21: Path, tmp_path: Path) -> None:
    sharded = ModelFiles(build_tiny_pipeline(tmp_path / "sharded", max_shard_size="100KB"))
    assert len(list((sharded.path / "transformer").glob("*.safetensors"))) > 2
    sharded.check_weights()
    for layers in split_layers(4, 3):
        ours = _values(sharded.load_slices(layers, torch.float32, CPU)[0])
        theirs = _values(ModelFiles(wan21).load_slices(layers, torch.float32, CPU)[0])
        assert len(ours) == len(theirs) > 20
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_dtype_of_layers_and_of_what_stays_float32(wan21: Path) -> None:
    (low,) = ModelFiles(wan21).load_slices(range(4), torch.bfloat16, CPU)
    (full,) = ModelFiles(wan21).load_slices(range(4), torch.float32, CPU)
    kinds = {tensor.dtype for tensor in _values(low)}
    assert kinds == {torch.bfloat16, torch.float32}
    for ours, theirs in zip(_values(low), _values(full), strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))


def test_fingerprints_tell_models_apart(wan21: Path, wan22: Path, tmp_path: Path) -> None:
    again = build_tiny_pipeline(tmp_path / "again", layers=4)
    other = build_tiny_pipeline(tmp_path / "other", layers=5)
    prints = [ModelFiles(path).fingerprint for path in (wan21, again, wan22, other)]
    assert prints[0] == prints[1] and len(set(prints)) == 3


# Refusals that the command line does not show ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "..", "sub/part.safetensors"])
def test_an_index_cannot_lead_out_of_its_folder(copy: Path, name: str) -> None:
    folder = copy / "transformer"
    shutil.copy(folder / WEIGHTS, copy.parent / "secret.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"proj_out.weight": name}}))
    with pytest.raises(ModelError) as error:
        WeightFiles(folder)
    assert name in str(error.value) or ".." in str(error.value)
    assert ("outside its folder" in str(error.value)) == (name != "..")


@pytest.mark.parametrize("index", ["[]", '{"weight_map": null}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}'])
def test_an_index_without_a_map_is_refused(copy: Path, index: str) -> None:
    (copy / "transformer" / INDEX).write_text(index)
    with pytest.raises(ModelError, match=r"weight_map|not an object|no weight file"):
        WeightFiles(copy / "transformer")


def test_indices_of_two_variants_are_refused(copy: Path) -> None:
    for name in (INDEX, INDEX.replace("model.", "model.fp16.")):
        (copy / "transformer" / name).write_text(json.dumps({"weight_map": {"a": WEIGHTS}}))
    with pytest.raises(ModelError, match=r"fp16.*variant"):
        WeightFiles(copy / "transformer")


def test_an_index_decides_over_files_that_lie_around(copy: Path) -> None:
    folder = copy / "transformer"
    save_file({"stray": torch.zeros(1)}, folder / "stray.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"proj_out.weight": WEIGHTS}}))
    assert "stray" not in WeightFiles(folder).shapes
    ModelFiles(copy).check_weights()


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
def test_missing_tensors_are_an_error_where_the_library_only_warns(copy: Path, component: str) -> None:
    path = next((copy / component).glob("*.safetensors"))
    files = ModelFiles(copy)
    files.check_weights()
    load = {
        "vae": lambda: files.load_vae(CPU),
        "text_encoder": lambda: files.load_text_encoder(CPU, torch.float32),
    }[component]
    load()
    name = sorted(load_file(path))[-1]
    _rewrite(path, lambda tensors: tensors.__delitem__(name))
    for attempt in (files.check_weights, load):  # from the headers, and once more when it is loaded
        with pytest.raises(ModelError) as error:
            attempt()
        assert name in str(error.value) and component in str(error.value)


def test_a_tied_tensor_may_be_stored_once_or_twice(copy: Path) -> None:
    path = next((copy / "text_encoder").glob("*.safetensors"))
    both = {"shared.weight", "encoder.embed_tokens.weight"}
    stored = both & set(load_file(path))

    def store(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            value = next(tensors[n] for n in both if n in tensors)
            for old in both:
                tensors.pop(old, None)
            tensors[name] = value

        return change

    assert stored
    for name in sorted(both):
        _rewrite(path, store(name))
        ModelFiles(copy).check_weights()
    _rewrite(path, lambda tensors: [tensors.pop(name, None) for name in both])
    with pytest.raises(ModelError, match=r"shared\.weight"):
        ModelFiles(copy).check_weights()


@pytest.mark.parametrize(
    ("component", "load"),
    [
        ("scheduler", lambda files: files.load_scheduler()),
        ("tokenizer", lambda files: files.load_text_encoder(CPU, torch.float32)),
    ],
)
def test_a_library_that_fails_is_quoted_with_the_folder(
    copy: Path, component: str, load: Callable[[ModelFiles], Any]
) -> None:
    files = ModelFiles(copy)
    for path in (copy / component).iterdir():
        path.unlink()
    with pytest.raises(ModelError) as error:
        load(files)
    assert str(copy / component) in str(error.value) and "\n" not in str(error.value)


def test_remote_code_is_never_run(copy: Path) -> None:
    trap = copy.parent / "touched"
    (copy / "tokenizer" / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Evil: pass\n")
    path = copy / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    ModelFiles(copy).load_text_encoder(CPU, torch.float32)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "./a/b", "a/b/c", "~/model"])
def test_what_is_no_folder_and_no_hub_id(name: str) -> None:
    with pytest.raises(ModelError, match="hub id"):
        resolve_model(name)


# A pipeline that is loaded ----------------------------------------------------------------------------------------


def test_a_loaded_pipeline_shares_its_tensors(pipeline: Any, wan21: Path) -> None:
    source = LoadedPipeline(pipeline)
    for parameter in pipeline.transformer.parameters():
        parameter.data = parameter.data.clone()  # a mapped file's begin anywhere, and those are copied
    owned = {p.data_ptr() for p in pipeline.transformer.parameters()}
    for layers in split_layers(4, 2):
        (ours,) = source.load_slices(layers, torch.float32, CPU)
        (theirs,) = ModelFiles(wan21).load_slices(layers, torch.float32, CPU)
        assert all(torch.equal(a, b) for a, b in zip(_values(ours), _values(theirs), strict=True))
        copied = [t for t in _values(ours) if t.data_ptr() not in owned]
        assert len(copied) == 2 * len(layers) + 1  # Q, K and V of a layer in one matrix and bias; the tables
    assert source.load_vae(CPU, torch.float32) is pipeline.vae
    narrow = source.load_vae(CPU, torch.bfloat16)
    assert narrow.dtype == torch.bfloat16 and pipeline.vae.dtype == torch.float32  # the user's stays as it is
    assert source.load_text_encoder(CPU, torch.float32) == (pipeline.tokenizer, pipeline.text_encoder)
    assert source.load_scheduler() is pipeline.scheduler
    assert (source.spec.spatial_factor, source.spec.temporal_factor) == (8, 4)


def test_another_pipeline_or_changed_weights_are_refused(wan21: Path) -> None:
    with pytest.raises(ModelError, match=r"a dict was given.*WanPipeline"):
        LoadedPipeline({})

    changed = WanPipeline.from_pretrained(wan21)
    layer = changed.transformer.blocks[0].attn1.to_q
    layer.register_parameter("lora_A", torch.nn.Parameter(torch.zeros(2, 2)))  # as a LoRA adapter does
    with pytest.raises(ModelError, match=r"lora_A.*fuse"):
        LoadedPipeline(changed).load_slices(range(4), torch.float32, CPU)

    quantised = WanPipeline.from_pretrained(wan21)
    layer = quantised.transformer.blocks[1].ffn.net[2]
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"blocks\.1\.ffn\.net\.2\.weight.*int8"):
        LoadedPipeline(quantised).load_slices(range(4), torch.float32, CPU)
