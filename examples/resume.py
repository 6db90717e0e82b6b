"""A run that ends early and goes on from its last snapshot, here with another number of stages.

python examples/resume.py --out resume.mp4
"""

import argparse
from pathlib import Path

import dualparal
from dualparal.io.output import open_output

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("resume.mp4"))
parser.add_argument("--kept", type=Path, default=Path("kept"), help="a folder for snapshots, empty or absent")
parser.add_argument("--num-frames", type=int, default=129)
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

# Snapshots are taken where a run needs nothing but latents: that is every refresh_every iterations.
model = {"model": "moving-shapes", "frames_per_block": 4, "context_frames": 2, "refresh_every": 2}
call = {"height": 64, "width": 64, "num_frames": options.num_frames, "num_inference_steps": options.steps}
prompt = "a green triangle drifting left on a dark background"

engine = dualparal.Engine.from_pretrained(**model, stages=1)
output = open_output(options.out, fps=16)
keep = dualparal.Checkpoint(options.kept, every=2)  # in iterations; without it, 2 % of the time
receipts = {}  # of what is on disk: whoever goes on looks whether it still is
for chunk in engine.stream(prompt, **call, output_type="uint8", checkpoint=keep):
    receipts[chunk.block] = output.write(chunk.block, chunk.frames)
    if chunk.block == 2:
        break  # a crash would do as well
print(f"stopped after block {chunk.block}")

# Everything but the machine is in the snapshot, the prompt too. The frames are those of an unbroken run, bit for bit.
engine = dualparal.Engine.from_pretrained(**model, stages=2)
output = None
for chunk in engine.resume(options.kept):
    if output is None:
        print(f"goes on with block {chunk.block}")
        output = open_output(options.out, 16, {block: receipts[block] for block in range(chunk.block)})
    output.write(chunk.block, chunk.frames)
output.close()
output.remove_blocks()
print(options.out)
