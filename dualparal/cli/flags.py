"""The flags of the commands, in groups: a field per flag. A command gets the groups whole.

The docstring of a group is its title in --help.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from dualparal.config.decoding import AUTO
from dualparal.config.lora import Lora
from dualparal.config.transformer_file import TransformerFile
from dualparal.launch.blame import Limits
from dualparal.models.registry import BUILT_IN

_FEWEST_SECONDS = 3  # a few signs of life: they come every 0.3 s, under torchrun every second
_TORCHRUN_HEARTBEAT = 60.0  # beats travel over a network, and the ranks' clocks start apart


@dataclass(frozen=True)
class VideoFlags:
    """Video"""

    num_frames: Annotated[
        int, typer.Option(help="Length in frames: 1, 5, 9 ... (4k + 1); exactly that many are made.")
    ] = 81
    height: Annotated[int | None, typer.Option(help="Pixels. Default: the model's own, or 480.")] = None
    width: Annotated[int | None, typer.Option(help="Pixels. Default: the model's own, or 832.")] = None
    num_inference_steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            "--num-inference-steps",
            help="Denoising steps of every block. Default: as many as --timesteps or --sigmas names, or the model's "
            "own, or 50.",
            show_default=False,
        ),
    ] = None
    timesteps: Annotated[
        str | None,
        typer.Option(help="The steps one by one, such as 1000,757,522, as the weights were distilled for."),
    ] = None
    sigmas: Annotated[
        str | None,
        typer.Option(help="The same as noise levels before the sampler's shift, such as 1.0,0.9,0.6."),
    ] = None
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance; 1: none, half the work. Default: the model's own, or 5.", show_default=False
        ),
    ] = None
    guidance_scale_2: Annotated[
        float | None,
        typer.Option(help="The same for the second transformer of Wan2.2. Default: as the first."),
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of the noise; one more in each further video.")] = 0


def parse_steps(flag: str, text: str | None) -> tuple[float, ...] | None:
    """The numbers of a flag such as "1000,757,522"; None: it was not given. Raises ValueError."""
    if text is None:
        return None
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"{flag} {text!r}: use numbers with commas between, such as 1000,757,522") from None


@dataclass(frozen=True)
class ModelFlags:
    """Model and sampler"""

    model: Annotated[
        str,
        typer.Option(
            help="Wan text-to-video pipeline: a directory in diffusers format, a name that 'dualparal models' lists, a "
            "hub id, or the small model of moving shapes that ships with this package."
        ),
    ] = BUILT_IN
    transformer: Annotated[
        list[str] | None,
        typer.Option(
            help="FILE (.safetensors, or a folder of them) in place of the model's transformer: original or diffusers' "
            "names, 16 bits or fp8. For the two transformers of Wan2.2 high:FILE and low:FILE.",
            show_default=False,
        ),
    ] = None
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="FILE[:WEIGHT], a LoRA (.safetensors) that is merged into the weights; may be repeated. For the two "
            "transformers of Wan2.2 high:FILE[:WEIGHT] and low:FILE[:WEIGHT].",
            show_default=False,
        ),
    ] = None
    sampler: Annotated[str | None, typer.Option(help="unipc, euler, dpm++ or lcm. Default: the model's own.")] = None
    flow_shift: Annotated[
        float | None, typer.Option(help="Shift of the sampler's noise levels. Default: the model's own.")
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16. Default: bfloat16 on cuda, float32 on cpu."),
    ] = None
    vae_dtype: Annotated[
        str,
        typer.Option(
            help="Of what decodes: float32, bfloat16, float16, or auto: float32, and on cuda bfloat16 once its "
            "measured error allows (docs/vae-dtype.md)."
        ),
    ] = AUTO
    decoder: Annotated[
        Path | None,
        typer.Option(
            help="A light decoder (TAEHV, such as taew2_1) as .safetensors, in the VAE's place: quicker, less exact."
        ),
    ] = None
    allow_nonfinite: Annotated[
        bool, typer.Option(help="Go on when a block holds NaN or infinity, instead of stopping before it.")
    ] = False

    @property
    def transformers(self) -> tuple[TransformerFile, ...]:
        """The files in place of transformers. Raises ValueError."""
        return tuple(_file("--transformer", text, TransformerFile.of) for text in self.transformer or ())

    @property
    def loras(self) -> tuple[Lora, ...]:
        """The LoRAs that the flags ask for. Raises ValueError."""
        return tuple(_file("--lora", text, Lora.parse) for text in self.lora or ())


def _file(flag: str, text: str, make: Callable[[str], Any]) -> Any:
    """The value that is made of a flag's text. Raises ValueError, with the text as it was typed."""
    try:
        return make(text)
    except ValueError as error:
        raise ValueError(f"{flag} {text}: {str(error).partition(': ')[2] or error}") from None


