"""A pipeline that the user has loaded already, as a source of layers."""

from __future__ import annotations

import copy
from typing import Any

import torch

from dualparal.config.eight_bit import LINEAR_OFF, LinearPolicy
from dualparal.config.video import VideoConfig
from dualparal.models.base import ModelSpec, Slice
from dualparal.models.defaults import model_defaults
from dualparal.models.family import Family
from dualparal.models.files import EXPERTS
from dualparal.models.json_files import ModelError
from dualparal.models.linear import placed
from dualparal.models.loading import one_at_a_time
from dualparal.models.registry import family_of, supported_pipelines

_ALIGNMENT = 64  # bytes, as torch's own allocations on a CPU


class LoadedPipeline:
    """A diffusers pipeline that the user has loaded; its tensors are shared where device and dtype allow.

    Raises:
        ModelError: a class of no family, or a variant that its family does not run.
    """

    def __init__(self, pipeline: Any) -> None:
        name = type(pipeline).__name__
        family = family_of(name)
        if family is None:
            raise ModelError(
                f"a {name} was given; supported: a directory, a hub id, or a loaded {supported_pipelines()}"
            )
        self.family: Family = family
        self.pipeline = pipeline
        self._modules = [m for m in (getattr(pipeline, part, None) for part in EXPERTS) if m is not None]
        try:
            reader = getattr(pipeline, "image_encoder", None)
            self.spec: ModelSpec = family.spec(
                [m.config for m in self._modules],
                pipeline.vae.config,
                pipeline.config,
                None if reader is None else reader.config.to_dict(),
            )
        except ValueError as error:
            raise ModelError(str(error)) from None

    @property
    def defaults(self) -> VideoConfig:
        """A request as the folder has it that it was loaded from, where nothing was asked for. Raises ModelError."""
        return model_defaults(self.pipeline).video

    @property
    def fingerprint(self) -> str:
        """The number of elements of each transformer, for ranks to compare (no checksum of the data)."""
        return "; ".join(f"{sum(p.numel() for p in m.parameters())} elements" for m in self._modules)

    @one_at_a_time
    def load_slices(
        self, layers: range, dtype: torch.dtype, device: torch.device, linear_8bit: LinearPolicy = LINEAR_OFF
    ) -> list[Slice]:
        """Slices that share the tensors of the loaded transformers (Q, K and V are copied into one matrix).

        On the CPU a tensor that does not begin at a multiple of 64 bytes is copied: products with it can have other
        last bits than with those that are read from files. transformers and diffusers map files, and begin anywhere.

        Raises:
            ModelError: weights were replaced (LoRA, quantisation), which would silently be lost.
        """
        slices: list[Slice] = []
        for expert, module in enumerate(self._modules):
            state = module.state_dict()
            odd = sorted(set(state) ^ set(self.spec.shapes(expert)))
            if odd:
                raise ModelError(
                    f"the loaded transformer has other tensors than a plain one ({', '.join(odd[:3])} ...): fuse "
                    "LoRA weights first (pipe.fuse_lora(); pipe.unload_lora_weights()) and do not quantise"
                )
            tensors: dict[str, torch.Tensor] = {}
            for name in self.spec.names(expert, layers):
                if not state[name].is_floating_point() or state[name].element_size() < 2:
                    raise ModelError(
                        f"the loaded transformer holds {name} as {state[name].dtype}: quantised weights "
                        "are not supported; load it in float32, bfloat16 or float16"
                    )
                made = placed(self.spec, name, state[name], dtype, device, linear_8bit)
                tensors |= {each: _aligned(tensor) for each, tensor in made.items()}
            slices.append(self.spec.build(tensors, layers))
        return slices

    def load_scheduler(self) -> Any:
        """The pipeline's own scheduler."""
        return self.pipeline.scheduler

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The pipeline's own VAE, moved to ``device``; where it has another dtype, a copy in ``dtype``."""
        vae = self.pipeline.vae
        return vae.to(device) if next(vae.parameters()).dtype == dtype else copy.deepcopy(vae).to(device, dtype)

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
        """Returns the pipeline's own (tokenizer, text encoder), the latter moved to ``device``; it keeps its dtype."""
        return self.pipeline.tokenizer, self.pipeline.text_encoder.to(device)

    def load_image_encoder(self, device: torch.device) -> tuple[Any, Any]:
        """Returns the pipeline's own (image processor, image encoder), the latter moved to ``device``."""
        return self.pipeline.image_processor, self.pipeline.image_encoder.to(device)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT else tensor
