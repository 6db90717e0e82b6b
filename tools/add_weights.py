"""Adds up the transformers and text encoders of models in diffusers' layout, each times a number of its own.

    python tools/add_weights.py --model build/sum dualparal/moving_shapes=1 build/plain=1 build/guided=-1

What weights learnt from common ones on is the difference between the two, and such differences may be added up (task
arithmetic, arXiv 2212.04089). The numbers add up to 1. All else is the first model's.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FILES = "transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


def share(text: str) -> tuple[Path, float]:
    """ "build/plain=0.5" to a folder and a number."""
    folder, _, number = text.rpartition("=")
    if not (Path(folder) / FILES[0]).exists():
        raise argparse.ArgumentTypeError(f"{text}: use DIR=NUMBER, DIR a model's folder in diffusers' layout")
    return Path(folder), float(number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder to write; what is there is replaced")
    parser.add_argument("shares", type=share, nargs="+", metavar="DIR=NUMBER", help="a model's folder and its number")
    options = parser.parse_args()
    total = sum(number for _, number in options.shares)
    if abs(total - 1) > 1e-6:
        parser.error(f"the numbers add up to {total:g}: use some that add up to 1")
    if options.model.resolve() in [folder.resolve() for folder, _ in options.shares]:
        parser.error(f"--model {options.model} is one of those to add up: use another folder")
    first = options.shares[0][0]
    shutil.rmtree(options.model, ignore_errors=True)
    shutil.copytree(first, options.model)
    for file in FILES:
        kept = {name: tensor.dtype for name, tensor in load_file(first / file).items()}
        added: dict[str, torch.Tensor] = {}
        for folder, number in options.shares:
            weights = load_file(folder / file)
            added = {name: added.get(name, 0) + number * weights[name].float() for name in kept}
        save_file({name: added[name].to(dtype) for name, dtype in kept.items()}, options.model / file, {"format": "pt"})


if __name__ == "__main__":
    main()