@dataclass(frozen=True)
class PlaceFlags:
    """Place"""

    gpus: Annotated[
        int | None,
        typer.Option(
            help="Number of GPUs, one stage each but for --decode-gpus and --sequence-parallel.", show_default=False
        ),
    ] = None
    stages: Annotated[
        int | None,
        typer.Option(help="Stages. Default: (--gpus less --decode-gpus) / --sequence-parallel, or 1."),
    ] = None
    decode_gpus: Annotated[
        int,
        typer.Option(
            help="Of the GPUs, those that only decode frames, each a part of the picture's rows (on the CPU: processes "
            "besides --stages). 0: stage 0's decodes, too."
        ),
    ] = 0
    decode_in_place: Annotated[
        bool, typer.Option(help="Every stage's GPU decodes a part of the picture's rows beside its own work.")
    ] = False
    sequence_parallel: Annotated[
        int,
        typer.Option(
            help="GPUs (processes) of each stage, which share the tokens and heads of every unit: for few steps on "
            "many cards. The same video."
        ),
    ] = 1
    sequence_parallel_form: Annotated[
        str,
        typer.Option(help="plain, or pipelined: one group of heads travels while the next is attended to."),
    ] = "plain"
    layers_per_stage: Annotated[
        str | None,
        typer.Option(help="Layers of each stage, such as 9,11,10. Default: an even split.", show_default=False),
    ] = None
    device: Annotated[str | None, typer.Option(help="cuda or cpu. Default: cuda where there is one.")] = None
    text_encoder_device: Annotated[
        str | None,
        typer.Option(
            help="cpu: encode prompts there, where the card has no room for the text encoder. Default: --device.",
            show_default=False,
        ),
    ] = None
    depth: Annotated[int, typer.Option(help="Messages that fit between two stages.")] = 2
    graphs: Annotated[bool, typer.Option(help="Run every stage step as a CUDA graph (cuda only).")] = False
    threads: Annotated[
        int,
        typer.Option(
            help="CPU threads per process; 0: OMP_NUM_THREADS, or the cores over the processes, few for a small model."
        ),
    ] = 0
    plan: Annotated[
        str | None,
        typer.Option(help="auto: layers per stage, blocks in flight and roles of --gpus, as by 'dualparal plan'."),
    ] = None


