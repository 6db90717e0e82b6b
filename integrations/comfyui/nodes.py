"""The nodes: a model on its ranks, LoRAs, a storyboard, and a long video with a live preview.

Progress, preview and interrupt go by ComfyUI's own hooks, which are imported when a node runs. ``IMAGE`` is ComfyUI's:
float32 [frames, height, width, 3] from 0 to 1.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

_CATEGORY = "dualparal"
_PREVIEW_SIDE = 512  # pixels, at most
_kept: dict[str, Any] = {}  # the engine of the last model, by what it was made of: its ranks stay warm between prompts


def _engine(model: dict[str, Any]) -> Any:
    """The engine of a model as its nodes describe it; one is kept, and closed when another is wanted."""
    import dualparal

    key = repr(sorted(model.items()))
    if key not in _kept:
        forget()
        options = {**model, "loras": list(model["loras"])}
        gpus, device = options.pop("gpus"), options.pop("device")
        options |= {} if device == "auto" else {"device": device}
        options |= {"gpus": gpus} if gpus else {}
        _kept[key] = dualparal.Engine.from_pretrained(options.pop("model"), **options)
    return _kept[key]


def forget() -> None:
    """Closes the engine that is kept, if there is one, and ends its ranks."""
    while _kept:
        _, engine = _kept.popitem()
        getattr(engine, "close", lambda: None)()


class LoadModel:
    """A model, and how it is spread over GPUs. Weights are read when a video is made."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = _CATEGORY, "load", ("DUALPARAL_MODEL",), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs, as ComfyUI asks for them."""
        return {
            "required": {
                "model": ("STRING", {"default": "moving-shapes"}),
                "gpus": ("INT", {"default": 0, "min": 0, "max": 64, "tooltip": "ranks; 0: all in this process"}),
                "device": (["auto", "cuda", "cpu"],),
                "frames_per_block": ("INT", {"default": 8, "min": 1, "max": 64}),
                "context_frames": ("INT", {"default": 4, "min": 0, "max": 64}),
            }
        }

    def load(self, **options: Any) -> tuple[dict[str, Any]]:
        """Describes the model."""
        return ({**options, "loras": ()},)


class AddLora:
    """A LoRA file, merged into the model's weights when they are read."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = _CATEGORY, "add", ("DUALPARAL_MODEL",), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs, as ComfyUI asks for them."""
        weight = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}
        return {
            "required": {
                "model": ("DUALPARAL_MODEL",),
                "file": ("STRING", {"default": "style.safetensors"}),
                "weight": ("FLOAT", weight),
                "expert": (["both", "high", "low"],),
            }
        }

    def add(self, model: dict[str, Any], file: str, weight: float, expert: str) -> tuple[dict[str, Any]]:
        """Describes the model with one more LoRA."""
        lora = (file, weight) if expert == "both" else (file, weight, expert)
        return ({**model, "loras": (*model["loras"], lora)},)


class Storyboard:
    """Prompts by second: a line each, ``0: a cat``, ``4.5: a dog``."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = _CATEGORY, "read", ("DUALPARAL_PROMPT",), ("prompt",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs, as ComfyUI asks for them."""
        return {
            "required": {
                "text": ("STRING", {"multiline": True, "default": "0: a red circle moving right\n4: a blue square"}),
                "fps": ("FLOAT", {"default": 16.0, "min": 1.0, "max": 120.0}),
            }
        }

    def read(self, text: str, fps: float) -> tuple[dict[int, str]]:
        """The prompts by their first frame. Raises ValueError for a line that is none."""
        found: dict[int, str] = {}
        for line in filter(str.strip, text.splitlines()):
            second, colon, prompt = line.partition(":")
            try:
                frame = round(float(second) * fps)
            except (ValueError, OverflowError):
                colon = ""
            if not colon or frame < 0 or frame in found:
                raise ValueError(f"storyboard: {line!r}: use SECOND: TEXT, such as 4: a dog, each second once")
            found[frame] = prompt.strip()
        return (found,)


class Generate:
    """A video of any length. With ``continue_from`` it goes on from these pictures, and gives the new ones alone."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = _CATEGORY, "generate", ("IMAGE",), ("frames",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs, as ComfyUI asks for them."""
        own = {"default": 0, "min": 0, "tooltip": "0: the model's own"}
        pixels = {**own, "max": 16384, "step": 16}
        return {
            "required": {
                "model": ("DUALPARAL_MODEL",),
                "prompt": ("DUALPARAL_PROMPT",),
                "negative_prompt": ("STRING", {"multiline": True, "default": ""}),
                "width": ("INT", pixels),
                "height": ("INT", pixels),
                "num_frames": ("INT", {"default": 81, "min": 1, "max": 100_000_000}),
                "steps": ("INT", {**own, "max": 10_000}),
                "guidance_scale": ("FLOAT", {**own, "default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
            },
            "optional": {"continue_from": ("IMAGE",)},
        }

    def generate(
        self, model: dict[str, Any], prompt: Any, steps: int, continue_from: Any = None, **call: Any
    ) -> tuple[Any]:
        """Makes the video, with a preview of each block as it is finished.

        Raises:
            ValueError: a request that the engine refuses.
            comfy.model_management.InterruptProcessingException: the user has stopped it.
        """
        import torch
        from comfy.model_management import throw_exception_if_processing_interrupted
        from comfy.utils import ProgressBar

        throw_exception_if_processing_interrupted()
        engine = _engine(model)
        call |= {name: call[name] or None for name in ("width", "height", "guidance_scale")}  # 0: the model's own
        bar = None

        def watch(*_: Any) -> dict[str, Any]:
            throw_exception_if_processing_interrupted()  # after every step of every block; the stream ends with it
            return {}

        frames = []
        with tempfile.TemporaryDirectory(prefix="dualparal-") as folder:
            clip = None if continue_from is None else _write_clip(continue_from, Path(folder) / "clip")
            stream = engine.stream(
                prompt,
                num_inference_steps=steps or None,
                video=clip,
                callback_on_step_end=watch,
                output_type="np",
                **call,
            )
            try:
                for chunk in stream:
                    frames.append(torch.from_numpy(chunk.frames))
                    bar = bar or ProgressBar(chunk.progress.total_frames)
                    picture = _picture(chunk.frames[-1])
                    bar.update_absolute(chunk.progress.frames, preview=("JPEG", picture, _PREVIEW_SIDE))
                    throw_exception_if_processing_interrupted()
            finally:
                stream.close()
        return (torch.cat(frames),)


def _picture(frame: Any) -> Any:
    """A frame [height, width, 3] from 0 to 1 as PIL has it."""
    from PIL import Image

    return Image.fromarray((frame * 255).round().astype("uint8"))


def _write_clip(images: Any, folder: Path) -> Path:
    """Pictures [frames, height, width, 3] as an mp4 file without loss of its own, from which the engine goes on."""
    import numpy as np

    from dualparal.io.video import SegmentWriter

    frames = (np.asarray(images) * 255).round().clip(0, 255).astype(np.uint8)
    return SegmentWriter(folder, fps=16, crf=0).write(0, frames)


NODE_CLASS_MAPPINGS = {
    "DualParalLoadModel": LoadModel,
    "DualParalAddLora": AddLora,
    "DualParalStoryboard": Storyboard,
    "DualParalGenerate": Generate,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DualParalLoadModel": "DualParal: load model",
    "DualParalAddLora": "DualParal: LoRA",
    "DualParalStoryboard": "DualParal: storyboard",
    "DualParalGenerate": "DualParal: generate",
}
