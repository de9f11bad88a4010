// The past, painted once: blocks that ended go onto strips of canvas, which each frame only moves.

import { HUES, blockRects, fillBlocks, hatchBlocks, perforateBlocks, strokeBlocks } from "./paint.js";
import { isVideo } from "./words.js";

const NUM_STRIPS = 10; // across what is shown

export class Tape {
  #strips = new Map(); // by number: strip k covers [k, k + 1) * stripS seconds

  /** Start anew. `layout` has spanS, width, height, rows, scale; `palette` the colours. */
  constructor(layout, palette, runs) {
    this.layout = layout;
    this.palette = palette;
    this.stripS = layout.spanS / NUM_STRIPS;
    this.stripWidth = Math.max(1, Math.round(layout.width / NUM_STRIPS)); // whole pixels: no seams
    for (const run of runs) this.add(run);
  }

  get pixelsPerS() {
    return this.stripWidth / this.stripS;
  }

  add(run) {
    const { rows, scale } = this.layout;
    this.#onStrips(run, (context, rects) => {
      const colour = HUES[run.request.hue];
      if (run.failure) strokeBlocks(context, rects, colour, 1.5 * scale, scale);
      else fillBlocks(context, rects, colour, scale);
      if (isVideo(run.request) && !run.failure) perforateBlocks(context, rects, this.palette.holes, scale);
      if (run.request.isLate) hatchBlocks(context, rects, this.palette.late, scale);
    }, rows);
  }

  hatch(run) {
    this.#onStrips(run, (context, rects) => hatchBlocks(context, rects, this.palette.late, this.layout.scale), this.layout.rows);
  }

  /** Draw what happened between `fromS` and now; `toX` says where a time is. */
  draw(context, fromS, toX) {
    const first = Math.floor(fromS / this.stripS);
    for (const [number, strip] of this.#strips) {
      if (number < first) this.#strips.delete(number);
      else context.drawImage(strip.canvas, Math.round(toX(number * this.stripS)), 0);
    }
  }

  #onStrips(run, paint, rows) {
    const first = Math.floor(run.start_s / this.stripS);
    const last = Math.floor(run.end_s / this.stripS);
    for (let number = first; number <= last; number++) {
      const at = (time_s) => Math.round((time_s - number * this.stripS) * this.pixelsPerS);
      paint(this.#strip(number), blockRects(run, rows, at(run.start_s), at(run.end_s), this.layout.scale));
    }
  }

  #strip(number) {
    let context = this.#strips.get(number);
    if (context === undefined) {
      context = new OffscreenCanvas(this.stripWidth, this.layout.height).getContext("2d");
      this.#strips.set(number, context);
    }
    return context;
  }
}
