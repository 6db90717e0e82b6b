"""A video whose prompt changes: by frame when it is asked for, and by hand while it runs.

python examples/storyboard.py --out storyboard.mp4
"""

import argparse
from pathlib import Path

import dualparal
from dualparal.io.output import open_output

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("storyboard.mp4"))
parser.add_argument("--num-frames", type=int, default=129)
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

engine = dualparal.Engine.from_pretrained("moving-shapes", frames_per_block=4, context_frames=2)

# A text for each first frame. The block that holds the frame, and all after it, take the text.
prompt = {
    0: "a red circle drifting right on a dark background",
    options.num_frames // 3: "a blue square drifting right on a dark background",
}
output = open_output(options.out, fps=16)
for chunk in engine.stream(
    prompt,
    height=64,
    width=64,
    num_frames=options.num_frames,
    num_inference_steps=options.steps,
    output_type="uint8",
):
    output.write(chunk.block, chunk.frames)
    if chunk.block == 0:
        # Blocks that have entered keep their prompt; those that are still to come take the new one.
        first = engine.set_prompt("a green triangle bouncing on a gray background")
        print(f"from block {first} on: a green triangle")
output.close()
output.remove_blocks()
print(options.out)
