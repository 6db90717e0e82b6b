"""Random inputs for everything that reads what others wrote: only errors of ours may come out.

    python tests/helpers/fuzz.py --inputs 100000                     every target, and a table
    python tests/helpers/fuzz.py latents --seed 0 --only 4711        one input again, with its traceback
    python tests/helpers/fuzz.py extension --sanitized               the extension, built with ASan and UBSan

A target runs in a process of its own, so that a crash, a hang and the memory are its own, too; input k of a seed is
always the same. A new target is a function below with ``@target``: it returns a function of a random generator, and
the exceptions that are a refusal. Anything else that comes out is a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import inspect
import io
import itertools
import json
import logging
import math
import mmap
import os
import random
import re
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Feed = Callable[[random.Random], None]
Setup = Callable[[Path], tuple[Feed, tuple[type[Exception], ...]]]  # given an empty folder

HANG_SECONDS = 20.0  # per input; other work may hold the machine up
MAX_GROWTH_MB = 500.0

TARGETS: dict[str, Setup] = {}


def target(setup: Setup) -> Setup:
    TARGETS[setup.__name__] = setup
    return setup


# Values ------------------------------------------------------------------------------------------------------------

INTEGERS = [0, 1, 2, 3, 4, 5, 8, 16, 17, 33, 64, 81, 97, 480, 832, 1000, 10_000, 10_001, 16_384, 10**8, 10**9]
EDGES = [-1, -2, -(2**31), 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 10**400]
FLOATS = [0.0, -0.0, 0.5, 1.0, 5.0, 16.0, -1.0, 1e-300, 1e308, math.inf, -math.inf, math.nan]
WORDS = [
    "", "cached", "prior", "paper", "matching", "newest", "np", "uint8", "latent", "int8", "fp8", "off", "auto", "cpu",
    "cuda", "unipc", "euler", "dpm++", "float32", "bfloat16", "a.mp4", "pictures", "a.json", "../a.mp4", "/", "~", ".",
    "a/b", "9,11,10", "1,1", "0:x", "5:dog", "-1:x", "1:", ":", "²", "1e5", "0x10", "1_000", "nan", "inf", "true",
    "a\nb", "\x1b[31m", "\udcff", "é" * 300, "x" * 5000, "%s{}", "--out", "-", "--", "'\"", "\t", "9" * 5000,
]  # fmt: skip


def integer(rng: random.Random) -> int:
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(INTEGERS)
    return rng.choice(EDGES) if kind < 0.8 else rng.randint(-3, 300)


def anything(rng: random.Random) -> Any:
    kind = rng.randrange(8)
    if kind < 4:
        return integer(rng)
    if kind == 4:
        return rng.choice(FLOATS)
    if kind == 5:
        return rng.choice(WORDS)
    return rng.choice([None, True, False, [], [1], {}, (), b"x", object, 1j, "cached", 4])


# Targets -----------------------------------------------------------------------------------------------------------


@target
def config(folder: Path) -> tuple[Feed, tuple[type[Exception], ...]]:
    """The dataclasses of a request and the split of layers: refused, or usable."""
    from dualparal.config.blocks import CONTEXT_POLICIES, MAX_STEPS, BlockConfig
    from dualparal.config.eight_bit import EightBitPolicy
    from dualparal.config.video import VideoConfig
    from dualparal.schedule.layout import Layout, split_layers
    from dualparal.schedule.schedule import Schedule

    def arguments(rng: random.Random, right: dict[str, Any], wrong: Callable[[random.Random], Any]) -> dict[str, Any]:
        """Right ones, of which some are replaced."""
        chosen = {name: value(rng) if callable(value) else value for name, value in right.items()}
        for name in rng.sample(sorted(right), rng.randint(0, min(3, len(right)))):
            chosen[name] = wrong(rng)
        return chosen

    def small(rng: random.Random) -> int:
        return rng.randint(1, 9)

    def blocks(rng: random.Random) -> None:
        right = {
            "frames_per_block": lambda r: r.randint(4, 9),
            "context_frames": lambda r: r.randint(0, 4),
            "context": lambda r: r.choice(CONTEXT_POLICIES),
            "max_blocks_in_flight": lambda r: r.choice([None, 1, 2, 7]),
            "context_version": "matching",
            "refresh_every": lambda r: r.choice([None, 1, 5]),
        }
        made = BlockConfig(**arguments(rng, right, anything))
        assert 0 <= made.context_frames <= made.frames_per_block
        layout = Layout(made, rng.choice([None, 1, rng.randint(1, 10**6)]))
        assert made.gap(rng.randint(1, MAX_STEPS)) >= 1
        if layout.num_blocks is not None and layout.num_latents is not None:
            last = layout.num_blocks - 1
            assert layout.start(last) + layout.kept_frames(last) == layout.num_latents
            assert layout.window(last, refresh=True).start >= 0 and layout.padded_latents is not None

    def video(rng: random.Random) -> None:
        right = {
            "height": 480, "width": 832, "num_frames": lambda r: r.choice([None, 1, 81, 1025]),
            "num_inference_steps": lambda r: r.choice([None, 3]), "guidance_scale": 5.0, "guidance_scale_2": None,
            "seed": small, "output_type": "np", "max_sequence_length": 512,
            "timesteps": lambda r: r.choice([None, None, [9, 5, 2], [9.5, r.randint(-9, 20)], [anything(r)]]),
            "sigmas": lambda r: r.choice([None, None, None, [1.0, 0.5]]),
        }  # fmt: skip
        made = VideoConfig.of(**arguments(rng, right, anything))
        assert isinstance(made.guidance, bool)
        made.check_size(rng.randint(1, 64), rng.randint(1, 64))
        latents = made.num_latents(rng.randint(1, 8))
        assert latents is None or latents >= 1

    def schedule(rng: random.Random) -> None:
        right = {
            "num_stages": small, "num_steps": small, "num_blocks": lambda r: r.choice([None, 1, 5]),
            "context": lambda r: r.choice(CONTEXT_POLICIES), "context_frames": lambda r: r.randint(0, 4),
            "guidance": lambda r: r.random() < 0.5, "depth": small,
            "max_blocks_in_flight": lambda r: r.choice([None, 1, 2]), "context_version": "matching",
            "refresh_every": lambda r: r.choice([None, 1, 5]), "start": lambda r: r.choice([0, 0, 5]),
        }  # fmt: skip
        made = Schedule(**arguments(rng, right, integer))
        units = list(itertools.islice(made.units(), 50))
        assert units and all(unit.block >= 0 and 0 <= unit.step < made.num_steps for unit in units)

    def split(rng: random.Random) -> None:
        layers, stages = rng.randint(1, 60), integer(rng)
        parts = None if rng.random() < 0.4 else [anything(rng) for _ in range(rng.randint(0, 6))]
        made = split_layers(layers, stages, parts)
        assert [layer for part in made for layer in part] == list(range(layers)) and all(made)

    def eight_bit(rng: random.Random) -> None:
        right = {"mode": "int8", "keep_layers": (), "first_steps": 0, "last_steps": 0}
        EightBitPolicy(**arguments(rng, right, lambda r: r.choice([anything(r), (integer(r),)])))

    def feed(rng: random.Random) -> None:
        rng.choice([blocks, video, schedule, split, eight_bit])(rng)

    return feed, (ValueError,)


class Refused(Exception):
    """The command line ended with code 2."""


@target
def argv(folder: Path) -> tuple[Feed, tuple[type[Exception], ...]]:
    """``dualparal generate`` up to the point where weights would be read: code 0 or 2, one line, no traceback."""
    os.environ.update(HF_HUB_OFFLINE="1", COLUMNS="200")

    from dualparal.cli import generate
    from dualparal.cli import main as cli
    from dualparal.engine import engine
    from dualparal.models import source as loading
    from dualparal.models.wan.tiny import build_tiny_pipeline

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    model = loading.ModelFiles(build_tiny_pipeline(folder / "model"))
    scheduler, found = model.load_scheduler(), loading.resolve_model
    # What takes long and does not depend on the flags.
    loading.ModelFiles.check_weights = lambda self, parts=True: None  # type: ignore[method-assign]
    loading.ModelFiles.load_scheduler = lambda self: scheduler  # type: ignore[method-assign]
    loading.resolve_model = lambda name: model if name == "model" else found(name)  # type: ignore[assignment]
    engine.resolve_model = loading.resolve_model
    generate.work = lambda *_: 0  # type: ignore[assignment]
    generate.lead = lambda *_, **__: 0  # type: ignore[assignment]
    generate.on_stop_signals = lambda handler: None  # type: ignore[assignment]
    os.chdir(folder)
    Path("there.mp4").touch()
    Path("full").mkdir()
    Path("full/file").touch()
    Path("link.mp4").symlink_to("nowhere")
    options = [*inspect.signature(cli.generate_command).parameters.values()]
    right = ["generate", "--prompt", "a cat", "--model", "model", "--height", "32", "--width", "32", "--device", "cpu"]
    names = ["there.mp4", "full", "full/a.mp4", "there.mp4/a", "link.mp4", "model", "new/a.mp4"]

    def value(rng: random.Random, kind: str) -> str:
        numeric = "int" in kind or "float" in kind
        kinds = [integer, integer, anything] if numeric else [lambda r: r.choice(WORDS), lambda r: r.choice(names)]
        return str(rng.choice([*kinds, anything])(rng)).replace("\0", "")

    def flags(rng: random.Random) -> list[str]:
        made = []
        for option in rng.sample(options, rng.randint(0, 4)):
            kind = str(option.annotation).partition(",")[0]  # Annotated[int | None, ...
            flag = "--" + option.name.replace("_", "-")
            made.append(flag if rng.random() < 0.97 else rng.choice(WORDS))
            if "bool" not in kind or rng.random() < 0.05:
                made.append(value(rng, kind))
        return made

    def feed(rng: random.Random) -> None:
        sys.argv = ["dualparal", *(right if rng.random() < 0.97 else right[: rng.randint(1, 4)]), *flags(rng)]
        with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
            try:
                cli.main()
                code: Any = 0
            except SystemExit as end:
                code = end.code or 0
        text = re.sub(r"\Aplan: .*\n", "", errors.getvalue())  # what --plan auto found, before other flags are checked
        assert code in (0, 2), (code, sys.argv, text)
        if code == 2:
            assert text.startswith("error: ") and text.count("\n") == 1, (sys.argv, text)
            raise Refused

    return feed, (Refused,)


@target
def header(folder: Path) -> tuple[Feed, tuple[type[Exception], ...]]:
    """Message headers: noise, bits and fields changed, with the old checksum or a right one, cut, for another size."""
    import torch

    from dualparal.distributed.messages import Header, Kind, Lengths, TransportError, pack_header, unpack_header
    from dualparal.schedule.actions import Unit

    def number(rng: random.Random) -> int:
        return rng.choice([0, 1, rng.randrange(100), rng.randrange(2**63), -1, -(2**63), rng.randrange(-(2**63), 0)])

    def feed(rng: random.Random) -> None:
        elements = rng.randrange(2**40)
        unit = Unit(rng.randrange(2**40), rng.randrange(2**20), rng.randrange(2), rng.randrange(2**20))
        sent = Header(rng.choice(list(Kind)), unit, rng.randrange(2**40))
        fields = pack_header(sent, elements)
        change = rng.choice(["none", "bits", "field", "forged", "noise", "length", "size", "swap"])
        if change == "bits":
            for _ in range(rng.randint(1, 3)):
                at, bit = rng.randrange(len(fields)), rng.randrange(64)
                fields[at] ^= (1 << bit) - (1 << 64 if bit == 63 else 0)
        elif change == "field":
            fields[rng.randrange(len(fields))] = number(rng)
        elif change == "forged":
            for _ in range(rng.randint(1, 3)):
                fields[rng.randrange(len(fields))] = number(rng)
            fields[-1] = zlib.crc32(fields[:-1].numpy().tobytes())
        elif change == "noise":
            fields = torch.tensor([number(rng) for _ in range(rng.randrange(14))], dtype=torch.int64)
        elif change == "length":
            fields = fields[: rng.randrange(9)] if rng.random() < 0.5 else torch.cat([fields, fields])
        elif change == "swap":
            order = rng.sample(range(len(fields)), len(fields))
            fields = fields[order]
        wanted = number(rng) if change == "size" else elements
        received = unpack_header(fields, Lengths.fixed(wanted), "edge 0 -> 1")
        assert torch.equal(pack_header(received, wanted), fields), "taken for what was not sent"
        assert change == "forged" or (received == sent and wanted == elements), "a change went unnoticed"

    return feed, (TransportError,)


DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I64", "I8", "U8", "U16", "BOOL", "C64"]


@target
def latents(folder: Path) -> tuple[Feed, tuple[type[Exception], ...]]:
    """``--latents-in`` files: legal, with a changed entry, name, length, end or bit; then the check of their shape."""
    import torch

    from dualparal.config.blocks import BlockConfig
    from dualparal.engine.request import _latents
    from dualparal.io.latents import read_latents
    from dualparal.models.base import Grid
    from dualparal.schedule.layout import Layout

    shape = [1, 4, 3, 2, 2]
    size = 4 * math.prod(shape)
    layout, grid = Layout(BlockConfig(3, 0), 3), Grid(2, 2, 1, 1)
    path = folder / "latents.safetensors"

    def entry(rng: random.Random) -> dict[str, Any]:
        made: dict[str, Any] = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
        change = max(0, rng.randrange(-5, 7))
        if change == 1:
            made["dtype"] = rng.choice([*DTYPES, anything(rng)])
        elif change == 2:
            made["shape"] = [integer(rng) for _ in range(rng.randrange(7))]
        elif change == 3:
            made["data_offsets"] = [rng.choice([0, size, size - 4, integer(rng)]) for _ in range(rng.randint(1, 3))]
        elif change == 4:
            del made[rng.choice(sorted(made))]
        elif change == 5:
            made[rng.choice(["dtype", "shape", "data_offsets", "more"])] = anything(rng)
        elif change == 6:  # another dtype of as many bytes, where there is one
            made |= {"dtype": rng.choice(DTYPES), "shape": [1, 4, 3, 2, rng.choice([1, 2, 4, 8])]}
        return made

    def contents(rng: random.Random) -> bytes:
        names: dict[str, Any] = {"latents": entry(rng)}
        change = rng.randrange(10)
        if change == 1:
            names[rng.choice(WORDS)] = entry(rng)
        elif change == 2:
            names = {rng.choice(WORDS): entry(rng)}
        elif change == 3:
            names["__metadata__"] = rng.choice([{"a": "b"}, {"a": 1}, anything(rng)])
        elif change == 4:
            names["latents"] = anything(rng)
        head = json.dumps(names, default=str).encode("utf-8", "replace")
        if change == 5:
            head = rng.choice([b"[]", b"{", b"[" * 5000, b"{}" + b" " * rng.randrange(2**21), head * 2, b"\xff" * 9])
        length = rng.choice([0, 1, 2**63, 2**64 - 1, rng.randrange(2**22)]) if change == 6 else len(head)
        number = rng.choice([0.0, 1.0, -1.0, 5.0, 3e38, math.inf, -math.inf, math.nan])
        values = struct.pack("<f", number) if rng.random() < 0.9 else rng.randbytes(4)
        data = bytearray(struct.pack("<Q", length) + head + values * (size // 4))
        if change == 7:
            del data[rng.randrange(len(data)) :]
        elif change == 8:
            data += rng.randbytes(rng.randint(1, 40))
        elif change == 9:
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)

    def feed(rng: random.Random) -> None:
        path.write_bytes(contents(rng))
        read = read_latents(path)
        assert read.dtype == torch.float32
        taken = _latents(read, layout, grid, shape[1])
        assert list(taken.shape) == shape and bool(torch.isfinite(taken).all())

    return feed, (ValueError,)


@target
def snapshot(folder: Path) -> tuple[Feed, tuple[type[Exception], ...]]:
    """Snapshots: a real one with changed values, keys, tensors, bytes or name; up to where a run would go on."""
    import torch
    from safetensors.torch import load, save

    from dualparal.checkpoint import sealed, snapshot
    from dualparal.checkpoint.checkpointer import Checkpoint
    from dualparal.engine.engine import Engine
    from dualparal.models.wan.tiny import build_tiny_pipeline

    logging.disable(logging.WARNING)
    model = build_tiny_pipeline(folder / "model", layers=1)
    engine = Engine.from_pretrained(model, frames_per_block=2, context_frames=1, refresh_every=2, device="cpu")
    rows = torch.randn(2, 4, engine.source.spec.text_dim)
    kept = folder / "kept"
    chunks = engine.stream(
        prompt_embeds=rows[:1], negative_prompt_embeds=rows[1:], height=16, width=16, num_frames=33,
        num_inference_steps=4, output_type="latent", checkpoint=Checkpoint(kept, every=1, notes={"out": ["a.mp4"]}),
    )  # fmt: skip
    for _ in range(3):
        next(chunks)
        time.sleep(0.2)  # until it is on disk
    chunks.close()
    whole = snapshot._snapshots(kept)[0].read_bytes()
    metadata = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    tensors = load(whole)
    assert json.loads(metadata["state"])["blocks"][0], "blocks are in flight"

    def change(rng: random.Random, tree: Any) -> None:
        """One value or key somewhere in a tree."""
        while isinstance(tree, (dict, list)) and tree:
            key = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
            if rng.random() < 0.3 or not isinstance(tree[key], (dict, list)) or not tree[key]:
                if rng.random() < 0.2:
                    del tree[key]
                else:
                    tree[key] = rng.choice([anything(rng), "tensor:" + rng.choice([*tensors, "x"]), str(integer(rng))])
                return
            tree = tree[key]

    def other(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
        kind = rng.randrange(4)
        if kind == 0:
            return tensor.to(rng.choice([torch.float16, torch.int64, torch.bool, torch.float64]))
        if kind == 1:
            return tensor.flatten()[: rng.randrange(5)]
        return tensor[None] if kind == 2 else torch.zeros([rng.randrange(4) for _ in range(rng.randrange(6))])

    def contents(rng: random.Random) -> bytes:
        said, kinds = (
            dict(metadata),
            rng.choices(["value", "tensor", "format", "none"], [5, 3, 1, 2], k=rng.randint(1, 2)),
        )
        chosen = dict(tensors)
        for kind in kinds:
            if kind == "value":
                part = rng.choice(["run", "state"])
                tree = json.loads(metadata[part])
                change(rng, tree)
                said[part] = json.dumps(tree, default=str)
            elif kind == "tensor":
                name = rng.choice(sorted(chosen))
                chosen[name] = other(rng, chosen[name])
            elif kind == "format":
                said[rng.choice(sorted(said))] = rng.choice(["", "2", "[", "{}", "[" * 5000, "null"])
        return bytes(save({name: tensor.contiguous() for name, tensor in chosen.items()}, said))

    def feed(rng: random.Random) -> None:
        for path in snapshot._snapshots(kept):
            path.unlink()
        data = bytearray(contents(rng))
        kind = rng.randrange(12)
        if kind == 0:
            del data[rng.randrange(len(data)) :]
        elif kind == 1:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        name = sealed.checksum(bytes(data))
        if kind == 2:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (kept / f"snapshot-{rng.choice([2, 4, 7]):010d}-{name}.safetensors").write_bytes(data)
        engine.resume(kept).close()

    return feed, (ValueError,)


@target
def extension(folder: Path) -> tuple[Feed, tuple[type[Exception], ...]]:
    """Calls of dualparal._C over memory of exactly the right size: right ones, and such with wrong arguments.

    A pointer to too little memory is beyond the contract (a number does not say what lies behind it), so that
    arguments change only to what must be refused, or to what needs no more memory than there is. Without torch.
    """
    import numpy as np

    name = os.environ.get("DUALPARAL_FUZZ_EXTENSION")  # a folder with another build
    if name:
        sys.path.insert(0, name)
    native = importlib.import_module("_C" if name else "dualparal._C")
    keep: list[Any] = []  # pointers are numbers; somebody must own the memory

    def memory(rng: random.Random, elements: int, size: int) -> int:
        array = np.frombuffer(bytearray(rng.randbytes(min(elements * size, 4096)) or b"\0"), np.uint8)
        array = np.resize(array, max(elements * size, 1)).copy()
        keep.append(array)
        return int(array.ctypes.data)

    def common(rng: random.Random, dtype: int) -> dict[str, Any]:
        return dict(dtype=dtype, device=-1, stream=0, threads=rng.randint(1, 4))

    def combine(rng: random.Random) -> dict[str, Any]:
        dtype, size = rng.randrange(3), rng.choice([0, 1, 15, 2047, 2049, rng.randrange(300), rng.randrange(40_000)])
        arrays = {key: memory(rng, size, 2 if dtype else 4) for key in ("cond", "uncond", "out")}
        return dict(**arrays, size=size, scale=5.0, **common(rng, dtype))

    def norm(rng: random.Random) -> dict[str, Any]:
        dtype, rows, dim = rng.randrange(3), rng.randrange(9), rng.randint(1, 70)
        arrays = {key: memory(rng, rows * dim, 2 if dtype else 4) for key in ("x", "y", "x_new", "h")}
        arrays |= {key: memory(rng, dim, 4) for key in ("gate", "weight", "bias")}
        absent = rng.choice(["", "gate", "y x_new gate", "weight bias h", "y x_new gate weight bias", "weight"])
        arrays |= dict.fromkeys(absent.split(), 0)
        return dict(**arrays, rows=rows, dim=dim, eps=1e-6, **common(rng, dtype))

    def lend(rng: random.Random, rows: int, inner: int, size: int) -> tuple[Any, ...]:
        tokens = rng.randint(0, rows)
        slots = rng.randint(1, 3)
        keys, values = (memory(rng, slots * tokens * inner, size) for _ in range(2))
        slot = np.array([rng.randrange(slots) if rng.random() < 0.9 else rng.choice([-1, slots, 2**62])])
        keep.append(slot)
        return keys, values, int(slot.ctypes.data), slots, tokens, rng.randint(0, rows - tokens)

    def rope(rng: random.Random) -> dict[str, Any]:
        dtype, rows, heads, head_dim = rng.randrange(3), rng.randrange(9), rng.randint(1, 4), 2 * rng.randint(1, 9)
        size, inner = 2 if dtype else 4, heads * head_dim
        stride = inner + rng.choice([0, 0, 1, 8])
        arrays = {"qkv": memory(rng, 3 * rows * inner, size), "q": memory(rng, rows * inner, size)}
        last = max(rows - 1, 0) * stride + (inner if rows else 0)
        arrays |= {key: memory(rng, last, size) for key in ("k", "v")}
        arrays |= {key: memory(rng, inner, 4) for key in ("norm_q", "norm_k")}
        arrays |= {key: memory(rng, rows * head_dim // 2, 4) for key in ("cos", "sin")}
        lends = [lend(rng, rows, inner, size) for _ in range(rng.randint(0, 2))]
        return dict(
            **arrays, rows=rows, heads=heads, head_dim=head_dim, k_stride=stride, v_stride=stride, lends=lends,
            eps=1e-6, **common(rng, dtype),
        )  # fmt: skip

    def hopper(rng: random.Random) -> dict[str, Any]:
        """Refused by a build without CUDA, and with it for its device: the memory is the CPU's."""
        sizes = {key: rng.choice([1, 64, 128, integer(rng)]) for key in ("q_rows", "k_rows", "heads", "head_dim")}
        strides = {f"{key}_stride": rng.choice([64, 128, integer(rng)]) for key in "qkv"}
        pointers = {key: 16 * rng.randrange(9) for key in ("q", "k", "v", "out", "lse")}
        device = rng.choice([-1, integer(rng)]) if not native.build_info()["cuda"] else -1
        return dict(**pointers, **sizes, **strides, dtype=rng.randrange(3), device=device, stream=0)

    sizes = {"rows", "dim", "heads", "head_dim", "size", "k_stride", "v_stride"}
    numbers = {"eps", "scale"}

    def spoilt(rng: random.Random, key: str, value: Any) -> Any:
        """Another value for one argument."""
        if rng.random() < 0.15:
            return rng.choice([None, "8", 1.5, b"", [], (), object(), 2**64, -(2**64)])
        if key in sizes:
            return rng.choice([-1, -value, 2**40, 2**62, 2**63, -(2**63), rng.randint(0, value), value])
        if key == "dtype":
            return rng.choice([-1, 3, 2**31 - 1, 2**31, max(value, 1)])  # 1 and 2 need less memory than 0
        if key == "device":
            return rng.choice([-2, -(2**31), -1, 2**31 - 1, 0 if not native.build_info()["cuda"] else -1])
        if key == "threads":
            return rng.choice([0, -1, 1, 7, 4097, 2**31 - 1, 2**31])
        if key in numbers:
            return rng.choice(FLOATS)
        if key == "stream":
            return rng.choice([0, 1, -1, 2**64])  # of CUDA; the CPU does not look at it
        if key == "lends":
            changed = [list(one) for one in value] or [[0] * 6]
            one = rng.choice(changed)
            at = rng.randrange(6)
            one[at] = rng.choice([0, -1, 2**31, 2**62, 2**63, 2**64, "8", None] if at > 2 else [0, "8", None, 2**64])
            return rng.choice([[tuple(one) for one in changed], [tuple(one)[:5]], [None], list(value) * 3])
        # A pointer: to nothing, or between two elements.
        return rng.choice([0, value + 1, -8, 2**64])

    calls = {"combine_guidance": combine, "residual_norm": norm, "qk_norm_rope": rope, "attention_hopper": hopper}

    def feed(rng: random.Random) -> None:
        keep.clear()
        name = rng.choice([*calls, "cuda_problem"])
        if name == "cuda_problem":
            assert isinstance(native.cuda_problem(anything(rng) if not native.build_info()["cuda"] else -1), str)
            return
        arguments = calls[name](rng)
        changes = rng.sample(sorted(arguments), rng.choice([0, 1, 1, 2, 3]))
        arguments |= {key: spoilt(rng, key, arguments[key]) for key in changes}
        for key in rng.sample(sorted(arguments), rng.random() < 0.03):
            del arguments[key]
        if rng.random() < 0.02:
            arguments["more"] = 1
        try:
            getattr(native, name)(**arguments)
        except (ValueError, TypeError):
            if not changes and name != "attention_hopper" and "more" not in arguments and "lends" not in arguments:
                assert len(arguments) < len(calls[name](rng)), f"{name} refuses what is right"
            raise

    return feed, (ValueError, TypeError, RuntimeError)  # the last: CUDA said no


