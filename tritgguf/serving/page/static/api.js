// The server, as far as the page needs it: a streamed answer, and what it says of its model.

import { eventData } from "./event_stream.js";

/** What went wrong, in words for the person in front of the page. */
export class ServerError extends Error {
  /** kind: "gone", "key", "busy", "context", "refused", "broken" or "failed". */
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

/**
 * Yield the chunks of a chat completion. Raises ServerError; an aborted signal ends it with an AbortError.
 * request: the body, key: the API key or "".
 */
export async function* streamChat(request, key, signal) {
  const response = await post("v1/chat/completions", request, key, signal);
  let ended = false;
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError("failed", `The server gave up: ${sentence(chunk.error.message)}`);
      ended ||= Boolean(chunk.choices?.[0]?.finish_reason);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ServerError || error.name === "AbortError") throw error;
    throw brokenOff();
  }
  if (!ended) throw brokenOff();
}

/** What GET /props says; raises ServerError. */
export async function fetchProperties(key) {
  const response = await reach("props", { headers: headers(key) });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

function brokenOff() {
  return new ServerError("broken", "The connection broke in the middle of the answer. What had come is kept.");
}

async function post(path, body, key, signal) {
  const options = { method: "POST", headers: headers(key), body: JSON.stringify(body), signal };
  const response = await reach(path, options);
  if (!response.ok) throw await refusal(response);
  return response;
}

function headers(key) {
  const authorization = key ? { Authorization: `Bearer ${key}` } : {};
  return { "Content-Type": "application/json", ...authorization };
}

async function reach(path, options) {
  try {
    return await fetch(path, { ...options, credentials: "omit", referrerPolicy: "no-referrer" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("gone", "The server does not answer. Is tritgguf serve still running?");
  }
}

async function refusal(response) {
  const error = await response.json().then((body) => body.error ?? {}).catch(() => ({}));
  const said = sentence(error.message);
  if (response.status === 401) {
    return new ServerError("key", "The server wants another API key. Enter it in the settings.");
  }
  if (error.code === "shutting_down") return new ServerError("gone", "The server is shutting down.");
  if (response.status === 503 || response.status === 429) {
    const seconds = Number(response.headers.get("Retry-After"));
    const when = seconds > 0 ? `in ${seconds} ${seconds === 1 ? "second" : "seconds"}` : "in a moment";
    return new ServerError("busy", `The server is busy: its queue is full. Try again ${when}.`);
  }
  if (error.code === "context_length_exceeded") {
    const remedy = "Begin a new conversation, or write something shorter: this message is then left out.";
    return new ServerError("context", `This no longer fits into the model’s context. ${remedy} (${said})`);
  }
  if (response.status < 500) return new ServerError("refused", `The server refused the message: ${said}`);
  return new ServerError("failed", `The server failed (${response.status}): ${said}`);
}

function sentence(message) {
  const text = String(message ?? "it gave no reason").trim();
  return /[.!?]$/.test(text) ? text : `${text}.`;
}
