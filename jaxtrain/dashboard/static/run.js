// One run: how it is, and a tab for each side of it.

import { advice, get, runPath } from "./api.js";
import { CommandsTab } from "./commands.js";
import { ConfigTab } from "./config.js";
import { Curves } from "./curves.js";
import { announce, clock, empty, h, notice, progress, prose, show, statePill, table, throttled, when } from "./dom.js";
import { EvaluationTab } from "./evaluation.js";
import { LayoutTab } from "./layout.js";
import { change, href, read } from "./link.js";
import { LogsTab } from "./logs.js";
import { progressText } from "./overview.js";
import { curvePlots, machinePlots } from "./plots.js";
import { store } from "./store.js";
import { TimeTab } from "./time.js";

const { format, duration } = jaxtrainCharts;
const REFRESH_MS = 1000;
const TABS = [
  ["curves", "Curves", (parent, view) => new CurvesTab(parent, view)],
  ["machine", "Devices and host", (parent, view) => new Curves(parent, view, machinePlots, ["No measurements of devices or hosts yet.", "They are in the rows of training: the first one comes after `train.log_every` steps."])],
  ["time", "Time", (parent, view) => new TimeTab(parent, view)],
  ["layout", "Layout", (parent, view) => new LayoutTab(parent, view)],
  ["logs", "Logs", (parent, view) => new LogsTab(parent, view)],
  ["config", "Config", (parent, view) => new ConfigTab(parent, view)],
  ["evaluation", "Evaluation", (parent, view) => new EvaluationTab(parent, view)],
  ["commands", "Commands", (parent, view) => new CommandsTab(parent, view)],
];
const TAB_PARAMETERS = { from: null, to: null };

export class RunView {
  #tab = null;

  constructor(main, id) {
    Object.assign(this, { main, id, info: null, events: { cursor: null, recorded: true, list: [] } });
    this.refresh = throttled(REFRESH_MS, () => this.load());
    this.listeners = {
      rows: ({ detail }) => (!detail || detail.includes(id)) && this.#rowChanged(),
      gone: ({ detail }) => detail.includes(id) && this.#gone(),
      changed: ({ detail }) => detail.id === id && this.#changed(detail.what),
    };
    for (const [name, listener] of Object.entries(this.listeners)) store.addEventListener(name, listener);
    main.replaceChildren(h("p", { class: "loading" }, "Reading the run"));
    this.load();
  }

  close() {
    this.closed = true;
    for (const [name, listener] of Object.entries(this.listeners)) store.removeEventListener(name, listener);
    this.#tab?.close?.();
  }

  /** The address has other parameters: the tab may be another one. */
  follow(params) {
    if (this.built && (params.get("tab") ?? "curves") !== this.tab) this.#open(params.get("tab"));
  }

  get row() {
    return store.rows.get(this.id) ?? this.info.run;
  }

  get columns() {
    return this.info.columns;
  }

  async load() {
    const done = await this.guarded(async () => {
      const [info] = await Promise.all([get(runPath(this.id)), this.#loadEvents()]);
      if (this.closed) return;
      this.info = info;
      if (!this.built) this.#build();
      this.#head();
      this.#problems();
      this.#tab.update?.(info.columns);
    });
    if (!done && !this.built && !this.closed) setTimeout(() => this.load(), 3000);
  }

  /** Runs `action`, which asks the server; what goes wrong is shown. Returns whether it went well. */
  async guarded(action) {
    try {
      await action();
      if (!this.closed && this.missing) this.#back();
      return true;
    } catch (error) {
      if (this.closed) return false;
      if (error.status === 404) this.#gone();
      else if (error.status !== 0 || !this.built) this.#failed(error);
      if (error.status === undefined) console.error(error);
      return false;
    }
  }

  note(text) {
    this.notes?.prepend(notice("warn", text));
    announce(text);
  }

  /** What happened, on the axis `x`: for `jaxtrainCharts`. */
  marks(x) {
    const { last_step: lastStep, epochs, began } = this.row;
    const batch = this.info.config.find(({ key }) => key === "data.global_batch")?.value;
    const place = {
      step: ({ step }) => step,
      time: ({ time }) => (time && began ? time - began : null),
      epoch: ({ step }) => (lastStep && epochs ? (step / lastStep) * epochs : null),
      examples: ({ step }) => (batch ? step * batch : null),
    }[x];
    return this.events.list
      .map((event) => ({ x: place(event), kind: event.kind, label: `${event.kind.replaceAll("_", " ")} at step ${event.step}${event.message ? `: ${event.message}` : ""}` }))
      .filter((mark) => Number.isFinite(mark.x) && mark.x !== null)
      .sort((a, b) => a.x - b.x);
  }

  async #loadEvents() {
    const { cursor, events, reset, recorded } = await get(`${runPath(this.id)}/events`, { since: this.events.cursor });
    this.events = { cursor, recorded, list: reset || this.events.cursor === null ? events : this.events.list.concat(events) };
  }

  #rowChanged() {
    if (!this.built) return;
    if (this.missing && store.rows.has(this.id)) this.#back();
    this.#head();
  }

