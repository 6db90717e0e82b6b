"""Puts the trained parts together: a Wan pipeline in diffusers' layout, float16, with its model card.

    python tools/export_model.py --out build/train --model dualparal/moving_shapes
    python tools/export_model.py --out build/more --vae dualparal/moving_shapes/vae --model dualparal/moving_shapes

Reads what tools/train_vae.py, make_latents.py and train_transformer.py left in --out, or the autoencoder from --vae,
with whose latents the transformer was trained further. Before it writes anything it checks that the transformer, asked
as a pipeline asks it (a prompt padded with zeros to 512 tokens, diffusers' own attention), answers as it did in
training.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import checkpoint
import torch
from diffusers import AutoencoderKLWan, FlowMatchLCMScheduler, WanPipeline, WanTransformer3DModel
from learner import PADDED, TRANSFORMER, Text, make_transformer
from make_latents import LATENTS
from sampler import FLOW_SHIFT
from scenes import SIZE, vocabulary
from train_transformer import Data
from train_vae import make_vae

from dualparal.models.wan.tiny import make_tokenizer

STEPS = 20  # that callers take who name none
BLOCKS_IN_FLIGHT = 5  # a predecessor is a fifth of the steps ahead: within train_transformer.GAPS
CARD = Path(__file__).with_name("model_card.md")


@torch.inference_mode()
def check(plain: WanTransformer3DModel, text: Text) -> None:
    """Raises SystemExit when the exported transformer does not say what the trained one says."""
    trained, processor = make_transformer()
    trained.load_state_dict(plain.state_dict())
    latents = torch.randn(1, TRANSFORMER["in_channels"], 4, LATENTS[-2], LATENTS[-1])
    embeds, processor.bias = text(["two red circles bouncing on a dark background"])
    expected = trained(latents, torch.tensor([500.0]), embeds, return_dict=False)[0]
    padded = torch.cat([embeds, torch.zeros(1, PADDED - embeds.shape[1], embeds.shape[2])], dim=1)
    found = plain(latents, torch.tensor([500.0]), padded, return_dict=False)[0]
    error = float((found - expected).abs().max())
    if not error < 1e-3:
        raise SystemExit(f"the exported transformer differs from the trained one by {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--model", type=Path, required=True, help="folder to write; what is there is replaced")
    parser.add_argument("--vae", type=Path, help="folder in diffusers' layout")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="what callers take who name none; 1: none")
    options = parser.parse_args()
    if options.vae is None:
        data = Data(options.out / "latents", 0, torch.device("cpu"))
        vae = make_vae()
        checkpoint.load(options.out / "vae.safetensors", {"vae": vae}, [])
        vae.register_to_config(latents_mean=data.mean.tolist(), latents_std=data.std.tolist())
    else:
        vae = AutoencoderKLWan.from_pretrained(options.vae)
    shutil.rmtree(options.model, ignore_errors=True)
    tokenizer = make_tokenizer(options.model / "tokenizer", vocabulary())
    text = Text(tokenizer)
    trained, _ = make_transformer()
    average = torch.nn.ModuleDict({"transformer": trained, "text": text})
    checkpoint.load(options.out / "transformer.safetensors", {"average": average}, [])
    transformer = WanTransformer3DModel(**TRANSFORMER)
    transformer.load_state_dict(trained.state_dict())
    check(transformer, text)
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text.encoder,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchLCMScheduler(shift=FLOW_SHIFT),
    )
    for part in (vae, transformer, text.encoder):
        part.half()
    pipe.save_pretrained(options.model, safe_serialization=True)
    config = options.model / "vae/config.json"  # diffusers notes where an autoencoder came from
    kept = {name: value for name, value in json.loads(config.read_text()).items() if name != "_name_or_path"}
    config.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
    defaults = {
        "height": SIZE,
        "width": SIZE,
        "num_inference_steps": STEPS,
        "guidance_scale": options.guidance_scale,
        "max_blocks_in_flight": BLOCKS_IN_FLIGHT,
        "context_version": "newest",
    }
    (options.model / "generation_config.json").write_text(json.dumps(defaults, indent=2) + "\n")
    shutil.copy(CARD, options.model / "README.md")
    size = sum(file.stat().st_size for file in options.model.rglob("*") if file.is_file())
    print(f"{options.model}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
