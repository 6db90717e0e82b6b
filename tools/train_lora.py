"""Trains a LoRA on windows as a queue shows them, for a model that knows equal noise only. The weights stay.

    torchrun --nproc-per-node=2 -- tools/train_lora.py --out build/lora --model DIR --data build/more --threads 1

Flow matching as in tools/train_transformer.py, of true clips (--data, the folder that it reads): most of them as blocks
of a queue, whose noise differs, the rest whole, so that these are not forgotten. It learns by AdamW, at a rate that
rises, stays and falls. OUT/lora.safetensors is what ``dualparal generate --lora`` reads; OUT/merged the model with it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import checkpoint
import numpy as np
import parallel
import torch
from diffusers import WanTransformer3DModel
from learner import Learner
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize
from train_transformer import Data, draw

PARTS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")  # of every layer
MIX = {"queue": 0.7, "whole": 0.3}  # shares of the steps
WHOLE, TOTAL = 16, 384  # latent frames of a whole window, and of a step's
RATE = 2e-3
WARM, FALL = 0.1, 0.5  # shares of the steps


class LowRank(nn.Module):
    """A weight [out, in] and what is added to it: up [out, rank] times down [rank, in], nothing at first."""

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


def adapt(transformer: nn.Module, rank: int) -> dict[str, LowRank]:
    """Gives every layer's linears, but for nothing else, a ``LowRank``, by the linear's name."""
    found = {}
    for name, module in list(transformer.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("blocks.") and name.endswith(PARTS):
            found[name] = LowRank(module.weight, rank).to(module.weight.device)
            parametrize.register_parametrization(module, "weight", found[name])
    return found


def in_diffusers_layout(adapters: dict[str, LowRank]) -> dict[str, torch.Tensor]:
    """Tensors of a LoRA file. No alpha: it is the rank."""
    down = {f"transformer.{name}.lora_A.weight": each.down for name, each in adapters.items()}
    up = {f"transformer.{name}.lora_B.weight": each.up for name, each in adapters.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in (down | up).items()}


def merge(model: Path, adapters: dict[str, LowRank], out: Path) -> None:
    """Writes a copy of ``model`` whose transformer has the adapters' changes."""
    shutil.copytree(model, out, dirs_exist_ok=True)
    transformer = WanTransformer3DModel.from_pretrained(model / "transformer", torch_dtype=torch.float32)
    with torch.no_grad():
        for name, each in adapters.items():
            weight = transformer.get_submodule(name).weight
            weight.copy_(each.cpu()(weight))
    transformer.half().save_pretrained(out / "transformer", safe_serialization=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder in diffusers' layout")
    parser.add_argument("--data", type=Path, required=True, help="folder with latents/")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parallel.add_flags(parser, stops=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rank, ranks = parallel.start()
    device = torch.device(options.device)
    learner = Learner(options.model, device, bfloat16=not options.float32)
    learner.weights.requires_grad_(False)
    torch.manual_seed(options.seed)  # the same on every rank
    adapters = adapt(learner.weights["transformer"], options.rank)
    parameters = [p for each in adapters.values() for p in each.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    data = Data(options.data / "latents", options.seed, device, learner.scale)
    options.out.mkdir(parents=True, exist_ok=True)
    log = (options.out / "lora.jsonl").open("a")
    path, state = options.out / "state.safetensors", {"lora": nn.ModuleList(adapters.values())}
    start = checkpoint.load(path, state, [optimizer])
    began, losses = time.perf_counter(), {kind: [] for kind in MIX}
    for step in range(start, options.steps):
        rng = np.random.default_rng([options.seed, 5, step])
        kind = str(rng.choice(list(MIX), p=list(MIX.values())))
        windows = draw(kind, data, rng, WHOLE, TOTAL, high_noise=0.5)
        generator = torch.Generator(device).manual_seed(step)
        noise = torch.randn(windows.clean.shape, generator=generator, device=device)
        loss = windows.of_rank(rank, ranks).loss(learner, noise[rank::ranks])
        optimizer.param_groups[0]["lr"] = RATE * min(
            1.0, (step + 1) / (WARM * options.steps), (1 - step / options.steps) / FALL
        )
        optimizer.zero_grad()
        loss.backward()
        parallel.average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses[kind].append(loss.item())
        last = step + 1 == options.steps or parallel.any_rank(time.perf_counter() - began > 60 * options.minutes)
        if rank == 0 and ((step + 1) % 50 == 0 or last):
            row = {"step": step + 1} | {kind: float(np.mean(seen)) for kind, seen in losses.items() if seen}
            print(json.dumps(row | {"seconds": round(time.perf_counter() - began, 1)}), file=log, flush=True)
            losses = {kind: [] for kind in MIX}
        if rank == 0 and ((step + 1) % 100 == 0 or last):
            checkpoint.save(path, step + 1, state, [optimizer])
        if last:
            break
    if rank == 0:
        save_file(in_diffusers_layout(adapters), options.out / "lora.safetensors", {"format": "pt"})
        merge(options.model, adapters, options.out / "merged")


if __name__ == "__main__":
    main()
