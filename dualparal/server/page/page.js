// The page: asks for videos, plays their blocks while they are made (Media Source Extensions, or native HLS), shows what
// the ranks do. No framework. Everything comes from this server; texts of users are only ever set as textContent.
import { Timeline } from "./timeline.js";

const at = (id) => document.getElementById(id);
const video = at("video"), timeline = new Timeline(at("timeline"));
const WORDS = { queued: "waiting", in_progress: "live", completed: "finished", failed: "failed" };
let server = null, current = null, events = null, player = null;

async function call(method, path, body) {
  const answer = await fetch(path, {
    method,
    headers: body === undefined || body instanceof FormData ? {} : { "content-type": "application/json" },
    body: body === undefined || body instanceof FormData ? body : JSON.stringify(body),
  });
  if (answer.status === 401) at("door").hidden = false;
  if (answer.ok) return answer.json();
  const told = await answer.json().catch(() => null);
  throw new Error(told?.error?.message ?? `the server answered ${answer.status}`);
}

// The player: a MediaSource to which block after block is appended, in order.
class Player {
  constructor(id) {
    this.id = id; this.next = 0; this.known = 0; this.ended = false; this.busy = false; this.gone = false;
    const Source = window.MediaSource ?? window.ManagedMediaSource;
    if (!Source) {  // Safari on a phone: it plays HLS itself
      this.native = true;
      return;
    }
    this.source = new Source();
    video.disableRemotePlayback = true;
    this.url = URL.createObjectURL(this.source);
    video.src = this.url;
    this.source.addEventListener("sourceopen", () => this.pump(), { once: true });
  }

  follow(told) {
    this.known = told.blocks.length;
    this.ended = told.status === "completed" || told.status === "failed";
    if (this.native && !video.src && this.known) {
      video.src = `v1/videos/${this.id}/playlist.m3u8`;
      video.play().catch(() => {});
    }
    this.pump();
  }

  async pump() {
    if (this.native || this.busy || this.gone || this.source.readyState !== "open") return;
    this.busy = true;
    try {
      while (this.next < this.known && !this.gone) {
        if (!this.buffer) {
          const header = await this.bytes(`v1/videos/${this.id}/init.mp4`);
          this.buffer = this.source.addSourceBuffer(`video/mp4; codecs="${codec(header)}"`);
          await this.append(header);
        }
        await this.append(await this.bytes(`v1/videos/${this.id}/segments/${this.next}.m4s`));
        this.next += 1;
        if (this.next === 1) video.play().catch(() => {});
        else this.goOn();
      }
      if (this.ended && this.next >= this.known && this.source.readyState === "open" && !this.gone) this.source.endOfStream();
    } catch (error) {
      if (!this.gone) note(`The video cannot be played here: ${error.message}`, true);
    }
    this.busy = false;
  }

  goOn() {  // it stood at the end of what was there
    if (!video.paused && video.readyState < 3) video.play().catch(() => {});
  }

  async bytes(path) {
    const answer = await fetch(path);
    if (!answer.ok) throw new Error(`block ${this.next} is gone`);
    return new Uint8Array(await answer.arrayBuffer());
  }

  append(bytes) {
    return new Promise((resolve, reject) => {
      if (this.gone) return resolve();
      this.buffer.addEventListener("updateend", resolve, { once: true });
      this.buffer.addEventListener("error", () => reject(new Error("a block was refused")), { once: true });
      this.buffer.appendBuffer(bytes);
    });
  }

  close() {
    this.gone = true;
    if (this.url) URL.revokeObjectURL(this.url);
    video.removeAttribute("src");
    video.load();
  }
}

function codec(header) {  // profile, constraints and level of H.264 stand behind the word avcC
  for (let i = 0; i + 8 < header.length; i++) {
    if (header[i] === 97 && header[i + 1] === 118 && header[i + 2] === 99 && header[i + 3] === 67) {
      return "avc1." + [...header.slice(i + 5, i + 8)].map((each) => each.toString(16).padStart(2, "0")).join("");
    }
  }
  throw new Error("no H.264");
}

function show(id) {
  events?.close();
  player?.close();
  current = null;
  timeline.clear();
  at("ranks").hidden = true;
  player = new Player(id);
  events = new EventSource(`v1/videos/${id}/events`);
  events.addEventListener("video", (event) => draw(JSON.parse(event.data)));
  events.addEventListener("spans", (event) => { at("ranks").hidden = false; timeline.add(JSON.parse(event.data)); });
  events.addEventListener("deleted", leave);
  events.onerror = () => { if (current && isOver(current)) events.close(); };
  history.replaceState(null, "", "#" + id);
}

const isOver = (told) => told.status === "completed" || told.status === "failed";

