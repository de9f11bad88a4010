// The prompt box: a quote while the user types, then a card for each picture or video.

import { errorOf, post } from "./api.js";
import { Picture } from "./picture.js";
import { offerOf, partsOf, plural, seconds } from "./words.js";
import { Video } from "./video.js";

const QUOTE_AFTER_MS = 350;
const QUOTE_EVERY_MS = 4000;
const MAX_CARDS = 12;

const byId = (id) => document.getElementById(id);

export class Ask {
  #timer = null;
  #asked = 0; // quotes so far: answers to earlier ones are dropped
  #quotedAt = 0; // requests that were open then
  #cards = []; // latest first

  constructor(pool) {
    this.pool = pool;
    this.form = byId("ask");
    this.form.addEventListener("input", (event) => this.#change(event.target));
    this.form.addEventListener("submit", (event) => this.#submit(event));
    this.form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    });
    pool.addEventListener("begin", () => this.#fill());
    this.form.addEventListener("focusin", () => this.#renew());
    setInterval(() => this.#renew(), QUOTE_EVERY_MS);
    for (const video of Video.ofThisTab(pool)) this.#follow(video);
  }

  /** The model that is asked. */
  get model() {
    return this.pool.models[Math.max(0, byId("of-model").selectedIndex)];
  }

  get isForVideo() {
    return this.model.makes === "video";
  }

  /** Offer the models that are served; what was chosen before stays chosen. */
  #fill() {
    const { models, isShared } = this.pool;
    offer(byId("of-model"), models.map(({ key, name }) => [key || name, key]));
    byId("model-field").hidden = !isShared;
    this.#fillModel();
  }

  /** Offer what the chosen model makes. Of a video's sizes only the sides: its length has fields of its own. */
  #fillModel() {
    const { sizes, num_steps, makes } = this.model;
    const sides = [...new Set(sizes.map((size) => partsOf(size).slice(0, 2).join("x")))];
    offer(byId("size"), sides.map((size) => [size.replace("x", " × "), size]));
    byId("steps").placeholder = num_steps;
    byId("length").hidden = makes !== "video";
    byId("ask-title").textContent = `Ask for ${offerOf([this.model])}`;
    byId("draw").textContent = makes === "video" ? "Make it" : "Draw it";
    this.#fillLength();
    this.#quoteSoon();
  }

  /** Say what the length is where it is not given: the model's own at this size. One of the two fields tells the other. */
  #fillLength() {
    if (!this.isForVideo) return;
    const { sizes, fps, frame_step: step } = this.model;
    const size = sizes.find((each) => each.startsWith(`${byId("size").value}x`)) ?? sizes[0];
    const [, , own] = partsOf(size);
    const asked = { seconds: Number(byId("seconds").value), frames: Number(byId("frames").value) };
    const nearest = (number) => 1 + step * Math.round((number - 1) / step); // which the model makes
    byId("frames").placeholder = asked.seconds ? nearest(Math.max(1, Math.round(asked.seconds * fps))) : own;
    byId("seconds").placeholder = ((asked.frames ? nearest(asked.frames) : own) / fps).toFixed(2);
  }

  #change(field) {
    if (field.id === "of-model") return this.#fillModel();
    if (field.id === "seconds") byId("frames").value = "";
    if (field.id === "frames") byId("seconds").value = "";
    this.#fillLength();
    this.#quoteSoon();
  }

  get #body() {
    const number = (id) => (byId(id).value === "" ? undefined : Number(byId(id).value));
    const deadlineS = number("deadline");
    return {
      ...(this.pool.isShared ? { model: this.model.name } : {}),
      prompt: byId("prompt").value.trim(),
      size: byId("size").value,
      ...(this.isForVideo ? { seconds: number("seconds"), num_frames: number("frames") } : {}),
      slo_ms: deadlineS && deadlineS * 1000,
      num_inference_steps: number("steps"),
      seed: number("seed"),
    };
  }

  /** A quote holds for as long as nobody comes or goes. It is renewed while the user is at it, else taken back. */
  #renew() {
    if (this.pool.open.size === this.#quotedAt) return;
    if (this.form.contains(document.activeElement) && document.visibilityState === "visible") this.#quoteSoon();
    else this.#show("none", "");
  }

  #quoteSoon() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#quote(), QUOTE_AFTER_MS);
  }

  async #quote() {
    if (!this.pool.isLive || !this.form.checkValidity()) return;
    const number = ++this.#asked;
    const response = await post("v1/quotes", this.#body).catch(() => null);
    if (response === null || number !== this.#asked) return;
    this.#quotedAt = this.pool.open.size;
    if (response.ok) this.#showQuote(await response.json());
    else this.#show("none", await errorOf(response));
  }

  #showQuote({ feasible, slo_ms, predicted_finish_ms, earliest_deadline_ms, queue_position }) {
    const [finish, deadline] = [predicted_finish_ms / 1000, slo_ms / 1000];
    const ahead = queue_position ? ` ${queue_position} ahead in the queue.` : "";
    const promise = earliest_deadline_ms === null ? "" : ` Could be promised: ${seconds(earliest_deadline_ms / 1000)}.`;
    if (feasible) {
      this.#show("feasible", `In time: done in ${seconds(finish)}, ${seconds(deadline - finish)} before its deadline.${ahead}`);
    } else if (predicted_finish_ms === null) {
      this.#show("late", `Late: no end in sight.${promise}${ahead}`);
    } else if (finish > deadline) {
      this.#show("late", `Late: done in ${seconds(finish)}, ${seconds(finish - deadline)} after its deadline.${promise}${ahead}`);
    } else {
      this.#show("late", `In time only if others are late.${promise}${ahead}`);
    }
  }

  #show(state, text) {
    const quote = byId("quote");
    quote.dataset.state = state;
    if (quote.textContent !== text) quote.textContent = text;
  }

  #submit(event) {
    event.preventDefault();
    if (!this.pool.isLive) return;
    const quote = byId("quote").dataset.state === "none" ? "" : byId("quote").textContent;
    this.#follow(this.isForVideo ? new Video(this.#body, quote, this.pool) : new Picture(this.#body, quote));
  }

  /** Show what becomes of a picture or a video, above those before it. Those that are over make room. */
  #follow(card) {
    byId("pictures").prepend(card.node);
    this.#cards.unshift(card);
    if (this.#cards.length > MAX_CARDS) {
      const last = this.#cards.findLast(({ isOver }) => isOver) ?? this.#cards.at(-1);
      this.#cards.splice(this.#cards.indexOf(last), 1);
      last.leave();
    }
    card.draw().then(() => this.#quoteSoon());
  }
}

/** Have `select` offer these [text, value]; what is chosen stays so if it is still offered. */
function offer(select, choices) {
  const chosen = select.value;
  select.replaceChildren(...choices.map(([text, value]) => new Option(text, value)));
  if (choices.some(([, value]) => value === chosen)) select.value = chosen;
}
