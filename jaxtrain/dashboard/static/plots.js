// Which curves belong into one plot, what the plots are called, and their units.

const TITLES = {
  loss: ["Loss", ""],
  accuracy: ["Accuracy", "share"],
  top5: ["Top-5 accuracy", "share"],
  learning_rate: ["Learning rate", ""],
  grad_norm: ["Gradient norm", ""],
  throughput: ["Throughput", "images/s"],
  data_wait: ["Data wait, a step", "seconds"],
  flops_per_second: ["Operations of all devices", "FLOP/s"],
  mfu: ["Model FLOP utilization", "share"],
  update_norm: ["Update norm", ""],
  param_norm: ["Parameter norm", ""],
  loss_scale: ["Loss scale", ""],
  throughput_per_device: ["Throughput of a device", "images/s"],
};
const MACHINE = {
  utilization: ["Utilization", "share"],
  memory_used: ["Memory in use", "bytes"],
  temperature: ["Temperature", "°C"],
  power: ["Power", "W"],
  clock: ["Clock", "MHz"],
  memory_clock: ["Memory clock", "MHz"],
  probe_seconds: ["Probe", "seconds"],
  xids: ["Xid errors", ""],
  cpu: ["Host: processors busy", "share"],
  memory: ["Host: memory in use", "share"],
  process_cpu: ["Process: cores busy", "cores"],
  process_memory: ["Process: resident memory", "bytes"],
  disk_read: ["Disk read", "bytes/s"],
  disk_write: ["Disk written", "bytes/s"],
  network_received: ["Network received", "bytes/s"],
  network_sent: ["Network sent", "bytes/s"],
};
const PHASES = [["train", "training"], ["val", "validation"], ["test", "test"]];
const PART = /^(device|host)(\d+)\/(.+)$/;

/** Title and unit of a metric: "grad_norm" is "Gradient norm". */
export function titleOf(metric) {
  const part = PART.exec(metric);
  if (part) return MACHINE[part[3]] ?? [`${part[1]}: ${part[3].replaceAll("_", " ")}`, ""];
  return TITLES[metric] ?? [metric.replaceAll("_", " "), ""];
}

/** "validation, EMA" for ("val", "ema_loss"). */
export function lineOf(column) {
  const [phase, ...rest] = column.split("/");
  const key = rest.join("/");
  const ema = key.startsWith("ema_");
  const name = PHASES.find(([each]) => each === phase)?.[1] ?? phase;
  return { phase, metric: ema ? key.slice(4) : key, label: ema ? `${name}, EMA` : name, ema };
}

function ordered(plots) {
  const order = [...Object.keys(TITLES), ...Object.keys(MACHINE)];
  const rank = ({ key }) => (order.includes(key) ? order.indexOf(key) : order.length);
  return plots.sort((a, b) => rank(a) - rank(b) || a.title.localeCompare(b.title));
}

/**
 * The plots of a run's curves: [{key, title, unit, lines: [{column, label, slot, dash}]}].
 *
 * columns: by phase, as the server names them.
 */
export function curvePlots(columns) {
  const plots = new Map();
  PHASES.forEach(([phase], slot) => {
    for (const key of columns[phase] ?? []) {
      if (PART.test(key) || key.startsWith("time/") || key === "time") continue;
      if (key.startsWith("throughput") && phase !== "train") continue; // of an evaluation: another program
      const line = lineOf(`${phase}/${key}`);
      const [title, unit] = titleOf(line.metric);
      if (!plots.has(line.metric)) plots.set(line.metric, { key: line.metric, title, unit, lines: [] });
      plots.get(line.metric).lines.push({ column: `${phase}/${key}`, label: line.label, slot: line.ema ? slot + 2 : slot, dash: line.ema ? 1 : 0 });
    }
  });
  return ordered([...plots.values()]);
}

/** The plots of a run's devices and hosts: one a measure, with a line for each of them. */
export function machinePlots(columns) {
  const plots = new Map();
  for (const key of columns.train ?? []) {
    const part = PART.exec(key);
    if (!part) continue;
    const [, kind, number, measure] = part;
    const throttled = measure.startsWith("throttled_");
    const name = throttled ? "throttled" : measure;
    const [title, unit] = throttled ? ["Slowed down (1: yes)", ""] : titleOf(key);
    if (!plots.has(kind + name)) plots.set(kind + name, { key: name, title, unit, lines: [] });
    const { lines } = plots.get(kind + name);
    const label = throttled ? `${kind} ${number}, ${measure.slice(10).replaceAll("_", " ")}` : `${kind} ${number}`;
    lines.push({ column: `train/${key}`, label, slot: throttled ? lines.length : Number(number) });
  }
  return ordered([...plots.values()]);
}
