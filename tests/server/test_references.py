"""Images that clients send, and a video of one with a storyboard, made by an engine in this process."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dualparal.engine.engine import Engine
from dualparal.io.video import SegmentWriter, join
from dualparal.models.wan.tiny import build_tiny_pipeline
from dualparal.server import runner as making
from dualparal.server.runner import Runner
from dualparal.server.store import COMPLETED
from servers import URL, made


def picture(width: int = 40, height: int = 30, kind: str = "PNG") -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


def test_images_are_taken_where_the_model_has_a_use_for_them(tmp_path: Path) -> None:
    fields, sent = {"prompt": "a"}, {"input_reference": ("../../x.png", picture())}
    for counts, files, status, says in (
        ((0,), sent, 400, "input_reference: this model makes videos of a text alone; leave it out"),
        ((1,), None, 400, "input_reference is missing: this model makes videos of an image"),
        ((2,), sent, 400, "input_reference: this model takes 2 images"),
        ((0, 1), None, 200, None),
        ((1, 2), sent, 200, None),
    ):
        client, jobs = made(tmp_path / "videos", image_counts=counts, max_queue=9)
        answer = client.post("/v1/videos", data=fields, files=files)
        assert answer.status_code == status, answer.text
        assert says is None or answer.json()["error"]["message"].startswith(says)
        assert "images" in client.get("/v1/server").json()
        jobs.store.close()
    (kept,) = (tmp_path / "videos").rglob("reference")
    assert kept.read_bytes() == picture() and kept.stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.rglob("x.png"))


def test_images_have_limits(tmp_path: Path) -> None:
    client, jobs = made(tmp_path / "videos", image_counts=(0, 1), max_queue=9)
    bomb = bytearray(picture(8, 8))
    bomb[16:24] = (50_000).to_bytes(4, "big") * 2  # the size in its header
    plain = io.BytesIO()
    Image.new("RGB", (4097, 4096)).save(plain, "PNG")
    for data, says in (
        (b"", "is no image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image that can be read; send one of JPEG"),
        (picture(kind="BMP"), "is no image that can be read"),
        (picture()[:-900], "is no image that can be read"),
        (bytes(bomb), "is no image that can be read"),
        (plain.getvalue(), "has too many pixels; send 16777216 or fewer"),
    ):
        answer = client.post("/v1/videos", data={"prompt": "a"}, files={"input_reference": data})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_reference")
        assert answer.json()["error"]["message"].startswith(f"input_reference {says}")
    for value in ("x", {"image_url": "http://127.0.0.1/a.png"}, {"file_id": "../../a"}, 5):
        answer = client.post("/v1/videos", json={"prompt": "a", "input_reference": value})
        assert answer.status_code == 400 and "no address is fetched" in answer.json()["error"]["message"]
    large = bytes(9 << 20)
    assert client.post("/v1/videos", data={"prompt": "a"}, files={"input_reference": large}).status_code == 413
    assert client.post("/session", data={"token": "a"}, files={"x": bytes(1 << 17)}).status_code == 413
    two = [("input_reference", picture()), ("input_reference", picture())]
    assert client.post("/v1/videos", data={"prompt": "a"}, files=two).status_code == 400
    assert not jobs.waiting() and not list((tmp_path / "videos" / "videos").iterdir())
    jobs.store.close()


def test_an_image_and_a_storyboard_reach_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tiny_pipeline(tmp_path / "model", layers=2, wan22=True, images="condition")
    options = {"frames_per_block": 2, "context_frames": 1, "refresh_every": 1, "device": "cpu"}
    engine = Engine.from_pretrained(model, **options)
    monkeypatch.setattr(making.Engine, "from_pretrained", lambda *_, **__: engine)
    asked: dict[str, Any] = {"height": 32, "width": 32, "steps": 2, "engine": engine.config, "image_counts": (1, 2)}
    client, jobs = made(tmp_path / "videos", **asked)
    fields = {"prompt": "a cat", "seconds": "0.8", "storyboard": '{"0.4": "a dog"}', "seed": "3"}
    video = client.post("/v1/videos", data=fields, files={"input_reference": picture(kind="JPEG")}).json()
    run = jobs.take()
    assert run is not None
    Runner(jobs)._make(run)
    jobs.finish(run)
    assert client.get(f"/v1/videos/{video['id']}").json()["status"] == COMPLETED
    writer = SegmentWriter(tmp_path / "alone", 16)
    call = {"height": 32, "width": 32, "num_frames": 13, "num_inference_steps": 2, "output_type": "uint8", "seed": 3}
    image = Image.open(io.BytesIO(picture(kind="JPEG")))
    for chunk in engine.stream({0: "a cat", 5: "a dog"}, "", image=image, **call):
        writer.write(chunk.block, chunk.frames)
    join(writer.segments, tmp_path / "alone.mp4")
    assert client.get(f"/v1/videos/{video['id']}/content").content == (tmp_path / "alone.mp4").read_bytes()
    assert client.get(f"{URL}/v1/videos/{video['id']}/playlist.m3u8").text.count("#EXTINF") == 2
    jobs.store.close()