# Running -----------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of the inputs of one target. failure: empty, or what went wrong with which input."""

    target: str
    inputs: int
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0  # seconds
    peak_mb: float = 0.0
    seconds: float = 0.0
    failure: str = ""


def feed_inputs(name: str, seed: int, inputs: range, folder: Path, at: Callable[[int], object]) -> Outcome:
    """Feeds these inputs to a target, in this process. An exception that is no refusal comes out."""
    feed, refusals = TARGETS[name](folder)
    outcome = Outcome(name, len(inputs))
    before = _peak_mb()
    began = time.perf_counter()
    for index in inputs:
        at(index)
        rng = random.Random(f"{seed}/{name}/{index}")
        begin = time.perf_counter()
        try:
            feed(rng)
            outcome.accepted += 1
        except refusals:
            outcome.refused += 1
        outcome.slowest = max(outcome.slowest, time.perf_counter() - begin)
    outcome.seconds = time.perf_counter() - began
    outcome.peak_mb = _peak_mb()
    if outcome.peak_mb - before > MAX_GROWTH_MB:
        outcome.failure = f"memory grew by {outcome.peak_mb - before:.0f} MB; at most {MAX_GROWTH_MB:.0f} expected"
    return outcome


def _peak_mb() -> float:
    """Of this process since it began; what getrusage says goes back to the parent's before."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except FileNotFoundError:  # not on Linux
        found = None
    return (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024


def _work(name: str, seed: int, inputs: range, progress: Path) -> None:
    """In the process of a target: notes where it is, so that a crash or a hang can be told."""
    faulthandler.enable()
    logging_off()
    with open(progress, "r+b") as file, tempfile.TemporaryDirectory(dir=_quick_folder()) as folder:
        place = mmap.mmap(file.fileno(), 8)
        outcome = feed_inputs(
            name, seed, inputs, Path(folder), lambda at: place.__setitem__(slice(8), at.to_bytes(8, "little"))
        )
        os.chdir("/")
    print(json.dumps(vars(outcome)))


def logging_off() -> None:
    import logging

    logging.disable(logging.ERROR)


def _quick_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def run_target(name: str, seed: int, inputs: range) -> Outcome:
    """Feeds a target in a process of its own."""
    with tempfile.NamedTemporaryFile() as progress:
        progress.write(bytes(8))
        progress.flush()
        bounds = f"{inputs.start}:{inputs.stop}"
        command = [sys.executable, __file__, name, "--seed", str(seed), "--worker", bounds, progress.name]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        hung = _watch(process, Path(progress.name), len(inputs) >= 20_000)
        index = int.from_bytes(Path(progress.name).read_bytes(), "little")
    assert process.stdout is not None
    last = process.stdout.read().splitlines()[-1:]
    process.stdout.close()
    if process.returncode == 0 and last:
        return Outcome(**json.loads(last[0]))
    how = f"hangs for more than {HANG_SECONDS:.0f} s" if hung else f"ends the process with {process.returncode}"
    again = f"python tests/helpers/fuzz.py {name} --seed {seed} --only {index}"
    return Outcome(name, len(inputs), failure=f"input {index} {how}; again with: {again}")


def _watch(process: subprocess.Popen[str], progress: Path, tell: bool) -> bool:
    """Waits for the end; True when it had to be killed because it stood still."""
    seen, since, told = b"", time.monotonic(), time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            return False
        now, place = time.monotonic(), progress.read_bytes()
        if place != seen:
            seen, since = place, now
        if tell and now - told > 10:
            told = now
            print(f"  input {int.from_bytes(place, 'little')}", file=sys.stderr, flush=True)
        # The first input waits for imports.
        if now - since > (HANG_SECONDS if any(seen) else 120):
            process.kill()
            process.wait()
            return True


def table(outcomes: list[Outcome]) -> str:
    columns = ["target", "inputs", "accepted", "refused", "slowest input", "peak RSS", "seconds", ""]
    lines = [f"| {' | '.join(columns)} |", "|---|--:|--:|--:|--:|--:|--:|---|"]
    for o in outcomes:
        counts = f"{o.inputs:,} | {o.accepted:,} | {o.refused:,}"
        cost = f"{1e3 * o.slowest:.0f} ms | {o.peak_mb:.0f} MB | {o.seconds:.0f}"
        lines.append(f"| {o.target} | {counts} | {cost} | {o.failure or 'ok'} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Feed random inputs to what reads them.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--inputs", type=int, default=100_000, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="INDEX", help="this input alone, in this process")
    parser.add_argument("--sanitized", action="store_true", help="the extension as built with ASan and UBSan")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = sorted(set(options.targets) - set(TARGETS))
    if unknown:
        parser.error(f"no target {unknown[0]!r}: use {', '.join(TARGETS)}")
    names = options.targets or list(TARGETS)
    if options.worker:
        begin, end = map(int, options.worker[0].split(":"))
        _work(names[0], options.seed, range(begin, end), Path(options.worker[1]))
        return 0
    if options.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(feed_inputs(names[0], options.seed, range(options.only, options.only + 1), Path(folder), id))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if options.sanitized:
            import sanitizers

            names = ["extension"]
            os.environ.update(sanitizers.build(Path(folder)), DUALPARAL_FUZZ_EXTENSION=folder)
        outcomes = []
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            outcomes.append(run_target(name, options.seed, range(options.inputs)))
    print(table(outcomes))
    return int(any(outcome.failure for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
