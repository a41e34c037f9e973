// The curves of a run: a grid of plots that share x, zoom and cursor, with what happened drawn on them.

import { choice, empty, h, notice, slider, throttled, toggle } from "./dom.js";
import { addPlot, X_CHOICES, xAxis } from "./grid.js";
import { change, read } from "./link.js";
import { Series } from "./series.js";

const LOGARITHMIC = new Set([
  "loss",
  "grad_norm",
  "update_norm",
  "param_norm",
  "learning_rate",
  "throughput",
  "data_wait",
]);
const SHOWN_AGAIN_MS = 1000; // while the server still searches a huge file

export class Curves {
  #charts = new Map(); // key of a plot -> chart
  #series = null;
  #detail = null;
  #range = null;

  /**
   * Args:
   *   parent: where it goes.
   *   context: the run's view: `id`, `row`, `events`, `batch`.
   *   makePlots: from the run's columns, the plots.
   *   nothing: the sentences where there is no plot.
   */
  constructor(parent, context, makePlots, nothing) {
    Object.assign(this, { parent, context, makePlots, nothing });
    const { params } = read();
    this.x = X_CHOICES.some(([key]) => key === params.get("x")) ? params.get("x") : "step";
    this.smoothing = Math.min(Math.max(Number(params.get("smooth")) || 0, 0), 0.99);
    this.log = params.get("log") === "1";
    this.marks = params.get("marks") !== "0";
    const [from, to] = [params.get("from"), params.get("to")].map((text) => (text === null ? NaN : Number(text)));
    if (to > from) this.#range = [from, to];
    this.redraw = throttled(80, () => this.#draw());
    this.#toolbar();
    this.grid = h("div", { class: "grid" });
    this.notes = h("div");
    parent.replaceChildren(this.bar, this.notes, this.grid);
    this.update(context.columns);
  }

  close() {
    this.closed = true;
    this.#charts.forEach((chart) => chart.destroy());
  }

  #toolbar() {
    const whole = h("button", { type: "button", on: { click: () => this.#zoom(null) } }, "Whole range");
    this.whole = whole;
    whole.hidden = this.#range === null;
    this.bar = h(
      "div",
      { class: "toolbar" },
      choice("x", X_CHOICES, this.x, (x) => this.#choose({ x }, true)),
      slider("Smoothing", this.smoothing, (smoothing) => this.#choose({ smoothing })),
      toggle("Log scale", this.log, (log) => this.#choose({ log }), "Of losses, norms, rates and times"),
      toggle(
        "Events",
        this.marks,
        (marks) => this.#choose({ marks }),
        "Checkpoints, restarts, anomalies … on the curves",
      ),
      whole,
    );
  }

  #choose(values, anew = false) {
    Object.assign(this, values);
    change({
      x: this.x === "step" ? null : this.x,
      smooth: this.smoothing || null,
      log: this.log ? 1 : null,
      marks: this.marks ? null : 0,
    });
    if (anew) {
      this.#zoom(null);
      this.#load();
    } else {
      this.redraw();
    }
  }

  /** The run's columns, which may be more than before. */
  update(columns) {
    const plots = this.makePlots(columns);
    const names = plots.flatMap(({ lines }) => lines.map(({ column }) => column));
    if (names.join() === this.names?.join()) return;
    if (!plots.length && this.#charts.size) return; // the file is gone: what was read of it stays
    this.plots = plots;
    this.names = names;
    this.#drop(new Set(plots.map(({ key, title }) => key + title)));
    if (!plots.length) {
      this.notes.replaceChildren(empty(...this.nothing));
      return;
    }
    this.notes.replaceChildren();
    this.#load();
  }

  /** Removes the plots that are not in `kept`: what they show is not in the file any more. */
  #drop(kept) {
    for (const [key, chart] of this.#charts) {
      if (kept.has(key)) continue;
      chart.destroy();
      chart.element.remove();
      this.#charts.delete(key);
    }
  }

  async #load() {
    const series = new Series(this.context.id, this.names, this.x);
    this.#series = series;
    await this.context.guarded(async () => {
      await series.load();
      if (series !== this.#series || this.closed) return;
      if (this.#range) this.#detail = await series.detail(this.#range);
      this.#draw();
      if (!series.complete) setTimeout(() => series === this.#series && !this.closed && this.#load(), SHOWN_AGAIN_MS);
    });
  }

  /** There are new rows. */
  async more() {
    const series = this.#series;
    if (!series || this.loading) return (this.again = true);
    this.loading = true;
    await this.context.guarded(async () => {
      const reset = await series.more();
      if (reset)
        this.context.note(
          `metrics.jsonl was cut or written anew at ${new Date().toLocaleTimeString()}; the curves are what it holds now.`,
        );
      if (series === this.#series && !this.closed) this.#draw();
    });
    this.loading = false;
    if (this.again) {
      this.again = false;
      this.more();
    }
  }

  async #zoom(range) {
    this.#range = range;
    this.#detail = null;
    this.whole.hidden = range === null;
    change({ from: range && Number(range[0].toPrecision(8)), to: range && Number(range[1].toPrecision(8)) });
    if (range === null) return this.#draw();
    await this.context.guarded(async () => {
      const detail = await this.#series.detail(range);
      if (this.#range !== range || this.closed) return;
      this.#detail = detail;
      this.#draw();
    });
  }

  #draw() {
    if (this.closed || !this.#series) return;
    const began = this.x === "time" ? (this.context.row.began ?? 0) : 0;
    const offset = (points) => (began ? { x: points.x.map((t) => t - began), y: points.y } : points);
    const source = this.#detail ?? this.#series.points;
    const marks = this.marks ? this.context.marks(this.x) : [];
    let drawn = 0;
    for (const plot of this.plots) {
      const series = plot.lines
        .filter(({ column }) => source.has(column))
        .map((line) => ({ ...line, ...offset(source.get(line.column)) }));
      if (!series.length && !this.#charts.has(plot.key + plot.title)) continue;
      drawn++;
      this.#plot(plot, {
        series,
        marks,
        log: this.log && LOGARITHMIC.has(plot.key),
        smoothing: plot.key === "learning_rate" ? 0 : this.smoothing,
        x: xAxis(this.x),
      });
    }
    const missing = !drawn && this.#series.complete && this.x !== "step";
    this.notes.replaceChildren(
      ...(missing
        ? [notice("", `This run's rows have no ${this.x}: they are from before it was recorded. Choose another x.`)]
        : []),
    );
  }

  #plot(plot, options) {
    const key = plot.key + plot.title;
    const chart = this.#charts.get(key);
    const zoomed =
      this.#range && this.x === "time" ? this.#range.map((t) => t - (this.context.row.began ?? 0)) : this.#range;
    if (chart) {
      chart.set(options);
    } else {
      const made = addPlot(this.grid, this.context.row.name, {
        title: plot.title,
        unit: plot.unit,
        group: `run-${this.context.id}`,
        ...options,
        onZoom: (range) =>
          this.#zoom(range && this.x === "time" ? range.map((t) => t + (this.context.row.began ?? 0)) : range),
      });
      this.#charts.set(key, made);
    }
    this.#charts.get(key).zoom(zoomed);
  }
}
