// One picture that the user asked for: how far it is, what it looks like, whether it came in time.

import { Unreachable, errorOf, eventsOf, post } from "./api.js";
import { Card } from "./card.js";
import { element, plural, seconds } from "./words.js";

const PREVIEWS = 2;
const PAUSE_MS = 250; // between two tasks that is not worth a word

export class Picture extends Card {
  constructor(body, quote) {
    super("picture", body, body.size.replace("x", " × "), quote);
    this.image = element("img", { alt: `Picture of: ${body.prompt}`, hidden: true });
    this.node.append(this.image);
  }

  /** Ask for it, and show what becomes of it. */
  async draw() {
    try {
      const response = await post("v1/images/generations", { ...this.body, stream: true, partial_images: PREVIEWS });
      if (!response.ok) return this.fail(await errorOf(response));
      for await (const { name, data } of eventsOf(response)) this.#take(name, data);
      if (!this.isOver) this.fail("the connection was lost");
    } catch (error) {
      if (!(error instanceof Unreachable)) throw error;
      this.fail("the server cannot be reached");
    }
  }

  #take(name, data) {
    switch (name) {
      case "image_generation.progress":
        return this.#progress(data);
      case "image_generation.partial_image":
        return this.#show(data, true);
      case "image_generation.completed":
        this.#show(data, false);
        return this.judge(data.schedule, `${this.body.size.replace("x", " × ")}, seed ${data.seed}`);
      case "error":
        return this.fail(data.error.message);
    }
  }

  #progress({ stage, step, num_steps, degree, predicted_finish_ms }) {
    this.bar.value = step / num_steps;
    clearTimeout(this.pause);
    if (predicted_finish_ms !== null) this.doneAt = performance.now() + predicted_finish_ms;
    const left = this.doneAt - performance.now();
    const where = stage === "denoise" ? `step ${step} of ${num_steps}` : stage;
    const who = degree ? `on ${plural(degree, "rank")}` : "waiting";
    const say = () => (this.state.textContent = `${where}, ${who}${left > 0 ? `, done in ${seconds(left / 1000)}` : ""}`);
    if (degree) say();
    else this.pause = setTimeout(say, PAUSE_MS);
  }

  #show({ b64_json, output_format }, isPreview) {
    this.image.src = `data:image/${output_format ?? "png"};base64,${b64_json}`;
    this.image.hidden = false;
    this.image.classList.toggle("preview", isPreview);
  }

  end(...what) {
    clearTimeout(this.pause);
    super.end(...what);
  }
}