function draw(told) {
  const before = current;
  current = told;
  const badge = at("badge"), stopped = told.error?.code === "cancelled";
  badge.className = "badge " + (stopped ? "" : told.status);
  badge.textContent = stopped ? "stopped" : WORDS[told.status];
  at("status").hidden = false;
  at("empty").hidden = told.blocks.length > 0;
  at("empty").textContent = told.status === "queued" ? "It waits for its turn."
    : told.status === "in_progress" ? "The first frames are on their way." : "It has no frames.";
  at("caption").textContent = told.status === "failed" && !stopped ? told.error.message : "";
  const frames = told.blocks.reduce((sum, block) => sum + block.frames, 0);
  at("figures").textContent =
    `${told.progress} %  ·  ${(frames / told.fps).toFixed(1)} of ${(told.num_frames / told.fps).toFixed(1)} s  ·  ${told.size}`;
  at("progress").value = told.progress;
  at("progress").hidden = isOver(told);
  at("prompts").replaceChildren(...told.prompts.map((each, index) => {
    const item = document.createElement("li"), from = document.createElement("b"), text = document.createElement("span");
    from.textContent = each.block ? `block ${each.block} on` : "block 0";
    text.textContent = each.prompt;
    item.append(from, text);
    item.className = index === told.prompts.length - 1 ? "now" : "";
    return item;
  }));
  at("stop").hidden = isOver(told);
  at("change").hidden = isOver(told);
  at("download").hidden = told.status !== "completed";
  at("download").href = `v1/videos/${told.id}/content`;
  player.follow(told);
  if (!before || before.status !== told.status) list();
  if (isOver(told)) events.close();
}

function leave() {
  events?.close();
  player?.close();
  current = player = null;
  at("status").hidden = at("ranks").hidden = at("change").hidden = true;
  at("empty").hidden = false;
  history.replaceState(null, "", location.pathname);
  list();
}

async function list() {
  const told = await call("GET", "v1/videos?limit=50");
  at("history").replaceChildren(...told.data.map((each) => {
    const item = document.createElement("li"), button = document.createElement("button");
    const text = document.createElement("span"), badge = document.createElement("span");
    text.className = "text"; text.textContent = each.prompt; text.title = each.prompt;
    const stopped = each.error?.code === "cancelled";
    badge.className = "badge " + (stopped ? "" : each.status);
    badge.textContent = stopped ? "stopped" : WORDS[each.status];
    button.type = "button";
    button.setAttribute("aria-current", String(each.id === current?.id));
    button.append(text, badge);
    button.onclick = () => show(each.id);
    item.append(button);
    return item;
  }));
}

function note(text, bad = false) {
  at("note").textContent = text;
  at("note").className = bad ? "error" : "";
}

function storyboard() {  // lines of "SECOND: TEXT"
  const scenes = {};
  for (const line of at("storyboard").value.split("\n")) {
    if (!line.trim()) continue;
    const found = /^\s*(\d+(?:\.\d+)?)\s*:\s*(\S.*)$/.exec(line);
    if (!found || found[1] in scenes) throw new Error(`Storyboard: use SECOND: TEXT, each second once, not "${line.trim()}"`);
    scenes[found[1]] = found[2];
  }
  return Object.keys(scenes).length ? scenes : null;
}

function guarded(action) {
  return async (event) => {
    event?.preventDefault();
    try { await action(); } catch (error) { note(error.message, true); }
  };
}

at("ask").onsubmit = guarded(async () => {
  note("");
  const fields = { prompt: at("prompt").value };
  for (const name of ["seconds", "steps", "seed", "size"]) if (at(name).value) fields[name] = at(name).value;
  const scenes = storyboard();
  if (scenes) fields.storyboard = scenes;
  const file = at("reference").files[0];
  if (!file) return show((await call("POST", "v1/videos", fields)).id);
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.set(name, name === "storyboard" ? JSON.stringify(value) : value);
  form.set("input_reference", file);
  show((await call("POST", "v1/videos", form)).id);
});
at("change").onclick = guarded(async () => {
  if (!at("prompt").value.trim()) return note("Say first what is to follow.", true);
  note("It is being encoded.");
  const told = await call("POST", `v1/videos/${current.id}/prompt`, { prompt: at("prompt").value });
  note(`Block ${told.block} and those after it take it.`);
});
at("stop").onclick = guarded(() => call("POST", `v1/videos/${current.id}/cancel`));
at("delete").onclick = guarded(async () => { await call("DELETE", `v1/videos/${current.id}`); leave(); });
at("door").onsubmit = guarded(async () => {
  try {
    await call("POST", "session", { token: at("token").value });
  } catch (error) {
    at("door-error").textContent = error.message;
    return;
  }
  at("door").hidden = true;
  await begin();
});

async function begin() {
  server = await call("GET", "v1/server");
  at("server").textContent = `${server.model} · ${server.gpus} rank${server.gpus > 1 ? "s" : ""}`;
  at("seconds").value = server.seconds; at("seconds").max = server.max_seconds;
  at("steps").value = server.steps; at("steps").max = server.max_steps;
  at("size").value = server.size;
  at("reference-label").hidden = server.images === "none";
  at("reference").required = server.images === "must";
  await list();
  const wanted = location.hash.slice(1);
  if (/^video_[0-9a-f]{24}$/.test(wanted)) show(wanted);
}

guarded(begin)();
setInterval(() => { if (server && at("door").hidden && !document.hidden) list().catch(() => {}); }, 5000);
