"""Settings of a server, checked when they are made: model and place, defaults of a video, limits, who may come."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass
from pathlib import Path

from dualparal.config.engine import EngineConfig

MIN_TOKEN = 16  # characters
_LOOPBACK_NAMES = "localhost"
_HOST_NAME = re.compile(r"[A-Za-z0-9.-]{1,253}")


@dataclass(frozen=True)
class Settings:
    """Everything that a server is started with.

    Attributes:
        model: a directory in diffusers format, a hub id, or a name; ``model_name`` is how clients call it.
        gpus: rank processes, also on the CPU.
        engine: the options of all videos.
        folder: where videos, snapshots and the queue are kept.
        host, port: the address.
        token: what clients say; None: nobody has to say anything, which only loopback allows.
        allow_hosts: names beside ``host`` by which browsers may call the server.
        height, width, multiple: pixels of a video unless a request says otherwise, and what they are multiples of.
        fps, seconds, steps, guidance_scale: the same of frames per second (of all videos), length, steps and guidance.
        max_queue, max_seconds, max_pixels, max_steps: limits: waiting videos, and of one video, pixels of a frame.
        keep: finished videos that are kept; beyond it the oldest goes.
        image_counts: numbers of images that the model takes for a video.

    Raises:
        ValueError: a value cannot be; names the flag.
    """

    model: str
    gpus: int
    engine: EngineConfig
    folder: Path
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    allow_hosts: tuple[str, ...] = ()
    height: int = 480
    width: int = 832
    multiple: int = 16
    fps: int = 16
    seconds: float = 4.0
    steps: int = 50
    guidance_scale: float = 5.0
    max_queue: int = 32
    max_seconds: float = 120.0
    max_pixels: int = 1280 * 720
    max_steps: int = 100
    keep: int = 200
    image_counts: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for flag, value, most in (
            ("--gpus", self.gpus, 4096),
            ("--fps", self.fps, 240),
            ("--steps", self.steps, self.max_steps),
            ("--max-queue", self.max_queue, 100_000),
            ("--max-steps", self.max_steps, 1000),
            ("--max-pixels", self.max_pixels, 1 << 28),
            ("--keep", self.keep, 1_000_000),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"{flag} {value}: use a number from 1 to {most}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port {self.port}: use 0 (any that is free) to 65535")
        for flag, number, limit in (
            ("--max-seconds", self.max_seconds, 86_400.0),
            ("--seconds", self.seconds, self.max_seconds),
        ):
            if not (math.isfinite(number) and 0 < number <= limit):
                raise ValueError(f"{flag} {number:g}: use seconds above 0, at most {limit:g}")
        for name in (self.host, *self.allow_hosts):
            if not (_HOST_NAME.fullmatch(name) or is_address(name)):
                raise ValueError(f"--host or --allow-host {name!r}: use a name or an address, without port or brackets")
        if self.token is not None and (len(self.token) < MIN_TOKEN or not self.token.isascii() or " " in self.token):
            raise ValueError(f"--token: use at least {MIN_TOKEN} ASCII characters without spaces, such as of "
                             "`openssl rand -hex 16`")  # fmt: skip
        if self.token is None and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} without --token: everybody who reaches that address could use the cards; give "
                "--token (or DUALPARAL_SERVER_TOKEN), or listen on 127.0.0.1"
            )

    @property
    def model_name(self) -> str:
        """The model's name in answers: no path of this machine."""
        return Path(self.model).name if Path(self.model).is_dir() else self.model


def is_address(name: str) -> bool:
    """True for an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(name: str) -> bool:
    """True for an address, or the name, that only this machine reaches."""
    return ipaddress.ip_address(name).is_loopback if is_address(name) else name == _LOOPBACK_NAMES
