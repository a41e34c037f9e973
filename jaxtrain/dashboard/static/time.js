// Where a run's time went: of all its starts, and of each.

import { empty, h, table, when } from "./dom.js";

const { duration, format } = jaxtrainCharts;
const SLOTS = { training: 2, step: 2, "done again": 1, down: 6, start: 7, compile: 4, input: 3, checkpoint: 0, evaluation: 5, profile: 3, other: 6 };
const NAMES = { step: "steps", input: "waiting for data", start: "start-up", training: "training that counts", "done again": "steps done again", down: "down between starts" };
const ORDER = Object.keys(SLOTS);

const named = (key) => NAMES[key] ?? key;
const sorted = (seconds) => Object.entries(seconds).filter(([, value]) => value > 0).sort(([a], [b]) => ORDER.indexOf(a) - ORDER.indexOf(b));
const total = (seconds) => Object.values(seconds).reduce((sum, value) => sum + value, 0);

/** A bar of `seconds` by category, as wide as its share of `longest`. */
function bar(seconds, longest) {
  const whole = total(seconds);
  const parts = sorted(seconds).map(([key, value]) => {
    const part = h("span", { class: `part fill-${SLOTS[key] ?? 6}${key === "done again" || key === "down" ? " hatched" : ""}`, title: `${named(key)}: ${duration(value)}, ${format(value / whole, "share", 3)}` });
    part.style.flexGrow = value;
    return part;
  });
  const text = sorted(seconds).map(([key, value]) => `${named(key)} ${duration(value)}`).join(", ");
  const element = h("span", { class: "stack", role: "img", "aria-label": text }, parts);
  element.style.width = `${(100 * whole) / longest}%`;
  return element;
}

function legend(seconds) {
  const whole = total(seconds);
  return h("ul", { class: "legend" }, sorted(seconds).map(([key, value]) => h("li", {}, h("span", { class: `dot fill-${SLOTS[key] ?? 6}${key === "done again" || key === "down" ? " hatched" : ""}` }), named(key), " ", h("b", {}, duration(value)), h("span", { class: "muted" }, ` ${format(value / whole, "share", 3)}`))));
}

export class TimeTab {
  constructor(parent, view) {
    Object.assign(this, { parent, view });
    this.update();
  }

  update() {
    const { starts, goodput } = this.view.info;
    if (!starts.length) {
      this.parent.replaceChildren(empty("No start of this run is recorded yet.", "Its file in `starts/` is written two seconds after it began."));
      return;
    }
    const categories = ORDER.filter((key) => starts.some(({ seconds }) => seconds[key] > 0));
    const longest = Math.max(...starts.map(({ seconds }) => total(seconds)));
    const rows = starts.map(({ number, began, seconds, first_step: first, step, lost_steps: lost, end, host }) => [
      String(number), when(began), host || "–", `${first.toLocaleString("en")} – ${step.toLocaleString("en")}${lost ? `, ${lost} lost` : ""}`,
      ...categories.map((key) => (seconds[key] ? duration(seconds[key]) : "–")), duration(total(seconds)), end ? end.message : "it runs, or nobody has said how it ended",
    ]);
    this.parent.replaceChildren(
      ...(goodput ? [this.#whole(goodput)] : []),
      h(
        "section",
        { class: "card" },
        h("h2", {}, starts.length === 1 ? "Its one start" : `Its ${starts.length} starts`),
        h("div", { class: "stacks" }, starts.slice(-50).map(({ number, seconds }) => [h("span", { class: "muted" }, `start ${number}`), bar(seconds, longest)])),
        table("Time of each start", ["Start", "Began", "Host", "Steps", ...categories.map(named), "Wall time", "How it ended"], rows, `    ${"n".repeat(categories.length + 1)}`),
      ),
    );
  }

  #whole({ goodput, wall_seconds: wall, seconds, steps, lost_steps: lost, gpu_hours: hours, cost }) {
    const facts = [`${duration(wall)} from first to last`, `${steps.toLocaleString("en")} steps that count`, lost ? `${lost.toLocaleString("en")} steps done again` : "", hours ? `${format(hours)} GPU hours` : "", cost ? `cost ${format(cost)}` : ""];
    return h(
      "section",
      { class: "card" },
      h("h2", {}, "Goodput"),
      h("p", { class: "headline" }, h("b", {}, format(goodput, "share", 3)), " of the wall time went into steps that count."),
      h("p", { class: "muted" }, facts.filter(Boolean).join(" · ")),
      bar(seconds, total(seconds)),
      legend(seconds),
    );
  }
}
