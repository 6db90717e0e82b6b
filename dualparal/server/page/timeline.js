// The timeline of the ranks: spans of the last seconds on a canvas, a row for each stage and one below it for its decoder.
const SECONDS = 12, ROW = 22, DECODE = 9, GAP = 9, LABEL = 74;

export class Timeline {
  constructor(canvas) {
    this.canvas = canvas;
    this.clear();
    const draw = () => { if (this.dirty || performance.now() - this.came < 2000) this.draw(); requestAnimationFrame(draw); };
    requestAnimationFrame(draw);
  }

  clear() {
    this.spans = []; this.stages = 0; this.end = 0; this.came = 0; this.drawn = 0; this.dirty = true;
  }

  // spans: [stage, row, kind, name, begin, duration, block]
  add(spans) {
    for (const span of spans) {
      if (!["compute", "decode", "wait"].includes(span[2])) continue;
      this.spans.push(span);
      this.stages = Math.max(this.stages, span[0] + 1);
      this.end = Math.max(this.end, span[4] + span[5]);
    }
    const first = this.end - 2 * SECONDS;
    if (this.spans.length > 6000 || (this.spans[0] && this.spans[0][4] < first)) {
      this.spans = this.spans.filter((span) => span[4] + span[5] >= first).slice(-6000);
    }
    if (this.came === 0) this.drawn = this.end;
    this.came = performance.now(); this.dirty = true;
  }

  draw() {
    this.dirty = false;
    const scale = devicePixelRatio || 1, width = this.canvas.clientWidth, row = ROW + DECODE + GAP;
    const height = Math.max(1, this.stages) * row + 18;
    if (this.canvas.width !== Math.round(width * scale) || this.canvas.height !== Math.round(height * scale)) {
      this.canvas.width = Math.round(width * scale); this.canvas.height = Math.round(height * scale);
      this.canvas.style.height = height + "px";
    }
    const pen = this.canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue("--" + name).trim();
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    this.drawn += (this.end - this.drawn) * 0.15;  // spans come a few times a second: the paper moves evenly
    const left = this.drawn - SECONDS, x = (time) => LABEL + ((time - left) / SECONDS) * (width - LABEL);
    pen.font = "12px system-ui, sans-serif"; pen.textBaseline = "middle";
    for (let stage = 0; stage < this.stages; stage++) {
      const y = stage * row;
      pen.fillStyle = colour("soft"); pen.fillText("stage " + stage, 0, y + ROW / 2);
      pen.fillStyle = colour("ground"); pen.fillRect(LABEL, y, width - LABEL, ROW);
    }
    pen.save(); pen.beginPath(); pen.rect(LABEL, 0, width - LABEL, height); pen.clip();
    for (const kind of ["wait", "compute", "decode"]) {
      for (const [stage, , its, , begin, duration, block] of this.spans) {
        if (its !== kind || begin + duration < left) continue;
        const at = x(begin), wide = Math.max(0.5, x(begin + duration) - at), y = stage * row;
        pen.fillStyle = colour(kind);
        pen.globalAlpha = kind === "compute" && block % 2 ? 0.65 : 1;  // neighbours among blocks are told apart
        if (kind === "decode") pen.fillRect(at, y + ROW + 1, wide, DECODE);
        else pen.fillRect(at, y, wide, ROW);
        pen.globalAlpha = 1;
        if (kind === "compute" && wide > 26) { pen.fillStyle = colour("on-accent"); pen.fillText("b" + block, at + 5, y + ROW / 2); }
      }
    }
    pen.restore();
    pen.fillStyle = colour("soft");
    const foot = this.stages * row + 8;
    pen.fillText("−" + SECONDS + " s", LABEL, foot);
    pen.textAlign = "right"; pen.fillText("now", width, foot); pen.textAlign = "left";
  }
}
