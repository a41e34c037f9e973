// A grid of plots, with the buttons that every plot has.

import { h } from "./dom.js";

function save(chart, name) {
  const link = h("a", { href: chart.png(), download: `${name}.png`.replaceAll(/[^\w.,=-]+/g, "_") });
  link.click();
}

/**
 * Adds a plot to `parent`. Returns the chart of `jaxtrainCharts`.
 *
 * name: of the picture's file, before the plot's title.
 */
export function addPlot(parent, name, options) {
  const element = h("section", { class: "card plot" });
  parent.append(element);
  const chart = jaxtrainCharts.create(element, options);
  const enlarge = h("button", { type: "button", class: "icon", title: "Enlarge", "aria-label": `Enlarge ${options.title}`, "aria-pressed": "false" }, "⤢");
  enlarge.addEventListener("click", () => {
    const large = element.classList.toggle("large");
    enlarge.setAttribute("aria-pressed", String(large));
    chart.resize(large ? 420 : options.height ?? 210);
  });
  const picture = h(
    "button",
    { type: "button", class: "icon", title: "Save as PNG", "aria-label": `Save ${options.title} as PNG`, on: { click: () => save(chart, `${name}-${options.title}`) } },
    "⤓",
  );
  chart.head.append(h("span", { class: "plot-buttons" }, enlarge, picture));
  return chart;
}

export const X_CHOICES = [["step", "step"], ["epoch", "epoch"], ["examples", "examples"], ["time", "time"]];

/** How x is shown: its label and kind. */
export const xAxis = (x) => ({ label: x, kind: x === "time" ? "elapsed" : "number" });
