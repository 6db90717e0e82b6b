"""A diffusers pipeline that is loaded already: its tensors are shared, its scheduler is used.

python examples/loaded_pipeline.py
"""

import argparse
from pathlib import Path

import torch
from diffusers import WanPipeline

import dualparal

parser = argparse.ArgumentParser()
parser.add_argument("--num-frames", type=int, default=65)
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

# Any WanPipeline will do, also one with fused LoRA weights (pipe.fuse_lora(); pipe.unload_lora_weights()).
folder = Path(dualparal.__file__).with_name("moving_shapes")
pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)

# The engine is called as the pipeline is, with the same arguments, and returns the same shapes.
engine = dualparal.Engine.from_pretrained(pipe, frames_per_block=4, context_frames=2, dtype="float32")
frames = engine(
    "a red circle bouncing on a gray background",
    height=64,
    width=64,
    num_frames=options.num_frames,
    num_inference_steps=options.steps,
    generator=torch.Generator().manual_seed(7),
).frames
print(f"frames {frames.shape}: videos, frames, height, width, colours; from {frames.min():.2f} to {frames.max():.2f}")
