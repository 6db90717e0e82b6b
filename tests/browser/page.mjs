// The page in a real browser, against a server that runs: node page.mjs URL FOLDER CHROMIUM [TOKEN]. Needs playwright-core.
// Exit code 0: the video played before its end, the timeline moved, a change of prompt showed in later blocks, stop worked.
import { createRequire } from "node:module";
import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const { chromium } = createRequire(process.cwd() + "/")("playwright-core");
const [url, folder, executablePath, token] = process.argv.slice(2);
const args = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];
const context = await chromium.launchPersistentContext(mkdtempSync(join(tmpdir(), "page-")), {
  executablePath, args, headless: true, viewport: { width: 1180, height: 820 }, colorScheme: "light" });
const page = context.pages()[0] ?? await context.newPage();
page.setDefaultTimeout(240000);
const wrong = [], begun = Date.now();
page.on("pageerror", (error) => wrong.push(error.message));
page.on("console", (message) => { if (message.type() === "error") wrong.push(message.text()); });
const say = (text) => console.log(((Date.now() - begun) / 1000).toFixed(1) + " s", text);
const check = (truth, text) => { if (!truth) throw new Error("not so: " + text); say(text); };
const state = () => page.evaluate(async () => {
  const told = await (await fetch("v1/videos/" + location.hash.slice(1))).json();
  const video = document.getElementById("video");
  return { ...told, time: video.currentTime, width: video.videoWidth };
});
const drawn = () => page.evaluate(() => document.getElementById("timeline").toDataURL());
const until = async (what, text) => {
  for (let i = 0; i < 2400; i++) {
    const now = await state();
    if (what(now)) return now;
    if (now.status === "failed" && !text.includes("stop")) throw new Error(`${text}: ${JSON.stringify(now.error)}`);
    await page.waitForTimeout(100);
  }
  throw new Error("never: " + text);
};

try {
  await page.goto(url);
  if (token) { await page.fill("#token", token); await page.click("#door button"); }
  await page.waitForFunction(() => document.getElementById("size").value);
  await page.fill("#prompt", "two red circles and a blue square drifting left on a dark background");
  await page.fill("#seconds", "30");
  await page.fill("#steps", "6");
  await page.click("#make");
  await page.waitForFunction(() => location.hash.length > 1);
  const playing = await until((now) => now.time > 0.3 && now.width > 0, "it plays");
  check(playing.status === "in_progress", `video plays at ${playing.time.toFixed(1)} s with ${playing.progress} % made`);
  const before = await drawn();
  await page.waitForTimeout(1500);
  check(before !== await drawn(), "the timeline moves");
  await page.fill("#prompt", "three green triangles rising on a white background");
  await page.click("#change");
  const changed = await until((now) => now.prompts.length > 1, "the prompt is changed");
  const block = changed.prompts[1].block;
  check(block > changed.blocks.length - 1, `the new prompt holds from block ${block} on, ${changed.blocks.length} were there`);
  await until((now) => now.blocks.length > block + 1 || now.status === "completed", "blocks with the new prompt");
  await page.waitForFunction((time) => {
    const video = document.getElementById("video");
    return video.buffered.length && video.buffered.end(video.buffered.length - 1) > time;
  }, (1 + 32 * block) / 16);
  const seconds = (1 + 32 * block + 24) / 16;
  const corner = async (time) => page.evaluate((when) => new Promise((resolve) => {
    const video = document.getElementById("video"), canvas = document.createElement("canvas");
    video.pause();
    video.onseeked = () => {
      canvas.width = video.videoWidth; canvas.height = video.videoHeight;
      const pen = canvas.getContext("2d");
      pen.drawImage(video, 0, 0);
      const data = pen.getImageData(0, 0, canvas.width, canvas.height).data;
      let sum = 0;
      for (let i = 0; i < data.length; i += 4) sum += data[i] + data[i + 1] + data[i + 2];
      resolve(sum / data.length * 4 / 3);
    };
    video.currentTime = when;
  }), time);
  const dark = await corner(0.5), light = await corner(seconds);
  check(Math.abs(light - dark) > 10, `the picture is another one: mean level ${dark.toFixed(0)}, then ${light.toFixed(0)}`);
  await page.evaluate(() => document.getElementById("video").play());
  await page.screenshot({ path: join(folder, "page.png") });
  await page.emulateMedia({ colorScheme: "dark" });
  await page.waitForTimeout(600);
  await page.screenshot({ path: join(folder, "page-dark.png") });
  await page.setViewportSize({ width: 390, height: 844 });
  await page.waitForTimeout(600);
  check(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), "nothing hangs over on a phone");
  await page.screenshot({ path: join(folder, "page-phone.png"), fullPage: true });
  const now = await state();
  if (now.status === "in_progress") {
    const asked = Date.now();
    await page.click("#stop");
    await until((each) => each.status === "failed", "stop");
    check((await state()).error.code === "cancelled", `stop is seen after ${Date.now() - asked} ms`);
  } else throw new Error("it was over before it could be stopped: give more seconds");
  check(await page.locator("#history button").count() > 0, "history lists it");
  check(!wrong.length, "no error on the page " + wrong.join("; "));
} finally {
  await page.screenshot({ path: join(folder, "last.png") }).catch(() => {});
  await context.close();
}
