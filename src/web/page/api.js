// The server's routes: RunPod's own, and the one that reads a picture's request.

import { ask, element } from "./dom.js";

const meta = (name) => document.querySelector(`meta[name="${name}"]`).content;
const ENDPOINT = meta("endpoint");
/** Where programs send requests. */
export const API = meta("api");
export const IS_LOCAL = ENDPOINT === "local";

const FINAL = new Set(["COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]);
const FIRST_PAUSE = 1000, LONGEST_PAUSE = 15000; // milliseconds between calls that fail

/** The server cannot be reached, or cannot answer now; `seconds` is how long it wants to be left alone. */
export class Unanswered extends Error {
  constructor(message, seconds = 0) {
    super(message);
    this.seconds = seconds;
  }
}

/** The server answered that it will not do it; `status` is HTTP's. */
export class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

let token = readToken();

/** The token of the address, which is kept for this tab and taken out of the address bar. */
function readToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  try {
    if (given) sessionStorage.setItem("token", given);
    if (given) history.replaceState(null, "", location.pathname + location.search);
    return given ?? sessionStorage.getItem("token");
  } catch {
    return given; // a browser that keeps nothing
  }
}

/** @type {Promise<void> | null} */
let asking = null;

function askForToken() {
  asking ??= (async () => {
    const input = element("input", { type: "password", autocomplete: "current-password", required: true, id: "token" });
    const why = token ? "The server does not take this token." : "The server was started with a token (--token).";
    await ask("Token", [element("p", {}, why), element("label", { htmlFor: "token" }, "Token"), input],
      [["Go on", true, "primary"]], { closable: false });
    token = input.value.trim();
    try { sessionStorage.setItem("token", token); } catch { /* it is asked for again after a reload */ }
    asking = null;
  })();
  return asking;
}

/** One call; raises Unanswered or Refusal. A 401 asks for the token and calls again. */
async function call(path, options = {}) {
  for (;;) {
    const used = token;
    let answer;
    try {
      const headers = { ...options.headers, ...(used ? { Authorization: `Bearer ${used}` } : {}) };
      answer = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch {
      throw new Unanswered("The server does not answer.");
    }
    if (answer.status === 401) {
      if (used === token) await askForToken();
      continue;
    }
    const body = await answer.json().catch(() => null);
    if (answer.ok && body !== null) return body;
    if (answer.ok || answer.status === 429 || answer.status >= 500) {
      throw new Unanswered(`The server cannot answer now (HTTP ${answer.status}).`,
        Number(answer.headers.get("Retry-After")) || 0);
    }
    throw new Refusal(sentence(body) ?? `The server refused with HTTP ${answer.status}.`, answer.status);
  }
}

/** What an answer that is not a success says, in the words of whoever sent it. */
function sentence(body) {
  const said = body?.error?.message ?? body?.error ?? body?.detail ?? body?.message;
  return typeof said === "string" ? said : null;
}

const route = (name) => `v2/${ENDPOINT}/${name}`;
const post = (path, body) => call(path, {
  method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
});

/** Queue a request; the job's id. */
export const run = async (input) => (await post(route("run"), { input })).id;

export const cancel = (id) => post(route(`cancel/${encodeURIComponent(id)}`), {});

/** What the request is that this picture's file carries; raises Refusal where it carries none. */
export const parameters = (file) => call("parameters", {
  method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: file,
});

const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/**
 * Ask for a job's status until it is final, and give that; what comes before goes to `onStatus`. Calls that fail are
 * made again, ever later; `onTrouble` is told of each, and gets null when the server answers again. Raises Refusal
 * where the server knows no such job.
 */
export async function follow(id, onStatus = () => {}, onTrouble = () => {}) {
  let pause = FIRST_PAUSE;
  for (;;) {
    try {
      const status = await call(route(`status/${encodeURIComponent(id)}`));
      onTrouble(null);
      if (FINAL.has(status.status)) return status;
      onStatus(status);
      pause = FIRST_PAUSE;
      // A deployed endpoint is asked less often: its answers come over the network, and its calls are counted.
      await sleep(status.status === "IN_PROGRESS" && IS_LOCAL ? 250 : 1000);
    } catch (error) {
      if (!(error instanceof Unanswered)) throw error;
      const wait = Math.max(pause, error.seconds * 1000);
      onTrouble(error, wait / 1000);
      await sleep(wait);
      pause = Math.min(pause * 2, LONGEST_PAUSE);
    }
  }
}

/**
 * The answer of a job that is final, as the worker gave it, or its faults.
 * @returns {{output: any} | {error: string, errors: {field: string, message: string}[]}}
 */
export function answerOf(status, fieldNames) {
  const output = status.output;
  if (status.status === "COMPLETED" && output?.status !== "error") return { output };
  const error = String(status.error ?? output?.error ?? `The job ended as ${status.status}.`);
  return { error, errors: output?.errors ?? faultsIn(error, fieldNames) };
}

/** The faults that an error's one sentence names: RunPod passes on no more of an answer that failed. */
function faultsIn(error, fieldNames) {
  if (!error.startsWith("invalid_request: ")) return [];
  const start = new RegExp(`(?:^|; )((?:${fieldNames.join("|")})(?:\\.\\w+)*): `);
  const parts = error.slice("invalid_request: ".length).split(start);
  const faults = [];
  for (let i = 1; i < parts.length; i += 2) faults.push({ field: parts[i], message: parts[i + 1] });
  return faults;
}
