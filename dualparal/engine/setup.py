"""The setup of an engine: its model, options and place, checked before weights are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dualparal.config.decoding import AUTO, choose_vae_dtype
from dualparal.config.engine import EngineConfig
from dualparal.distributed.mesh import Mesh, in_distributed_run
from dualparal.kernels import attention_8bit, linear_8bit
from dualparal.models.base import LightFile
from dualparal.models.files import ModelFiles
from dualparal.models.json_files import ModelError
from dualparal.models.loaded import LoadedPipeline
from dualparal.models.source import ModelSource, resolve_model
from dualparal.schedule.layout import check_heads, split_layers


@dataclass(frozen=True)
class Setup:
    """An engine's model, options and place.

    Attributes:
        source: the model.
        config: the options; device, dtypes and number of stages are filled in.
        mesh: this process among those of the run.
    """

    source: ModelSource
    config: EngineConfig
    mesh: Mesh

    @classmethod
    def of(cls, model: str | Path | Any, config: EngineConfig) -> Setup:
        """Joins the ranks of a distributed run, and fills in what ``config`` leaves open.

        Args:
            model: a directory in diffusers format, a hub id, the model of the package, or a loaded pipeline.
            config: the options, some of them open.

        Raises:
            ValueError: options that this machine or this model does not have; ``ModelError`` for a model that is not
                supported, or whose files do not fit its config.
            RuntimeError: a rank of a distributed run without a card.
        """
        source = _source(model, config)
        device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda' but torch sees no GPU; use device='cpu', or install a CUDA build of torch")
        if config.graphs and device.type != "cuda":
            raise ValueError(f"graphs=True with device={device.type!r}: CUDA graphs need a GPU; leave graphs out")
        mesh = _mesh(config, device)
        config = replace(
            config,
            stages=mesh.num_stages,
            device=str(mesh.device),
            dtype=config.dtype or ("bfloat16" if device.type == "cuda" else "float32"),
            vae_dtype=_vae_dtype(config, source, mesh.device),
        )
        found = cls(source, config, mesh)
        _ = found.layers  # checks the split, before weights are looked at
        check_heads(found.source.spec.heads, mesh.places)
        _ = found.light
        if config.attention_8bit.on:
            found.check_8bit()
        if config.linear_8bit.on:
            found.check_linear_8bit()
        if config.features_8bit and (reason := linear_8bit.rows_absent(mesh.device)):
            raise ValueError(f"features_8bit=True cannot run: {reason}; leave it out")
        if isinstance(source, ModelFiles):
            source.check_weights(parts=mesh.is_leader or config.decode_in_place or not mesh.stages)
        return found

    @property
    def num_stages(self) -> int:
        """The number of stages of the whole run."""
        return self.mesh.num_stages

    @cached_property
    def layers(self) -> list[range]:
        """The layers of each stage, as indices of the model's layers."""
        return split_layers(self.source.spec.num_layers, self.num_stages, self.config.layers_per_stage)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the transformer."""
        assert self.config.dtype is not None, "filled in when a setup is made"
        found: torch.dtype = getattr(torch, self.config.dtype)
        return found

    @cached_property
    def light(self) -> LightFile | None:
        """The file of the light decoder; None: the VAE decodes. Raises ModelError."""
        path, source = self.config.decoder, self.source
        return None if path is None else source.family.light_file(Path(path), source.spec)

    @property
    def vae_dtype(self) -> torch.dtype:
        """The dtype of what decodes."""
        found: torch.dtype = getattr(torch, self.config.vae_dtype)
        return found

    def check_8bit(self) -> None:
        """Checks that the model and the device have 8-bit attention like this. Raises ValueError when not."""
        eight_bit, spec, device = self.config.attention_8bit, self.source.spec, self.mesh.device
        eight_bit.check(spec.num_layers)
        if device.type == "cuda":
            reason = attention_8bit.absent(device, spec.inner_dim // spec.heads, eight_bit.mode == "fp8")
            if reason:
                raise ValueError(f"attention_8bit={eight_bit.mode!r} cannot run: {reason}; leave it out")

    def check_linear_8bit(self) -> None:
        """Checks that the model and the device have 8-bit linears like this. Raises ValueError when not."""
        policy, spec, divisor = self.config.linear_8bit, self.source.spec, linear_8bit.DIVISOR
        policy.check(spec.num_layers)
        shapes = {name: shape for name, shape in spec.shapes(0).items() if policy.covers(spec.linear_layer(name))}
        reason = linear_8bit.absent(self.mesh.device)
        if not shapes:
            reason = "this family of models has no linears for it"
        for name, shape in shapes.items():
            if any(side % divisor for side in shape):
                reason = f"{name} is {list(shape)}, and both sides must divide by {divisor}"
        if reason:
            raise ValueError(f"linear_8bit={policy.mode!r} cannot run: {reason}; leave it out")


def _source(model: Any, config: EngineConfig) -> ModelSource:
    """The model that ``Setup.of`` was given. Raises ModelError."""
    if isinstance(model, (str, Path)):
        return resolve_model(model, config.loras, config.transformers)
    if config.transformers:
        raise ModelError(
            f"transformer {config.transformers[0].file} with a loaded pipeline: it has its own; load it there "
            "(WanTransformer3DModel.from_single_file), or give the model as a directory"
        )
    if config.loras:
        raise ModelError(
            f"LoRA {config.loras[0].file} with a loaded pipeline: fuse it there (pipe.load_lora_weights(...); "
            "pipe.fuse_lora(); pipe.unload_lora_weights()), or give the model as a directory"
        )
    return LoadedPipeline(model)


def _vae_dtype(config: EngineConfig, source: ModelSource, device: torch.device) -> str:
    """The dtype of what decodes on ``device``; "auto" leaves a loaded pipeline's VAE as it is."""
    if config.vae_dtype == AUTO and config.decoder is None and isinstance(source, LoadedPipeline):
        return str(next(source.pipeline.vae.parameters()).dtype).removeprefix("torch.")
    on_card = device.type == "cuda"
    has_bfloat16 = on_card and torch.cuda.get_device_capability(device) >= (8, 0)  # below, it is emulated
    return choose_vae_dtype(config.vae_dtype, on_card, has_bfloat16)


def _mesh(config: EngineConfig, device: torch.device) -> Mesh:
    """The mesh of this process, by itself or among the ranks of a distributed run. Raises ValueError, RuntimeError."""
    stages, split = config.stages, config.layers_per_stage
    if not in_distributed_run():
        if stages is None:
            stages = 1 if split is None else len(split)
        return Mesh.local(device, stages, config.sequence_parallel)
    mesh = Mesh.join(device.type, config.decode_ranks, config.sequence_parallel)
    if stages not in (None, mesh.num_stages):
        rule = "every rank owns one stage"
        if config.decode_ranks:
            rule = f"{config.decode_ranks} decode and every other one owns one stage"
        if mesh.places > 1:
            rule = rule.replace("owns one stage", f"shares a stage with {mesh.places - 1}")
        raise ValueError(
            f"stages={stages} with {mesh.world_size} ranks: in a distributed run {rule}; leave stages out or start "
            f"{(stages or 0) * mesh.places + config.decode_ranks} ranks"
        )
    return mesh
