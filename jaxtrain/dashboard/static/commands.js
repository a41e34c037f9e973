// What one can do with a run, as commands to copy; its checkpoints and its result.

import { command, empty, h, table, when } from "./dom.js";

const { format } = jaxtrainCharts;
const WORDS = { resume: "Go on with it from its latest checkpoint", evaluate: "Evaluate it, with the confusion matrix and the worst images (then under “Evaluation”)", export: "Export the weights for other programs", logs: "Watch its logs in a terminal" };

export class CommandsTab {
  constructor(parent, view) {
    Object.assign(this, { parent, view });
    this.update();
  }

  update() {
    const { commands, checkpoints, result } = this.view.info;
    const signature = JSON.stringify([commands, checkpoints, result]);
    if (signature === this.signature) return;
    this.signature = signature;
    const rows = checkpoints.toReversed().map(({ step, time, bytes, best }) => [step.toLocaleString("en"), when(time), format(bytes, "bytes"), best ? "the best" : ""]);
    const results = Object.entries(result ?? {}).map(([key, value]) => [h("code", {}, key), h("code", {}, typeof value === "string" ? value : JSON.stringify(value))]);
    this.parent.replaceChildren(
      h("section", { class: "card" }, h("h2", {}, "Commands"), Object.entries(commands).map(([key, text]) => [h("h3", {}, WORDS[key] ?? key), command(text)])),
      h("section", { class: "card" }, h("h2", {}, "Checkpoints"), rows.length ? table("Checkpoints, the latest first", ["Step", "Saved", "Size", ""], rows, "n n") : empty("No checkpoint yet.")),
      ...(results.length ? [h("section", { class: "card" }, h("h2", {}, "Result"), table("Result", ["What", "Value"], results))] : []),
    );
  }
}
