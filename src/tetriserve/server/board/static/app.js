// Puts the page together.

import { Ask } from "./ask.js";
import { Board } from "./board.js";
import { follow } from "./feed.js";
import { showNumbers } from "./numbers.js";
import { Pool } from "./pool.js";
import { Speaker, ahead, showTable, summaryOf } from "./table.js";
import { isVideo, offerOf, outputOf, plural } from "./words.js";

const WORDS_EVERY_MS = 500; // text changes no more often than it can be read

const byId = (id) => document.getElementById(id);
const pool = new Pool();
const board = new Board(byId("canvas"), pool);
new Ask(pool);
new Speaker(pool);

let isStale = false;
pool.addEventListener("change", () => (isStale = true));
pool.addEventListener("begin", () => {
  byId("model-label").textContent = pool.isShared ? "models" : "model";
  byId("model").textContent = pool.models.map(({ name }) => name).join(", ");
  byId("policy").textContent = pool.policy;
  byId("legend-video").hidden = !pool.makesVideos;
  byId("empty-hint").textContent = `Ask for ${offerOf(pool.models)}, and its tasks fall into place here.`;
  showWords();
});
setInterval(() => {
  if (isStale || pool.open.size) showWords();
}, WORDS_EVERY_MS);

function showWords() {
  isStale = false;
  byId("num-ranks").textContent = pool.ranks.length === pool.numRows ? pool.numRows : `${pool.ranks.length} of ${pool.numRows}`;
  byId("summary").textContent = summaryOf(pool);
  byId("empty").hidden = pool.open.size > 0 || pool.runs.length > 0;
  showNumbers(pool);
  if (byId("table").open) showTable(pool, board.selected, select);
  showTip();
}

byId("table").addEventListener("toggle", showWords);
byId("span").addEventListener("change", (event) => board.show(Number(event.target.value)));

// Which request is meant: by pointer, by arrow keys on the board, or from the table.

const tip = byId("tip");
let pointed = { run: null, at: null };

function select(id, run = null, at = null) {
  board.selected = id;
  pointed = { run, at };
  board.wake();
  showTip();
}

function showTip() {
  const { run, at } = pointed;
  const request = pool.requests.get(board.selected);
  tip.hidden = request === undefined;
  if (request === undefined) return;
  tip.replaceChildren(...describe(request, run).map((line) => Object.assign(document.createElement("p"), { textContent: line })));
  const width = byId("canvas").clientWidth;
  const x = at?.x ?? width / 2;
  tip.style.left = `${Math.min(Math.max(0, x + 14), width - tip.offsetWidth)}px`;
  tip.style.top = `${(at?.y ?? 8) + 14}px`;
}

function describe(request, run) {
  const state = { open: ahead(request.deadline_s - pool.now), finished: "done", failed: "failed", cancelled: "cancelled" }[request.status];
  const lines = [
    `${outputOf(request)}, ${request.steps_done} of ${plural(request.num_steps, "step")}`,
    request.status === "open" ? `deadline ${state}` : `${state}, ${request.attained ? "in time" : request.status === "finished" ? "late" : `no ${isVideo(request) ? "video" : "picture"}`}`,
    `request ${request.id.slice(0, 8)}${pool.isShared ? `, ${pool.modelOf(request).key}` : ""}`,
  ];
  const company = run?.lanes > 1 ? `, shared by ${run.lanes}` : "";
  if (run) lines.splice(1, 0, `${run.stage} on ${plural(run.ranks.length, "rank")} (${run.ranks.join(" ")})${company}`);
  return lines;
}

byId("canvas").addEventListener("pointermove", (event) => {
  const run = board.runAt(event.offsetX, event.offsetY);
  select(run?.id ?? null, run, { x: event.offsetX, y: event.offsetY });
});
byId("canvas").addEventListener("pointerleave", () => select(null));
byId("canvas").addEventListener("blur", () => select(null));
byId("canvas").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "Escape") select(null);
  if (step === undefined) return;
  event.preventDefault();
  const requests = board.inSight;
  const from = requests.findIndex((request) => request.id === board.selected);
  const to = requests.at(from < 0 ? (step > 0 ? 0 : -1) : (from + step) % requests.length);
  select(to?.id ?? null, null, to && board.placeOf(to));
  if (to) byId("said").textContent = describe(to, null).join(", ");
});

const connection = byId("connection");
follow(pool, (state, text) => {
  connection.dataset.state = state;
  if (connection.textContent !== text) connection.textContent = text;
});
if (document.activeElement === document.body) byId("prompt").focus({ preventScroll: true });
