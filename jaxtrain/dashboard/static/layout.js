// How the state lies on the devices: the mesh as a picture, bytes by tree, and the pipeline's timeline.

import { runPath } from "./api.js";
import { empty, h, notice, table } from "./dom.js";

const { format } = jaxtrainCharts;
const AXES = ["stage", "replica", "data", "tensor"];
const MOST_BOXES = 256;
const ZERO = ["everything whole on each device", "optimizer state sharded over data", "optimizer state and gradients sharded over data", "optimizer state, gradients and parameters sharded over data"];

const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);

export class LayoutTab {
  constructor(parent, view) {
    Object.assign(this, { parent, view });
    this.update();
  }

  update() {
    const { layout, has_schedule: scheduled } = this.view.info;
    const signature = JSON.stringify([layout, scheduled]);
    if (signature === this.signature) return;
    this.signature = signature;
    if (!layout) {
      this.parent.replaceChildren(empty("The layout of this run is not recorded.", "Runs write it at their start; an older run has it once it is resumed. `jaxtrain layout --config RECIPE` prints it without training."));
      return;
    }
    const trees = Object.keys(layout.bytes_per_device);
    this.parent.replaceChildren(
      ...layout.warnings.map((text) => notice("warn", text)),
      h("section", { class: "card" }, h("h2", {}, "Mesh"), this.#about(layout), legend(trees), mesh(layout, trees)),
      h("section", { class: "card" }, h("h2", {}, "Bytes of the state on a device"), bytesTable(layout, trees)),
      ...(scheduled ? [this.#schedule()] : []),
    );
  }

  #about({ mesh: axes, zero, devices, microbatches, parameters }) {
    const shape = AXES.filter((axis) => axes[axis] > 1).map((axis) => `${axis} ${axes[axis]}`).join(" × ") || "one device";
    const facts = [["Devices", devices], ["Mesh", shape], ["ZeRO", `${zero}: ${ZERO[zero] ?? ""}`], ["Microbatches", microbatches], ["Parameters", Number(parameters).toLocaleString("en")]];
    return h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", { class: "fact" }, h("dt", {}, name), h("dd", {}, String(value)))));
  }

  #schedule() {
    const address = `${runPath(this.view.id)}/schedule.svg`;
    return h(
      "section",
      { class: "card" },
      h("h2", {}, "The pipeline's timeline, as planned"),
      h("div", { class: "scroll picture", tabindex: 0, role: "region", "aria-label": "Timeline" }, h("img", { src: address, alt: "The planned timeline of the pipeline: a row a stage, a box a forward or backward pass of a microbatch" })),
      h("p", {}, h("a", { href: address, target: "_blank", rel: "noopener" }, "Open the picture alone")),
    );
  }
}

const legend = (trees) => h("ul", { class: "legend" }, trees.map((tree, slot) => h("li", {}, h("span", { class: `dot fill-${slot % 8}` }), tree.replaceAll("_", " "))));

/** The bytes of each tree on a device of stage `stage`. */
function bytesOf({ bytes_by_stage: byStage, bytes_per_device: perDevice }, trees, stage) {
  return trees.map((tree) => byStage?.[tree]?.[stage] ?? perDevice[tree]);
}

/** A box a device, a row a stage; in it, the bytes by tree. */
function mesh(layout, trees) {
  const size = (axis) => layout.mesh[axis] ?? 1;
  const [stages, columns] = [size("stage"), size("replica") * size("data") * size("tensor")];
  const largest = Math.max(...Array.from({ length: stages }, (_, stage) => sum(bytesOf(layout, trees, stage))));
  const boxes = Math.min(stages * columns, MOST_BOXES);
  const rows = [];
  for (let stage = 0; stage < stages && stage * columns < boxes; stage++) {
    const devices = Array.from({ length: Math.min(columns, boxes - stage * columns) }, (_, i) => device(layout, trees, stage, i, columns, largest));
    rows.push(h("div", { class: "mesh-row" }, h("div", { class: "mesh-label" }, stages > 1 ? [h("b", {}, `Stage ${stage}`), h("span", { class: "about" }, layout.stages[stage] ?? "")] : null), h("div", { class: "mesh-devices" }, devices)));
  }
  const left = stages * columns - boxes;
  return h("div", { class: "mesh" }, rows, left > 0 ? h("p", { class: "muted" }, `and ${left} devices more, alike`) : null);
}

function device(layout, trees, stage, i, columns, largest) {
  const size = (axis) => layout.mesh[axis] ?? 1;
  const bytes = bytesOf(layout, trees, stage);
  const place = { replica: Math.floor(i / (size("data") * size("tensor"))), data: Math.floor(i / size("tensor")) % size("data"), tensor: i % size("tensor") };
  const where = Object.entries(place).filter(([axis]) => size(axis) > 1).map(([axis, at]) => `${axis} ${at}`).join(", ");
  const parts = bytes.map((n, slot) => {
    const part = h("span", { class: `part fill-${slot % 8}`, title: `${trees[slot].replaceAll("_", " ")}: ${format(n, "bytes")}` });
    part.style.flexGrow = n;
    return part;
  });
  const stack = h("span", { class: "stack" }, parts);
  stack.style.width = `${(100 * sum(bytes)) / (largest || 1)}%`;
  return h("div", { class: "device" }, h("span", { class: "device-name" }, `device ${stage * columns + i}`), where ? h("span", { class: "about" }, where) : null, stack, h("span", { class: "device-bytes" }, format(sum(bytes), "bytes", 3)));
}

function bytesTable(layout, trees) {
  const stages = layout.mesh.stage ?? 1;
  const columns = Array.from({ length: stages }, (_, stage) => bytesOf(layout, trees, stage));
  const rows = trees.map((tree, i) => [tree.replaceAll("_", " "), ...columns.map((bytes) => format(bytes[i], "bytes"))]);
  rows.push([h("b", {}, "sum"), ...columns.map((bytes) => h("b", {}, format(sum(bytes), "bytes")))]);
  const heads = stages > 1 ? columns.map((_, stage) => `Stage ${stage}`) : ["A device"];
  return table("Bytes of the state on a device", ["Tree", ...heads], rows, ` ${"n".repeat(stages)}`);
}
