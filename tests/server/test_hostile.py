"""Careless and hostile clients, slow networks, killed servers: answered by a line, bounded, and lived through.

Nothing is made here: engines are stand-ins.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from dualparal.config.engine import EngineConfig
from dualparal.server import app, guard, serve
from dualparal.server import jobs as queue
from dualparal.server.errors import ApiError
from dualparal.server.runner import Runner
from dualparal.server.store import Store
from servers import made, settings

BLOCKS = EngineConfig.of(frames_per_block=2, context_frames=1)


class Still:
    """An engine that is told things and does nothing."""

    def __init__(self) -> None:
        self.closed = self.interrupted = 0
        self.asked, self.may_answer = threading.Event(), threading.Event()

    def interrupt(self) -> None:
        self.interrupted += 1

    def close(self, *, now: bool = False) -> None:
        self.closed += 1

    def set_prompt(self, *_: Any, **__: Any) -> int:
        self.asked.set()
        assert self.may_answer.wait(20)
        return 3


# Texts and numbers -------------------------------------------------------------------------------------------------


def test_names_and_texts_that_no_answer_can_hold(tmp_path: Path) -> None:
    client, jobs = made(tmp_path / "videos", token="0123456789abcdef")
    client.headers["authorization"] = "Bearer 0123456789abcdef"
    json_kind = {"content-type": "application/json"}
    for body in (b'{"\\ud800": 1}', b'{"a\\nb\\u202e": 1}', b'{"prompt": "a", "size": "\\ud800"}',
                 b'{"prompt": "a", "model": "\\ud800"}', b'{"prompt": "\\ud800"}', b'{"prompt": "a\\u0085"}',
                 b'{"prompt": "a\\u007f"}', b'{"prompt": "a", "seed": 9223372036854775808}',
                 b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": "a", "steps": Infinity}',
                 b'{"prompt": "a", "guidance_scale": NaN}', b'{"prompt": "a", "seconds": -Infinity}'):  # fmt: skip
        answer = client.post("/v1/videos", content=body, headers=json_kind)
        assert answer.status_code in (400, 404), body
        assert "\n" not in answer.json()["error"]["message"]
    assert client.post("/session", content=b'{"token": "\\ud800"}', headers=json_kind).status_code == 401
    for limit in ("000001" + "9" * 6, "9" * 5000, "0", "101", "-1", "1.0"):
        assert client.get(f"/v1/videos?limit={limit}").status_code == 400, limit
    for header in ({"origin": "http://["}, {"origin": "http://127.0.0.1.evil.example"}, {"origin": ""}):
        assert client.get("/v1/videos", headers=header).status_code == 403, header
    assert client.post("/v1/videos", content=b"a", headers={"content-length": "9" * 30}).status_code == 413
    assert client.post("/v1/videos", json={"prompt": "a", "seed": 2**63 - 1}).json()["seed"] == 2**63 - 1
    assert client.get("/").headers["cross-origin-resource-policy"] == "same-origin"
    jobs.store.close()


@pytest.mark.parametrize(
    ("storyboard", "says"),
    [
        ([], "is {second: text}"),
        ("{", "is {second: text}"),
        ({str(second): "a" for second in range(65)}, "of at most 64"),
        ({"nan": "a"}, "nan: use seconds from 0"),
        ({"1e9": "a"}, "1e9: use seconds from 0 to below the video's 4"),
        ({"-1": "a"}, "-1: use seconds"),
        ({"1": "a", "1.0": "b"}, "1.0: use seconds"),
        ({"a\n": "a"}, "a?: use seconds"),
        ({"1": ""}, "is missing"),
        ({"1": 5}, "is missing"),
        ({"1": "a" * 4001}, "4000 or fewer"),
        ({"0": "a"}, "second 0, which is the prompt"),
        ({"2": "a", "2.1": "b"}, "2.1: it lies in the block of the text before; put them 0.5 s apart"),
        ({"0.01": "a"}, "0.01: it lies in the block of the text before"),
    ],
)
def test_storyboards_have_limits(tmp_path: Path, storyboard: Any, says: str) -> None:
    client, jobs = made(tmp_path / "videos", engine=BLOCKS)
    answer = client.post("/v1/videos", json={"prompt": "a", "seconds": 4, "storyboard": storyboard})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "storyboard") and says in error["message"]
    jobs.store.close()


def test_a_storyboard_waits_with_its_video(tmp_path: Path) -> None:
    client, jobs = made(tmp_path / "videos", engine=BLOCKS)
    scenes = {"2.5": "a dog", "1": "a cow"}
    video = client.post("/v1/videos", json={"prompt": "a cat", "seconds": 4, "storyboard": scenes}).json()
    wanted = [(0, "a cat"), (2, "a cow"), (5, "a dog")]
    assert [(each["block"], each["prompt"]) for each in video["prompts"]] == wanted
    form = {"seconds": "4", "storyboard": json.dumps({"0": "a cat", **scenes})}
    assert client.post("/v1/videos", data=form).json()["prompts"] == video["prompts"]
    jobs.store.close()
    again = Store(tmp_path / "videos")
    found = again.videos[video["id"]]
    assert found.prompts == wanted and found.request.scenes == tuple(wanted[1:])
    again.close()


# Slow clients ------------------------------------------------------------------------------------------------------


def test_who_neither_sends_nor_reads_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_BODY_SECONDS", 0.1)
    monkeypatch.setattr(guard, "_SEND_SECONDS", 0.1)
    headers = [(b"host", b"127.0.0.1"), (b"content-length", b"5")]
    scope = {"type": "http", "method": "POST", "path": "/v1/videos", "headers": headers}

    async def never(*_: Any) -> Any:
        await asyncio.sleep(30)

    async def reads(_: Any, receive: Any, send: Any) -> None:
        await receive()

    async def answers(_: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    begun = time.monotonic()
    with pytest.raises(ApiError) as caught:
        asyncio.run(guard.Guard(reads, settings(tmp_path))(dict(scope), never, never))
    assert caught.value.status == 408
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(guard.Guard(answers, settings(tmp_path))(dict(scope), never, never))
    assert time.monotonic() - begun < 20


def test_who_connects_and_does_not_ask_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_HEAD_SECONDS", 0.5)

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(1.5)  # an answer may take its time
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    server = uvicorn.Server(uvicorn.Config(slow, port=0, log_level="error", http=serve._Patient, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        address = server.servers[0].sockets[0].getsockname()
        for begin in (b"", b"GET / HTTP/1.1\r\nHost: a"):
            with socket.create_connection(address) as link:
                link.settimeout(20)
                link.sendall(begin)
                assert link.recv(100) == b""
        with socket.create_connection(address) as link:
            link.settimeout(20)
            link.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert link.recv(100).startswith(b"HTTP/1.1 204")
    finally:
        server.should_exit = True
        thread.join()


def test_streams_of_events_are_bounded_though_they_come_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "_MOST_STREAMS", 2)
    client, jobs = made(tmp_path / "videos")
    video = jobs.get(client.post("/v1/videos", json={"prompt": "a"}).json()["id"])
    routes = app._Routes(jobs, SimpleNamespace(is_up=True))  # type: ignore[arg-type]

    async def connected() -> bool:
        return False

    async def follow() -> list[bool]:
        request: Any = SimpleNamespace(is_disconnected=connected)
        streams = [routes._follow(video, request) for _ in range(4)]
        begun = [await anext(stream, None) is not None for stream in streams]
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]
        return begun

    assert asyncio.run(follow()) == [True, True, False, False] and routes._streams == 0
    jobs.store.close()


# The queue ---------------------------------------------------------------------------------------------------------


def test_changes_of_a_prompt_neither_pile_up_nor_hold_up_others(tmp_path: Path) -> None:
    client, jobs = made(tmp_path / "videos")
    name = client.post("/v1/videos", json={"prompt": "a"}).json()["id"]
    run = jobs.take()
    assert run is not None
    run.engine = engine = Still()
    first: list[int] = []
    thread = threading.Thread(target=lambda: first.append(jobs.set_prompt(name, "b")))
    thread.start()
    assert engine.asked.wait(20)
    second = client.post(f"/v1/videos/{name}/prompt", json={"prompt": "c"})
    assert (second.status_code, second.json()["error"]["code"]) == (409, "not_yet")
    engine.may_answer.set()
    thread.join()
    assert first == [3] and jobs.set_prompt(name, "d") == 3
    video = jobs.get(name)
    assert video.prompts == [(0, "a"), (3, "d")] and video.changed == "d"
    video.blocks = [(0, 5), (5, 8)]
    jobs.again(run)
    jobs.finish(run)
    for text in "efg":  # while its run waits to be gone on with
        assert jobs.set_prompt(name, text) == 2
    assert video.prompts == [(0, "a"), (2, "g")]
    jobs.store.close()


def test_a_late_end_of_ranks_does_not_end_those_of_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "SOFT_SECONDS", 0.1)
    client, jobs = made(tmp_path / "videos")
    engine = Still()
    for slow in (False, True):
        name = client.post("/v1/videos", json={"prompt": "a"}).json()["id"]
        run = jobs.take()
        assert run is not None
        run.engine = engine
        client.post(f"/v1/videos/{name}/cancel")
        if slow:
            deadline = time.monotonic() + 20
            while not engine.closed and time.monotonic() < deadline:
                time.sleep(0.01)
        jobs.finish(run)
        run._end()
        assert (engine.closed, run.killed) == (slow, slow)
    jobs.store.close()


def test_a_stop_while_ranks_start_asks_nothing_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, jobs = made(tmp_path / "videos")
    name = client.post("/v1/videos", json={"prompt": "a"}).json()["id"]
    run = jobs.take()
    assert run is not None
    making_of = Runner(jobs)

    def start() -> Still:  # which has no stream
        client.delete(f"/v1/videos/{name}")
        return Still()

    monkeypatch.setattr(making_of, "_start_engine", start)
    making_of._make(run)
    jobs.finish(run)
    assert not list((tmp_path / "videos" / "videos").iterdir())
    assert client.delete(f"/v1/videos/{name}").status_code == 404
    jobs.store.close()


def test_a_video_that_could_not_be_made_with_others_is_made_alone(tmp_path: Path) -> None:
    client, jobs = made(tmp_path / "videos", gpus=2, max_queue=9)
    for _ in range(2):
        client.post("/v1/videos", json={"prompt": "a", "steps": 1})
    run = jobs.take()
    assert run is not None and len(run.live()) == 2
    jobs.again(run, apart=True)
    jobs.finish(run)
    client.post("/v1/videos", json={"prompt": "a", "steps": 1})
    sizes = []
    while (jobs.waiting()) and (run := jobs.take()) is not None:
        sizes.append(len(run.live()))
        jobs.completed(run.live()[0])
        jobs.finish(run)
    assert sizes == [1, 1, 1]
    jobs.store.close()


# Disks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record[: len(record) // 2],
        lambda record: b"",
        lambda record: b"[1]",
        lambda record: record.replace(b'"number": 1', b'"number": "1"'),
        lambda record: record.replace(b'"place": 0', b'"place": 1000000000'),
        lambda record: record.replace(b'"run": null', b'"run": "../videos"'),
        lambda record: record.replace(b'"status": "queued"', b'"status": "fine"'),
        lambda record: record.replace(b'"id": "video_', b'"id": "video-'),
    ],
)
def test_a_damaged_record_is_left_out_and_the_rest_goes_on(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    client, jobs = made(tmp_path)
    names = [client.post("/v1/videos", json={"prompt": "a"}).json()["id"] for _ in range(2)]
    jobs.store.close()
    path = tmp_path / "videos" / names[0] / "video.json"
    assert change(path.read_bytes()) != path.read_bytes()
    path.write_bytes(change(path.read_bytes()))
    (tmp_path / "videos" / ("video_" + "0" * 24) / "blocks").mkdir(parents=True)  # a removal that was cut short
    client, jobs = made(tmp_path)
    assert [each["id"] for each in client.get("/v1/videos").json()["data"]] == names[1:]
    assert client.post("/v1/videos", json={"prompt": "b"}).status_code == 200
    assert path.exists() and len(list((tmp_path / "videos").iterdir())) == 3
    jobs.store.close()


def test_a_file_that_somebody_removed_is_no_error_of_the_server(tmp_path: Path) -> None:
    client, jobs = made(tmp_path / "videos")
    name = client.post("/v1/videos", json={"prompt": "a"}).json()["id"]
    run = jobs.take()
    assert run is not None
    jobs.completed(run.live()[0])
    jobs.finish(run)
    assert client.get(f"/v1/videos/{name}/content").status_code == 404
    jobs.store.close()
