"""The server as a process: OpenAI's own client, stop, and videos that outlive the server's death and a rank's."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import openai
import pytest

import dualparal
from dualparal.io.video import SegmentWriter, join, probe
from servers import Served

PROMPT = "two red circles on a dark background"
pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("served") / "videos") as server:
        yield server


def until_over(url: str, name: str) -> dict[str, Any]:
    while (told := httpx.get(f"{url}/v1/videos/{name}").json())["status"] in ("queued", "in_progress"):
        time.sleep(0.1)
    return told


def test_openais_client(served: Served, tmp_path: Path) -> None:
    client = openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)
    video = client.videos.create(prompt=PROMPT, model="moving-shapes", extra_body={"seconds": "0.9", "seed": 3})
    assert video.object == "video" and video.status in ("queued", "in_progress") and video.size == "64x64"
    with httpx.stream("GET", f"{served.url}/v1/videos/{video.id}/events", timeout=120) as events:
        lines = list(events.iter_lines())
    kinds = {line.partition(": ")[2] for line in lines if line.startswith("event: ")}
    assert kinds == {"video", "spans"}
    last = json.loads([line for line in lines if line.startswith('data: {"id"')][-1].partition(": ")[2])
    assert last["status"] == "completed" and last["progress"] == 100 and len(last["blocks"]) == 2
    done = client.videos.poll(video.id)
    assert done.status == "completed" and done.completed_at and done.error is None
    (tmp_path / "a.mp4").write_bytes(client.videos.download_content(video.id).read())
    assert probe(tmp_path / "a.mp4").frames == 13
    playlist = httpx.get(f"{served.url}/v1/videos/{video.id}/playlist.m3u8").text
    assert playlist.count("#EXTINF") == 2 and playlist.endswith("#EXT-X-ENDLIST\n")
    parts = ["init.mp4", "segments/0.m4s", "segments/1.m4s"]
    joined = b"".join(httpx.get(f"{served.url}/v1/videos/{video.id}/{part}").content for part in parts)
    with av.open(io.BytesIO(joined)) as container:
        times = [float(frame.time) for frame in container.decode(video=0)]
    assert times == [frame / 16 for frame in range(13)]
    ranged = httpx.get(f"{served.url}/v1/videos/{video.id}/content", headers={"range": "bytes=4-7"})
    assert ranged.status_code == 206 and ranged.content == b"ftyp"
    assert [each.id for each in client.videos.list()] == [video.id]
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError, match="no video with this id"):
        client.videos.retrieve(video.id)
    with pytest.raises(openai.BadRequestError, match="multiples of 16") as caught:
        client.videos.create(prompt=PROMPT, size="100x100")  # type: ignore[arg-type]
    assert caught.value.param == "size"


def test_stop_frees_the_engine(served: Served) -> None:
    long = httpx.post(served.url + "/v1/videos", json={"prompt": PROMPT, "seconds": 100}).json()
    while not httpx.get(f"{served.url}/v1/videos/{long['id']}").json()["blocks"]:
        time.sleep(0.1)
    short = httpx.post(served.url + "/v1/videos", json={"prompt": PROMPT, "seconds": 0.3}).json()
    changed = httpx.post(f"{served.url}/v1/videos/{long['id']}/prompt", json={"prompt": "a green square"}, timeout=60)
    assert changed.json()["block"] > 1
    told = httpx.post(f"{served.url}/v1/videos/{long['id']}/cancel").json()
    assert (told["status"], told["error"]["code"]) == ("failed", "cancelled")
    assert until_over(served.url, short["id"])["status"] == "completed"
    gone = httpx.post(f"{served.url}/v1/videos/{long['id']}/prompt", json={"prompt": "a"})
    assert gone.status_code == 409
    metrics = httpx.get(served.url + "/metrics").text
    assert 'dualparal_videos_total{end="cancelled"} 1.0' in metrics and "dualparal_engine_up 1.0" in metrics


@pytest.mark.timeout(900)  # four starts of processes that import torch
def test_a_video_outlives_the_server_and_a_rank(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    first = Served(folder)
    body = {"prompt": PROMPT, "seconds": 4.6, "seed": 7}
    video = httpx.post(first.url + "/v1/videos", json=body).json()
    waiting = httpx.post(first.url + "/v1/videos", json={**body, "seconds": 0.3}).json()
    while len(httpx.get(f"{first.url}/v1/videos/{video['id']}").json()["blocks"]) < 2:
        time.sleep(0.05)
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    first.end()
    with Served(folder) as second:
        before = len(httpx.get(f"{second.url}/v1/videos/{video['id']}").json()["blocks"])
        while len(httpx.get(f"{second.url}/v1/videos/{video['id']}").json()["blocks"]) <= before:
            time.sleep(0.05)
        os.kill(second.ranks()[0].pid, signal.SIGKILL)
        done = until_over(second.url, video["id"])
        assert done["status"] == "completed", done["error"]
        assert until_over(second.url, waiting["id"])["status"] == "completed"
        assert "dualparal_rank_failures_total 1.0" in httpx.get(second.url + "/metrics").text
        found = httpx.get(f"{second.url}/v1/videos/{video['id']}/content").content
    assert list((folder / "runs").iterdir()) == []
    options = {"frames_per_block": 2, "context_frames": 1, "refresh_every": 2, "device": "cpu", "stages": 1}
    engine = dualparal.Engine.from_pretrained("moving-shapes", **options)
    writer = SegmentWriter(tmp_path / "alone", 16)
    size = {"height": 64, "width": 64, "num_frames": done["num_frames"], "num_inference_steps": 2}
    for chunk in engine.stream(PROMPT, "", seed=7, output_type="uint8", **size):
        writer.write(chunk.block, chunk.frames)
    join(writer.segments, tmp_path / "alone.mp4")
    assert found == (tmp_path / "alone.mp4").read_bytes()
