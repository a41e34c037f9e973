"use strict";
// Draws the plots of a report, whose numbers are in the page, and the controls above them.
(() => {
  const root = document.documentElement;
  const plots = JSON.parse(document.getElementById("report-data").textContent);
  const state = { smoothing: 0, log: false, together: true };
  const series = (plot) => (state.together && plot.together.length ? plot.together : plot.curves);
  const log = (plot) => state.log && plot.logarithmic;

  const drawn = plots.map((plot, i) => {
    const element = document.querySelector(`[data-plot="${i}"]`);
    const { title, unit, marks, x } = plot;
    const chart = jaxtrainCharts.create(element, {
      title, unit, marks, x: { label: x, kind: "number" }, series: series(plot), group: x === "step" ? x : null,
    });
    const save = document.createElement("button");
    save.type = "button";
    save.className = "save";
    save.textContent = "PNG";
    save.title = `Save ${title} as a picture`;
    save.addEventListener("click", () => {
      const link = document.createElement("a");
      link.download = `${title.replace(/[^A-Za-z0-9]+/g, "-")}.png`;
      link.href = chart.png();
      link.click();
    });
    element.append(save);
    return { plot, chart };
  });

  const redraw = () =>
    drawn.forEach(({ plot, chart }) => chart.set({ series: series(plot), smoothing: state.smoothing, log: log(plot) }));

  function control(text, key, type, more) {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type, ...more });
    input.addEventListener("input", () => {
      state[key] = type === "range" ? Number(input.value) : input.checked;
      redraw();
    });
    label.append(input, ` ${text}`);
    return label;
  }

  const bar = document.querySelector(".toolbar");
  if (bar) {
    bar.hidden = false;
    bar.append(control("smoothing", "smoothing", "range", { min: 0, max: 0.98, step: 0.02, value: 0 }));
    bar.append(control("log scale", "log", "checkbox", {}));
    if (plots.some((plot) => plot.together.length)) {
      bar.append(control("seeds as mean and range", "together", "checkbox", { checked: true }));
    }
    const hint = document.createElement("span");
    hint.textContent = "Drag to zoom, double-click for all; click a name to hide its line.";
    bar.append(hint);
  }

  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  });
  let theme = root.dataset.theme;
  addEventListener("beforeprint", () => {
    theme = root.dataset.theme;
    root.dataset.theme = "light";
    drawn.forEach(({ chart }) => chart.redraw());
  });
  addEventListener("afterprint", () => (root.dataset.theme = theme));
})();
