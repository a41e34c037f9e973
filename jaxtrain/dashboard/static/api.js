// Asking the server. All addresses are relative, so the page works behind a prefix too.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status; // 0: no answer
  }
}

export async function get(path, params = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(params)) if (value !== null && value !== undefined && value !== "") query.set(name, value);
  const text = query.toString();
  let answer;
  try {
    answer = await fetch(text ? `${path}?${text}` : path, { signal: AbortSignal.timeout(30000) });
  } catch {
    throw new ApiError(0, "The server does not answer.");
  }
  if (answer.ok) return answer.json();
  const { error } = await answer.json().catch(() => ({}));
  throw new ApiError(answer.status, error ?? `The server answered ${answer.status}.`);
}

export const runPath = (id) => `api/runs/${encodeURIComponent(id)}`;

/** What a person can do about an error. */
export function advice(error) {
  if (!(error instanceof ApiError)) return [`Something in this page broke: ${error.message}`, "Reload it."];
  if (error.status === 401) {
    return ["This browser has not shown the token.", "Open the address that `jaxtrain dashboard` printed when it started: the token is part of it."];
  }
  if (error.status === 404) return ["This run is not there.", "It was deleted, renamed or moved out of the directory that is watched."];
  if (error.status === 0) return ["The server does not answer.", "Is `jaxtrain dashboard` still running, and the ssh tunnel up? This page tries again."];
  return [error.message, "This page tries again."];
}
