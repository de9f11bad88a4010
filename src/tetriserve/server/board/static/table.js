// The board in words: a table of the open requests, a sentence for the eye, and one now and then for the ear.

import { HUES } from "./paint.js";
import { attainedOf } from "./numbers.js";
import { element, outputOf, percent, plural, seconds } from "./words.js";

const MAX_ROWS = 50;
const SAY_EVERY_MS = 10_000;

const byId = (id) => document.getElementById(id);

/** What the pool does, in a sentence. */
export function summaryOf(pool) {
  const busy = new Set(pool.running.flatMap((run) => run.ranks)).size;
  const late = [...pool.open.values()].filter((request) => request.isLate).length;
  const running = new Set(pool.running.map((run) => run.id)).size;
  const parts = [`${busy} of ${plural(pool.ranks.length, "rank")} busy`, `${running} running`, `${Math.max(0, pool.open.size - running)} waiting`];
  if (late) parts.push(`${late} late`);
  return parts.join(", ");
}

/** Says what changed to screen readers, not more often than can be listened to. */
export class Speaker {
  #last = "";

  constructor(pool) {
    setInterval(() => {
      if (!pool.isLive) return;
      const judged = pool.ended.filter((request) => request.status !== "cancelled");
      const onTime = judged.length ? `; ${percent(attainedOf(judged), judged.length)} on time in the last 5 minutes` : "";
      const text = `${summaryOf(pool)}${onTime}.`;
      if (text !== this.#last) byId("said").textContent = this.#last = text;
    }, SAY_EVERY_MS);
  }
}

export function showTable(pool, selected, onSelect) {
  byId("rows-model").hidden = !pool.isShared;
  const running = new Map(pool.running.map((run) => [run.id, run]));
  const requests = [...pool.open.values()].sort((a, b) => a.deadline_s - b.deadline_s);
  const rows = requests.slice(0, MAX_ROWS).map((request) => rowOf(request, running.get(request.id), pool, selected, onSelect));
  const focused = document.activeElement.dataset.request;
  byId("rows").replaceChildren(...rows);
  if (focused) byId("rows").querySelector(`[data-request="${CSS.escape(focused)}"]`)?.focus();
  const left = requests.length - rows.length;
  byId("rows-more").textContent = requests.length ? (left > 0 ? `and ${left} more, due later` : "") : "No request is open.";
}

function rowOf(request, run, pool, selected, onSelect) {
  const chip = element("span", { className: "chip" });
  chip.style.background = HUES[request.hue];
  const name = element("button", { className: "link", type: "button", onclick: () => onSelect(request.id) }, request.id.slice(0, 8));
  name.setAttribute("aria-pressed", String(request.id === selected));
  name.dataset.request = request.id;
  const expected = pool.plan.finishes.get(request.id);
  const cells = [
    ...(pool.isShared ? [[pool.modelOf(request).key, "word"]] : []),
    [outputOf(request), "word"],
    [`${run ? run.stage : "waiting"}${pool.isDoomed(request) ? ", late" : ""}`, "word"],
    [`${request.steps_done}/${request.num_steps}`, ""],
    [run ? run.ranks.join(" ") : "–", "word"],
    [expected === undefined ? "–" : ahead(expected - pool.now), ""],
    [ahead(request.deadline_s - pool.now), ""],
  ];
  return element("tr", {}, element("th", { className: "word", scope: "row" }, chip, name), ...cells.map(([text, className]) => element("td", { className }, text)));
}

export function ahead(time_s) {
  return time_s >= 0 ? `in ${seconds(time_s)}` : `${seconds(-time_s)} ago`;
}
