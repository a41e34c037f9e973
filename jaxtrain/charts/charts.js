"use strict";
// The curves of all pages, drawn with uPlot: the dashboard's, and the reports', which are files without a server. A classic
// script, so that a page may carry it inside itself. It needs uPlot.iife.min.js before it and charts.css beside it.
//
//   const chart = jaxtrainCharts.create(element, {
//     title: "loss", unit: "",                                  // "share", "bytes", "seconds", or what stands behind a number
//     x: { label: "step", kind: "number" },                     // kind: number, elapsed (seconds) or clock (Unix seconds)
//     series: [{ label: "train", x: [..], y: [..], slot: 0 }],  // slot: of the palette; low, high: a band around y
//     marks: [{ x: 100, kind: "checkpoint", label: "..." }],    // vertical lines with names
//     log: false, smoothing: 0,                                 // smoothing: from 0 to below 1, as in TensorBoard
//     group: "run",                                             // charts of a group share cursor and zoom
//     onZoom: (range) => {},                                    // [from, to] of x, or null for all of it
//   });
//   chart.set({ series });  chart.resize(420);  chart.png();  chart.destroy();

globalThis.jaxtrainCharts = (() => {
  const COLOURS = 8; // --chart-0 to --chart-7 of charts.css
  const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]];
  const MARK_COLOURS = {
    anomaly: "bad",
    roll_back: "bad",
    slow_device: "warn",
    gpu: "warn",
    start: "good",
    end: "ink",
  };
  const MANY_MARKS = 20; // in a plot; the lines of ordinary ones are then fainter
  const SHORT_CURVE = 40; // points that are drawn as points too
  const charts = new Set();

  // ------------------------------------------------------------------------------------------------------------ numbers

  const BINARY = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  const DECIMAL = ["", "k", "M", "G", "T", "P", "E"];

  function digits(value, significant) {
    if (value === 0) return "0";
    const size = Math.floor(Math.log10(Math.abs(value)));
    if (size < -4 || size > 15) return value.toExponential(Math.max(significant - 2, 0));
    const text = value.toFixed(Math.min(Math.max(significant - 1 - size, 0), 12));
    return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
  }

  function scaled(value, base, names, significant) {
    let power = 0;
    while (Math.abs(value) >= base && power < names.length - 1) [value, power] = [value / base, power + 1];
    return [digits(value, significant), names[power]];
  }

  /** A length of time: "850 ms", "12.4 s", "3 min 20 s", "5 h 3 min", "2 d 4 h". */
  function duration(seconds) {
    const sign = seconds < 0 ? "-" : "";
    const size = Math.abs(seconds);
    if (size === 0) return "0 s";
    if (size < 1e-3) return `${sign}${digits(size * 1e6, 3)} µs`;
    if (size < 1) return `${sign}${digits(size * 1e3, 3)} ms`;
    if (size < 59.95) return `${sign}${digits(size, 3)} s`;
    const whole = Math.round(size);
    const pairs = [
      [86400, "d", 3600, "h"],
      [3600, "h", 60, "min"],
      [60, "min", 1, "s"],
    ];
    const [big, bigName, small, smallName] = pairs.find(([unit]) => whole >= unit);
    const rest = Math.floor((whole % big) / small);
    return `${sign}${Math.floor(whole / big)} ${bigName}${rest ? ` ${rest} ${smallName}` : ""}`;
  }

  /** A number with its unit, as it stands in a table or a legend; "–" where there is none. */
  function format(value, unit = "", significant = 4) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (!Number.isFinite(value)) return value > 0 ? "∞" : "-∞";
    if (unit === "share") return `${digits(value * 100, significant)} %`;
    if (unit === "seconds") return duration(value);
    if (unit === "bytes" || unit === "bytes/s") {
      const [number, name] = scaled(value, 1024, BINARY, significant);
      return `${number} ${name}${unit === "bytes/s" ? "/s" : ""}`;
    }
    if (Math.abs(value) >= 1e5) {
      const [number, name] = scaled(value, 1000, DECIMAL, significant);
      return `${number} ${name}${unit}`.trimEnd();
    }
    return unit ? `${digits(value, significant)} ${unit}` : digits(value, significant);
  }

  /** Whether the numbers of an axis need no unit, since the title has it. */
  const titled = (unit) => Boolean(unit) && !["share", "seconds"].includes(unit) && !unit.startsWith("bytes");

  /** A value of x: a step, a length of time, or a moment. */
  function formatX(value, kind) {
    if (value === null || value === undefined) return "–";
    if (kind === "clock") return new Date(value * 1000).toLocaleString();
    if (kind === "elapsed") return duration(value);
    return Number.isInteger(value) ? value.toLocaleString("en") : digits(value, 5);
  }

  // --------------------------------------------------------------------------------------------------------------- data

  /** `y` smoothed as TensorBoard does it: a running mean with the weight `share`, corrected for its start at zero. */
  function smooth(y, share) {
    let mean = 0;
    let weight = 0;
    return y.map((value) => {
      if (value === null || value === undefined || !Number.isFinite(value)) return value;
      mean = mean * share + value * (1 - share);
      weight = weight * share + (1 - share);
      return mean / weight;
    });
  }

  /** Columns whose x only grows: rows that a resumed run did again take the place of the first ones. */
  function ascending(columns) {
    const kept = columns.map(() => []);
    const [x] = kept;
    columns[0].forEach((value, row) => {
      while (x.length && x[x.length - 1] >= value) kept.forEach((column) => column.pop());
      kept.forEach((column, i) => column.push(columns[i][row]));
    });
    return kept;
  }

  const positive = (column) => column.map((value) => (value > 0 ? value : null));

  /** The lower edge of a band on a logarithmic axis: what is not above zero lies at the least value of the line. */
  function clipped(low, y) {
    const least = Math.min(...y.filter((value) => value > 0));
    return low.map((value) => (value > 0 || value === null ? value : least));
  }

  /** The lines to draw for the series: [{series, role, columns: [x, y]}]; role: line, raw, low or high. */
  function linesOf({ series, smoothing, log }) {
    const lines = [];
    for (const each of series) {
      const banded = Boolean(each.low);
      const [x, y, low, high] = ascending(banded ? [each.x, each.y, each.low, each.high] : [each.x, each.y]);
      const add = (role, column) => lines.push({ series: each, role, columns: [x, log ? positive(column) : column] });
      const smoothed = smoothing > 0 && y.length > 2;
      if (banded) {
        add("high", smoothed ? smooth(high, smoothing) : high);
        const edge = log ? clipped(low, y) : low;
        add("low", smoothed ? smooth(edge, smoothing) : edge);
      } else if (smoothed) {
        add("raw", y);
      }
      add("line", smoothed ? smooth(y, smoothing) : y);
    }
    return lines;
  }

  const joined = (lines) => (lines.length ? uPlot.join(lines.map(({ columns }) => columns)) : [[], []]);

  /** The value at a place, or the one before it where the line has no point there; null where that is no number. */
  function before(column, index) {
    for (let i = Math.min(index, column.length - 1); i >= 0; i--) {
      if (column[i] !== undefined) return column[i];
    }
    return null;
  }

  // ------------------------------------------------------------------------------------------------------------ drawing

  const token = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--chart-${name}`).trim();
  const colour = (slot) => token(slot % COLOURS);
  const dashOf = (series) => DASHES[(series.dash ?? Math.floor(series.slot / 4)) % DASHES.length];

  function faded(name, share) {
    const hex = name.slice(1);
    const [r, g, b] = [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16));
    return `rgba(${r}, ${g}, ${b}, ${share})`;
  }

  function plotSeries({ series, role, columns }) {
    const stroke = {
      line: () => colour(series.slot),
      raw: () => faded(colour(series.slot), 0.35),
      low: () => "transparent",
      high: () => "transparent",
    }[role];
    const line = role === "line";
    return {
      label: series.label,
      stroke,
      width: line ? 1.75 : 1,
      dash: line ? dashOf(series) : [],
      points: { show: line && columns[0].length <= SHORT_CURVE, size: 4.5, fill: stroke },
    };
  }

  function bandsOf(lines) {
    const bands = [];
    lines.forEach(({ role, series }, i) => {
      if (role === "high") bands.push({ series: [i + 1, i + 2], fill: () => faded(colour(series.slot), 0.16) });
    });
    return bands;
  }

  function axis(unit, side) {
    return {
      stroke: () => token("muted"),
      grid: { stroke: () => token("grid"), width: 1 },
      ticks: { stroke: () => token("grid"), width: 1, size: 4 },
      font: "11px system-ui, sans-serif",
      ...side,
      ...(unit?.startsWith("bytes") ? { incrs: BINARY_STEPS } : {}),
      ...(unit === undefined
        ? {}
        : {
            values: (_, splits) =>
              splits.map((value) => (value === null ? "" : format(value, titled(unit) ? "" : unit, 3))),
          }),
    };
  }

  const BINARY_STEPS = Array.from({ length: 60 }, (_, i) => 2 ** i);
  const yWidth = (_, values) => 14 + 6.4 * Math.max(2, ...(values ?? []).map((text) => text.length));

  function yRange(log) {
    return (_, low, high) => {
      if (low === null || high === null) return log ? [0.1, 1] : [0, 1];
      if (log) return [low / 1.15, high * 1.15];
      const margin = (high - low || Math.abs(high) || 1) * 0.06;
      return [low >= 0 && low - margin < 0 ? 0 : low - margin, high + margin];
    };
  }

  /** Of a logarithmic axis: powers of ten; with few of them, also 2 and 5 times these. */
  function logSplits(plot, _, low, high) {
    const powers = Math.log10(high / low);
    const every = Math.max(Math.ceil(powers / (plot.bbox.height / devicePixelRatio / 30)), 1);
    const splits = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      if (power % every === 0) splits.push(...(powers < 3 ? [1, 2, 5] : [1]).map((times) => times * 10 ** power));
    }
    return splits.filter((split) => split >= low && split <= high);
  }

  function xRange(_, low, high) {
    if (low === null || high === null) return [0, 1];
    return low === high ? [low - 1, high + 1] : [low, high];
  }

  function drawMark(ctx, x, { top, height }, ratio, strength) {
    ctx.globalAlpha = strength;
    ctx.lineWidth = ratio;
    ctx.setLineDash([3 * ratio, 3 * ratio]);
    ctx.beginPath();
    ctx.moveTo(x, top);
    ctx.lineTo(x, top + height);
    ctx.stroke();
    ctx.globalAlpha = 1;
    ctx.beginPath(); // a small triangle that points at it
    ctx.moveTo(x - 3.5 * ratio, top - 5 * ratio);
    ctx.lineTo(x + 3.5 * ratio, top - 5 * ratio);
    ctx.lineTo(x, top);
    ctx.fill();
  }

  /** The vertical lines with their names; a name for which there is no room is left out, the ordinary ones first. */
  function drawMarks(plot, marks) {
    const { ctx, bbox } = plot;
    const ratio = devicePixelRatio;
    const right = bbox.left + bbox.width;
    const shown = marks
      .map(({ x, kind }) => ({ at: Math.round(plot.valToPos(x, "x", true)), kind }))
      .filter(({ at }) => at >= bbox.left - 1 && at <= right + 1);
    const taken = shown.map(({ at }) => [at - 4 * ratio, at + 4 * ratio]);
    ctx.save();
    ctx.font = `${10 * ratio}px system-ui, sans-serif`;
    ctx.textAlign = "left"; // the axes have set others
    ctx.textBaseline = "alphabetic";
    for (const { at, kind } of shown.toSorted((a, b) => (b.kind in MARK_COLOURS) - (a.kind in MARK_COLOURS))) {
      ctx.strokeStyle = ctx.fillStyle = token(MARK_COLOURS[kind] ?? "mark");
      drawMark(ctx, at, bbox, ratio, kind in MARK_COLOURS ? 0.9 : shown.length > MANY_MARKS ? 0.15 : 0.5);
      const name = kind.replaceAll("_", " ");
      const width = ctx.measureText(name).width;
      const left = [at + 6 * ratio, at - 6 * ratio - width].find(
        (x) => x >= bbox.left && x + width <= right && !taken.some(([from, to]) => x < to && x + width > from),
      );
      if (left === undefined) continue;
      ctx.fillText(name, left, bbox.top - 4 * ratio);
      taken.push([left - 6 * ratio, left + width + 6 * ratio]);
    }
    ctx.restore();
  }

  // ------------------------------------------------------------------------------------------------------------- legend

  function node(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  /** A short piece of the line of `series`, as an SVG. */
  function swatch(series) {
    const space = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(space, "svg");
    svg.setAttribute("viewBox", "0 0 22 8");
    svg.setAttribute("class", `chart-swatch chart-slot-${series.slot % COLOURS}`);
    svg.setAttribute("aria-hidden", "true");
    const line = document.createElementNS(space, "line");
    for (const [name, value] of Object.entries({ x1: 0, x2: 22, y1: 4, y2: 4 })) line.setAttribute(name, value);
    line.setAttribute("stroke-dasharray", dashOf(series).join(" "));
    svg.append(line);
    return svg;
  }

  class Chart {
    constructor(element, options) {
      this.options = { unit: "", log: false, smoothing: 0, marks: [], height: 210, ...options };
      this.hidden = new Set();
      this.zoomed = null;
      this.element = element;
      element.classList.add("chart");
      this.head = node("div", "chart-head");
      this.at = node("span", "chart-at");
      const { title, unit } = this.options;
      const heading = node("h3", "chart-title", title);
      if (titled(unit)) heading.append(node("span", "chart-unit", unit));
      this.head.append(heading, this.at);
      this.canvas = node("div", "chart-canvas");
      this.canvas.tabIndex = 0;
      this.canvas.setAttribute("role", "img");
      this.legend = node("div", "chart-legend");
      element.replaceChildren(this.head, this.canvas, this.legend);
      this.canvas.addEventListener("keydown", (event) => this._key(event));
      this._build();
      this.sizes = new ResizeObserver(() => this._fit());
      this.sizes.observe(this.canvas);
      charts.add(this);
    }

    /** Draws with other options; what is not named stays. */
    set(options) {
      const { log, x } = this.options;
      Object.assign(this.options, options);
      const lines = linesOf(this.options);
      const shape = (all) =>
        all
          .map(
            ({ series, role, columns }) => `${series.label}/${series.slot}/${role}/${columns[0].length <= SHORT_CURVE}`,
          )
          .join("\n");
      const same =
        shape(lines) === shape(this.lines) &&
        log === this.options.log &&
        x.kind === this.options.x.kind &&
        x.label === this.options.x.label;
      if (!same) {
        if (x.label !== this.options.x.label) this.zoomed = null;
        this._build();
        return;
      }
      this.lines = lines;
      this.plot.setData(joined(lines), false);
      this._scale();
      this._values(null);
    }

    /** Shows x in [from, to]; null for all of it. Says so to nobody. */
    zoom(range) {
      this.zoomed = range;
      this._scale();
    }

    /** Draws it so many pixels high. */
    resize(height) {
      this.options.height = height;
      this.plot.setSize({ width: this.canvas.clientWidth, height });
    }

    destroy() {
      charts.delete(this);
      this.sizes.disconnect();
      this.plot.destroy();
      this.element.replaceChildren();
    }

    /** The plot with its title and legend, as a PNG in a data URL. */
    png() {
      const [ratio, source] = [devicePixelRatio, this.plot.ctx.canvas];
      const shown = this.lines.filter(({ role, series }) => role === "line" && !this.hidden.has(series.label));
      const picture = document.createElement("canvas");
      const row = 18 * ratio;
      picture.width = source.width + 16 * ratio;
      picture.height = source.height + 34 * ratio + row * shown.length;
      const ctx = picture.getContext("2d");
      ctx.fillStyle = token("paper");
      ctx.fillRect(0, 0, picture.width, picture.height);
      ctx.fillStyle = token("ink");
      ctx.font = `600 ${14 * ratio}px system-ui, sans-serif`;
      ctx.fillText(
        titled(this.options.unit) ? `${this.options.title} (${this.options.unit})` : this.options.title,
        10 * ratio,
        20 * ratio,
      );
      ctx.drawImage(source, 8 * ratio, 28 * ratio);
      ctx.font = `${12 * ratio}px system-ui, sans-serif`;
      shown.forEach(({ series }, i) => {
        const y = source.height + 34 * ratio + row * (i + 0.5);
        ctx.strokeStyle = colour(series.slot);
        ctx.lineWidth = 2 * ratio;
        ctx.setLineDash(dashOf(series).map((part) => part * ratio));
        ctx.beginPath();
        ctx.moveTo(12 * ratio, y);
        ctx.lineTo(36 * ratio, y);
        ctx.stroke();
        ctx.fillStyle = token("ink");
        ctx.fillText(series.label, 42 * ratio, y + 4 * ratio);
      });
      return picture.toDataURL("image/png");
    }

    redraw() {
      this.plot.redraw(false);
    }

    _build() {
      this.plot?.destroy();
      this.lines = linesOf(this.options);
      const { x, log, unit, group, height } = this.options;
      this.plot = new uPlot(
        {
          width: Math.max(this.canvas.clientWidth, 120),
          height,
          padding: [14, 20, 0, 0],
          legend: { show: false },
          scales: {
            x: { time: x.kind === "clock", range: xRange },
            y: { distr: log ? 3 : 1, range: yRange(log) },
          },
          series: [{}, ...this.lines.map(plotSeries)],
          bands: bandsOf(this.lines),
          axes: [
            axis(undefined, {
              size: 26,
              space: 64,
              ...(x.kind === "clock" ? {} : { values: (_, splits) => splits.map((value) => formatX(value, x.kind)) }),
            }),
            axis(unit, { size: yWidth, space: 34, ...(log ? { splits: logSplits } : {}) }),
          ],
          cursor: {
            y: false,
            points: { size: (_, i) => (this.lines[i - 1]?.role === "line" ? 7 : 0) },
            drag: { x: true, y: false, setScale: false },
            bind: { dblclick: () => () => this._choose(null) },
            ...(group ? { sync: { key: group, scales: ["x", null] } } : {}),
          },
          hooks: {
            drawClear: [(plot) => drawMarks(plot, this.options.marks)],
            setCursor: [(plot) => this._values(plot.cursor.idx)],
            setSelect: [(plot) => this._selected(plot)],
          },
        },
        joined(this.lines),
        this.canvas,
      );
      this.lines.forEach(({ series }, i) => {
        if (this.hidden.has(series.label)) this.plot.setSeries(i + 1, { show: false });
      });
      this._scale();
      this._rows();
      this._values(null);
    }

    _fit() {
      const width = this.canvas.clientWidth;
      if (width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: this.options.height });
    }

    _scale() {
      const x = this.plot.data[0];
      const whole = x.length ? [x[0], x[x.length - 1]] : [0, 1];
      const [min, max] = this.zoomed ?? whole;
      this.plot.setScale("x", { min, max });
    }

    _selected(plot) {
      const { left, width } = plot.select;
      if (width < 4) return;
      const range = [plot.posToVal(left, "x"), plot.posToVal(left + width, "x")];
      plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
      this._choose(range);
    }

    _choose(range) {
      const { group } = this.options;
      for (const chart of charts) {
        if (chart === this || (group && chart.options.group === group)) chart.zoom(range);
      }
      this.options.onZoom?.(range);
    }

    /** Arrows move the cursor, + and - zoom around it, Escape shows all. */
    _key(event) {
      const plot = this.plot;
      const { min, max } = plot.scales.x;
      const width = plot.over.clientWidth;
      const left = plot.cursor.left >= 0 ? plot.cursor.left : width / 2;
      const centre = plot.posToVal(left, "x");
      const move = (by) =>
        plot.setCursor({ left: Math.min(Math.max(left + by, 0), width), top: plot.over.clientHeight / 2 });
      const around = (share) => this._choose([centre - (centre - min) * share, centre + (max - centre) * share]);
      const actions = {
        ArrowLeft: () => move(-width / 50),
        ArrowRight: () => move(width / 50),
        "+": () => around(0.5),
        "-": () => around(2),
        Escape: () => this._choose(null),
      };
      if (!(event.key in actions) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      actions[event.key]();
    }

    _rows() {
      this.values = new Map();
      const rows = this.lines.filter(({ role }) => role === "line").map(({ series }) => this._row(series));
      this.legend.replaceChildren(...rows);
    }

    _row(series) {
      const row = node("button", "chart-key");
      row.type = "button";
      row.setAttribute("aria-pressed", String(!this.hidden.has(series.label)));
      row.title = `Hide or show ${series.label}`;
      const value = node("span", "chart-value");
      this.values.set(series.label, value);
      row.append(swatch(series), node("span", "chart-name", series.label), value);
      row.addEventListener("click", () => {
        const show = this.hidden.delete(series.label);
        if (!show) this.hidden.add(series.label);
        row.setAttribute("aria-pressed", String(show));
        this.lines.forEach((line, i) => {
          if (line.series.label === series.label) this.plot.setSeries(i + 1, { show });
        });
      });
      return row;
    }

    /** Writes the values at the cursor into the legend; the last ones where there is no cursor. */
    _values(index) {
      if (!this.values) return;
      const data = this.plot.data;
      const { x, unit, title, marks } = this.options;
      const at = index ?? data[0].length - 1;
      this.lines.forEach(({ role, series }, i) => {
        if (role !== "line") return;
        const raw = this.lines[i - 1]?.role === "raw" ? ` (${format(before(data[i], at), unit)})` : ""; // as in the file
        this.values.get(series.label).textContent = format(before(data[i + 1], at), unit) + raw;
      });
      const named = index === null || index === undefined ? null : this._nearMark(marks);
      this.at.textContent = named ?? (data[0].length ? `${x.label} ${formatX(data[0][at], x.kind)}` : "");
      const texts = [...this.values].map(([label, value]) => `${label} ${value.textContent}`);
      this.canvas.setAttribute(
        "aria-label",
        `${title}, ${this.at.textContent}: ${texts.join(", ") || "no values yet"}`,
      );
    }

    _nearMark(marks) {
      const left = this.plot.cursor.left;
      const near = marks.find((mark) => Math.abs(this.plot.valToPos(mark.x, "x") - left) < 5);
      return near ? near.label : null;
    }
  }

  const redrawAll = () => charts.forEach((chart) => chart.redraw());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
  new MutationObserver(redrawAll).observe(document.documentElement, { attributeFilter: ["data-theme"] });

  return { create: (element, options) => new Chart(element, options), format, formatX, duration, smooth, swatch };
})();