  #changed(what) {
    if (!this.built) return;
    if (what.includes("metrics") || what.includes("all")) this.#tab.more?.();
    if (what.includes("logs") || what.includes("all")) this.#tab.logs?.();
    if (what.some((each) => each !== "logs")) this.refresh();
  }

  #gone() {
    if (this.missing) return;
    this.missing = Date.now() / 1000;
    const text = [h("b", {}, `This run's directory is gone since ${clock(this.missing)}.`), " It was deleted, renamed or moved. ", h("a", { href: href([]) }, "All runs")];
    if (!this.built) {
      this.main.replaceChildren(empty("This run is not there.", "It was deleted, renamed or moved out of the directory that is watched.", h("a", { class: "button", href: href([]) }, "All runs")));
      return;
    }
    this.missingNotice = notice("bad", text, " What was read before is below.");
    this.notes.prepend(this.missingNotice);
  }

  #back() {
    this.missing = null;
    this.missingNotice?.remove();
    if (this.built) this.note(`The run's directory is back since ${clock(Date.now() / 1000)}.`);
    this.refresh();
  }

  #failed(error) {
    const [what, todo] = advice(error);
    const shown = notice("bad", h("b", {}, what), " ", prose(todo));
    if (this.built) this.problems.replaceChildren(shown);
    else this.main.replaceChildren(shown);
  }

  #build() {
    this.built = true;
    this.header = h("div", { class: "run-head card" });
    this.notes = h("div");
    this.problems = h("div");
    this.panel = h("div", { role: "tabpanel", id: "panel", tabindex: -1 });
    this.tabs = h("div", { class: "tabs", role: "tablist", "aria-label": "Sides of the run", on: { keydown: (event) => this.#tabKey(event) } },
      TABS.map(([key, text]) => h("button", { type: "button", role: "tab", id: `tab-${key}`, "aria-controls": "panel", on: { click: () => this.#open(key) } }, text)));
    this.main.replaceChildren(this.header, this.notes, this.problems, this.tabs, this.panel);
    this.#head();
    this.#open(read().params.get("tab"));
  }

  #open(wanted) {
    const [key, , make] = TABS.find(([each]) => each === wanted) ?? TABS[0];
    this.#tab?.close?.();
    if (this.tab) change({ ...TAB_PARAMETERS, tab: key === "curves" ? null : key });
    this.tab = key;
    for (const button of this.tabs.children) {
      const mine = button.id === `tab-${key}`;
      button.setAttribute("aria-selected", String(mine));
      button.tabIndex = mine ? 0 : -1;
      if (mine) button.scrollIntoView({ block: "nearest", inline: "nearest" });
    }
    this.panel.setAttribute("aria-labelledby", `tab-${key}`);
    this.panel.replaceChildren();
    this.#tab = make(this.panel, this);
  }

  #tabKey(event) {
    const buttons = [...this.tabs.children];
    const at = buttons.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (to === undefined || at < 0) return;
    event.preventDefault();
    const button = buttons[(to + buttons.length) % buttons.length];
    button.focus();
    button.click();
  }

  #problems() {
    this.problems.replaceChildren(...this.info.problems.map((text) => notice("warn", text)));
  }

  #head() {
    const { row } = this;
    document.title = `${row.last_step ? `${Math.floor((row.step / row.last_step) * 100)} % ` : ""}${row.name} · jaxtrain`;
    const silent = row.state === "running" && row.seen && Date.now() / 1000 - row.seen > 15;
    const fact = (name, content) => h("div", { class: "fact" }, h("dt", {}, name), h("dd", {}, content));
    const focused = document.activeElement?.id === "back";
    show(
      this.header,
      h("div", { class: "run-title" }, h("a", { href: href([]), id: "back", class: "back" }, "All runs"), h("h1", {}, row.name), statePill(row.state)),
      row.reason ? h("p", { class: `reason reason-${row.state}` }, row.reason) : null,
      silent ? h("p", { class: "reason warn" }, "It has given no sign of life for a while: it may hang, or its host may be gone. The logs say what it did last.") : null,
      h("div", { class: "run-progress" }, progress(row), h("span", {}, progressText(row))),
      h(
        "dl",
        { class: "facts" },
        fact("Loss", format(row.loss)),
        fact("Accuracy", format(row.accuracy, "share")),
        fact("Validation", format(row.val_accuracy, "share")),
        fact("Best validation", format(row.best, "share")),
        row.state === "running" ? fact("Time left", row.seconds_left === null ? "–" : duration(row.seconds_left)) : null,
        fact("Recipe", row.recipe || "–"),
        fact("Devices", [row.devices || "–", row.host ? ` on ${row.host}` : ""]),
        fact("Began", when(row.began)),
        fact("Last sign of life", when(row.seen)),
        row.gpu_hours ? fact("GPU hours", format(row.gpu_hours)) : null,
        row.cost ? fact("Cost", format(row.cost)) : null,
      ),
    );
    if (focused) document.getElementById("back").focus();
  }
}

/** The curves, and below them what happened as a table. */
class CurvesTab {
  constructor(parent, view) {
    this.view = view;
    const curves = h("div");
    this.events = h("div");
    parent.replaceChildren(curves, this.events);
    this.curves = new Curves(curves, view, curvePlots, ["No row of metrics yet.", "The first one comes after `train.log_every` steps; it comes up here by itself."]);
    this.#table();
  }

  close() {
    this.curves.close();
  }

  update(columns) {
    this.curves.update(columns);
    this.curves.redraw();
    this.#table();
  }

  more() {
    this.curves.more();
  }

  #table() {
    const { list, recorded } = this.view.events;
    if (list.length === this.drawn) return;
    this.drawn = list.length;
    const rows = list.toReversed().slice(0, 200).map(({ time, step, kind, message }) => [when(time), step.toLocaleString("en"), h("span", { class: `kind kind-${kind}` }, kind.replaceAll("_", " ")), message]);
    show(
      this.events,
      rows.length > 0 && h("section", { class: "card" }, h("h2", {}, "What happened"), table("What happened, the latest first", ["When", "Step", "What", ""], rows, " n")),
      !recorded && h("p", { class: "muted" }, "This run is from before checkpoints and anomalies were recorded as events: its starts and ends alone are known."),
    );
  }
}
