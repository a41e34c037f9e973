// The logs of all processes of a run, merged by time.

import { get, runPath } from "./api.js";
import { empty, h, throttled, toggle } from "./dom.js";

const PAGE = 300;
const MOST_SHOWN = 5000;
const LEVELS = [["", "all levels"], ["INFO", "info and worse"], ["WARNING", "warnings and worse"], ["ERROR", "errors"]];

export class LogsTab {
  constructor(parent, view) {
    Object.assign(this, { parent, view, query: "", level: "", follow: true, older: null, newer: null });
    const search = throttled(250, () => this.#begin());
    this.field = h("input", { type: "search", placeholder: "Search   ( / )", "aria-label": "Search the logs", on: { input: () => ((this.query = this.field.value), search()) } });
    const level = h("select", { "aria-label": "Level", on: { change: () => ((this.level = level.value), this.#begin()) } }, LEVELS.map(([key, text]) => h("option", { value: key }, text)));
    this.count = h("span", { class: "muted", role: "status" });
    this.before = h("div", { class: "more" });
    this.lines = h("ol", { class: "log" });
    this.box = h("div", { class: "log-box card", tabindex: 0, role: "log", "aria-label": "Log lines", "aria-live": "off" }, this.before, this.lines);
    const follow = toggle("Follow", this.follow, (on) => ((this.follow = on), on && this.#toEnd()), "Scrolls to what is new");
    parent.replaceChildren(h("div", { class: "toolbar" }, this.field, level, follow, this.count), this.box);
    this.#begin();
  }

  close() {
    this.closed = true;
  }

  /** There are new lines. */
  logs() {
    if (this.newer === null || this.loading) return (this.again = true);
    this.#more({ since: this.newer });
  }

  #begin() {
    this.newer = this.older = null;
    this.lines.replaceChildren();
    this.#more({});
  }

  async #more(cursor) {
    const asked = `${this.query}\n${this.level}`;
    this.loading = true;
    await this.view.guarded(async () => {
      const page = await get(`${runPath(this.view.id)}/logs`, { limit: PAGE, query: this.query, level: this.level, ...cursor });
      if (this.closed || asked !== `${this.query}\n${this.level}`) return;
      if (page.reset) {
        this.view.note(`A log was cut or written anew at ${new Date().toLocaleTimeString()}; below is what it holds now.`);
        this.lines.replaceChildren();
      }
      this.#add(page, "before" in cursor, "since" in cursor && !page.reset);
    });
    this.loading = false;
    if (this.again && !this.closed) {
      this.again = false;
      this.logs();
    }
  }

  #add(page, atTop, appended) {
    const lines = page.entries.map((entry) => line(entry, page.processes > 1, this.query));
    const height = this.box.scrollHeight;
    if (atTop) this.lines.prepend(...lines);
    else this.lines.append(...lines);
    while (!atTop && this.lines.children.length > MOST_SHOWN) this.lines.firstChild.remove();
    if (!atTop) this.newer = page.newer;
    if (!appended) this.older = page.older;
    this.count.textContent = `${this.lines.children.length.toLocaleString("en")} ${this.query || this.level ? "lines that match" : "lines"} shown, of ${page.processes} ${page.processes === 1 ? "process" : "processes"}`;
    const more = h("button", { type: "button", on: { click: () => this.#more({ before: this.older }) } }, this.query || this.level ? "Search further back" : "Show older lines");
    const none = this.lines.children.length ? [] : [empty(this.query || this.level ? "No line is like that here." : "Nothing is logged yet.")];
    this.before.replaceChildren(...(this.older ? [more] : []), ...none);
    if (atTop) this.box.scrollTop += this.box.scrollHeight - height;
    else if (this.follow) this.#toEnd();
  }

  #toEnd() {
    this.box.scrollTop = this.box.scrollHeight;
  }
}

function line({ time, process, level, message }, several, query) {
  const moment = new Date(time * 1000);
  return h(
    "li",
    { class: `level-${level.toLowerCase()}` },
    h("time", { datetime: moment.toISOString(), title: moment.toLocaleString() }, moment.toLocaleTimeString("en-GB")),
    several ? h("span", { class: "process", title: `process ${process}` }, `p${process}`) : null,
    level === "INFO" ? null : h("span", { class: "level" }, level.toLowerCase()),
    h("span", { class: "message" }, marked(message, query)),
  );
}

/** `text` with what was searched marked. */
function marked(text, query) {
  if (!query) return text;
  const [low, parts] = [text.toLowerCase(), []];
  let from = 0;
  for (let at = low.indexOf(query.toLowerCase()); at >= 0; at = low.indexOf(query.toLowerCase(), from)) {
    parts.push(text.slice(from, at), h("mark", {}, text.slice(at, at + query.length)));
    from = at + query.length;
  }
  return [...parts, text.slice(from)];
}
