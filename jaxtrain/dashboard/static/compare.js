// Several runs over each other: their curves, the settings that differ, and mean and spread over seeds.

import { advice, get, runPath } from "./api.js";
import { choice, empty, h, notice, prose, slider, statePill, table, throttled, toggle } from "./dom.js";
import { addPlot, X_CHOICES, xAxis } from "./grid.js";
import { change, href, read } from "./link.js";
import { lineOf, titleOf } from "./plots.js";
import { store } from "./store.js";

const { format, swatch } = jaxtrainCharts;
const POINTS = 1000;
const REFRESH_MS = 2000;
const DEFAULT_COLUMNS = ["val/accuracy", "val/loss", "train/loss", "train/accuracy"];
const LEFT_OUT = /^(train\/(time\/|device|host)|[^/]+\/time$)/; // of a machine, not of a setting

const plotTitle = (column) => {
  const { metric, label } = lineOf(column);
  return `${titleOf(metric)[0]}, ${label}`;
};

export class Compare {
  #charts = new Map();
  #answers = new Map(); // column -> the server's answer

  constructor(main) {
    const { params } = read();
    const list = (name) => (params.get(name) ?? "").split(",").filter(Boolean);
    Object.assign(this, { main, ids: list("runs"), spread: params.get("spread") === "1", log: params.get("log") === "1" });
    this.columns = list("col").length ? list("col") : DEFAULT_COLUMNS;
    this.x = X_CHOICES.some(([key]) => key === params.get("x")) ? params.get("x") : "step";
    this.smoothing = Math.min(Math.max(Number(params.get("smooth")) || 0, 0), 0.99);
    this.range = params.has("from") ? [Number(params.get("from")), Number(params.get("to"))] : null;
    this.refresh = throttled(REFRESH_MS, () => this.#load());
    this.redraw = throttled(80, () => this.#draw());
    this.listener = ({ detail }) => (!detail || detail.some((id) => this.ids.includes(id))) && this.refresh();
    store.addEventListener("rows", this.listener);
    document.title = `${this.ids.length} runs compared · jaxtrain`;
    if (this.ids.length < 2) {
      main.replaceChildren(empty("Choose two runs or more to compare them.", h("a", { class: "button", href: href([]) }, "All runs")));
      return;
    }
    this.#build();
    this.#load();
    this.#known();
  }

  close() {
    this.closed = true;
    store.removeEventListener("rows", this.listener);
    this.#charts.forEach(({ chart }) => chart.destroy());
  }

  #build() {
    this.whole = h("button", { type: "button", on: { click: () => this.#zoom(null) } }, "Whole range");
    this.link = h("button", { type: "button", on: { click: () => this.#copy() } }, "Copy link");
    this.chooser = h("details", { class: "chooser" }, h("summary", {}, "Plots"), h("p", { class: "loading" }, "Reading"));
    this.notes = h("div");
    this.grid = h("div", { class: "grid wide" });
    this.tables = h("div");
    this.main.replaceChildren(
      h("div", { class: "run-title" }, h("a", { href: href([], { pick: this.ids.join(",") }), class: "back" }, "All runs"), h("h1", {}, `${this.ids.length} runs compared`)),
      h(
        "div",
        { class: "toolbar" },
        choice("x", X_CHOICES, this.x, (x) => this.#choose({ x, range: null }, true)),
        slider("Smoothing", this.smoothing, (smoothing) => this.#choose({ smoothing })),
        toggle("Log scale", this.log, (log) => this.#choose({ log }), "Of all but shares"),
        toggle("Mean and spread over seeds", this.spread, (spread) => this.#choose({ spread }), "Of runs that differ in the seed alone: the mean, and one standard deviation to each side"),
        this.chooser, this.whole, this.link,
      ),
      this.notes, this.grid, this.tables,
    );
    this.whole.hidden = this.range === null;
  }

  async #copy() {
    try {
      await navigator.clipboard.writeText(location.href);
      this.link.textContent = "Copied";
    } catch {
      this.link.textContent = "It is in the address bar";
    }
    setTimeout(() => (this.link.textContent = "Copy link"), 2000);
  }

  #choose(values, anew = false) {
    Object.assign(this, values);
    this.whole.hidden = this.range === null;
    const same = this.columns.join() === DEFAULT_COLUMNS.join();
    change({
      x: this.x === "step" ? null : this.x, smooth: this.smoothing || null, log: this.log ? 1 : null, spread: this.spread ? 1 : null, col: same ? null : this.columns.join(","),
      from: this.range && Number(this.range[0].toPrecision(8)), to: this.range && Number(this.range[1].toPrecision(8)),
    });
    if (anew) this.#load();
    else this.redraw();
  }

  #zoom(range) {
    this.#choose({ range });
  }

  /** The columns that these runs have, to choose from. */
  async #known() {
    const infos = await Promise.all(this.ids.map((id) => get(runPath(id)).catch(() => null)));
    if (this.closed) return;
    const all = infos.flatMap((info) => Object.entries(info?.columns ?? {}).flatMap(([phase, keys]) => keys.map((key) => `${phase}/${key}`)));
    const columns = [...new Set([...this.columns, ...all])].filter((column) => !LEFT_OUT.test(column));
    const pick = (column, on) => this.#choose({ columns: columns.filter((each) => (each === column ? on : this.columns.includes(each))) }, true);
    this.chooser.replaceChildren(h("summary", {}, "Plots"), h("div", { class: "choices" }, columns.map((column) => toggle(plotTitle(column), this.columns.includes(column), (on) => pick(column, on)))));
  }

  async #load() {
    const { x, columns } = this;
    if (this.closed || this.ids.length < 2) return;
    try {
      const answers = await Promise.all(columns.map((column) => get("api/compare", { runs: this.ids.join(","), column, x, points: POINTS })));
      if (this.closed || x !== this.x || columns !== this.columns) return;
      this.#answers = new Map(columns.map((column, i) => [column, answers[i]]));
      this.notes.replaceChildren();
      this.#draw();
      this.#tables();
    } catch (error) {
      if (this.closed) return;
      const [what, todo] = advice(error);
      this.notes.replaceChildren(notice("bad", h("b", {}, what), " ", prose(todo), " ", h("a", { href: href([]) }, "All runs")));
      if (error.status === undefined) console.error(error);
      if (error.status !== 404 && error.status !== 401) this.refresh();
    }
  }

  #draw() {
    for (const [column, { element, chart }] of this.#charts) {
      if (this.#answers.has(column)) continue;
      chart.destroy();
      element.remove();
      this.#charts.delete(column);
    }
    for (const [column, answer] of this.#answers) {
      const unit = titleOf(lineOf(column).metric)[1];
      const options = { series: this.#series(answer), x: xAxis(this.x), log: this.log && unit !== "share", smoothing: this.smoothing };
      const known = this.#charts.get(column);
      if (known) known.chart.set(options);
      else {
        const chart = addPlot(this.grid, "compare", { title: plotTitle(column), unit, group: "compare", height: 260, ...options, onZoom: (range) => this.#zoom(range) });
        this.#charts.set(column, { chart, element: chart.element });
      }
      this.#charts.get(column).chart.zoom(this.range);
    }
    if (this.spread && ![...this.#answers.values()].some(({ groups }) => groups.length)) {
      this.notes.replaceChildren(notice("", "No two of these runs differ in the seed alone, so there is no mean over seeds."));
    } else {
      this.notes.replaceChildren();
    }
  }

  #series({ runs, groups }) {
    const grouped = new Set(this.spread ? groups.flatMap((group) => group.runs) : []);
    const slot = (id) => this.ids.indexOf(id);
    const single = runs.filter(({ id, series }) => series && !grouped.has(id)).map(({ id, name, series }) => ({ label: name, slot: slot(id), x: series.x, y: series.y }));
    const bands = (this.spread ? groups : []).map(({ runs: ids, settings, seeds, x, mean, low, high }) => {
      const differs = Object.entries(settings).map(([key, value]) => `${key} ${typeof value === "string" ? value : JSON.stringify(value)}`).join(", ");
      return { label: `mean of ${seeds.length} seeds${differs ? `: ${differs}` : ""}`, slot: slot(ids[0]), x, y: mean, low, high };
    });
    return [...bands, ...single];
  }

  #tables() {
    const answers = [...this.#answers.values()];
    if (!answers.length) return this.tables.replaceChildren(empty("Choose a plot."));
    const [{ runs, differences }] = answers;
    const title = ({ id, name }) => h("span", { class: "run-key" }, swatch({ slot: this.ids.indexOf(id) }), h("a", { href: href(["run", id]) }, name));
    const row = (run) => store.rows.get(run.id);
    const numbers = runs.map((run) => [title(run), statePill(run.state), (row(run)?.step ?? 0).toLocaleString("en"), format(row(run)?.loss), format(row(run)?.accuracy, "share"), format(row(run)?.val_accuracy, "share"), format(row(run)?.best, "share")]);
    const text = (value) => (value === undefined || value === null ? "–" : typeof value === "string" ? value : JSON.stringify(value));
    const settings = differences.map(({ key, values }) => [h("code", {}, key), ...runs.map(({ id }) => text(values[id]))]);
    this.tables.replaceChildren(
      h("section", { class: "card" }, h("h2", {}, "Latest values"), table("Latest values of each run", ["Run", "State", "Step", "Loss", "Accuracy", "Validation", "Best"], numbers, "  nnnnn")),
      h("section", { class: "card" }, h("h2", {}, "Settings that differ"), settings.length ? table("Settings that differ", ["Setting", ...runs.map(title)], settings) : empty("None: these runs have the same settings.")),
    );
  }
}
