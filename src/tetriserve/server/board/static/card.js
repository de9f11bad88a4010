// What a picture and a video have in common: a card that says how far it is, and then whether it came in time.

import { element, plural, seconds } from "./words.js";

export class Card {
  isOver = false; // nothing more becomes of it

  /** `noun`: what is made. `facts`: what was asked for beside the prompt. `quote`: what was said of it before. */
  constructor(noun, body, facts, quote) {
    this.noun = noun;
    this.body = body;
    this.bar = element("progress", { max: 1, value: 0 });
    this.bar.setAttribute("aria-label", "Progress");
    this.state = element("p", { className: "state" }, "sent");
    this.verdict = element("p", { className: "verdict", hidden: true });
    this.verdict.setAttribute("role", "status");
    this.facts = element("p", { className: "muted" }, facts);
    if (quote) this.facts.append(`. Quoted: ${quote}`);
    this.node = element("li", { className: "picture" },
      element("p", { className: "prompt" }, body.prompt), this.facts, this.verdict, this.bar, this.state);
    this.node.dataset.state = "running";
  }

  /** It is there: by its deadline, or not. */
  judge(schedule, facts) {
    const spare = schedule.slo_ms / 1000 - schedule.latency_s;
    this.facts.textContent = facts;
    this.state.replaceChildren(degreesOf(schedule), ` ${seconds(schedule.queued_s)} queued`);
    this.end(schedule.attained ? "attained" : "late", schedule.attained ? "In time" : "Late",
      ` by ${seconds(Math.abs(spare))}: done in ${seconds(schedule.latency_s)}, due in ${seconds(schedule.slo_ms / 1000)}`);
  }

  /** There will be none. */
  fail(message) {
    this.state.hidden = true;
    this.end("failed", `No ${this.noun}`, `: ${message}`);
  }

  end(state, title, text) {
    this.isOver = true;
    this.node.dataset.state = state;
    this.verdict.replaceChildren(element("strong", {}, title), text);
    this.verdict.hidden = false;
    this.bar.hidden = true;
  }

  /** Take it off the page. */
  leave() {
    this.isOver = true;
    this.node.remove();
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
