"""The nodes for ComfyUI against stand-ins of its hooks, by its rules for node classes and workflows."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dualparal
from places import ROOT

FOLDER = ROOT / "integrations" / "comfyui"
PLAIN = {"INT": int, "FLOAT": float, "STRING": str}


class Interrupted(Exception):
    """Stands in for ComfyUI's InterruptProcessingException, which no code but ComfyUI's catches."""


class Host:
    """ComfyUI's side: progress that it was told, and whether the user has asked it to stop."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, Any]] = []
        self.stop_after: int | None = None  # calls of the hook that throws
        self.asked = 0

    def throw(self) -> None:
        self.asked += 1
        if self.stop_after is not None and self.asked > self.stop_after:
            raise Interrupted

    def bar(self, total: int) -> Any:
        return types.SimpleNamespace(
            update_absolute=lambda value, total_=None, preview=None: self.told.append((value, total, preview))
        )


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    found = Host()
    hooks = {
        "comfy": types.ModuleType("comfy"),
        "comfy.utils": types.SimpleNamespace(ProgressBar=found.bar),
        "comfy.model_management": types.SimpleNamespace(throw_exception_if_processing_interrupted=found.throw),
    }
    for name, module in hooks.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.fixture
def package() -> Iterator[Any]:
    """The folder as ComfyUI imports it: a package by its path, under a name that is none."""
    name = str(FOLDER)
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    sys.modules[f"{name}.nodes"].forget()
    for loaded in [each for each in sys.modules if each.startswith(name)]:
        del sys.modules[loaded]


def test_a_folder_that_would_hide_the_library_is_refused() -> None:
    """Some versions of ComfyUI put the package into sys.modules under the folder's own name."""
    spec = importlib.util.spec_from_file_location("dualparal", FOLDER / "__init__.py")
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match="call it comfyui-dualparal"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_node_classes_keep_the_contract(package: Any) -> None:
    assert set(package.NODE_CLASS_MAPPINGS) == set(package.NODE_DISPLAY_NAME_MAPPINGS)
    for node in package.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        assert set(inputs) <= {"required", "optional"} and callable(getattr(node, node.FUNCTION))
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) and node.CATEGORY
        for kind, *options in (entry for part in inputs.values() for entry in part.values()):
            assert isinstance(kind, (str, list)) and len(options) <= 1
            if isinstance(kind, str) and kind in PLAIN:
                default = options[0]["default"]
                assert isinstance(default, PLAIN[kind])
                assert kind == "STRING" or options[0]["min"] <= default <= options[0]["max"]


def check(workflow: dict[str, Any], nodes: dict[str, Any]) -> None:
    """ComfyUI's checks of a workflow: links of the right type, values of the right kind and within their limits."""
    for number, entry in workflow.items():
        if entry["class_type"] not in nodes:
            continue  # ComfyUI's own
        given = entry["inputs"]
        declared = nodes[entry["class_type"]].INPUT_TYPES()
        assert set(declared["required"]) <= set(given), number
        for name, value in given.items():
            kind, *options = (declared["required"] | declared.get("optional", {}))[name]
            if isinstance(value, list):
                source, slot = value
                assert nodes[workflow[source]["class_type"]].RETURN_TYPES[slot] == kind
            elif isinstance(kind, list):
                assert value in kind
            else:
                limits = options[0]
                assert isinstance(value, PLAIN[kind])
                assert kind == "STRING" or limits["min"] <= value <= limits["max"]


def run(workflow: dict[str, Any], number: str, nodes: dict[str, Any], done: dict[str, Any]) -> Any:
    """What a node returns, after those that it needs. As in ComfyUI every node runs once."""
    if number not in done:
        entry = workflow[number]
        node = nodes[entry["class_type"]]
        given = {
            name: run(workflow, value[0], nodes, done)[value[1]] if isinstance(value, list) else value
            for name, value in entry["inputs"].items()
        }
        done[number] = getattr(node(), node.FUNCTION)(**given)
    return done[number]


def test_the_example_workflow_makes_video_and_goes_on_from_it(package: Any, host: Host) -> None:
    workflow = json.loads((FOLDER / "example_workflow.json").read_text())
    nodes = package.NODE_CLASS_MAPPINGS
    check(workflow, nodes)
    workflow["1"]["inputs"]["gpus"] = 0  # in this process: ranks are tested elsewhere
    workflow["2"]["inputs"]["text"] = "0: a red circle moving right"
    for number, frames in (("3", 9), ("4", 4)):
        workflow[number]["inputs"] |= {"num_frames": frames, "steps": 2}
    done: dict[str, Any] = {}
    (more,) = run(workflow, "4", nodes, done)
    (video,) = done["3"]
    for images, count in ((video, 9), (more, 4)):
        assert images.shape == (count, 64, 64, 3) and images.dtype == torch.float32
        assert images.min() >= 0 and images.max() <= 1
    values, totals, previews = zip(*host.told)
    assert totals == (9, 9, 4) and values[1:] == (9, 4)
    assert all(kind == "JPEG" and picture.size == (64, 64) for kind, picture, _ in previews)
    engine = dualparal.Engine.from_pretrained("moving-shapes", device="cpu", frames_per_block=2, context_frames=1)
    prompt = {0: "a red circle moving right"}
    wanted = engine(prompt, negative_prompt="", num_frames=9, num_inference_steps=2, seed=7).frames
    assert torch.equal(video, torch.from_numpy(wanted[0]))


def test_a_stop_ends_the_video_and_the_engine_serves_on(package: Any, host: Host) -> None:
    nodes = package.NODE_CLASS_MAPPINGS
    workflow = json.loads((FOLDER / "example_workflow.json").read_text())
    workflow["1"]["inputs"]["gpus"] = 0
    workflow["3"]["inputs"] |= {"num_frames": 100_001, "steps": 1}
    host.stop_after = 6
    with pytest.raises(Interrupted):
        run(workflow, "3", nodes, {})
    assert host.asked == 7
    host.stop_after = None
    workflow["3"]["inputs"]["num_frames"] = 5
    (video,) = run(workflow, "3", nodes, {})
    assert len(video) == 5


def test_models_loras_and_storyboards_are_described(package: Any, tmp_path: Path) -> None:
    nodes = package.NODE_CLASS_MAPPINGS
    defaults = {name: options[0] if isinstance(options[0], list) else options[1]["default"]
                for name, options in nodes["DualParalLoadModel"].INPUT_TYPES()["required"].items()}  # fmt: skip
    defaults["device"] = "cpu"
    (model,) = nodes["DualParalLoadModel"]().load(**defaults)
    (model,) = nodes["DualParalAddLora"]().add(model, "a.safetensors", 0.5, "high")
    (model,) = nodes["DualParalAddLora"]().add(model, "b.safetensors", 1.0, "both")
    assert model["loras"] == (("a.safetensors", 0.5, "high"), ("b.safetensors", 1.0))
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        sys.modules[f"{FOLDER}.nodes"]._engine(model)
    read = nodes["DualParalStoryboard"]().read
    assert read("0: a cat\n\n 1.5 : a dog: big", 16.0) == ({0: "a cat", 24: "a dog: big"},)
    for text in ("a cat", "-1: a cat", "0: a\n0: b", "nan: a"):
        with pytest.raises(ValueError, match=r"storyboard: .*use SECOND: TEXT"):
            read(text, 16.0)
