// One video that the user asked for: a job of the server's that is asked about until it is done, and then a player.

import { Unreachable, call, errorOf, post } from "./api.js";
import { Card } from "./card.js";
import { element, outputOf, plural, seconds } from "./words.js";

const POLL_MS = 1000; // where the server does not say when to ask again
const RETRY_MS = 3000; // after it could not be reached
const JOBS = "tetriserve-videos";
const STAGES = { encode: "encoding the prompt", encode_image: "encoding the picture", decode: "encoding the video" };

export class Video extends Card {
  #urls = []; // of blobs, to be given back
  #listening = new AbortController();
  #wake = () => {};
  #hasEnded = false; // as the pool tells
  #isLeaving = false; // it is being cancelled

  constructor(body, quote, pool, id = null) {
    super("video", body, body.size.replace("x", " × "), quote);
    this.pool = pool;
    this.id = id;
    this.verdict.tabIndex = -1; // takes the focus from a button that goes
    this.cancel = element("button", { className: "quiet", type: "button", disabled: true, onclick: () => this.#delete() }, "Cancel");
    this.notes = element("p", { className: "muted", hidden: true });
    this.actions = element("p", { className: "actions" }, this.cancel);
    this.node.append(this.notes, this.actions);
    pool.addEventListener("change", () => this.#showProgress(), { signal: this.#listening.signal });
  }

  /** Those that were asked for in this tab before the page was loaded again, the first of them first. */
  static ofThisTab(pool) {
    return jobs().map(({ id, body }) => new Video(body, "", pool, id));
  }

  /** Ask for it, unless that was done before, and show what becomes of it. */
  async draw() {
    const isKnown = this.id !== null;
    try {
      const response = isKnown ? await this.#ask() : await post("v1/videos", this.body);
      if (!response.ok && isKnown) return this.leave(); // it has expired, or was deleted
      if (!response.ok) return this.fail(await errorOf(response));
      await this.#follow(response);
    } catch (error) {
      if (!(error instanceof Unreachable)) throw error;
      this.fail("the server cannot be reached");
    }
  }

  /** From the server's first answer to its last. */
  async #follow(response) {
    for (;;) {
      if (!response.ok) return this.isOver || this.fail(await errorOf(response));
      const job = await response.json();
      if (this.isOver) return;
      this.#take(job);
      if (job.status === "failed") return this.fail(job.error?.message ?? "it failed");
      if (job.status === "completed") return this.#finish(job);
      await this.#pause(Number(response.headers.get("openai-poll-after-ms")) || POLL_MS);
      if (this.isOver) return;
      response = await this.#ask();
    }
  }

  /** The job's present state, or that there is none. A server that is away may come back, and go on with it. */
  async #ask() {
    for (;;) {
      try {
        const response = await call(`v1/videos/${this.id}`);
        if (response.status < 500 && response.status !== 429) return response;
        this.#say(await errorOf(response));
      } catch (error) {
        if (!(error instanceof Unreachable)) throw error;
        this.#say("the server is not there; trying again");
      }
      await this.#pause(RETRY_MS);
    }
  }

  /** Wait so long, or until the pool tells that it has ended. */
  #pause(ms) {
    return new Promise((resolve) => {
      this.#wake = resolve;
      setTimeout(resolve, ms);
    });
  }

