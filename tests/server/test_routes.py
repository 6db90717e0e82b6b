"""Routes, limits, the door and the page, without an engine: nothing is made here, videos only wait."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from dualparal.cli import serve
from dualparal.cli.main import app as commands
from dualparal.config.blocks import BlockConfig
from dualparal.config.engine import EngineConfig
from dualparal.server.jobs import together
from dualparal.server.serve import serve as run_server
from dualparal.server.store import COMPLETED, Store
from places import ROOT
from servers import URL, made, settings

TOKEN = "0123456789abcdef"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    found, jobs = made(tmp_path / "videos")
    yield found
    jobs.store.close()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "  "}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "a" * 4001}, "prompt"),
        ({"prompt": "a\x00"}, "prompt"),
        ({"prompt": "a", "seconds": "nan"}, "seconds"),
        ({"prompt": "a", "seconds": "11"}, "seconds"),
        ({"prompt": "a", "seconds": True}, "seconds"),
        ({"prompt": "a", "size": "64"}, "size"),
        ({"prompt": "a", "size": "16000x16000"}, "size"),
        ({"prompt": "a", "size": "65x64"}, "size"),
        ({"prompt": "a", "steps": 1.5}, "steps"),
        ({"prompt": "a", "steps": 101}, "steps"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "guidance_scale": "1e400"}, "guidance_scale"),
        ({"prompt": "a", "negative_prompt": "b" * 4001}, "negative_prompt"),
        ({"prompt": "a", "input_reference": "x"}, "input_reference"),
        ({"prompt": "a", "out": "/etc/passwd"}, "out"),
    ],
)
def test_fields_have_limits(client: TestClient, fields: dict[str, Any], param: str) -> None:
    answer = client.post("/v1/videos", json=fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert error["message"].startswith(param) and "\n" not in error["message"]


def test_bodies_and_models(client: TestClient) -> None:
    assert client.post("/v1/videos", json={"prompt": "a", "model": "sora-2"}).status_code == 404
    for body in (b"{", b"[1]", b"\xff", b"[" * 60000):
        assert client.post("/v1/videos", content=body).status_code == 400
    assert client.post("/v1/videos", content=b"a" * 70000).status_code == 413
    assert client.post("/v1/videos", content=iter([b"a" * 40000] * 2)).status_code == 413
    form = client.post("/v1/videos", data={"prompt": "a", "seconds": "1"}, files={"x": b""})
    assert form.json()["error"]["param"] == "x"
    assert client.get("/nowhere").json()["error"]["code"] == "http"


def test_the_queue_and_its_list(tmp_path: Path) -> None:
    client, jobs = made(tmp_path / "videos", keep=3)
    names = [client.post("/v1/videos", data={"prompt": f"number {i}"}, files=None).json()["id"] for i in range(3)]
    full = client.post("/v1/videos", json={"prompt": "a"})
    assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
    page = client.get("/v1/videos?limit=2").json()
    assert [each["id"] for each in page["data"]] == names[:0:-1] and page["has_more"]
    rest = client.get(f"/v1/videos?limit=2&after={page['last_id']}").json()
    assert [each["id"] for each in rest["data"]] == names[:1] and not rest["has_more"]
    assert client.get("/v1/videos?limit=0").status_code == 400
    assert client.post(f"/v1/videos/{names[1]}/prompt", json={"prompt": "other"}).json()["block"] == 0
    assert client.get(f"/v1/videos/{names[1]}/content").status_code == 409
    assert client.post(f"/v1/videos/{names[0]}/cancel").json()["error"]["code"] == "cancelled"
    for path in (f"{names[0]}/segments/0.m4s", f"{names[0]}/init.mp4", "..%2f..%2fserver.lock", "video_" + "0" * 24):
        assert client.get(f"/v1/videos/{path}").status_code == 404
    jobs.store.close()
    client, jobs = made(tmp_path / "videos", keep=3)  # a restart
    assert [video.id for video in jobs.waiting()] == names[1:]
    assert jobs.get(names[1]).prompts == [(0, "other")]
    client.post("/v1/videos", json={"prompt": "new"})  # the oldest that is over makes room
    assert client.get(f"/v1/videos/{names[0]}").status_code == 404
    assert client.delete(f"/v1/videos/{names[1]}").json()["deleted"]
    run = jobs.take()
    assert run is not None and [video.id for video in run.live()] == [names[2]]
    jobs.delete(names[2])
    assert run.stopping and jobs.store.path(jobs.store.videos[names[2]]).is_dir()
    jobs.finish(run)
    assert names[2] not in jobs.store.videos and len(list((tmp_path / "videos" / "videos").iterdir())) == 1
    jobs.store.close()


def test_videos_that_fill_the_stages_are_made_together(tmp_path: Path) -> None:
    blocks = BlockConfig(max_blocks_in_flight=2)
    assert together(settings(tmp_path, gpus=4), 50) == 1 and together(settings(tmp_path, gpus=4), 1) == 4
    assert together(settings(tmp_path, gpus=5, engine=EngineConfig(blocks=blocks)), 50) == 3
    client, jobs = made(tmp_path / "videos", gpus=2)
    for steps in (1, 3, 1):
        client.post("/v1/videos", json={"prompt": "a", "steps": steps})
    run = jobs.take()
    assert run is not None and [video.number for video in run.live()] == [1, 3]
    jobs.again(run)
    jobs.finish(run)
    again = jobs.take()
    assert again is not None and again.name == run.name and [video.failures for video in again.live()] == [1, 1]
    jobs.cancel(again.live()[0].id)
    assert not again.stopping
    jobs.completed(again.live()[0])
    jobs.finish(again)
    assert [video.status for video in jobs.all()] == [COMPLETED, "queued", "failed"]
    jobs.store.close()


def test_the_door(tmp_path: Path) -> None:
    client, jobs = made(tmp_path / "videos", token=TOKEN, host="video.example", allow_hosts=("other.example",))
    assert client.get("/v1/videos").json()["error"]["code"] == "invalid_api_key"
    assert client.get("/metrics").status_code == 401 and client.get("/healthz").status_code == 200
    assert client.get("/").status_code == 200 and client.get("/page/page.js").status_code == 200
    for given, status in ((f"Bearer {TOKEN}", 200), ("Bearer wrong", 401), (f"Basic {TOKEN}", 401), ("Bearer é", 401)):
        assert client.get("/v1/videos", headers={"authorization": given.encode()}).status_code == status
    known = {"authorization": f"Bearer {TOKEN}"}
    for host, status in (("evil.example", 421), ("other.example:80", 200), ("VIDEO.example", 200), ("[::1]:1", 200)):
        assert client.get("/v1/videos", headers={**known, "host": host}).status_code == status
    for origin, status in (("http://evil.example", 403), ("null", 403), (URL, 200)):
        assert client.get("/v1/videos", headers={**known, "origin": origin}).status_code == status
    answer = client.post("/session", json={"token": TOKEN})
    assert answer.status_code == 200 and TOKEN not in answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict"} <= set(answer.headers["set-cookie"].split("; "))
    assert client.get("/v1/videos").status_code == 200  # by the cookie
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    jobs.store.close()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 without --token"),
        (["--host", "0.0.0.0", "--token", "short"], "--token: use at least 16"),
        (["--port", "70000"], "--port 70000"),
        (["--max-seconds", "nan"], "--max-seconds nan"),
        (["--size", "big"], "--size 'big'"),
        (["--max-queue", "0"], "--max-queue 0"),
        (["--allow-host", "http://a"], "'http://a'"),
    ],
)
def test_flags_that_cannot_be(flags: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serve.TOKEN, raising=False)
    result = CliRunner().invoke(commands, ["serve", "--out-dir", str(tmp_path / "none"), *flags])
    assert isinstance(result.exception, ValueError) and says in str(result.exception)
    assert not (tmp_path / "none").exists()


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else name)
    result = CliRunner().invoke(commands, ["serve"])
    assert str(result.exception) == "serve needs uvicorn: pip install 'dualparal[server]'"


def test_an_address_that_is_taken_is_named_before_ranks_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: cannot listen there"):
            run_server(settings(tmp_path / "none", port=port), print)
    assert not (tmp_path / "none").exists()


def test_a_full_disk_does_not_stop_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, jobs = made(tmp_path / "videos")
    name = client.post("/v1/videos", json={"prompt": "a"}).json()["id"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jobs.store, "save", full)
    run = jobs.take()
    assert run is not None
    jobs.failed(run, "storage", "the disk is full")
    jobs.finish(run)
    assert client.get(f"/v1/videos/{name}").json()["error"]["code"] == "storage"
    assert client.post("/v1/videos", json={"prompt": "b"}).json()["error"]["type"] == "server_error"
    jobs.store.close()


def test_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    first = Store(tmp_path)
    with pytest.raises(ValueError, match="--out-dir"):
        Store(tmp_path)
    first.close()
    Store(tmp_path).close()


def test_the_page_asks_for_routes_that_there_are(client: TestClient) -> None:
    page = ROOT / "dualparal" / "server" / "page"
    script = (page / "page.js").read_text(encoding="utf-8")
    routes = [(method, route.path_regex) for route in client.app.routes for method in route.methods]  # type: ignore[attr-defined]
    calls = r'call\("(\w+)", [`"]([^`"?]*)'
    asked = re.findall(calls, script)
    asked += [("GET", path) for path in re.findall(r"[`\"](v1/[^`\"?]*)[`\"?]", re.sub(calls, "", script))]
    asked += [("GET", path) for path in re.findall(r'(?:href|src)="(page/[^"]+)"', (page / "index.html").read_text())]
    asked += [("GET", f"page/{name}") for name in re.findall(r'from "./([^"]+)"', script)]
    assert len(asked) > 10
    for method, path in asked:
        plain = "/" + re.sub(r"\$\{[^}]*\}", "0", path)
        assert any(method == known and pattern.fullmatch(plain) for known, pattern in routes), (method, path)
    for path in page.iterdir():
        assert path.name == "index.html" or client.get(f"/page/{path.name}").status_code == 200
    ids = set(re.findall(r'\bat\("([\w-]+)"\)', script))
    assert ids and ids <= set(re.findall(r'id="([\w-]+)"', (page / "index.html").read_text(encoding="utf-8")))
    assert "innerHTML" not in script, "texts of users are no HTML"


def test_settings_name_no_path(tmp_path: Path) -> None:
    assert replace(settings(tmp_path), model=str(tmp_path)).model_name == tmp_path.name
