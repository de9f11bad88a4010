// The prompt box: a quote while the user types, then a card per picture.

import { errorOf, post } from "./api.js";
import { Picture } from "./picture.js";
import { seconds } from "./words.js";

const QUOTE_AFTER_MS = 350;
const QUOTE_EVERY_MS = 4000;

const byId = (id) => document.getElementById(id);

export class Ask {
  #timer = null;
  #asked = 0; // quotes so far: answers to earlier ones are dropped
  #quotedAt = 0; // requests that were open then

  constructor(pool) {
    this.pool = pool;
    this.form = byId("ask");
    this.form.addEventListener("input", () => this.#quoteSoon());
    this.form.addEventListener("submit", (event) => this.#submit(event));
    this.form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    });
    pool.addEventListener("begin", () => this.#fill());
    byId("of-model").addEventListener("change", () => this.#fill());
    this.form.addEventListener("focusin", () => this.#renew());
    setInterval(() => this.#renew(), QUOTE_EVERY_MS);
  }

  #fill() {
    const models = this.pool.model.models.filter((model) => !model.makes_videos);
    renew(byId("of-model"), models.map(({ name }) => new Option(name, name)));
    byId("models").hidden = models.length < 2;
    const { sizes, num_steps } = models.find(({ name }) => name === byId("of-model").value) ?? this.pool.model;
    renew(byId("size"), sizes.map((size) => new Option(size.replace("x", " × "), size)));
    byId("steps").placeholder = num_steps;
    this.#quoteSoon();
  }

  get #body() {
    const number = (id) => (byId(id).value === "" ? undefined : Number(byId(id).value));
    const deadlineS = number("deadline");
    return {
      prompt: byId("prompt").value.trim(),
      model: byId("of-model").value || undefined,
      size: byId("size").value,
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
    if (!this.form.checkValidity()) return;
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
    const picture = new Picture(this.#body, byId("quote").dataset.state === "none" ? "" : byId("quote").textContent);
    byId("pictures").prepend(picture.card);
    while (byId("pictures").children.length > 12) byId("pictures").lastChild.remove();
    picture.draw().then(() => this.#quoteSoon());
  }
}

/** Give a select other options, if they are others; what was chosen stays, unless it is gone. */
function renew(select, options) {
  if (options.map(({ value }) => value).join() !== [...select.options].map(({ value }) => value).join()) {
    const chosen = select.value;
    select.replaceChildren(...options);
    if (options.some(({ value }) => value === chosen)) select.value = chosen;
  }
}