  #take(job) {
    this.job = job;
    if (this.id === null) {
      this.id = job.id;
      keepJobs([...jobs(), { id: this.id, body: this.body }]);
    }
    this.cancel.disabled = false;
    this.facts.firstChild.textContent = `${outputOf({ size: `${job.size}x${job.num_frames}`, fps: job.fps })}, seed ${job.seed}`;
    this.notes.textContent = (job.warnings ?? []).join(" ");
    this.notes.hidden = !this.notes.textContent;
    this.#showProgress();
  }

  /** In steps as the pool tells of them; before it does, as the job says. */
  #showProgress() {
    if (!this.job || this.isOver) return;
    const id = this.id.replace(/^video_/, ""); // of its request
    const request = this.pool.requests.get(id);
    if (request === undefined) {
      this.bar.value = this.job.progress / 100;
      return this.#say(this.job.status === "queued" ? "queued" : `${this.job.progress} %`);
    }
    if (request.status !== "open") {
      if (!this.#hasEnded) this.#wake(); // not again: its file may not be there yet
      this.#hasEnded = true;
      return this.#say("finishing");
    }
    this.bar.value = request.steps_done / request.num_steps;
    const run = this.pool.running.find((each) => each.id === id);
    const end_s = this.pool.plan.finishes.get(id);
    const done = end_s > this.pool.now ? `, done in ${seconds(end_s - this.pool.now)}` : "";
    const steps = `step ${request.steps_done} of ${request.num_steps}`;
    if (run) this.#say(`${STAGES[run.stage] ?? steps}, on ${plural(run.ranks.length, "rank")}${done}`);
    else this.#say(`${this.job.status === "queued" && !request.runs.length ? "queued" : `${steps}, waiting`}${done}`);
  }

  #say(text) {
    if (this.state.textContent !== text) this.state.textContent = text;
  }

  /** Fetched with the user's key, which a player could not send. */
  async #finish(job) {
    const [poster, source] = await Promise.all([this.#blob("thumbnail"), this.#blob("video")]);
    if (this.isOver) return;
    if (source === null) return this.fail("it was made, and cannot be fetched any more");
    const label = `Video of: ${this.body.prompt}`;
    const player = element("video", { controls: true, loop: true, muted: true, playsInline: true, poster, preload: "metadata", src: source });
    player.setAttribute("aria-label", label);
    player.addEventListener("error", () => {
      player.replaceWith(element("img", { src: poster, alt: `First frame of the video of: ${this.body.prompt}` }));
      this.notes.textContent = "This browser cannot play H.264. The file can be downloaded.";
      this.notes.hidden = false;
    });
    this.actions.before(player);
    this.actions.append(element("a", { href: source, download: `${this.id}.mp4` }, "Download MP4"));
    this.judge(job.schedule, this.facts.firstChild.textContent);
  }

  async #blob(variant) {
    const response = await call(`v1/videos/${this.id}/content?variant=${variant}`);
    if (!response.ok) return null;
    this.#urls.push(URL.createObjectURL(await response.blob()));
    return this.#urls.at(-1);
  }

  /** The button stays as it is meanwhile, so that it keeps the focus. */
  async #delete() {
    if (this.#isLeaving) return;
    this.#isLeaving = true;
    try {
      const response = await call(`v1/videos/${this.id}`, { method: "DELETE" });
      if (!response.ok) return this.#say(await errorOf(response));
      this.state.hidden = true;
      this.end("cancelled", "Cancelled", "");
    } catch (error) {
      if (!(error instanceof Unreachable)) throw error;
      this.#say("the server cannot be reached");
    } finally {
      this.#isLeaving = false;
    }
  }

  end(state, ...what) {
    const hasFocus = document.activeElement === this.cancel;
    super.end(state, ...what);
    this.cancel.hidden = true;
    if (hasFocus) (this.actions.querySelector("a") ?? this.verdict).focus();
    this.#listening.abort();
    if (state === "failed" || state === "cancelled") this.#forget();
    this.#wake();
  }

  leave() {
    super.leave();
    this.#listening.abort();
    for (const url of this.#urls) URL.revokeObjectURL(url);
    this.#forget();
    this.#wake();
  }

  #forget() {
    keepJobs(jobs().filter(({ id }) => id !== this.id));
  }
}

/** What this tab has asked for, as {id, body}: a video may take longer than the page is open. */
function jobs() {
  return JSON.parse(sessionStorage.getItem(JOBS) ?? "[]");
}

function keepJobs(list) {
  sessionStorage.setItem(JOBS, JSON.stringify(list));
}
