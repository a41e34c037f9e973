// What `jaxtrain evaluate --report` found: confusions, classes, calibration, the worst images.

import { get, runPath } from "./api.js";
import { choice, command, empty, h, notice, table } from "./dom.js";

const { format } = jaxtrainCharts;
const MOST_NUMBERED = 25; // classes of a matrix with its numbers in it; a larger one is a picture
const PICTURE = 640; // pixels a side, at most
const CONFUSIONS = 20;

export class EvaluationTab {
  constructor(parent, view) {
    Object.assign(this, { parent, view });
    this.update();
  }

  update() {
    const { evaluations, commands } = this.view.info;
    if (evaluations.join() === this.drawn) return;
    this.drawn = evaluations.join();
    if (!evaluations.length) {
      this.parent.replaceChildren(
        empty(
          "This run is not evaluated in detail yet.",
          "This command does it; what it finds comes up here by itself:",
          command(commands.evaluate),
        ),
      );
      return;
    }
    this.result = h("div");
    const bar = h(
      "div",
      { class: "toolbar" },
      choice(
        "Split",
        evaluations.map((name) => [name, name]),
        evaluations[0],
        (name) => this.#load(name),
      ),
    );
    this.parent.replaceChildren(bar, this.result);
    this.#load(evaluations[0]);
  }

  #load(name) {
    return this.view.guarded(async () => {
      const report = await get(`${runPath(this.view.id)}/evaluation/${encodeURIComponent(name)}`);
      if (![report.classes, report.confusion, report.worst].every(Array.isArray)) {
        this.result.replaceChildren(notice("warn", `evaluation/${name}.json is damaged (it is no evaluation's report).`));
        return;
      }
      const names = report.classes.map((each) => each.class);
      this.result.replaceChildren(
        headline(report),
        h(
          "section",
          { class: "card" },
          h("h2", {}, "Confusion matrix"),
          h(
            "p",
            { class: "muted" },
            "Rows: the right class. Columns: the answer. The darker, the larger its share of the row.",
          ),
          names.length <= MOST_NUMBERED ? matrix(names, report.confusion) : picture(names, report.confusion),
        ),
        h(
          "div",
          { class: "columns" },
          confusions(names, report.confusion),
          classes(report.classes),
          calibration(report.calibration),
        ),
        h(
          "section",
          { class: "card" },
          h("h2", {}, "The highest losses"),
          h("div", { class: "worst" }, report.worst.map(figure)),
        ),
      );
    });
  }
}

function headline({ examples, accuracy, top5, loss, calibration: { expected_calibration_error: error } }) {
  const facts = [
    ["Examples", examples.toLocaleString("en")],
    ["Accuracy", format(accuracy, "share")],
    ["Top-5", format(top5, "share")],
    ["Loss", format(loss)],
    ["Expected calibration error", format(error)],
  ];
  return h(
    "section",
    { class: "card" },
    h(
      "dl",
      { class: "facts" },
      facts.map(([name, value]) => h("div", { class: "fact" }, h("dt", {}, name), h("dd", {}, value))),
    ),
  );
}

function matrix(names, confusion) {
  const rows = names.map((name, i) => {
    const whole = Math.max(
      confusion[i].reduce((a, b) => a + b, 0),
      1,
    );
    const cells = confusion[i].map((n, j) => {
      const cell = h(
        "td",
        { class: i === j ? "diagonal" : null, title: `${name}, taken for ${names[j]}: ${n.toLocaleString("en")}` },
        n ? n.toLocaleString("en") : "",
      );
      if (n) cell.style.setProperty("--share", `${Math.min(Math.max((150 * n) / whole, 3), 100)}%`);
      return cell;
    });
    return h("tr", {}, h("th", { scope: "row" }, name), cells);
  });
  const head = h(
    "tr",
    {},
    h("th"),
    names.map((name) => h("th", { scope: "col", class: "column-name" }, h("span", {}, name))),
  );
  return h(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": "Confusion matrix" },
    h(
      "table",
      { class: "matrix" },
      h("caption", { class: "hidden-text" }, "Confusion matrix"),
      h("thead", {}, head),
      h("tbody", {}, rows),
    ),
  );
}

