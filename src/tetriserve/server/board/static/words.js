// Numbers as people read them.

export function seconds(value) {
  const size = Math.abs(value);
  if (size < 1) return `${Math.round(value * 1000)} ms`;
  if (size < 100) return `${value.toFixed(size < 10 ? 2 : 1)} s`;
  const whole = Math.round(value);
  return `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

export function percent(part, all) {
  return all === 0 ? "–" : `${Math.floor((100 * part) / all)} %`;
}

export function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/** The value below which the share `level` of `sorted` lies (nearest rank). */
export function percentile(sorted, level) {
  return sorted[Math.max(0, Math.ceil(level * sorted.length) - 1)];
}

/** The sides of a size, and its frames, which are 1 where it has none: "640x480x17" is [640, 480, 17]. */
export function partsOf(size) {
  const [width, height, frames = 1] = size.split("x").map(Number);
  return [width, height, frames];
}

export function isVideo({ fps }) {
  return fps !== undefined;
}

/** What can be asked of these models: "a picture or a video". */
export function offerOf(models) {
  const makes = new Set(models.map((model) => model.makes));
  return [makes.has("image") && "a picture", makes.has("video") && "a video"].filter(Boolean).join(" or ");
}

/** What a request makes: "512x512", or "832x480, 81 frames, 5.06 s". */
export function outputOf(request) {
  if (!isVideo(request)) return request.size;
  const [width, height, frames] = partsOf(request.size);
  return `${width}x${height}, ${plural(frames, "frame")}, ${seconds(frames / request.fps)}`;
}

/** What a label on its blocks may say, the longest first: as much as there is room for. */
export function labelsOf(request) {
  const [width, height, frames] = partsOf(request.size);
  if (!isVideo(request)) return [width === height ? `${width}` : request.size];
  const inFrames = `${width}x${height}, ${plural(frames, "frame")}`;
  return [`${inFrames}, ${seconds(frames / request.fps)}`, inFrames, plural(frames, "frame"), `${frames} f`];
}

/** An element with these properties and children. */
export function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}
