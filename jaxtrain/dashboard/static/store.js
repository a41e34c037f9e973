// What the overview knows of the runs, kept up to date by server-sent events.

import { get } from "./api.js";
import { announce } from "./dom.js";

const PROBE_SECONDS = 8; // without an event, the server is asked whether it is still there
const RETRY_SECONDS = 3;

/**
 * Events: `connection` (of it: `since`, null while the server answers), `rows` (detail: ids that changed, or null for all),
 * `gone` (detail: ids) and `changed` (detail: {id, what} of the watched run).
 */
class Store extends EventTarget {
  rows = new Map();
  server = null;
  error = null;
  since = null;
  loaded = false;
  #source = null;
  #run = null;
  #greeted = false;
  #heard = Date.now();

  start() {
    this.load();
    setInterval(() => this.#probe(), 1000);
  }

  /** Opens the stream; with `run`, what changes of it is told too. */
  watch(run) {
    if (this.#source && this.#run === run) return;
    this.#run = run;
    this.#open();
  }

  async load() {
    try {
      const { server, runs } = await get("api/runs");
      this.#alive();
      Object.assign(this, { server, error: null, loaded: true });
      this.rows = new Map(runs.map((row) => [row.id, row]));
      this.#tell("rows", null);
      if (server.scanning) setTimeout(() => this.load(), 1000);
    } catch (error) {
      this.#silent(error);
    }
  }

  #open() {
    this.#source?.close();
    const source = new EventSource(this.#run ? `api/stream?run=${encodeURIComponent(this.#run)}` : "api/stream");
    this.#source = source;
    const on = (name, listener) =>
      source.addEventListener(name, (event) => {
        this.#alive();
        listener(JSON.parse(event.data));
      });
    on("hello", () => {
      if (this.#greeted) this.load(); // what happened between two streams
      this.#greeted = true;
      if (this.#run) this.#tell("changed", { id: this.#run, what: ["all"] });
    });
    on("runs", ({ rows, gone, scanning }) => this.#merge(rows, gone, scanning));
    on("changed", (change) => this.#tell("changed", change));
    source.addEventListener("error", () => {
      if (source !== this.#source) return;
      if (source.readyState === EventSource.CLOSED) {
        source.close(); // refused: too many streams, or no token; ask as one asks for a page, and try again
        this.load();
        setTimeout(() => source === this.#source && this.#open(), RETRY_SECONDS * 1000);
      } else {
        this.#silent(null);
      }
    });
  }

  #merge(rows, gone, scanning) {
    if (this.server) this.server.scanning = scanning;
    for (const row of rows) {
      const before = this.rows.get(row.id);
      if (before && before.state !== row.state) announce(`${row.name} is ${row.state}. ${row.reason}`);
      this.rows.set(row.id, row);
    }
    for (const id of gone) this.rows.delete(id);
    this.#tell(
      "rows",
      rows.map(({ id }) => id),
    );
    if (gone.length) this.#tell("gone", gone);
  }

  async #probe() {
    if (Date.now() - this.#heard < PROBE_SECONDS * 1000) return;
    this.#heard = Date.now();
    try {
      await fetch("static/icon.svg", { method: "HEAD", cache: "no-store", signal: AbortSignal.timeout(4000) });
      if (this.since !== null && this.#source.readyState === EventSource.OPEN) this.#alive();
    } catch {
      this.#silent(null);
    }
  }

  #alive() {
    this.#heard = Date.now();
    if (this.since === null && this.error === null) return;
    this.since = this.error = null;
    this.#tell("connection");
  }

  #silent(error) {
    this.since ??= Date.now() / 1000;
    this.error = error ?? this.error;
    this.#tell("connection");
  }

  #tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}

export const store = new Store();
