// What the page knows of the pool: the server's snapshot, and every change since. Times are the engine's seconds.

const BLOCKS_S = 125; // blocks are kept this long: what the widest view shows, and a little more
const ENDED_S = 300; // ended requests are, for the numbers
const NUM_HUES = 10;
const STAY_GAP_S = 0.1;

export class Pool extends EventTarget {
  models = []; // {key, name, makes: "image" or "video", sizes, num_steps}, and of one that makes videos fps, frame_step
  policy = "";
  status = null; // why a request sent now would not be served
  ranks = []; // that live
  numRows = 0;
  requests = new Map(); // by id: open ones, and ended ones while they are shown or counted
  open = new Map(); // the open ones of them
  running = [];
  runs = []; // that ended, oldest first
  stays = []; // of a request on the same ranks, oldest first
  ended = []; // requests, oldest first
  plan = { runs: [], finishes: new Map() };
  #offset = null; // engine time minus this page's
  #hue = 0;

  get now() {
    return this.#offset === null ? 0 : performance.now() / 1000 + this.#offset;
  }

  /** Whether a snapshot has come. */
  get isLive() {
    return this.models.length > 0;
  }

  /** Whether requests are for different models. */
  get isShared() {
    return this.models.length > 1;
  }

  /** The model that a request, or its block, is for. */
  modelOf({ model = "" }) {
    return this.models.find(({ key }) => key === model) ?? this.models[0];
  }

  get makesVideos() {
    return this.models.some(({ makes }) => makes === "video");
  }

  /** Take in the whole state. Requests that were known before keep their colours. */
  begin(snapshot) {
    const known = this.requests;
    this.models = snapshot.models;
    this.policy = snapshot.policy;
    this.requests = new Map();
    this.open = new Map();
    this.runs = [];
    this.stays = [];
    this.ended = [];
    this.numRows = 0;
    this.#offset = null;
    this.plan = { runs: [], finishes: new Map() };
    const rows = [...snapshot.ended.map((row) => ({ ...row })), ...snapshot.requests.map((row) => ({ ...row, status: "open" }))];
    for (const row of rows.sort((a, b) => a.arrival_s - b.arrival_s)) this.#meet(row, known.get(row.id));
    for (const row of snapshot.ended) this.#end(row);
    const stepsDone = new Map(snapshot.requests.map((row) => [row.id, row.steps_done]));
    this.#take({ ...snapshot, arrived: [], ended: [] });
    for (const [id, steps] of stepsDone) this.requests.get(id).steps_done = steps;
    this.noteLate();
    this.dispatchEvent(new Event("begin"));
    this.dispatchEvent(new Event("change"));
  }

  /** Take in what changed since. */
  update(changes) {
    this.#take(changes);
    this.dispatchEvent(new Event("change"));
  }

  /** Mark open requests whose deadline has passed since the last look. */
  noteLate() {
    const now = this.now;
    for (const request of this.open.values()) if (now > request.deadline_s) this.#markLate(request);
  }

  #markLate(request) {
    if (request.isLate) return;
    request.isLate = true;
    this.dispatchEvent(new CustomEvent("late", { detail: request }));
  }

  /** Whether the request has missed its deadline, or will if all goes as planned. */
  isDoomed(request) {
    return request.isLate || (request.status === "open" && this.plan.finishes.get(request.id) > request.deadline_s);
  }

  #take({ now_s, status, ranks, running, arrived = [], ran = [], ended = [], plan }) {
    // Messages are late by an unknown time; the quickest one tells the clocks' difference best.
    this.#offset = Math.max(this.#offset ?? -Infinity, now_s - performance.now() / 1000);
    this.status = status;
    this.ranks = ranks;
    this.numRows = Math.max(this.numRows, ...ranks.map((rank) => rank + 1));
    for (const row of arrived) this.#meet({ ...row, status: "open" });
    for (const row of ran) this.#keepRun(row);
    for (const row of ended) this.#end(row);
    this.running = this.#knownOf(running);
    if (plan) this.plan = { runs: this.#knownOf(plan.runs), finishes: new Map(Object.entries(plan.finishes)) };
    this.#forget();
  }

  #meet(row, before) {
    const hue = before?.hue ?? this.#hue++ % NUM_HUES;
    const request = { steps_done: 0, isLate: false, runs: [], ...row, hue };
    this.requests.set(row.id, request);
    if (request.status === "open") this.open.set(row.id, request);
  }

  #knownOf(runs) {
    return runs.filter((run) => this.requests.has(run.id)).map((run) => this.#known(run));
  }

  #known(run) {
    return { ...run, request: this.requests.get(run.id), parts: stretches(run.ranks) };
  }

  #keepRun(row) {
    const request = this.requests.get(row.id);
    if (request === undefined) return;
    const run = this.#known(row);
    this.numRows = Math.max(this.numRows, ...row.ranks.map((rank) => rank + 1));
    if (!row.failure) request.steps_done += row.num_steps;
    const stay = request.stay;
    const ranks = [...row.ranks].sort((a, b) => a - b).join();
    if (stay && stay.key === ranks && row.start_s - stay.end_s < STAY_GAP_S) {
      stay.end_s = run.end_s;
    } else {
      request.stay = { request, key: ranks, parts: run.parts, start_s: run.start_s, end_s: run.end_s };
      this.stays.push(request.stay);
    }
    request.runs.push(run);
    this.runs.push(run);
    this.dispatchEvent(new CustomEvent("run", { detail: run }));
  }

  #end(row) {
    const request = this.requests.get(row.id);
    if (request === undefined) return;
    Object.assign(request, row);
    this.open.delete(row.id);
    this.ended.push(request);
    if (isMissed(request)) this.#markLate(request);
  }

  #forget() {
    const since = this.now - BLOCKS_S;
    dropWhile(this.runs, (run) => run.end_s < since);
    dropWhile(this.stays, (stay) => stay.end_s < since);
    dropWhile(this.ended, (request) => request.finish_s < this.now - ENDED_S, (request) => this.requests.delete(request.id));
  }
}

export function isMissed(request) {
  return request.status === "failed" || (request.status === "finished" && !request.attained);
}

/** Remove from the front of `list` what satisfies `isOver`. */
function dropWhile(list, isOver, onDrop = () => {}) {
  let count = 0;
  while (count < list.length && isOver(list[count])) onDrop(list[count++]);
  if (count) list.splice(0, count);
}

/** Runs of adjacent ranks as [first, how many]. */
export function stretches(ranks) {
  const parts = [];
  for (const rank of [...ranks].sort((a, b) => a - b)) {
    const last = parts.at(-1);
    if (last && last[0] + last[1] === rank) last[1] += 1;
    else parts.push([rank, 1]);
  }
  return parts;
}