@dataclass(frozen=True)
class OutputFlags:
    """Output"""

    out: Annotated[
        Path | None,
        typer.Option(
            help="A .mp4 file, or a folder for PNG files (several videos: NAME-0, NAME-1 ...). Default video.mp4, or "
            "none with --latents-out."
        ),
    ] = None
    fps: Annotated[float, typer.Option(help="Frames per second of the video file.")] = 16.0
    keep_blocks: Annotated[bool, typer.Option(help="Keep the video's segments after they were joined.")] = False
    latents_in: Annotated[
        Path | None, typer.Option(help="Initial noise: safetensors, one tensor 'latents' [videos, C, L, H, W].")
    ] = None
    latents_out: Annotated[Path | None, typer.Option(help="Write the final latents there, in the same format.")] = None
    timeline: Annotated[
        Path | None,
        typer.Option(
            help="Write a trace of the run there (.json or .json.gz, for ui.perfetto.dev) and its picture beside it "
            "(.png; needs matplotlib)."
        ),
    ] = None
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="An empty folder for snapshots, from which --resume goes on after whatever happens."),
    ] = None
    checkpoint_every: Annotated[
        int | None,
        typer.Option(help="Iterations between snapshots. Default: 2 % of the time.", show_default=False),
    ] = None
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on from this folder's last snapshot, on any number of stages; all else is known there."),
    ] = None
    resume_or_start: Annotated[
        Path | None,
        typer.Option(
            help="As --checkpoint, for a command that is restarted as it is (a requeued job, Kubernetes): "
            "it begins where the folder has no snapshot, else it goes on; once done it says so and ends with 0.",
            show_default=False,
        ),
    ] = None
    overwrite: Annotated[bool, typer.Option(help="Replace outputs that exist.")] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the request and its plan as YAML, check it, and start nothing.")
    ] = False
    config: Annotated[
        Path | None,
        typer.Option(
            help="A YAML file with these flags as keys, and a storyboard; flags that are given win (docs/api.md).",
            show_default=False,
        ),
    ] = None


@dataclass(frozen=True)
class LimitFlags:
    """Patience with processes, in seconds"""

    heartbeat_limit: Annotated[
        float | None,
        typer.Option(
            help="Without a sign of life: a process is stopped or stuck. Default: 10, under torchrun 60.",
            show_default=False,
        ),
    ] = None
    progress_limit: Annotated[
        float, typer.Option(help="Without progress while busy, or while all wait for one another.")
    ] = Limits.progress
    startup_limit: Annotated[
        float, typer.Option(help="At least so much for either while a process imports and loads.")
    ] = Limits.startup
    grace: Annotated[float, typer.Option(help="From the wish to stop to the end of those that do not.")] = Limits.grace

    def limits(self, distributed: bool) -> Limits:
        """The limits that the flags ask for; ``distributed``: there is torchrun's store and no parent of ours.

        Raises ValueError.
        """
        usual = _TORCHRUN_HEARTBEAT if distributed else Limits.heartbeat
        heartbeat = usual if self.heartbeat_limit is None else self.heartbeat_limit
        for name, value in asdict(self).items():
            least = _FEWEST_SECONDS if name == "heartbeat_limit" else 0
            if value is not None and not value >= least:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {value:g}: seconds of patience with a process; use {least} or more")
        return Limits(heartbeat, self.progress_limit, self.startup_limit, self.grace)


def command_of(handler: Callable[..., None], *groups: Any) -> Callable[..., None]:
    """A command for typer whose flags are the fields of some groups.

    Args:
        handler: called with typer's context and an object of each group. Its docstring is the command's help.
        groups: dataclasses whose fields are annotated with ``typer.Option``; the docstring is the title in --help.

    Returns:
        A function with a keyword parameter per flag, for ``typer.Typer.command``.
    """

    def command(call: typer.Context, **given: Any) -> None:
        handler(call, *(group(**{item.name: given[item.name] for item in fields(group)}) for group in groups))

    parameters = [inspect.Parameter("call", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
    for group in groups:
        hints = get_type_hints(group, include_extras=True)
        for item in fields(group):
            hints[item.name].__metadata__[0].rich_help_panel = group.__doc__
            parameters.append(
                inspect.Parameter(
                    item.name, inspect.Parameter.KEYWORD_ONLY, default=_default(item), annotation=hints[item.name]
                )
            )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__name__, command.__doc__ = handler.__name__, handler.__doc__
    return command


def _default(item: Field[Any]) -> Any:
    """typer's mark for a flag that must be given is a parameter without a default."""
    return inspect.Parameter.empty if item.default is MISSING else item.default
