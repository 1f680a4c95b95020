import assert from "node:assert/strict";
import test, { afterEach } from "node:test";
import { ServerError, fetchProperties, streamChat } from "../../../tritgguf/serving/page/static/api.js";

const original = globalThis.fetch;
afterEach(() => { globalThis.fetch = original; });

/** Let fetch answer with a Response, or fail with an error; return the list of its calls. */
function answerWith(response) {
  const calls = [];
  globalThis.fetch = async (path, options) => {
    calls.push({ path, ...options });
    if (response instanceof Error) throw response;
    return response;
  };
  return calls;
}

const collect = async (stream) => {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
};
const events = (...data) => new Response(data.map((each) => `data: ${each}\n\n`).join(""));
const chat = () => collect(streamChat({ stream: true }, "key", undefined));
const refusal = (status, error, headers) => new Response(JSON.stringify({ error }), { status, headers });

test("chunks are yielded until [DONE], and the key is sent", async () => {
  const chunk = { choices: [{ delta: { content: "x" }, finish_reason: "stop" }] };
  const calls = answerWith(events(JSON.stringify(chunk), "[DONE]"));
  assert.deepEqual(await chat(), [chunk]);
  assert.equal(calls[0].headers.Authorization, "Bearer key");
  assert.equal(calls[0].credentials, "omit");
});

const FAULTS = [
  ["gone", new TypeError("fetch failed"), /does not answer/],
  ["gone", refusal(503, { message: "stopping", code: "shutting_down" }), /shutting down/],
  ["busy", refusal(503, { message: "full" }, { "Retry-After": "4" }), /in 4 seconds/],
  ["busy", refusal(503, { message: "full" }, { "Retry-After": "1" }), /in 1 second\./],
  ["key", refusal(401, { message: "no" }), /API key/],
  ["context", refusal(400, { message: "9 tokens", code: "context_length_exceeded" }), /context.*9 tokens\./],
  ["refused", refusal(400, { message: "temperature is -1" }), /temperature is -1\./],
  ["failed", new Response("<html>", { status: 502 }), /502/],
  ["failed", events(JSON.stringify({ error: { message: "too slow" } })), /too slow\./],
  ["broken", events('{"choices": [{"delta": {"content": "x"}}]}'), /broke/],
  ["broken", events("{"), /broke/],
];
for (const [kind, response, message] of FAULTS) {
  test(`${kind}: ${message}`, async () => {
    answerWith(response);
    const error = await chat().catch((raised) => raised);
    assert.ok(error instanceof ServerError, String(error));
    assert.equal(error.kind, kind);
    assert.match(error.message, message);
  });
}

test("an aborted request stays an AbortError", async () => {
  answerWith(new DOMException("aborted", "AbortError"));
  await assert.rejects(chat(), { name: "AbortError" });
});

test("what the server says of itself", async () => {
  answerWith(new Response('{"model_alias": "m"}'));
  assert.deepEqual(await fetchProperties(""), { model_alias: "m" });
});
