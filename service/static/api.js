// The service's HTTP interface: the key, problems in plain words, uploads that tell their progress, a job's events.

const KEY = "hypersam-key";
const RECONNECT = 1500; // milliseconds before a broken stream of events is taken up again
const MOST_WAIT = 30_000; // milliseconds that a request waits by itself to be sent again

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

const WORDS = {
  unauthorized: "This service asks for an API key. Enter yours at the top of the page.",
  forbidden: "The API key does not open this",
  rate_limited: "Too many requests",
  overloaded: "The service has too much to do",
  unavailable: "Something that the service needs is missing",
  upload_too_large: "The file is too large for this service",
  image_too_large: "The picture is too large for this service",
  bad_image: "The picture cannot be read",
  bad_prompt: "The model does not take this prompt",
  unsupported_prompt: "This sort of model cannot be asked so",
  name_taken: "The name is in use",
  not_a_checkpoint: "This file is no checkpoint",
  unsafe_checkpoint: "The file holds more than tensors, and is not opened",
  unknown_family: "No supported model has these tensors",
  layout_mismatch: "The tensors are not those of the model they look like",
  unknown_model: "The model is gone",
};

/** An answer that is an error. `message` is for people, `code` for programs, `wait` the milliseconds of Retry-After. */
export class Problem extends Error {
  constructor(status, code, detail, wait) {
    const words = WORDS[code];
    super(code === "unauthorized" ? words : words && detail ? `${words}: ${detail}` : words || detail);
    Object.assign(this, { status, code, wait });
  }

  /** Whether it is the picture that is refused, and will be every time. */
  get refusesPicture() {
    return this.status === 413 || this.code === "bad_image";
  }

  /** Whether the service says when to ask again, and that is soon. */
  get passes() {
    return this.wait <= MOST_WAIT;
  }
}

function problemOf(status, text, retryAfter) {
  const wait = retryAfter ? 1000 * retryAfter : undefined; // NaN where it is a date, which the service does not send
  try {
    const { code, detail } = JSON.parse(text);
    return new Problem(status, code, detail, wait);
  } catch {
    return new Problem(status, "error", `The service answered with status ${status}.`, wait);
  }
}

const unreachable = () => new Problem(0, "unreachable", "The service does not answer. Is it still running?");
const aborted = () => new DOMException("given up", "AbortError");
export const isAbort = (error) => error?.name === "AbortError";

function headers(more = {}) {
  return key.get() ? { ...more, Authorization: `Bearer ${key.get()}` } : more;
}

/** Ask, and return the response. `body`: FormData, or anything that becomes JSON. Throws Problem, or AbortError. */
export async function ask(path, { method = "GET", body, accept, signal, more = {} } = {}) {
  const form = body instanceof FormData;
  const sent = headers({ ...more, ...(accept && { Accept: accept }), ...(body && !form && { "Content-Type": "application/json" }) });
  let response;
  try {
    response = await fetch(path, { method, signal, headers: sent, body: form || !body ? body : JSON.stringify(body) });
  } catch (error) {
    throw isAbort(error) ? error : unreachable();
  }
  if (!response.ok) throw problemOf(response.status, await response.text(), response.headers.get("Retry-After"));
  return response;
}

export const askJson = async (path, options) => (await ask(path, options)).json();

/** As askJson; where the service says when to ask again, that is done once; `during(pause, problem)` awaits it. */
export async function askPatiently(path, options, during) {
  try {
    return await askJson(path, options);
  } catch (error) {
    if (!error.passes) throw error;
    await during(pause(error.wait, options.signal), error);
  }
  return askJson(path, options);
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => reject(aborted()));
  });
}

/** POST a form and tell how much of it has left (`told(sent, total)`, bytes). Only XMLHttpRequest tells that. */
export function upload(path, form, { signal, told }) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", path);
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => event.lengthComputable && told(event.loaded, event.total);
    request.onload = () =>
      request.status < 400 ? resolve(JSON.parse(request.responseText)) : reject(problemOf(request.status, request.responseText));
    request.onerror = () => reject(unreachable());
    request.onabort = () => reject(aborted());
    signal.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}

/**
 * Every state of a job until it has ended. By fetch and not EventSource, which cannot send a key. A service that does
 * not answer, or that says when to ask again, is asked for as long as it takes: `waits(problem, wait)` is told each time.
 */
export async function* watch(id, signal, waits) {
  let last;
  for (;;) {
    let wait = RECONNECT;
    try {
      const response = await ask(`jobs/${id}/events`, { signal, more: last ? { "Last-Event-ID": last } : {} });
      if (response.status === 204) return;
      for await (const event of eventsOf(response.body)) {
        last = event.id ?? last;
        if (event.event !== "job") continue;
        const job = JSON.parse(event.data);
        yield job;
        if (!["queued", "running"].includes(job.state)) return;
      }
    } catch (error) {
      if (isAbort(error) || (error.status && !error.passes)) throw error;
      if (error instanceof Problem) {
        if (error.passes) wait = Math.max(error.wait, RECONNECT);
        waits(error, wait);
        last = undefined; // the state is sent again, changed or not, in place of what was said of the waiting
      }
    }
    await pause(wait, signal);
  }
}

async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (text + value).replaceAll("\r\n", "\n").split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = block.split("\n").filter((line) => line && !line.startsWith(":"));
      yield Object.fromEntries(fields.map((line) => [line.split(":", 1)[0], line.slice(line.indexOf(":") + 1).trimStart()]));
    }
  }
}
