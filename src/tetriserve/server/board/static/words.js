// Numbers as people read them.

export function seconds(value) {
  const size = Math.abs(value);
  if (size < 1) return `${Math.round(value * 1000)} ms`;
  if (size < 100) return `${value.toFixed(size < 10 ? 2 : 1)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
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

/** An element with these properties and children. */
export function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}
