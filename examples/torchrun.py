"""One video over two processes. Every rank runs this script, makes the same calls and owns one stage of the model.

torchrun --nproc_per_node 2 examples/torchrun.py --out torchrun.mp4
"""

import argparse
from pathlib import Path

import torch.distributed as dist

import dualparal
from dualparal.io.output import open_output

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("torchrun.mp4"))
parser.add_argument("--num-frames", type=int, default=129)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--device", default="cpu", help="cuda: each rank takes a GPU")
options = parser.parse_args()

# Joins the process group of torchrun. There are as many stages as ranks.
engine = dualparal.Engine.from_pretrained("moving-shapes", frames_per_block=4, context_frames=2, device=options.device)
chunks = engine.stream(
    "two red circles and a blue square drifting left on a dark background",
    height=64,
    width=64,
    num_frames=options.num_frames,
    num_inference_steps=options.steps,
    output_type="uint8",
)
output = open_output(options.out, fps=16) if dist.get_rank() == 0 else None
for chunk in chunks:  # rank 0 gets all of them, the others none; but all must ask
    output.write(chunk.block, chunk.frames)
if output is not None:
    output.close()
    output.remove_blocks()
    print(options.out, engine.stats.summary())
