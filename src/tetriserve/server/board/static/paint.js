// Colours and the shapes of blocks. Sizes are device pixels.

// The first are M. Okabe's and K. Ito's ("Color Universal Design"); the same as on the boards of `simulate --report`.
export const HUES = ["#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#0077bb", "#d55e00", "#b5a642", "#44aa99", "#8f7fc0", "#c2b59b"];

const HOLE = 2.5; // height of a film's holes, in CSS pixels

/** The page's colours in its present theme, and the hatching of what is late. */
export function readPalette(context, scale) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const palette = {
    card: colour("card"), ink: colour("ink"), muted: colour("muted"), rule: colour("rule"), row: colour("row"),
    accent: colour("accent"), label: colour("label"), labelInk: colour("label-ink"),
  };
  return {
    ...palette,
    late: hatching(context, colour("hatch"), scale),
    down: hatching(context, palette.rule, scale),
    holes: perforation(context, palette.card, scale),
  };
}

function hatching(context, colour, scale) {
  const side = Math.round(7 * scale);
  const cell = new OffscreenCanvas(side, side);
  const pen = cell.getContext("2d");
  pen.strokeStyle = colour;
  pen.lineWidth = 1.4 * scale;
  pen.beginPath();
  for (const shift of [-side, 0, side]) {
    pen.moveTo(shift - 1, side + 1);
    pen.lineTo(shift + side + 1, -1);
  }
  pen.stroke();
  return context.createPattern(cell, "repeat");
}

function perforation(context, colour, scale) {
  const cell = new OffscreenCanvas(Math.round(8 * scale), Math.round(HOLE * scale));
  const pen = cell.getContext("2d");
  pen.fillStyle = colour;
  pen.globalAlpha = 0.75;
  pen.fillRect(Math.round(2 * scale), 0, Math.round(4 * scale), cell.height);
  return context.createPattern(cell, "repeat-x");
}

/** Where the rows are: `top` of the first, `row` high each, blocks `inset` from their edges. Requests that share a task
 * have a `lane` of its `lanes` each, one above the other. */
export function blockRects({ parts, lane = 0, lanes = 1 }, rows, left, right, scale) {
  const gap = right - left > 3 * scale ? scale : 0; // between blocks that follow each other
  const width = Math.max(right - left - gap, scale);
  return parts.map(([first, count]) => {
    const height = (count * rows.height - 2 * rows.inset) / lanes;
    return { x: left, y: rows.top + first * rows.height + rows.inset + lane * height, width, height };
  });
}

export function fillBlocks(context, rects, colour, scale) {
  context.fillStyle = colour;
  context.beginPath();
  for (const rect of rects) trace(context, rect, scale);
  context.fill();
}

export function strokeBlocks(context, rects, colour, lineWidth, scale) {
  context.strokeStyle = colour;
  context.lineWidth = lineWidth;
  context.beginPath();
  for (const { x, y, width, height } of rects) {
    const inset = lineWidth / 2;
    trace(context, { x: x + inset, y: y + inset, width: Math.max(width - lineWidth, 0.1), height: height - lineWidth }, scale);
  }
  context.stroke();
}

/** Hatch blocks. The pattern moves with them. */
export function hatchBlocks(context, rects, pattern, scale) {
  for (const rect of rects) {
    context.save();
    context.translate(rect.x, rect.y);
    context.fillStyle = pattern;
    context.beginPath();
    trace(context, { ...rect, x: 0, y: 0 }, scale);
    context.fill();
    context.restore();
  }
}

/** Holes along both edges of blocks, as a film has them: what is a video. Blocks that are too low have none. */
export function perforateBlocks(context, rects, pattern, scale) {
  const hole = Math.round(HOLE * scale);
  const inset = Math.round(2 * scale);
  context.fillStyle = pattern;
  for (const { x, y, width, height } of rects) {
    if (height < 5 * hole) continue;
    for (const top of [Math.round(y) + inset, Math.round(y + height) - inset - hole]) {
      context.save();
      context.translate(x, top);
      context.fillRect(0, 0, width, hole);
      context.restore();
    }
  }
}

function trace(context, { x, y, width, height }, scale) {
  const radius = Math.min(3 * scale, width / 3, height / 3);
  if (radius < 1) context.rect(x, y, width, height);
  else context.roundRect(x, y, width, height, radius);
}
