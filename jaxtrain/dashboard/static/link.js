// The view is in the address behind "#", so that a link holds it: #/run/ID?tab=logs&x=time.

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // cut in the middle
  }
}

/** {path: ["run", ID], params: URLSearchParams} of the address. */
export function read() {
  const [path, query = ""] = location.hash.slice(1).split("?");
  return { path: path.split("/").filter(Boolean).map(decoded), params: new URLSearchParams(query) };
}

/** The address of a view. Parameters that are null, false or "" are left out. */
export function href(path, params = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(params)) {
    if (value !== null && value !== undefined && value !== false && value !== "") query.set(name, value);
  }
  const text = query.toString().replaceAll("%2C", ",").replaceAll("%2F", "/");
  return `#/${path.map(encodeURIComponent).join("/")}${text ? `?${text}` : ""}`;
}

/** Sets parameters of this view in the address, without a new entry of the browser's history. */
export function change(params) {
  const { path, params: now } = read();
  history.replaceState(null, "", href(path, { ...Object.fromEntries(now), ...params }));
}
