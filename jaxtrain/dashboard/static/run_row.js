// The overview's table: its columns, how they are sorted, and the row of a run.

import { h, progress, statePill, when } from "./dom.js";
import { href } from "./link.js";

const { format, duration } = jaxtrainCharts;
const SILENT_SECONDS = 15;
export const STATES = ["running", "waiting", "done", "stopped", "failed", "died", "damaged"];
const ACTIVE = new Set(["running", "waiting"]);

const last = (low) => (a, b) => (a ?? low) - (b ?? low);
export const COLUMNS = [
  { key: "state", head: "State", compare: (a, b) => STATES.indexOf(a.state) - STATES.indexOf(b.state) },
  { key: "name", head: "Run", compare: (a, b) => a.name.localeCompare(b.name, "en", { numeric: true }) },
  {
    key: "progress",
    head: "Progress",
    compare: (a, b) => a.step / (a.last_step ?? Infinity) - b.step / (b.last_step ?? Infinity),
  },
  { key: "curve", head: "Loss curve" },
  { key: "loss", head: "Loss", number: true, compare: (a, b) => last(Infinity)(a.loss, b.loss) },
  { key: "accuracy", head: "Accuracy", number: true, compare: (a, b) => last(-1)(a.accuracy, b.accuracy) },
  {
    key: "val_accuracy",
    head: "Validation",
    number: true,
    compare: (a, b) => last(-1)(a.val_accuracy, b.val_accuracy),
  },
  { key: "best", head: "Best", number: true, compare: (a, b) => last(-1)(a.best, b.best) },
  { key: "devices", head: "Devices", compare: (a, b) => a.devices.localeCompare(b.devices) },
  {
    key: "seen",
    head: "Seen",
    title: "The last sign of life",
    number: true,
    compare: (a, b) => last(0)(a.seen, b.seen),
  },
];
export const DOWNWARD = new Set(["accuracy", "val_accuracy", "best", "seen", "progress"]); // the highest first

/** Those that run first, then the latest sign of life. */
export const latest = (a, b) =>
  ACTIVE.has(b.state) - ACTIVE.has(a.state) || (b.seen ?? 0) - (a.seen ?? 0) || COLUMNS[1].compare(a, b);

function number(label, text) {
  return h("td", { class: "n", "data-label": label }, text);
}

/** Whether a run that should be running has given no sign of life for a while. */
export const silent = (row) => row.state === "running" && row.seen && Date.now() / 1000 - row.seen > SILENT_SECONDS;

/** How far a run is, in words. */
export function progressText(row) {
  const step = row.last_step
    ? `${row.step.toLocaleString("en")} of ${row.last_step.toLocaleString("en")}`
    : `step ${row.step.toLocaleString("en")}`;
  const epoch = row.epoch === null ? "" : ` · epoch ${row.epoch + 1}${row.epochs ? `/${row.epochs}` : ""}`;
  const left = row.seconds_left !== null && row.state === "running" ? ` · ${duration(row.seconds_left)} left` : "";
  return `${step}${epoch}${left}`;
}

/** The table's row of a run: {element, curve}, where `curve` is the cell for its small curve. */
export function rowElement(row, chosen, onPick) {
  const open = href(["run", row.id]);
  const picked = h("input", {
    type: "checkbox",
    "aria-label": `Choose ${row.name}`,
    checked: chosen,
    disabled: row.kind === "job",
    on: { change: () => onPick(picked.checked) },
  });
  const about = [row.recipe, row.model, row.dataset].filter(Boolean).join(" · ");
  const name =
    row.kind === "job"
      ? h("span", { class: "run-name" }, row.name)
      : h("a", { class: "run-name", href: open }, row.name);
  const curve = h("td", { class: "cell-curve" });
  const element = h(
    "tr",
    { "data-id": row.id, class: `row-${row.state}` },
    h("td", { class: "cell-pick" }, picked),
    h("td", { class: "cell-state" }, statePill(row.state)),
    h(
      "td",
      { class: "cell-name" },
      name,
      h("span", { class: "about" }, about),
      row.reason && row.state !== "done"
        ? h("span", { class: `reason reason-${row.state}`, title: row.reason }, row.reason)
        : null,
    ),
    h("td", { class: "cell-progress" }, progress(row), h("span", { class: "about" }, progressText(row))),
    curve,
    number("Loss", format(row.loss)),
    number("Accuracy", format(row.accuracy, "share")),
    number("Validation", format(row.val_accuracy, "share")),
    number("Best", format(row.best, "share")),
    h(
      "td",
      { class: "cell-devices", "data-label": "Devices" },
      row.devices || "–",
      row.host ? h("span", { class: "about" }, row.host) : null,
    ),
    h(
      "td",
      { class: "n cell-seen", "data-label": "Seen" },
      when(row.seen),
      silent(row) ? h("span", { class: "about warn" }, "silent") : null,
    ),
  );
  return { element, curve };
}