/** A matrix of many classes: a few pixels a cell, named under the pointer. */
function picture(names, confusion) {
  const cell = Math.max(Math.floor(PICTURE / names.length), 1);
  const side = cell * names.length;
  const canvas = h("canvas", {
    width: side,
    height: side,
    role: "img",
    "aria-label": `Confusion matrix of ${names.length} classes; the most frequent confusions are in the table below`,
  });
  const ctx = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  ctx.fillStyle = style.getPropertyValue("--chart-grid");
  ctx.fillRect(0, 0, side, side);
  confusion.forEach((row, i) => {
    const whole = Math.max(
      row.reduce((a, b) => a + b, 0),
      1,
    );
    row.forEach((n, j) => {
      if (!n) return;
      ctx.globalAlpha = Math.sqrt(n / whole);
      ctx.fillStyle = style.getPropertyValue(i === j ? "--chart-2" : "--chart-1");
      ctx.fillRect(j * cell, i * cell, cell, cell);
    });
  });
  const said = h("p", { class: "muted", role: "status" }, "Point at a cell.");
  canvas.addEventListener("pointermove", ({ offsetX, offsetY }) => {
    const [j, i] = [offsetX, offsetY].map((at) =>
      Math.min(Math.max(Math.floor((at / canvas.clientWidth) * names.length), 0), names.length - 1),
    );
    said.textContent = `${names[i]}, taken for ${names[j]}: ${confusion[i][j].toLocaleString("en")}`;
  });
  return h("div", { class: "matrix-picture" }, canvas, said);
}

function confusions(names, confusion) {
  const wrong = confusion.flatMap((row, i) => row.map((n, j) => [n, i, j])).filter(([n, i, j]) => n && i !== j);
  const rows = wrong
    .sort(([a], [b]) => b - a)
    .slice(0, CONFUSIONS)
    .map(([n, i, j]) => [n.toLocaleString("en"), names[i], names[j]]);
  return h(
    "section",
    { class: "card" },
    h("h2", {}, "Most frequent confusions"),
    rows.length
      ? table("Most frequent confusions", ["Examples", "Of the class", "Taken for"], rows, "n")
      : empty("None: every answer is right."),
  );
}

function classes(list) {
  const rows = list
    .toSorted((a, b) => (a.accuracy ?? 2) - (b.accuracy ?? 2))
    .map((each) => [each.class, each.examples.toLocaleString("en"), format(each.accuracy, "share")]);
  return h(
    "section",
    { class: "card" },
    h("h2", {}, "Classes, the worst first"),
    table("Classes, the worst first", ["Class", "Examples", "Accuracy"], rows, " nn"),
  );
}

function calibration({ bins }) {
  const rows = bins
    .filter(({ examples }) => examples)
    .map(({ low, high, examples, confidence, accuracy }) => [
      `${format(low, "share", 3)} – ${format(high, "share", 3)}`,
      examples.toLocaleString("en"),
      format(confidence, "share", 3),
      format(accuracy, "share", 3),
    ]);
  return h(
    "section",
    { class: "card" },
    h("h2", {}, "Calibration"),
    table("Calibration", ["Confidence", "Examples", "Mean confidence", "Accuracy"], rows, " nnn"),
  );
}

function figure({ label, predicted, confidence, loss, file, index, picture: source }) {
  const drawable = typeof source === "string" && source.startsWith("data:image/png;base64,");
  return h(
    "figure",
    {},
    drawable ? h("img", { src: source, alt: `An image of ${label}`, loading: "lazy" }) : null,
    h(
      "figcaption",
      {},
      h("b", {}, label),
      ` taken for ${predicted}`,
      h("span", { class: "about" }, `${format(confidence, "share", 3)}, loss ${format(loss, "", 3)}`),
      h("span", { class: "about" }, file || `example ${index}`),
    ),
  );
}
