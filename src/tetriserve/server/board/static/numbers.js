// The numbers beside the board: who was on time, who waits, at which degree, and the same by size.

import { isMissed } from "./pool.js";
import { element, partsOf, percent, percentile, plural, seconds } from "./words.js";

const WINDOW_S = 300;
const COURSE_S = 10; // a bar of the course
const BLUES = ["#9ecae9", "#56b4e9", "#2b8cc4", "#0077bb", "#005a8f", "#003f66", "#00263d"];

const byId = (id) => document.getElementById(id);

export function showNumbers(pool) {
  const judged = pool.ended.filter((request) => request.status !== "cancelled");
  showSar(judged);
  showCourse(judged, pool.now);
  showQueue(pool);
  showMix(pool.runs);
  showSizes(pool, judged);
}

export function attainedOf(requests) {
  return requests.reduce((count, request) => count + request.attained, 0);
}

function showSar(judged) {
  const attained = attainedOf(judged);
  byId("sar").textContent = percent(attained, judged.length);
  byId("sar-of").textContent = judged.length ? `${attained} of ${judged.length} by their deadline` : "no request has ended";
}

/** Bars of `COURSE_S`: attained from below, missed on top of them. */
function showCourse(judged, now) {
  const numBars = WINDOW_S / COURSE_S;
  const bars = Array.from({ length: numBars }, () => [0, 0]);
  const newest = Math.floor(now / COURSE_S);
  for (const request of judged) {
    const bar = bars[numBars - 1 - (newest - Math.floor(request.finish_s / COURSE_S))];
    if (bar) bar[Number(isMissed(request))] += 1;
  }
  const most = Math.max(1, ...bars.map(([attained, missed]) => attained + missed));
  const [width, unit] = [200 / numBars, 42 / most];
  const rects = bars.flatMap(([attained, missed], number) => [
    rect(number * width, 44 - attained * unit, width - 1, attained * unit, "attained"),
    rect(number * width, 44 - (attained + missed) * unit, width - 1, missed * unit, "missed"),
  ]);
  const course = byId("course");
  course.replaceChildren(rect(0, 43.5, 200, 0.5, "base"), ...rects.filter((each) => each.getAttribute("height") !== "0"));
  const lost = judged.length - attainedOf(judged);
  course.setAttribute("aria-label", `Ended requests in steps of ${COURSE_S} seconds: ${judged.length - lost} attained, ${lost} missed`);
}

function rect(x, y, width, height, name) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  for (const [key, value] of Object.entries({ x, y, width, height, class: name })) node.setAttribute(key, value);
  return node;
}

function showQueue(pool) {
  const numRunning = new Set(pool.running.map((run) => run.id)).size;
  byId("waiting").textContent = Math.max(0, pool.open.size - numRunning);
  byId("running").textContent = `${numRunning} running on ${new Set(pool.running.flatMap((run) => run.ranks)).size} of ${plural(pool.ranks.length, "rank")}`;
}

function showMix(runs) {
  const steps = new Map();
  for (const run of runs) {
    if (run.num_steps && !run.failure) steps.set(run.ranks.length, (steps.get(run.ranks.length) ?? 0) + run.num_steps);
  }
  const degrees = [...steps.keys()].sort((a, b) => a - b);
  const all = degrees.reduce((sum, degree) => sum + steps.get(degree), 0);
  const colourOf = (degree) => BLUES[Math.min(BLUES.length - 1, Math.round(Math.log2(degree)))];
  byId("mix").replaceChildren(...degrees.map((degree) => {
    const part = element("span");
    Object.assign(part.style, { flexGrow: steps.get(degree), background: colourOf(degree) });
    return part;
  }));
  if (!degrees.length) return byId("mix-list").replaceChildren(element("li", { className: "muted" }, "none yet"));
  byId("mix-list").replaceChildren(...degrees.map((degree) => {
    const chip = element("span", { className: "chip" });
    chip.style.background = colourOf(degree);
    return element("li", {}, chip, `${plural(degree, "rank")} `, element("b", {}, `${Math.round((100 * steps.get(degree)) / all)} %`));
  }));
}

/** A row for each size; where several models are served also one for each of them, with its sizes below. */
function showSizes(pool, judged) {
  byId("sizes-title").textContent = pool.isShared ? "By model and size" : "By size";
  const rows = pool.models.flatMap((model) => {
    const ofModel = judged.filter((request) => pool.modelOf(request) === model);
    if (!ofModel.length) return [];
    return pool.isShared ? [sizeRow(model.key, ofModel, "model"), ...sizeRows(ofModel)] : sizeRows(ofModel);
  });
  if (rows.length) byId("sizes").replaceChildren(...rows);
}

function sizeRows(judged) {
  const sizes = Map.groupBy(judged, (request) => request.size);
  const pixels = (size) => partsOf(size).reduce((product, side) => product * side);
  return [...sizes.keys()].sort((a, b) => pixels(a) - pixels(b)).map((size) => sizeRow(size, sizes.get(size)));
}

function sizeRow(title, requests, className = "") {
  const finished = requests.filter((request) => request.status === "finished");
  const latencies = finished.map((request) => request.finish_s - request.arrival_s).sort((a, b) => a - b);
  const at = (level) => (latencies.length ? seconds(percentile(latencies, level)) : "–");
  const cells = [requests.length, percent(attainedOf(requests), requests.length), at(0.5), at(0.99)];
  return element("tr", { className }, element("th", { className: "word", scope: "row" }, title), ...cells.map((cell) => element("td", {}, `${cell}`)));
}
