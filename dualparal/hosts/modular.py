"""Blocks for diffusers' modular pipelines: denoising and decoding in flight, in the place of the stock steps."""

from __future__ import annotations

import weakref
from typing import Any

import diffusers
import torch
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam

from dualparal.decoding.chunks import Chunk
from dualparal.decoding.frames import to_output, to_uint8
from dualparal.engine.engine import Engine
from dualparal.engine.result import join_chunks
from dualparal.models.registry import family_of

_PIPELINE = "WanPipeline"  # the parts of text to video
_CFG = {"guidance_rescale": 0.0, "use_original_formulation": False}  # what there is of the guider's options


class DualParalDenoise(ModularPipelineBlocks):
    """The denoising of ``WanBlocks``: ``blocks.sub_blocks["denoise"] = DualParalDenoise(frames_per_block=8)``.

    Takes embeddings, sizes, steps and noise as the stock block does, and leaves latents [V, C, L, h, w] float32 of all
    videos. ``num_frames`` may be any length. The noise is the engine's own for a seed that ``generator`` draws, or
    ``latents``.

    Args:
        engine: makes the video: one of ``dualparal.Engine.from_pretrained``, also with ``gpus``, whose model and
            options hold then. None: one is made of the pipeline's own components at the first call.
        options: of that one, as ``Engine.from_pretrained`` takes them.

    Raises:
        ValueError: both; and when it runs, a request or a guider that the engine does not have.
    """

    model_name = "wan"

    def __init__(self, engine: Any = None, **options: Any) -> None:
        super().__init__()
        if engine is not None and options:
            raise ValueError(f"engine and {', '.join(options)} were both given; the engine has its options")
        self._engine, self._options = engine, options
        self._made: tuple[weakref.ref[Any], Any] | None = None  # the transformer that an engine was made of, and it

    @property
    def description(self) -> str:
        """A sentence for diffusers' descriptions."""
        return "Denoises a video of any length in blocks that are in flight together."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """The components that it reads."""
        return [
            ComponentSpec("transformer", diffusers.WanTransformer3DModel),
            ComponentSpec("vae", diffusers.AutoencoderKLWan),
            ComponentSpec("scheduler", diffusers.UniPCMultistepScheduler),
            ComponentSpec(
                "guider",
                diffusers.ClassifierFreeGuidance,
                config=diffusers.configuration_utils.FrozenDict({"guidance_scale": 5.0}),
                default_creation_method="from_config",
            ),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        """The values that it takes, by their names in diffusers."""
        optional = "negative_prompt_embeds timesteps sigmas height width latents generator attention_kwargs"
        return [
            InputParam("prompt_embeds", required=True, type_hint=torch.Tensor),
            InputParam("num_videos_per_prompt", default=1),
            InputParam("num_inference_steps", default=50),
            InputParam("num_frames", default=81),
            *(InputParam(name) for name in optional.split()),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """The value that it leaves."""
        return [OutputParam("latents", type_hint=torch.Tensor, description="Denoised latents [V, C, L, h, w].")]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Makes the latents. Raises ValueError, and what the engine raises."""
        block_state = self.get_block_state(state)  # type: ignore[attr-defined]
        engine = self._engine or self._made_of(components)
        engine.scheduler = components.scheduler
        values = {item.name: getattr(block_state, item.name, None) for item in self.inputs}
        if values["timesteps"] is not None or values["sigmas"] is not None:
            values["num_inference_steps"] = None
        scale = _guidance_scale(components.guider)
        found = engine(guidance_scale=scale, output_type="latent", **values)
        block_state.latents = found.frames.float()
        self.set_block_state(state, block_state)  # type: ignore[attr-defined]
        return components, state

    def _made_of(self, components: Any) -> Any:
        """The engine of these components, which is made once."""
        if getattr(components, "transformer_2", None) is not None:
            raise ValueError("transformer_2: this block has one transformer; give an engine of the whole model")
        if self._made is None or self._made[0]() is not components.transformer:
            pipe = diffusers.WanPipeline(
                tokenizer=None,
                text_encoder=None,
                vae=components.vae,
                scheduler=components.scheduler,
                transformer=components.transformer,
            )
            options = {"device": components.transformer.device.type, "dtype": components.transformer.dtype}
            engine = Engine.from_pretrained(pipe, **{**options, **self._options})
            self._made = weakref.ref(components.transformer), engine
        return self._made[1]


class DualParalDecode(ModularPipelineBlocks):
    """The decoding of ``WanBlocks``, a few latent frames at a time: memory for frames, not for the VAE's whole pass.

    Takes latents [V, C, L, h, w] and leaves ``videos`` by ``output_type``, as the stock block does: "np", "pt", "pil".
    Frames are those of the engine, bit for bit.
    """

    model_name = "wan"

    @property
    def description(self) -> str:
        """A sentence for diffusers' descriptions."""
        return "Decodes latents of any length frame by frame."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """The component that it reads."""
        return [ComponentSpec("vae", diffusers.AutoencoderKLWan)]

    @property
    def inputs(self) -> list[InputParam]:
        """The values that it takes, by their names in diffusers."""
        return [
            InputParam("latents", required=True, type_hint=torch.Tensor),
            InputParam("output_type", default="np", type_hint=str),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """The value that it leaves."""
        return [OutputParam("videos", description="The videos, as output_type says.")]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Decodes all videos. Raises ValueError for latents or a type that there is not."""
        block_state = self.get_block_state(state)  # type: ignore[attr-defined]
        kind: Any = block_state.output_type or "np"
        family = family_of(_PIPELINE)
        assert family is not None, "a row of the registry"
        chunks = []
        for video, latents in enumerate(block_state.latents.split(1)):
            decoder = family.decoder(components.vae)
            for number, part in enumerate(latents.split(1, dim=2)):
                frames = decoder.push(part)
                given = to_uint8(frames) if kind == "uint8" else to_output(frames, kind)
                chunks.append(Chunk(number, 0, given, part, None, video))  # type: ignore[arg-type]
        block_state.videos = join_chunks(chunks, kind)
        self.set_block_state(state, block_state)  # type: ignore[attr-defined]
        return components, state


def _guidance_scale(guider: Any) -> float:
    """The scale of a guider; 1: it is off. Raises ValueError for one that the engine does not have."""
    name = type(guider).__name__
    if name != "ClassifierFreeGuidance":
        raise ValueError(f"guider is a {name}: the engine has ClassifierFreeGuidance; use that")
    wanted = {**_CFG, "_start": 0.0, "_stop": 1.0}
    for option, value in wanted.items():
        if getattr(guider, option) != value:
            raise ValueError(
                f"guider.{option.strip('_')}={getattr(guider, option)!r}: the engine has {value!r} alone; leave it so"
            )
    if not guider._enabled or guider.guidance_scale == 1:
        return 1.0
    if guider.guidance_scale < 1:
        raise ValueError(f"guider.guidance_scale={guider.guidance_scale!r}: below 1 the engine has no guidance; use 1")
    return float(guider.guidance_scale)
