// Colours and the shapes of blocks. Sizes are device pixels.

// The first are M. Okabe's and K. Ito's ("Color Universal Design"); the same as on the boards of `simulate --report`.
export const HUES = ["#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#0077bb", "#d55e00", "#b5a642", "#44aa99", "#8f7fc0", "#c2b59b"];

/** The page's colours in its present theme, and the hatching of what is late. */
export function readPalette(context, scale) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const palette = {
    card: colour("card"), ink: colour("ink"), muted: colour("muted"), rule: colour("rule"), row: colour("row"),
    accent: colour("accent"), label: colour("label"), labelInk: colour("label-ink"),
  };
  return { ...palette, late: hatching(context, colour("hatch"), scale), down: hatching(context, palette.rule, scale) };
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

function trace(context, { x, y, width, height }, scale) {
  const radius = Math.min(3 * scale, width / 3, height / 3);
  if (radius < 1) context.rect(x, y, width, height);
  else context.roundRect(x, y, width, height, radius);
}
