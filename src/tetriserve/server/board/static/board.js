// The board itself: a row per rank, time to the right, now as a line; left of it what ran, right of it what is planned.

import { HUES, blockRects, fillBlocks, hatchBlocks, perforateBlocks, readPalette, strokeBlocks } from "./paint.js";
import { Tape } from "./tape.js";
import { isVideo, labelsOf } from "./words.js";

const NOW_AT = 0.62; // of the width
const LAG_S = 0.12; // the picture is this much behind, so that ends are known before they are drawn
const LANE = 20; // height of the lane of deadlines, in CSS pixels, as is all below
const AXIS = 20;
const GUTTER = 46; // for the names of ranks
const LABEL_WIDTH = 34;
const MAX_LINES = 12; // deadlines drawn over the whole height; with more, only in their lane
const CALM_MS = 500; // between frames for those who want no motion

export class Board {
  selected = null; // request id

  constructor(canvas, pool) {
    this.canvas = canvas;
    this.pool = pool;
    this.context = canvas.getContext("2d", { alpha: false });
    this.spanS = 30;
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
    this.frame = null;
    pool.addEventListener("begin", () => this.lay());
    pool.addEventListener("change", () => this.wake());
    pool.addEventListener("run", ({ detail }) => this.tape?.add(detail));
    pool.addEventListener("late", ({ detail }) => detail.runs.forEach((run) => this.tape?.hatch(run)));
    addEventListener("themechange", () => this.lay());
    new ResizeObserver(() => this.lay()).observe(canvas.parentElement);
  }

  show(spanS) {
    this.spanS = spanS;
    this.lay();
  }

  /** Where everything goes: again after every change of size, theme, span or number of ranks. */
  lay() {
    const scale = devicePixelRatio;
    const numRows = Math.max(this.pool.numRows, 1);
    const width = this.canvas.parentElement.clientWidth;
    const rowHeight = Math.round(Math.min(96, Math.max(9, 320 / numRows)) * scale);
    const top = LANE * scale;
    const height = top + numRows * rowHeight + AXIS * scale;
    Object.assign(this.canvas, { width: Math.round(width * scale), height });
    Object.assign(this.canvas.style, { width: `${width}px`, height: `${height / scale}px` });
    const left = GUTTER * scale;
    const rows = { top, height: rowHeight, inset: rowHeight > 14 * scale ? 1.5 * scale : 0.5 * scale };
    this.layout = { scale, numRows, rows, left, spanS: this.spanS, width: this.canvas.width - left, height };
    this.palette = readPalette(this.context, scale);
    this.tape = new Tape(this.layout, this.palette, this.pool.runs);
    this.nowX = left + Math.round(this.layout.width * NOW_AT);
    this.draw();
    this.wake();
  }

  /** Draw frames for as long as something moves. */
  wake() {
    if (this.frame !== null) return;
    const next = () => (this.calm.matches ? setTimeout(step, CALM_MS) : requestAnimationFrame(step));
    const step = () => {
      this.frame = null;
      this.draw();
      if (this.isMoving) this.frame = next();
    };
    this.frame = next();
  }

  get shown() {
    const now = this.pool.now - LAG_S;
    const pastS = (this.nowX - this.layout.left) / this.tape.pixelsPerS;
    return { now, fromS: now - pastS, untilS: now + this.layout.width / this.tape.pixelsPerS - pastS };
  }

  get isMoving() {
    const { fromS } = this.shown;
    return this.pool.running.length > 0 || this.pool.open.size > 0 || this.pool.runs.at(-1)?.end_s > fromS;
  }

  draw() {
    if (!this.layout) return;
    if (this.layout.numRows !== Math.max(this.pool.numRows, 1)) return this.lay();
    this.pool.noteLate();
    const { context, layout, palette } = this;
    const { now, fromS, untilS } = this.shown;
    const toX = (time_s) => this.nowX + (time_s - now) * this.tape.pixelsPerS;
    this.toX = toX;
    context.fillStyle = palette.card;
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    this.#drawRows();
    context.save();
    context.beginPath();
    context.rect(layout.left, 0, layout.width, layout.height);
    context.clip();
    this.tape.draw(context, fromS, toX);
    this.#drawRunning(now, toX);
    this.#drawPlan(now, untilS, toX);
    this.#drawDeadlines(fromS, untilS, toX);
    this.#drawNow();
    this.#drawLabels(now, fromS, toX);
    this.#drawSelection(toX);
    context.restore();
    this.#drawAxis();
  }

