// One picture that the user asked for: how far it is, what it looks like, whether it came in time.

import { Unreachable, errorOf, eventsOf, post } from "./api.js";
import { element, plural, seconds } from "./words.js";

const PREVIEWS = 2;
const PAUSE_MS = 250; // between two tasks that is not worth a word

export class Picture {
  constructor(body, quote) {
    this.body = body;
    this.image = element("img", { alt: `Picture of: ${body.prompt}`, hidden: true });
    this.bar = element("progress", { max: 1, value: 0 });
    this.bar.setAttribute("aria-label", "Progress");
    this.state = element("p", { className: "state" }, "sent");
    this.verdict = element("p", { className: "verdict", hidden: true });
    this.verdict.setAttribute("role", "status");
    this.card = element("li", { className: "picture" },
      element("p", { className: "prompt" }, body.prompt),
      this.facts = element("p", { className: "muted" }, body.size.replace("x", " × ")),
      this.verdict, this.bar, this.state, this.image);
    if (quote) this.facts.append(`. Quoted: ${quote}`);
    this.card.dataset.state = "running";
  }

  /** Ask for it, and show what becomes of it. */
  async draw() {
    try {
      const response = await post("v1/images/generations", { ...this.body, stream: true, partial_images: PREVIEWS });
      if (!response.ok) return this.#fail(await errorOf(response));
      for await (const { name, data } of eventsOf(response)) this.#take(name, data);
      if (this.card.dataset.state === "running") this.#fail("the connection was lost");
    } catch (error) {
      if (!(error instanceof Unreachable)) throw error;
      this.#fail("the server cannot be reached");
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
        return this.#judge(data.schedule, data.seed);
      case "error":
        return this.#fail(data.error.message);
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

  #judge(schedule, seed) {
    clearTimeout(this.pause);
    const spare = schedule.slo_ms / 1000 - schedule.latency_s;
    this.card.dataset.state = schedule.attained ? "attained" : "late";
    this.verdict.append(
      element("strong", {}, schedule.attained ? "In time" : "Late"),
      ` by ${seconds(Math.abs(spare))}: done in ${seconds(schedule.latency_s)}, due in ${seconds(schedule.slo_ms / 1000)}`,
    );
    this.verdict.hidden = false;
    this.bar.hidden = true;
    this.facts.textContent = `${this.body.size.replace("x", " × ")}, seed ${seed}`;
    this.state.replaceChildren(degreesOf(schedule), ` ${seconds(schedule.queued_s)} queued`);
  }

  #fail(message) {
    clearTimeout(this.pause);
    this.card.dataset.state = "failed";
    this.verdict.append(element("strong", {}, "No picture"), `: ${message}`);
    this.verdict.hidden = false;
    this.bar.hidden = this.state.hidden = true;
  }
}

/** The degrees of the denoise steps, in order: as wide as there are steps, as high as the degree. */
function degreesOf({ degrees }) {
  const most = Math.max(...degrees);
  const stretches = []; // [degree, steps]
  for (const degree of degrees) {
    if (stretches.at(-1)?.[0] === degree) stretches.at(-1)[1] += 1;
    else stretches.push([degree, 1]);
  }
  const words = stretches.map(([degree, steps]) => `${plural(steps, "step")} on ${plural(degree, "rank")}`).join(", ");
  const chart = element("span", { className: "degrees", title: words });
  chart.setAttribute("role", "img");
  chart.setAttribute("aria-label", words);
  chart.append(...stretches.map(([degree, steps]) => {
    const column = element("i");
    Object.assign(column.style, { height: `${(100 * degree) / most}%`, flexGrow: steps });
    return column;
  }));
  return chart;
}
