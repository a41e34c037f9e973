// The settings of a run, and where each value came from.

import { empty, h, table, toggle } from "./dom.js";

const ORIGINS = { default: "default", recipe: "recipe", argument: "recipe's argument", file: "file", flag: "command line" };

export class ConfigTab {
  constructor(parent, view) {
    Object.assign(this, { parent, view, query: "", chosenOnly: false });
    this.field = h("input", { type: "search", placeholder: "Search settings   ( / )", "aria-label": "Search settings", on: { input: () => ((this.query = this.field.value.toLowerCase()), this.#draw()) } });
    this.result = h("div");
    this.environment = h("div");
    const only = toggle("Without defaults", false, (on) => ((this.chosenOnly = on), this.#draw()), "Only the values that somebody chose");
    parent.replaceChildren(h("div", { class: "toolbar" }, this.field, only), this.result, this.environment);
    this.update();
  }

  update() {
    const signature = JSON.stringify([this.view.info.config, this.view.info.environment]);
    if (signature === this.signature) return;
    this.signature = signature;
    this.#draw();
    this.#about();
  }

  #draw() {
    const { config } = this.view.info;
    const text = ({ key, value }) => `${key} ${shown(value)}`.toLowerCase();
    const found = config.filter((row) => text(row).includes(this.query) && !(this.chosenOnly && !chosen(row)));
    const rows = found.toSorted((a, b) => chosen(b) - chosen(a)).map((row) => [
      h("code", { class: chosen(row) ? "chosen" : null }, row.key), h("code", {}, shown(row.value)),
      h("span", { class: `origin origin-${row.origin}` }, row.origin === null ? "not recorded" : ORIGINS[row.origin] ?? row.origin),
    ]);
    this.result.replaceChildren(
      rows.length ? h("section", { class: "card" }, table("Settings, the chosen ones first", ["Setting", "Value", "From"], rows)) : empty(config.length ? "No setting is like that." : "The config of this run cannot be read."),
    );
  }

  #about() {
    const { environment } = this.view.info;
    if (!environment) return this.environment.replaceChildren();
    const rows = Object.entries(environment).map(([key, value]) => [h("code", {}, key), h("code", {}, key === "command" && Array.isArray(value) ? value.join(" ") : shown(value))]);
    this.environment.replaceChildren(h("section", { class: "card" }, h("h2", {}, "The latest start's environment"), table("Environment of the latest start", ["What", "Value"], rows)));
  }
}

const chosen = ({ origin }) => origin !== null && origin !== "default";

function shown(value) {
  if (typeof value === "string") return value === "" ? '""' : value;
  if (value !== null && typeof value === "object" && !Array.isArray(value)) {
    return Object.entries(value).map(([key, each]) => `${key}: ${typeof each === "object" ? JSON.stringify(each) : each}`).join("\n");
  }
  return JSON.stringify(value);
}