  #drawRows() {
    const { context, palette, canvas } = this;
    const { rows, numRows, left, scale } = this.layout;
    const living = new Set(this.pool.ranks);
    const every = Math.ceil((14 * scale) / rows.height);
    context.textBaseline = "middle";
    context.textAlign = "right";
    context.font = this.#font(11);
    for (let rank = 0; rank < numRows; rank++) {
      const y = rows.top + rank * rows.height;
      const isUp = living.has(rank) || !this.pool.isLive;
      context.fillStyle = isUp ? palette.row : palette.down;
      context.fillRect(left, y + rows.inset, canvas.width - left, rows.height - 2 * rows.inset);
      if (rank % every && isUp) continue;
      context.fillStyle = isUp ? palette.muted : palette.accent;
      context.fillText(isUp ? `${rank}` : `${rank} down`, left - 8 * scale, y + rows.height / 2);
    }
  }

  #drawRunning(now, toX) {
    for (const run of this.pool.running) {
      const end_s = Math.max(run.end_s, now);
      if (end_s > now) this.#drawPlanned(run, Math.max(now, run.start_s), end_s, toX);
      if (run.start_s < now) this.#drawSolid(run, run.start_s, now, toX);
    }
  }

  #drawPlan(now, untilS, toX) {
    const freeAt = new Map(); // ranks: what runs there may have begun since the plan was made
    for (const run of this.pool.running) for (const rank of run.ranks) freeAt.set(rank, run.end_s);
    for (const run of this.pool.plan.runs) {
      if (run.start_s > untilS || run.request.status !== "open") continue;
      const start_s = Math.max(run.start_s, now, ...run.ranks.map((rank) => freeAt.get(rank) ?? now));
      if (start_s < run.end_s) this.#drawPlanned(run, start_s, run.end_s, toX);
    }
  }

  #drawSolid(run, start_s, end_s, toX) {
    const { context, palette } = this;
    const { scale, rows } = this.layout;
    const rects = blockRects(run, rows, Math.round(toX(start_s)), Math.round(toX(end_s)), scale);
    fillBlocks(context, rects, HUES[run.request.hue], scale);
    if (isVideo(run.request)) perforateBlocks(context, rects, palette.holes, scale);
    if (run.request.isLate) hatchBlocks(context, rects, palette.late, scale);
  }

  #drawPlanned(run, start_s, end_s, toX) {
    const { context, palette } = this;
    const { scale, rows } = this.layout;
    const rects = blockRects(run, rows, toX(start_s), toX(end_s), scale);
    const colour = HUES[run.request.hue];
    context.globalAlpha = 0.26;
    fillBlocks(context, rects, colour, scale);
    if (this.pool.isDoomed(run.request)) {
      context.globalAlpha = 0.4;
      hatchBlocks(context, rects, palette.late, scale);
    }
    context.globalAlpha = 0.9;
    if (rects[0].width > 4 * scale) strokeBlocks(context, rects, colour, scale, scale);
    context.globalAlpha = 1;
    if (isVideo(run.request)) this.#drawLabel(run, toX(start_s), toX(end_s));
  }

  #drawDeadlines(fromS, untilS, toX) {
    const isVisible = ({ deadline_s, status }) => deadline_s >= fromS && deadline_s <= untilS && status !== "cancelled";
    const open = [...this.pool.open.values()].filter(isVisible);
    const missed = this.endedSince(fromS).filter((request) => request.isLate && isVisible(request));
    const { context } = this;
    const { rows, scale, numRows } = this.layout;
    const bottom = rows.top + numRows * rows.height;
    context.lineWidth = 1.5 * scale;
    for (const request of [...missed, ...open]) {
      const x = Math.round(toX(request.deadline_s)) + 0.5;
      const isOpen = request.status === "open";
      context.fillStyle = context.strokeStyle = HUES[request.hue];
      context.globalAlpha = isOpen ? 1 : 0.55;
      this.#drawFlag(x, request);
      if (isOpen && (open.length <= MAX_LINES || request.id === this.selected)) {
        context.setLineDash([4 * scale, 4 * scale]);
        context.beginPath();
        context.moveTo(x, rows.top);
        context.lineTo(x, bottom);
        context.stroke();
        context.setLineDash([]);
      }
    }
    context.globalAlpha = 1;
  }

  /** A triangle at a deadline: filled while it can be met or was, a cross once it is missed. */
  #drawFlag(x, request) {
    const { context } = this;
    const { rows, scale } = this.layout;
    const [tip, half] = [rows.top - 2 * scale, 5 * scale];
    context.beginPath();
    if (request.isLate) {
      context.moveTo(x - half, tip - 2 * half);
      context.lineTo(x + half, tip);
      context.moveTo(x + half, tip - 2 * half);
      context.lineTo(x - half, tip);
      context.stroke();
    } else {
      context.moveTo(x, tip);
      context.lineTo(x - half, tip - 1.7 * half);
      context.lineTo(x + half, tip - 1.7 * half);
      context.fill();
    }
  }

  #drawNow() {
    const { context, palette, nowX } = this;
    const { scale, rows, numRows } = this.layout;
    context.fillStyle = palette.accent;
    context.fillRect(nowX - scale, rows.top - 4 * scale, 2 * scale, numRows * rows.height + 8 * scale);
  }

  #drawLabels(now, fromS, toX) {
    const { left, scale } = this.layout;
    const running = new Map(this.pool.running.map((run) => [run.request, { ...run, end_s: now }]));
    const label = (stay) => {
      const [fromX, endX] = [Math.max(left, toX(stay.start_s)), toX(stay.end_s)];
      if (endX - fromX >= LABEL_WIDTH * scale) this.#drawLabel(stay, fromX, endX);
    };
    for (const stay of this.pool.stays) {
      if (stay.end_s < fromS) continue;
      const run = running.get(stay.request);
      if (run && run.request.stay === stay && `${run.ranks}` === stay.key) {
        running.delete(stay.request);
        label({ ...stay, end_s: now });
      } else {
        label(stay);
      }
    }
    for (const run of running.values()) label(run);
  }

  #drawLabel({ parts, request }, fromX, toX) {
    const { context, palette } = this;
    const { scale, rows } = this.layout;
    const [first, count] = parts.reduce((widest, part) => (part[1] > widest[1] ? part : widest));
    if (count * rows.height < 15 * scale) return;
    context.font = this.#font(10.5);
    const texts = labelsOf(request).map((text) => [text, context.measureText(text).width]);
    const [text, textWidth] = texts.find(([, width]) => toX - fromX >= width + 12 * scale) ?? [];
    if (text === undefined) return;
    const [x, y] = [(fromX + toX) / 2, rows.top + (first + count / 2) * rows.height];
    context.fillStyle = palette.label;
    context.beginPath();
    context.roundRect(x - textWidth / 2 - 4 * scale, y - 7.5 * scale, textWidth + 8 * scale, 15 * scale, 3 * scale);
    context.fill();
    context.fillStyle = palette.labelInk;
    context.textAlign = "center";
    context.fillText(text, x, y + 0.5 * scale);
  }

  #drawSelection(toX) {
    const request = this.pool.requests.get(this.selected);
    if (request === undefined) return;
    const { context, palette } = this;
    const { scale, rows } = this.layout;
    for (const run of this.runsOf(request)) {
      const rects = blockRects(run, rows, toX(run.start_s), toX(run.end_s), scale);
      strokeBlocks(context, rects, palette.ink, 2 * scale, scale);
    }
  }

  #drawAxis() {
    const { context, palette, layout, nowX } = this;
    const { scale, rows, numRows, left } = layout;
    const stepS = this.spanS <= 10 ? 2 : this.spanS <= 30 ? 5 : 20;
    const y = rows.top + numRows * rows.height;
    context.textAlign = "center";
    context.textBaseline = "alphabetic";
    context.font = this.#font(11);
    const step = stepS * this.tape.pixelsPerS;
    const first = -Math.floor((nowX - left) / step);
    const last = Math.floor((this.canvas.width - nowX) / step);
    for (let number = first; number <= last; number++) {
      const x = nowX + number * step;
      context.fillStyle = palette.rule;
      context.fillRect(Math.round(x), y, scale, 4 * scale);
      context.fillStyle = number ? palette.muted : palette.accent;
      const text = number === 0 ? "now" : `${number > 0 ? "+" : "−"}${Math.abs(number) * stepS} s`;
      const half = context.measureText(text).width / 2;
      context.fillText(text, Math.min(Math.max(x, left + half), this.canvas.width - half), y + 16 * scale);
    }
  }

  /** Every block of a request: ended, running and planned ones. */
  runsOf(request) {
    const planned = [...this.pool.running, ...this.pool.plan.runs].filter((run) => run.request === request);
    return [...request.runs, ...planned];
  }

  /** The block at a point of the canvas, in CSS pixels; undefined where there is none. */
  runAt(x, y) {
    if (!this.toX) return undefined;
    const { scale, rows, left } = this.layout;
    const rank = Math.floor((y * scale - rows.top) / rows.height);
    if (x * scale < left) return undefined;
    const isHere = ({ parts, lane = 0, lanes = 1 }) => {
      const part = parts.find(([first, count]) => first <= rank && rank < first + count);
      if (part === undefined) return false;
      const share = (y * scale - rows.top - part[0] * rows.height) / (part[1] * rows.height);
      return Math.floor(share * lanes) === lane;
    };
    const covers = (run) => this.toX(run.start_s) <= x * scale && x * scale <= this.toX(run.end_s) + 1 && isHere(run);
    return this.pool.running.find(covers) ?? this.pool.runs.findLast(covers) ?? this.pool.plan.runs.find(covers);
  }

  /** Where the last block of a request ends, in CSS pixels; undefined if it has none. */
  placeOf(request) {
    const run = this.runsOf(request).at(-1);
    const { scale, rows } = this.layout;
    return run && { x: Math.max(this.toX(run.end_s), this.layout.left) / scale, y: rows.top / scale };
  }

  /** Requests with a block in sight or a deadline ahead, by arrival. */
  get inSight() {
    return [...this.endedSince(this.shown.fromS), ...this.pool.open.values()].sort((a, b) => a.arrival_s - b.arrival_s);
  }

  endedSince(time_s) {
    const last = this.pool.ended.findLastIndex((request) => request.finish_s < time_s);
    return this.pool.ended.slice(last + 1);
  }

  #font(size) {
    return `600 ${size * this.layout.scale}px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif`;
  }
}
