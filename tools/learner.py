"""The transformer and the text encoder of the model in the box while they learn: what they are, and a step.

For tools/train_transformer.py and tools/train_reward.py.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
from pathlib import Path

import checkpoint
import parallel
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from muon import Float32Muon
from scenes import vocabulary
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from dualparal.models.wan.tiny import make_tokenizer

TEXT_DIM, TEXT_TOKENS = 64, 32  # tokens of the longest caption, with room
PADDED = 512  # what diffusers' WanPipeline pads a prompt to, with zeros
TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "in_channels": 12,
    "out_channels": 12,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 640,
    "num_layers": 8,
}
Scale = tuple[torch.Tensor, torch.Tensor]


class PaddedCrossAttention:
    """diffusers' WanAttnProcessor for cross-attention to a padded text, at the cost of the words alone.

    All padding tokens are zeros and so have one key: softmax over n words and PADDED - n of them is softmax over n
    words and one of them whose score is log(PADDED - n) higher. ``bias`` [batch, 1, 1, TEXT_TOKENS + 1] says so.
    """

    bias: torch.Tensor

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):  # type: ignore[no-untyped-def]
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        key = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        value = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        bias = self.bias.to(query.dtype)
        out = F.scaled_dot_product_attention(query, key.to(query.dtype), value, attn_mask=bias)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


class Text(nn.Module):
    """Captions to padded embeddings and the bias of ``PaddedCrossAttention``."""

    def __init__(self, tokenizer) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.tokenizer = tokenizer
        self.encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer),
                d_model=TEXT_DIM,
                d_kv=16,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                relative_attention_num_buckets=16,
                relative_attention_max_distance=32,
                dropout_rate=0.0,
            )
        )

    def forward(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.encoder.device
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=TEXT_TOKENS + 1, truncation=True, return_tensors="pt"
        ).to(device)
        mask = tokens.attention_mask
        mask[:, TEXT_TOKENS:] = 0  # the last one stands for all of the padding
        embeds = self.encoder(tokens.input_ids, mask).last_hidden_state * mask[..., None]
        bias = torch.where(mask.bool(), 0.0, -math.inf)
        bias[:, -1] = torch.log(PADDED - mask.sum(1))
        return embeds, bias[:, None, None]


def make_transformer() -> tuple[WanTransformer3DModel, PaddedCrossAttention]:
    model = WanTransformer3DModel(**TRANSFORMER)
    processor = PaddedCrossAttention()
    for block in model.blocks:
        block.attn2.set_processor(processor)
    nn.init.zeros_(model.proj_out.weight)
    return model, processor


def make_optimizers(model: nn.Module, text: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in [*model.parameters(), *text.parameters()] if id(p) not in chosen]
    return [
        Float32Muon(matrices, lr=0.02, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def load_weights(folder: Path, trained: nn.ModuleDict) -> Scale:
    """Takes the weights of a pipeline in diffusers' layout. Returns mean and deviation of its latents' channels."""
    state = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32).state_dict()
    trained["transformer"].load_state_dict(state)
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    trained["text"].encoder.load_state_dict(encoder.state_dict())
    config = json.loads((folder / "vae/config.json").read_text())
    return torch.tensor(config["latents_mean"]), torch.tensor(config["latents_std"])


class Learner:
    """Weights that learn, the exponential average of them, which is what is kept, and their optimizers.

    Args:
        start: folder of finished weights, in diffusers' layout; None: from nothing.
        bfloat16: whether to compute in it.
    """

    def __init__(self, start: Path | None, device: torch.device, *, bfloat16: bool = True) -> None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = make_tokenizer(folder, vocabulary())
        transformer, self.processor = make_transformer()
        text = Text(tokenizer)
        self.weights = nn.ModuleDict({"transformer": transformer, "text": text}).to(device)
        self.scale = None if start is None else load_weights(start, self.weights)
        self.average = copy.deepcopy(self.weights)
        for block in self.average["transformer"].blocks:
            block.attn2.set_processor(self.processor)
        self.optimizers = make_optimizers(transformer, text)
        self.rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        self.device, self.bfloat16 = device, bfloat16

    @property
    def state(self) -> dict[str, nn.Module]:
        return {"trained": self.weights, "average": self.average}

    def load(self, path: Path) -> int:
        return checkpoint.load(path, self.state, self.optimizers)

    def save(self, path: Path, step: int) -> None:
        checkpoint.save(path, step, self.state, self.optimizers)

    def velocity(
        self, noisy: torch.Tensor, sigma: torch.Tensor, captions: list[str], *, average: bool = False
    ) -> torch.Tensor:
        """What the weights, or their average, say of ``noisy`` [n, channels, frames, height, width]: float32.

        ``sigma`` [n, frames]: noise levels; where a window's frames differ, each token has a time of its own.
        """
        net = self.average if average else self.weights
        times = 1000 * sigma[:, 0]
        if not sigma.equal(sigma[:, :1].expand_as(sigma)):
            tokens = noisy[0, 0, 0].numel() // math.prod(TRANSFORMER["patch_size"])
            times = (1000 * sigma).repeat_interleave(tokens, dim=1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            embeds, self.processor.bias = net["text"](captions)
            return net["transformer"](noisy, times, embeds, return_dict=False)[0].float()

    def learn(self, loss: torch.Tensor, rate: float, keep: float) -> None:
        """One step down ``loss``, averaged over ranks, at ``rate`` of all learning rates; ``keep``: of the average."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]  # others once loaded
        for group, full in zip(groups, self.rates, strict=True):
            group["lr"] = rate * full
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        parallel.average_gradients(self.weights.parameters())
        nn.utils.clip_grad_norm_(self.weights.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            for mine, new in zip(self.average.parameters(), self.weights.parameters(), strict=True):
                mine.lerp_(new, 1 - keep)
