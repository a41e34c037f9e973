// The points of a run's columns, read once and then only what is new.

import { get, runPath } from "./api.js";

const MOST_COLUMNS = 64; // a request
const POINTS = 1200; // of a series, at first; a live one may grow to twice that before it is read anew

export class Series {
  #parts = [];

  /** x: step, epoch, examples or time. */
  constructor(run, columns, x) {
    this.run = run;
    this.x = x;
    this.points = new Map(); // column -> {x, y}
    this.complete = true;
    for (let i = 0; i < columns.length; i += MOST_COLUMNS) this.#parts.push({ columns: columns.slice(i, i + MOST_COLUMNS), cursor: null });
  }

  /** Everything, at the resolution of a plot. */
  async load() {
    const answers = await Promise.all(this.#parts.map((part) => this.#ask(part, {})));
    this.complete = answers.every(({ complete }) => complete === undefined || complete >= 1);
    answers.forEach((answer, i) => this.#replace(this.#parts[i], answer));
  }

  /** Appends what is new. Returns whether the file was cut or written anew, so that all was read again. */
  async more() {
    let reset = false;
    for (const part of this.#parts) {
      const answer = await this.#ask(part, { since: part.cursor });
      reset ||= answer.reset;
      if (answer.reset) this.#replace(part, answer);
      else this.#append(part, answer);
    }
    if ([...this.points.values()].some(({ x }) => x.length > 2 * POINTS)) await this.load();
    return reset;
  }

  /** The points between two values of x, in more detail: a Map as `points`. */
  async detail([from, to]) {
    const answers = await Promise.all(this.#parts.map((part) => this.#ask(part, { from, to })));
    return new Map(answers.flatMap(({ series }) => Object.entries(series)));
  }

  #ask(part, params) {
    return get(`${runPath(this.run)}/series`, { columns: part.columns.join(","), x: this.x, points: POINTS, ...params });
  }

  #replace(part, { series, cursor }) {
    part.cursor = cursor;
    for (const column of part.columns) {
      if (series[column]) this.points.set(column, series[column]);
      else this.points.delete(column);
    }
  }

  #append(part, { series, cursor }) {
    part.cursor = cursor;
    for (const [column, { x, y }] of Object.entries(series)) {
      const known = this.points.get(column);
      if (known) this.points.set(column, { x: known.x.concat(x), y: known.y.concat(y) });
      else this.points.set(column, { x, y });
    }
  }
}
