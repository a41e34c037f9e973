// Building the page. Text from outside goes into text nodes and attributes alone, so nothing in it is markup.

/**
 * An element. In `properties`: `class`; `on` with listeners by event; everything else is an attribute (true: there; false, null
 * and undefined: not there). Children are nodes, texts, or lists of them; null and false are left out.
 */
export function h(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

const SVG = "http://www.w3.org/2000/svg";

/** The same for SVG. */
export function svg(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...present(children));
  return element;
}

const present = (children) =>
  children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);

/** Makes `children` all that `element` has. */
export const show = (element, ...children) => element.replaceChildren(...present(children));

/** A table with a caption for screen readers. A cell is a text or a node; of an alignment "n" it is a number. */
export function table(caption, head, rows, align = "") {
  const cell = (tag, content, i) =>
    h(tag, { class: align[i] === "n" ? "n" : null, scope: tag === "th" ? "col" : null }, content);
  return h(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    h(
      "table",
      {},
      h("caption", { class: "hidden-text" }, caption),
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          head.map((content, i) => cell("th", content, i)),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map((row) =>
          h(
            "tr",
            {},
            row.map((content, i) => cell("td", content, i)),
          ),
        ),
      ),
    ),
  );
}

/** A sentence of the page's own, with code between backticks. */
export const prose = (text) => text.split("`").map((part, i) => (i % 2 ? h("code", {}, part) : part));

/** What there is when there is nothing: a sentence, and what to do. */
export const empty = (...content) =>
  h(
    "div",
    { class: "empty" },
    content.map((part) => (typeof part === "string" ? h("p", {}, prose(part)) : part)),
  );

export const notice = (kind, ...content) =>
  h("div", { class: `notice ${kind}`, role: kind === "bad" ? "alert" : "status" }, content);

// --------------------------------------------------------------------------------------------------------------- times

const exact = (seconds) =>
  new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" });

function relative(seconds) {
  const ago = Date.now() / 1000 - seconds;
  if (Math.abs(ago) < 1.5) return "now";
  const length =
    ago >= 60 ? jaxtrainCharts.duration(ago).split(" ").slice(0, 2).join(" ") : `${Math.round(Math.abs(ago))} s`;
  return ago > 0 ? `${length} ago` : `in ${length}`;
}

/** A moment, relative to now; the exact one on hover. It goes on by itself. */
export function when(seconds) {
  if (seconds === null || seconds === undefined) return h("span", {}, "–");
  const moment = new Date(seconds * 1000);
  if (Number.isNaN(moment.getTime())) return h("span", {}, "–"); // beyond what a date can be: a damaged file
  return h("time", { datetime: moment.toISOString(), title: exact(seconds), "data-at": seconds }, relative(seconds));
}

setInterval(() => {
  for (const element of document.querySelectorAll("time[data-at]")) {
    const text = relative(Number(element.dataset.at));
    if (element.textContent !== text) element.textContent = text;
  }
}, 1000);

export const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString();

// --------------------------------------------------------------------------------------------------------------- parts

const ICONS = {
  running: "M8 3a5 5 0 1 0 .01 0z",
  waiting: "M8 2.2a5.8 5.8 0 1 0 .01 0zm0 1.8a4 4 0 1 1-.01 0zM7.3 5v3.4l2.3 1.5.7-1.1-1.6-1V5z",
  done: "M6.3 12.6 2.2 8.5l1.5-1.5 2.6 2.6 6-6.2 1.5 1.5z",
  stopped: "M4 3.5h3v9H4zm5 0h3v9H9z",
  failed: "M4.2 2.8 8 6.6l3.8-3.8 1.4 1.4L9.4 8l3.8 3.8-1.4 1.4L8 9.4l-3.8 3.8-1.4-1.4L6.6 8 2.8 4.2z",
  died: "M7 1.5h2v3.8h3.4v2H9v7.2H7V7.3H3.6v-2H7z",
  damaged: "M8 1.8 15 14H1zM7.2 6v4h1.6V6zm0 5.2v1.5h1.6v-1.5z",
};

/** The state of a run: an icon, a word and a colour. */
export function statePill(state) {
  const icon = svg(
    "svg",
    { viewBox: "0 0 16 16", "aria-hidden": "true" },
    svg("path", { d: ICONS[state] ?? ICONS.waiting, "fill-rule": "evenodd" }),
  );
  return h("span", { class: `state state-${state}` }, icon, state);
}

/** How far a run is. */
export function progress(row) {
  const share = row.last_step ? Math.min(row.step / row.last_step, 1) : 0;
  const bar = h("span", { class: "bar-fill" });
  bar.style.width = `${share * 100}%`;
  const label = row.last_step ? `${Math.floor(share * 100)} %` : "length not known";
  return h(
    "span",
    {
      class: `bar bar-${row.state}`,
      role: "progressbar",
      "aria-label": "progress",
      "aria-valuenow": Math.floor(share * 100),
      "aria-valuemin": 0,
      "aria-valuemax": 100,
      title: label,
    },
    bar,
  );
}

/** A command with a button that copies it. */
export function command(text) {
  const button = h("button", { type: "button", class: "small", on: { click: copy } }, "Copy");
  async function copy() {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code); // no permission: it is marked, so that Ctrl+C takes it
      button.textContent = "Press Ctrl+C";
    }
    setTimeout(() => (button.textContent = "Copy"), 2000);
  }
  const code = h("code", { tabindex: 0 }, text);
  return h("div", { class: "command" }, code, button);
}

/** A row of choices of which one is taken. */
export function choice(label, options, value, onChange) {
  const name = `choice-${label.replaceAll(" ", "-")}`;
  return h(
    "fieldset",
    { class: "choice" },
    h("legend", {}, label),
    options.map(([key, text]) =>
      h(
        "label",
        {},
        h("input", { type: "radio", name, value: key, checked: key === value, on: { change: () => onChange(key) } }),
        h("span", {}, text),
      ),
    ),
  );
}

export function toggle(text, checked, onChange, title) {
  const input = h("input", { type: "checkbox", checked, on: { change: () => onChange(input.checked) } });
  return h("label", { class: "toggle", title }, input, h("span", {}, text));
}

export function slider(label, value, onChange) {
  const shown = h("output", {}, value.toFixed(2));
  const input = h("input", {
    type: "range",
    min: 0,
    max: 0.99,
    step: 0.01,
    "aria-label": label,
    value,
    on: {
      input: () => {
        shown.textContent = Number(input.value).toFixed(2);
        onChange(Number(input.value));
      },
    },
  });
  return h("label", { class: "slider" }, h("span", {}, label), input, shown);
}

/** Says a sentence to a screen reader. */
export const announce = (text) => (document.getElementById("announce").textContent = text);

/** `action`, at most once in so many milliseconds, the last call always. */
export function throttled(milliseconds, action) {
  let timer = null;
  let last = 0;
  return () => {
    if (timer !== null) return;
    timer = setTimeout(
      () => {
        timer = null;
        last = Date.now();
        action();
      },
      Math.max(last + milliseconds - Date.now(), 0),
    );
  };
}
