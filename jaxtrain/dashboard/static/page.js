// The page: which view the address means, the line that says whether the server answers, the theme and the keyboard.

import { advice } from "./api.js";
import { Compare } from "./compare.js";
import { clock, h, prose } from "./dom.js";
import { read } from "./link.js";
import { Overview } from "./overview.js";
import { RunView } from "./run.js";
import { store } from "./store.js";

const main = document.getElementById("main");
const connection = document.getElementById("connection");
let view = null;
let shown = null; // the address without its parameters

function open() {
  const { path, params } = read();
  const address = path[0] === "compare" ? `compare ${params.get("runs")}` : path.join("/");
  if (address === shown) return view.follow?.(params);
  const first = shown === null;
  shown = address;
  view?.close();
  store.watch(path[0] === "run" ? path[1] : null);
  main.className = path[0] ?? "overview";
  if (path[0] === "run" && path[1]) view = new RunView(main, path[1]);
  else if (path[0] === "compare") view = new Compare(main);
  else view = new Overview(main);
  if (!first) {
    scrollTo(0, 0);
    main.focus({ preventScroll: true });
  }
}

function showConnection() {
  const { since, error, server } = store;
  connection.className = `connection ${since === null ? "live" : "stale"}`;
  connection.textContent = since === null ? "live" : `stale since ${clock(since)}, trying again`;
  if (server) {
    document.getElementById("root").textContent = server.root;
    document.getElementById("root").title = `${server.root} on ${server.host}`;
  }
  document.getElementById("trouble")?.remove();
  if (error && (!store.loaded || error.status === 401)) {
    const [what, todo] = advice(error);
    main.before(h("div", { class: "notice bad", id: "trouble", role: "alert" }, h("b", {}, what), " ", prose(todo)));
    main.querySelector(".loading")?.remove();
  }
}

const theme = document.getElementById("theme");

function nameTheme() {
  const dark = document.documentElement.dataset.theme === "dark";
  theme.textContent = dark ? "☀" : "☾";
  theme.setAttribute("aria-label", dark ? "Light colours" : "Dark colours");
  theme.title = theme.getAttribute("aria-label");
}

theme.addEventListener("click", () => {
  const chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = chosen;
  try {
    localStorage.setItem("jaxtrain-theme", chosen);
  } catch {
    // storage is off: it holds until the page is left
  }
});

document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address behind "#" is the view's
  main.focus();
});

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input:not([type=checkbox], [type=radio], [type=range]), select, textarea");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
    const field = main.querySelector("input[type=search]");
    if (field?.checkVisibility()) {
      event.preventDefault();
      field.focus();
    }
  } else if (event.key === "Escape" && event.target.matches("input[type=search]")) {
    event.target.value = "";
    event.target.dispatchEvent(new Event("input"));
    event.target.blur();
  }
});

new MutationObserver(nameTheme).observe(document.documentElement, { attributeFilter: ["data-theme"] });
nameTheme();
store.addEventListener("connection", showConnection);
store.addEventListener("rows", showConnection);
addEventListener("hashchange", open);
store.start();
open();
