import assert from "node:assert/strict";
import test from "node:test";
import { addChunk, isEmpty, newAnswer, requestMessages } from "../../../tritgguf/serving/page/static/answer.js";

const delta = (fields, finish = null) => ({ choices: [{ index: 0, delta: fields, finish_reason: finish }] });

test("chunks add up to an answer", () => {
  const answer = newAnswer(1000);
  assert.ok(isEmpty(answer));
  const chunks = [
    delta({ role: "assistant", content: "" }),
    delta({ reasoning_content: "Hm" }),
    delta({ content: "He" }),
    delta({ content: "llo" }),
    delta({}, "length"),
    { choices: [], usage: { prompt_tokens: 7, completion_tokens: 3 }, timings: { predicted_n: 9, predicted_per_second: 12.5 } },
  ];
  chunks.forEach((chunk, index) => addChunk(answer, chunk, 1000 + 100 * index));
  assert.equal(answer.content, "Hello");
  assert.equal(answer.reasoning, "Hm");
  assert.equal(answer.finishReason, "length");
  assert.deepEqual(answer.usage, { prompt: 7, completion: 3 });
  assert.equal(answer.tokensPerSecond, 12.5);
  assert.equal(answer.reasoningEnded, 1100);
  assert.ok(!isEmpty(answer));
});

test("tool calls come in pieces, several at once", () => {
  const answer = newAnswer(0);
  const call = (index, fields) => delta({ tool_calls: [{ index, ...fields }] });
  addChunk(answer, call(0, { id: "a", function: { name: "first", arguments: "" } }), 0);
  addChunk(answer, call(1, { id: "b", function: { name: "second", arguments: "{" } }), 0);
  addChunk(answer, call(0, { function: { arguments: '{"x": 1}' } }), 0);
  addChunk(answer, call(1, { function: { arguments: "}" } }), 0);
  assert.deepEqual(answer.toolCalls, [
    { id: "a", name: "first", arguments: '{"x": 1}' },
    { id: "b", name: "second", arguments: "{}" },
  ]);
});

test("the speed of the first tokens is not shown", () => {
  const answer = newAnswer(0);
  addChunk(answer, { ...delta({ content: "x" }), timings: { predicted_n: 1, predicted_per_second: 1e6 } }, 0);
  assert.equal(answer.tokensPerSecond, undefined);
});

test("the model sees the system prompt, no empty answers, and never two messages of the user in a row", () => {
  const messages = [
    { role: "user", content: "One" },
    { ...newAnswer(0), status: "failed" },
    { role: "user", content: "Two" },
    { ...newAnswer(0), content: "Answer", reasoning: "secret" },
    { role: "user", content: "Three" },
  ];
  assert.deepEqual(requestMessages(messages, "Be brief."), [
    { role: "system", content: "Be brief." },
    { role: "user", content: "One\n\nTwo" },
    { role: "assistant", content: "Answer" },
    { role: "user", content: "Three" },
  ]);
  assert.equal(messages[0].content, "One");
});

test("a message that the server refused is not sent again", () => {
  const refused = { ...newAnswer(0), status: "failed", error: { kind: "context", message: "Too long." } };
  const messages = [{ role: "user", content: "Too long" }, refused, { role: "user", content: "Short" }];
  assert.deepEqual(requestMessages(messages, ""), [{ role: "user", content: "Short" }]);
});

test("tool calls are sent with their results, and left out without", () => {
  const calls = [{ id: "a", name: "first", arguments: "{}" }];
  const asking = { ...newAnswer(0), status: "done", content: "Wait.", toolCalls: calls };
  const user = { role: "user", content: "Now?" };
  const result = { role: "tool", callId: "a", name: "first", content: "noon" };
  assert.deepEqual(requestMessages([user, asking, result], ""), [
    user,
    {
      role: "assistant",
      content: "Wait.",
      tool_calls: [{ id: "a", type: "function", function: { name: "first", arguments: "{}" } }],
    },
    { role: "tool", tool_call_id: "a", content: "noon" },
  ]);
  assert.deepEqual(requestMessages([user, asking, user], ""), [user, { role: "assistant", content: "Wait." }, user]);
});
