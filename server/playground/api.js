// The HTTP API as this page uses it: submit a job, then follow its events until it ends.

const MAX_ATTEMPTS = 10; // to reconnect to a broken stream of events
const RETRY_INTERVAL_MS = 1000;
const KEY = "glimmer-api-key";

/** An error response with the API's message. `status` is 0 without a response. */
export class ApiError extends Error {
  constructor(status, { message, param = null, code = null }) {
    super(message);
    Object.assign(this, { status, param, code });
  }
}

export const apiKey = () => sessionStorage.getItem(KEY) ?? "";

export function setApiKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** Resolves to the names of the models, the default first. */
export async function models() {
  const list = await (await send("v1/models")).json();
  return list.data.map((model) => model.id);
}

/**
 * Starts a job with the `fields` of a request; `sources`, images as Blobs, make it an edit. Resolves to the job.
 */
export async function start(fields, sources) {
  const body = { ...fields, partial_images: 2, return_plan: true, response_format: "b64_json" };
  const headers = { prefer: "respond-async" };
  if (sources.length) {
    const form = new FormData();
    for (const [name, value] of Object.entries(body)) form.append(name, String(value));
    for (const source of sources) form.append("image[]", source, "source");
    return (await send("v1/images/edits", { method: "POST", headers, body: form })).json();
  }
  headers["content-type"] = "application/json";
  return (await send("v1/images/generations", { method: "POST", headers, body: JSON.stringify(body) })).json();
}

export async function cancel(jobId) {
  await send(`v1/jobs/${jobId}`, { method: "DELETE" });
}

/**
 * Yields the events of a job as {name, data}: status, progress, partial_image, finally completed or failed. Reconnects
 * to a broken stream after an event "reconnecting"; earlier events may then repeat.
 */
export async function* follow(jobId) {
  for (let attempt = 1; ; attempt++) {
    try {
      for await (const event of events(await send(`v1/jobs/${jobId}/events`))) {
        if (event.data.error && !event.name) throw new ApiError(0, event.data.error);
        yield event;
        if (event.name === "completed" || event.name === "failed") return;
      }
    } catch (error) {
      const isFinal = error instanceof ApiError && error.status >= 400 && error.status < 500;
      if (isFinal || attempt === MAX_ATTEMPTS) throw error;
    }
    if (attempt === MAX_ATTEMPTS) throw new ApiError(0, { message: "The connection to the server was lost." });
    yield { name: "reconnecting", data: {} };
    await new Promise((resolve) => setTimeout(resolve, RETRY_INTERVAL_MS));
  }
}

export function toBlob(base64, format) {
  return new Blob([Uint8Array.from(atob(base64), (character) => character.charCodeAt(0))], { type: `image/${format}` });
}

async function send(path, options = {}) {
  const headers = new Headers(options.headers);
  if (/[^\x21-\x7e]/.test(apiKey())) {
    throw new ApiError(401, { message: "An API key has only printable ASCII characters and no spaces." });
  }
  if (apiKey()) headers.set("authorization", `Bearer ${apiKey()}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new ApiError(0, { message: "The server cannot be reached." });
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null); // a proxy may respond with anything
  throw new ApiError(response.status, body?.error ?? { message: `The server responded with HTTP ${response.status}.` });
}

async function* events(response) {
  let name = "";
  for await (const line of lines(response.body)) {
    if (line.startsWith("event: ")) name = line.slice(7);
    else if (line.startsWith("data: ")) {
      yield { name, data: JSON.parse(line.slice(6)) };
      name = "";
    }
  }
}

/** Yields lines. They may be many megabytes long in small chunks, so the chunks are joined once. */
async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let chunks = []; ; ) {
      const { done, value } = await reader.read();
      if (done) return;
      const [first, ...others] = value.split("\n");
      chunks.push(first);
      for (const other of others) {
        yield chunks.join("");
        chunks = [other];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
