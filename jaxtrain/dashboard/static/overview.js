// All runs below the root: a row each.

import { empty, h, notice, prose, statePill, throttled } from "./dom.js";
import { change, href, read } from "./link.js";
import { COLUMNS, DOWNWARD, latest, rowElement, silent, STATES } from "./run_row.js";
import { Sparks } from "./sparks.js";
import { store } from "./store.js";

const { format } = jaxtrainCharts;
const PAGE = 100; // rows at a time
const MOST_COMPARED = 32;
const LOOK_SECONDS = 5; // how often a running run is looked at for having fallen silent
const GROUPS = [
  ["", "nothing"],
  ["recipe", "recipe"],
  ["group", "folder"],
  ["dataset", "data set"],
  ["model", "model"],
  ["state", "state"],
];

const groupOf = (row, by) => row[by] || (by === "group" ? "in no folder" : `no ${by}`);

export class Overview {
  #picked = new Set();
  #rows = new Map(); // id -> {element, row, silent}
  #limit = PAGE;
  #sparks = new Sparks();

  constructor(main) {
    const { params } = read();
    this.query = params.get("q") ?? "";
    this.states = new Set((params.get("state") ?? "").split(",").filter(Boolean));
    this.sort = params.get("sort") ?? "";
    this.group = params.get("group") ?? "";
    (params.get("pick") ?? "")
      .split(",")
      .filter(Boolean)
      .forEach((id) => this.#picked.add(id));
    this.#build(main);
    this.draw = throttled(250, () => this.#draw());
    this.listener = (event) => this.#changed(event.detail);
    store.addEventListener("rows", this.listener);
    this.timer = setInterval(() => this.#changed(), LOOK_SECONDS * 1000);
    if (store.loaded) this.#draw();
    document.title = "jaxtrain";
  }

  close() {
    store.removeEventListener("rows", this.listener);
    clearInterval(this.timer);
    this.#sparks.close();
    this.closed = true;
  }

  #build(main) {
    this.filter = h("input", {
      type: "search",
      id: "filter",
      placeholder: "Filter by name, recipe, model …   ( / )",
      "aria-label": "Filter runs",
      value: this.query,
      on: { input: () => this.#choose({ query: this.filter.value }) },
    });
    this.grouping = h(
      "select",
      { id: "group", on: { change: () => this.#choose({ group: this.grouping.value }) } },
      GROUPS.map(([key, text]) => h("option", { value: key, selected: key === this.group }, text)),
    );
    this.chips = h("div", { class: "chips", role: "group", "aria-label": "Show states" });
    this.notes = h("div");
    this.head = h("tr");
    this.body = h("tbody");
    this.more = h("div", { class: "more" });
    this.bar = h("div", { class: "pickbar", role: "status" });
    this.table = h(
      "table",
      { class: "runs" },
      h("caption", { class: "hidden-text" }, "Runs"),
      h("thead", {}, this.head),
      this.body,
    );
    this.none = h("div", {}, h("p", { class: "loading" }, "Reading the runs"));
    main.replaceChildren(
      h("h1", { class: "hidden-text" }, "Runs"),
      h(
        "div",
        { class: "toolbar" },
        this.filter,
        this.chips,
        h("label", { class: "field" }, "Group by ", this.grouping),
      ),
      this.notes,
      this.none,
      this.table,
      this.more,
      this.bar,
    );
    this.table.hidden = true;
  }

  #choose(values) {
    Object.assign(this, values);
    this.#limit = PAGE;
    change({
      q: this.query,
      state: [...this.states].join(","),
      sort: this.sort,
      group: this.group,
      pick: [...this.#picked].join(","),
    });
    this.#draw();
  }

  #changed() {
    if (!this.closed) this.draw();
  }

  #shown() {
    const words = this.query.toLowerCase().split(/\s+/).filter(Boolean);
    const text = (row) =>
      [row.name, row.recipe, row.model, row.dataset, row.group, row.host, row.devices, row.state]
        .join(" ")
        .toLowerCase();
    const rows = [...store.rows.values()].filter(
      (row) => (!this.states.size || this.states.has(row.state)) && words.every((word) => text(row).includes(word)),
    );
    const column = COLUMNS.find(({ key }) => key === this.sort.replace("-", ""));
    if (!column?.compare) return rows.sort(latest);
    const sign = this.sort.startsWith("-") ? -1 : 1;
    return rows.sort((a, b) => sign * column.compare(a, b) || latest(a, b));
  }

  #draw() {
    if (this.closed) return;
    const rows = this.#shown();
    this.#chips();
    this.#heads();
    this.#notes();
    this.none.replaceChildren(...(rows.length ? [] : [this.#nothing()]));
    this.table.hidden = !rows.length;
    const focused = document.activeElement;
    const elements = this.group ? this.#grouped(rows) : rows.slice(0, this.#limit).map((row) => this.#row(row));
    place(this.body, elements);
    if (focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
    const left = this.group ? 0 : rows.length - this.#limit;
    const next = () => {
      this.#limit += PAGE;
      this.#draw();
    };
    this.more.replaceChildren(
      ...(left > 0
        ? [h("button", { type: "button", on: { click: next } }, `Show ${Math.min(left, PAGE)} more of ${left}`)]
        : []),
    );
    this.#bar();
  }

  #grouped(rows) {
    const groups = Map.groupBy(rows, (row) => groupOf(row, this.group));
    const names = [...groups.keys()].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    let room = this.#limit;
    return names.flatMap((name) => {
      const members = groups.get(name);
      const best = Math.max(...members.map(({ best: value }) => value ?? -1));
      const shown = members.slice(0, Math.max(room, 0));
      room -= shown.length;
      const hidden = members.length - shown.length;
      const about = [
        `${members.length} ${members.length === 1 ? "run" : "runs"}`,
        best >= 0 ? `best ${format(best, "share")}` : "",
        hidden ? `${hidden} not shown: filter to see them` : "",
      ].filter(Boolean);
      const head = h(
        "tr",
        { class: "group-head" },
        h(
          "th",
          { colspan: COLUMNS.length + 1, scope: "colgroup" },
          name,
          h("span", { class: "muted" }, ` ${about.join(", ")}`),
        ),
      );
      return [head, ...shown.map((row) => this.#row(row))];
    });
  }

  /** The table's row of a run; the one that is there, if nothing of the run changed. */
  #row(row) {
    const known = this.#rows.get(row.id);
    if (known?.row === row && known.silent === silent(row)) return known.element;
    const made = rowElement(row, this.#picked.has(row.id), (yes) => this.#pick(row.id, yes));
    if (row.kind !== "job") this.#sparks.watch(made.curve, row, known?.element.querySelector(".spark"));
    this.#rows.set(row.id, { ...made, row, silent: silent(row) });
    return made.element;
  }

  #pick(id, yes) {
    if (yes) this.#picked.add(id);
    else this.#picked.delete(id);
    change({ pick: [...this.#picked].join(",") });
    this.#bar();
  }

  #bar() {
    const ids = [...this.#picked].filter((id) => store.rows.has(id));
    this.bar.hidden = !ids.length;
    const clear = () => {
      this.#picked.clear();
      this.body.querySelectorAll("input:checked").forEach((input) => (input.checked = false));
      this.#choose({});
    };
    const enough = ids.length >= 2 && ids.length <= MOST_COMPARED;
    this.bar.replaceChildren(
      h("span", {}, `${ids.length} chosen`),
      enough
        ? h(
            "a",
            { class: "button primary", id: "compare", href: href(["compare"], { runs: ids.join(",") }) },
            "Compare",
          )
        : h(
            "span",
            { class: "muted" },
            ids.length < 2 ? "Choose another one to compare" : `At most ${MOST_COMPARED} can be compared`,
          ),
      h("button", { type: "button", on: { click: clear } }, "Clear"),
    );
  }

  #chips() {
    const counts = new Map(STATES.map((state) => [state, 0]));
    for (const { state } of store.rows.values()) counts.set(state, (counts.get(state) ?? 0) + 1);
    const signature = [...counts].join() + [...this.states].join();
    if (signature === this.signature) return;
    this.signature = signature;
    const toggle = (state) => {
      if (!this.states.delete(state)) this.states.add(state);
      this.#choose({});
      this.chips.querySelector(`[data-state="${state}"]`)?.focus();
    };
    this.chips.replaceChildren(
      ...[...counts]
        .filter(([state, count]) => count || this.states.has(state))
        .map(([state, count]) =>
          h(
            "button",
            {
              type: "button",
              class: "chip",
              "data-state": state,
              "aria-pressed": String(this.states.has(state)),
              on: { click: () => toggle(state) },
            },
            statePill(state),
            h("b", {}, count),
          ),
        ),
    );
    const running = counts.get("running");
    document.title = running ? `${running} running · jaxtrain` : "jaxtrain";
  }

  #heads() {
    if (this.drawnSort === this.sort) return;
    this.drawnSort = this.sort;
    const head = ({ key, head: text, title, number: right, compare }) => {
      const mine = this.sort.replace("-", "") === key;
      const down = mine && this.sort.startsWith("-");
      const next = mine
        ? down === DOWNWARD.has(key)
          ? down
            ? key
            : `-${key}`
          : ""
        : DOWNWARD.has(key)
          ? `-${key}`
          : key;
      const click = () => {
        this.#choose({ sort: next });
        this.head.querySelector(`[data-sort="${key}"]`).focus();
      };
      const content = compare
        ? h(
            "button",
            { type: "button", title, "data-sort": key, on: { click } },
            text,
            h("span", { "aria-hidden": "true" }, mine ? (down ? " ↓" : " ↑") : ""),
          )
        : text;
      return h(
        "th",
        { scope: "col", class: right ? "n" : null, "aria-sort": mine ? (down ? "descending" : "ascending") : null },
        content,
      );
    };
    this.head.replaceChildren(
      h("th", { scope: "col" }, h("span", { class: "hidden-text" }, "Choose")),
      ...COLUMNS.map(head),
    );
  }

  #notes() {
    const { server } = store;
    const scanning = server?.scanning ? [notice("", `Looking for runs: ${server.read} of ${server.found} read.`)] : [];
    this.notes.replaceChildren(...scanning);
  }

  #nothing() {
    if (store.rows.size) {
      const all = () => {
        this.filter.value = "";
        this.states.clear();
        this.#choose({ query: "" });
      };
      return empty("No run is like that.", h("button", { type: "button", on: { click: all } }, "Show all runs"));
    }
    const root = store.server?.root ?? "";
    return empty(
      h("p", {}, "There is no run below ", h("code", {}, root), " yet."),
      h(
        "p",
        {},
        prose(
          "Start one, and it comes up here by itself: `jaxtrain train --config quickstart --workdir " +
            root +
            "/first`",
        ),
      ),
    );
  }
}

/** Makes `elements` the children of `parent`, and moves only what is not where it belongs. */
function place(parent, elements) {
  elements.forEach((element, i) => {
    if (parent.children[i] !== element) parent.insertBefore(element, parent.children[i] ?? null);
  });
  while (parent.children.length > elements.length) parent.lastChild.remove();
}
