"""The options of an engine as one checked value, made once and passed whole. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dualparal.config.blocks import BlockConfig
from dualparal.config.decoding import AUTO
from dualparal.config.eight_bit import LINEAR_OFF, OFF, EightBitPolicy, LinearPolicy
from dualparal.config.lora import Lora
from dualparal.config.reuse import REUSE_OFF, Reuse
from dualparal.config.transformer_file import TransformerFile

# Of the transformer, and of the VAE: bytes per element.
DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
SEQUENCE_PARALLEL_FORMS = ("plain", "pipelined")


@dataclass(frozen=True)
class EngineConfig:
    """All options with which an engine runs a model, apart from the model and the request. None: its own choice.

    Attributes:
        blocks: the cut of a video into blocks, and what these see of each other.
        stages: number of runs of layers into which the model is cut. Default: the number of ranks.
        layers_per_stage: layers of each stage, for cards that are not alike. Default: an even split.
        transformers: files in place of the folder's transformers, in the original or in diffusers' names.
        loras: files of low-rank updates that are merged into the weights while these are read, in this order.
        device: "cuda", "cuda:1" or "cpu". Default: "cuda" where there is one, else "cpu".
        dtype: of the transformer, a key of ``DTYPE_BYTES``. Default: "bfloat16" on CUDA, "float32" on the CPU.
        vae_dtype: of what decodes, a key of ``DTYPE_BYTES``, or "auto": ``config.decoding`` has its rule. Latents do
            not depend on it.
        decoder: a safetensors file with a light decoder, which takes the VAE's place. None: the VAE.
        decode_ranks: ranks that decode and do nothing else, each a part of the picture's rows; they come after the
            stages' ranks. 0: the rank of stage 0 decodes, beside its units. The same latents for any number, and on
            the CPU the same frames.
        decode_in_place: every stage's rank decodes a part of the picture's rows beside its units.
        text_encoder_device: "cpu": prompts are encoded on the CPU, where the card has no room for the text encoder.
            Default: on ``device`` before a run, and on the CPU while one goes on.
        depth: messages that fit between two stages.
        sequence_parallel: ranks of each stage, P: they share the tokens and the heads of every unit. On the CPU the
            same video for any number, as long as each rank computes on one thread. 1: a stage is one rank.
        sequence_parallel_form: "plain", or "pipelined": the result of one group of heads travels while the next is
            attended to. The same video.
        graphs: run each stage step as a CUDA graph; the same bits, less work for the host.
        attention_8bit: self-attention in 8 bits, in all layers and steps or in some; with a dtype of 16 bits. Another
            video, near that of "off"; the same for any number of stages.
        linear_8bit: linears of the layers in 8 bits, in all layers or in some; with dtype bfloat16. Another video,
            near that of "off"; the same for any number of stages.
        features_8bit: neighbours' features of attention in 16 bits are kept in fp8, in half the memory (in a quarter,
            with float32). Another video, near that of False; the same for any number of stages.
        reuse: steps at which the model does not run, and velocities are extrapolated instead. Another video, near that
            of "off"; the same for any number of stages.
        allow_nonfinite: give out blocks that hold NaN or infinity, with a warning, and do not stop.

    Raises:
        ValueError: a value is out of range; the message names the value, the rule and the way out.
    """

    blocks: BlockConfig = field(default_factory=BlockConfig)
    stages: int | None = None
    layers_per_stage: tuple[int, ...] | None = None
    transformers: tuple[TransformerFile, ...] = ()
    loras: tuple[Lora, ...] = ()
    device: str | None = None
    dtype: str | None = None
    text_encoder_device: str | None = None
    vae_dtype: str = AUTO
    decoder: str | None = None
    decode_ranks: int = 0
    decode_in_place: bool = False
    depth: int = 2
    sequence_parallel: int = 1
    sequence_parallel_form: str = "plain"
    graphs: bool = False
    attention_8bit: EightBitPolicy = OFF
    linear_8bit: LinearPolicy = LINEAR_OFF
    features_8bit: bool = False
    reuse: Reuse = REUSE_OFF
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or self.depth < 1:
            raise ValueError(
                f"depth={self.depth!r}: at least one message must fit between two stages; 2 lets transfers overlap "
                "compute"
            )
        if self.dtype is not None and self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype={self.dtype!r} is not supported; use one of {', '.join(DTYPE_BYTES)}")
        if self.text_encoder_device not in (None, "cpu"):
            raise ValueError(
                f"text_encoder_device={self.text_encoder_device!r}: use 'cpu', or leave it out for the engine's device"
            )
        if self.vae_dtype not in (AUTO, *DTYPE_BYTES):
            raise ValueError(
                f"vae_dtype={self.vae_dtype!r} is not supported; use {AUTO} or one of {', '.join(DTYPE_BYTES)}"
            )
        self._check_decoders()
        if self.attention_8bit.on and self.dtype == "float32":
            raise ValueError(
                f"attention_8bit={self.attention_8bit.mode!r} with dtype=float32: values and weights beside 8-bit "
                "keys have 16 bits; use dtype='bfloat16'"
            )
        if self.linear_8bit.on and self.dtype not in (None, "bfloat16"):
            raise ValueError(
                f"linear_8bit={self.linear_8bit.mode!r} with dtype={self.dtype}: products of fp8 rows come in "
                "bfloat16; use dtype='bfloat16'"
            )
        if self.attention_8bit.on and self.blocks.anchor_frames:
            raise ValueError(
                f"attention_8bit={self.attention_8bit.mode!r} with anchor_frames={self.blocks.anchor_frames}: keys in "
                "8 bits cannot be turned to another position; leave one of them out"
            )
        self._check_features_8bit()
        self._check_sequence_parallel()

    def _check_sequence_parallel(self) -> None:
        """Checks the ranks of a stage, and what they cannot share yet. Raises ValueError."""
        count, form = self.sequence_parallel, self.sequence_parallel_form
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"sequence_parallel={count!r}: use the number of ranks of each stage, from 1 on")
        if form not in SEQUENCE_PARALLEL_FORMS:
            raise ValueError(
                f"sequence_parallel_form={form!r} is not a form; use one of {', '.join(SEQUENCE_PARALLEL_FORMS)}"
            )
        others = {
            "graphs=True": (self.graphs, "an exchange between ranks is not captured in a graph"),
            f"attention_8bit={self.attention_8bit.mode!r}": (
                self.attention_8bit.on, "its scales and means are of all tokens of a window, of which a rank has some"
            ),
            "features_8bit=True": (self.features_8bit, "its scales are of all heads, of which a rank has some"),
        }  # fmt: skip
        for name, (on, reason) in others.items():
            if on and count > 1:
                raise ValueError(f"{name} with sequence_parallel={count}: {reason}; leave one of them out")

    def _check_decoders(self) -> None:
        """Checks who decodes. Raises ValueError."""
        ranks = self.decode_ranks
        if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 0:
            raise ValueError(
                f"decode_ranks={ranks!r}: use the number of ranks that only decode, 0 for none: stage 0's rank decodes"
            )
        if not isinstance(self.decode_in_place, bool):
            raise ValueError(f"decode_in_place={self.decode_in_place!r}: it has no modes; use True or False")
        if self.decode_in_place and ranks:
            raise ValueError(
                f"decode_in_place=True with decode_ranks={ranks}: the stages' ranks decode, or others do; leave one out"
            )

    def _check_features_8bit(self) -> None:
        """Checks that ``features_8bit`` is a bool, and that there is something for it to do. Raises ValueError."""
        if not isinstance(self.features_8bit, bool):
            raise ValueError(f"features_8bit={self.features_8bit!r}: it has no modes; use True or False")
        if not self.features_8bit:
            return
        if self.blocks.context_frames == 0 and not self.blocks.anchor_frames:
            raise ValueError("features_8bit=True with context_frames=0: nobody lends features; leave one of them out")
        if self.attention_8bit.everywhere and self.blocks.refresh_every is None:
            raise ValueError(
                f"features_8bit=True with attention_8bit={self.attention_8bit.mode!r} in all layers and steps: its "
                "features have 8 bits already; leave features_8bit out"
            )

    @property
    def encodes_elsewhere(self) -> bool:
        """True when prompts are encoded on the CPU and stages are not there."""
        return self.text_encoder_device == "cpu" and self.device != "cpu"

    @classmethod
    def of(cls, own: BlockConfig | None = None, /, **options: Any) -> EngineConfig:
        """The config of flat options, as ``Engine.from_pretrained`` takes them.

        Args:
            own: blocks as a model brings them (``BlockConfig.of``).
            options: fields of this class and of ``BlockConfig`` (frames_per_block, context_frames, context, ...).
                Dtypes and ``device`` may be torch's own objects, ``attention_8bit`` and ``linear_8bit`` names of
                modes, ``reuse`` a text (``Reuse.of``), ``layers_per_stage`` any sequence, ``loras`` and
                ``transformers`` any sequences of what ``Lora.of`` and ``TransformerFile.of`` take.

        Raises:
            ValueError: as the classes raise it; an option that neither has, with the nearest one; or ``blocks``
                beside options of its own.
        """
        block_names = {item.name for item in fields(BlockConfig)}
        own_names = {item.name for item in fields(cls)}
        for name in options:
            if name not in block_names | own_names:
                near = difflib.get_close_matches(name, block_names | own_names, 1)
                hint = f"; the nearest is {near[0]}" if near else ""
                raise ValueError(f"{name}={options[name]!r}: the engine has no such option{hint}")
        blocks = {name: value for name, value in options.items() if name in block_names}
        found = {name: value for name, value in options.items() if name in own_names}
        if blocks and "blocks" in found:
            raise ValueError(f"blocks and {', '.join(blocks)} were both given; say it in one place")
        if "blocks" not in found:
            found["blocks"] = BlockConfig.of(own, **blocks)
        mode = found.get("attention_8bit", OFF)
        found["attention_8bit"] = mode if isinstance(mode, EightBitPolicy) else EightBitPolicy(mode)
        mode = found.get("linear_8bit", LINEAR_OFF)
        found["linear_8bit"] = mode if isinstance(mode, LinearPolicy) else LinearPolicy(mode)
        found["reuse"] = Reuse.of(found.get("reuse", REUSE_OFF))
        if found.get("layers_per_stage") is not None:
            found["layers_per_stage"] = tuple(found["layers_per_stage"])
        if isinstance(found.get("loras"), (str, Mapping)):
            raise ValueError(f"loras={found['loras']!r}: use a list of files or of (file, weight)")
        found["loras"] = tuple(Lora.of(value) for value in found.get("loras") or ())
        if isinstance(found.get("transformers"), (str, Mapping)):
            raise ValueError(f"transformers={found['transformers']!r}: use a list of files or of (file, 'high')")
        found["transformers"] = tuple(TransformerFile.of(value) for value in found.get("transformers") or ())
        for name in ("device", "dtype", "vae_dtype"):
            if found.get(name) is not None:
                found[name] = str(found[name]).removeprefix("torch.")
        if found.get("decoder") is not None:
            found["decoder"] = str(found["decoder"])
        return cls(**found)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EngineConfig:
        """The inverse of ``dataclasses.asdict`` after a way through JSON. Raises KeyError, TypeError, ValueError."""
        eight_bit, linear = values["attention_8bit"], values["linear_8bit"]
        return cls.of(
            **{
                **values,
                "blocks": BlockConfig(**values["blocks"]),
                "attention_8bit": EightBitPolicy(**{**eight_bit, "keep_layers": tuple(eight_bit["keep_layers"])}),
                "linear_8bit": LinearPolicy(linear["mode"], tuple(linear["keep_layers"])),
                "reuse": Reuse(**values["reuse"]),
                "loras": [Lora(**lora) for lora in values["loras"]],
                "transformers": [TransformerFile(**file) for file in values["transformers"]],
            }
        )
