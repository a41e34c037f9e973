// The small loss curves of the overview.

import { get, runPath } from "./api.js";
import { svg } from "./dom.js";

const { format } = jaxtrainCharts;
const POINTS = 60;
const SECONDS = 15; // a live run's curve is read again after that
const AT_ONCE = 4;

/** The small curves of the rows that can be seen; a few are asked for at a time. */
export class Sparks {
  #cells = new WeakMap(); // cell -> row
  #drawn = new Map(); // id -> {at, step, values}
  #queue = [];
  #busy = 0;
  #observer = new IntersectionObserver((entries) =>
    entries.forEach((entry) => entry.isIntersecting && this.#want(entry.target)),
  );

  watch(cell, row, before) {
    this.#cells.set(cell, row);
    if (before) cell.append(before);
    this.#observer.observe(cell);
  }

  close() {
    this.#observer.disconnect();
    this.#queue = [];
  }

  #want(cell) {
    const row = this.#cells.get(cell);
    const drawn = this.#drawn.get(row.id);
    this.#observer.unobserve(cell);
    if (drawn) sparkline(cell, drawn.values);
    if (drawn && (drawn.step === row.step || Date.now() - drawn.at < SECONDS * 1000)) return;
    this.#queue.push(cell);
    this.#next();
  }

  async #next() {
    if (this.#busy >= AT_ONCE || !this.#queue.length) return;
    const cell = this.#queue.shift();
    const row = this.#cells.get(cell);
    this.#busy++;
    try {
      const { series } = await get(`${runPath(row.id)}/series`, { columns: "train/loss", points: POINTS });
      const values = (series["train/loss"]?.y ?? []).filter((y) => y !== null);
      this.#drawn.set(row.id, { at: Date.now(), step: row.step, values });
      sparkline(cell, values);
    } catch {
      // the run is gone, or the server: the page says so elsewhere
    }
    this.#busy--;
    this.#next();
  }
}

function sparkline(cell, values) {
  if (values.length < 2) return;
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const points = values.map(
    (y, i) =>
      `${((i / (values.length - 1)) * 98 + 1).toFixed(1)},${(25 - ((y - low) / (high - low || 1)) * 22).toFixed(1)}`,
  );
  cell.replaceChildren(
    svg(
      "svg",
      {
        class: "spark",
        viewBox: "0 0 100 28",
        preserveAspectRatio: "none",
        role: "img",
        "aria-label": `Loss from ${format(values[0])} to ${format(values.at(-1))}`,
      },
      svg("polyline", { points: points.join(" ") }),
    ),
  );
}
