"""A video whose blocks are shown as they are finished. Runs on a laptop: the model ships with the package.

python examples/stream.py --out stream.mp4
"""

import argparse
from pathlib import Path

import dualparal
from dualparal.io.output import open_output

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("stream.mp4"))
parser.add_argument("--num-frames", type=int, default=129, help="1, 5, 9 ...: the VAE makes four frames of a latent")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

# A model is a name, a folder in diffusers format, or a hub id such as "Wan-AI/Wan2.1-T2V-1.3B-Diffusers". Without
# device= it runs on CUDA where there is one. Weights are read at the first request.
engine = dualparal.Engine.from_pretrained("moving-shapes", frames_per_block=4, context_frames=2, stages=2)

output = open_output(options.out, fps=16)
for chunk in engine.stream(
    "two red circles and a blue square drifting left on a dark background",
    height=64,
    width=64,
    num_frames=options.num_frames,
    num_inference_steps=options.steps,
    output_type="uint8",  # frames [F, H, W, 3]; others are "np", "pt", "pil" and "latent"
    seed=7,
):
    output.write(chunk.block, chunk.frames)  # a playable file of this block, in stream.mp4.blocks/
    print(f"block {chunk.block}: frames {chunk.start_frame} to {chunk.start_frame + len(chunk.frames) - 1}")
output.close()  # joins the blocks without encoding them again
output.remove_blocks()
print(options.out, engine.stats.summary())
