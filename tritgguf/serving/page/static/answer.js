// An answer of the model: a message that grows by the chunks of a stream.
//
// status: "streaming", then "done", "stopped" (by the user), "broken" (the stream ended early) or "failed" (an error).
// A message that is still "streaming" in the storage belongs to a page that was left.

const FEWEST_TOKENS = 5; // the speed of fewer says nothing

/** Return an answer that has nothing yet. */
export function newAnswer(now) {
  return { role: "assistant", content: "", reasoning: "", toolCalls: [], status: "streaming", started: now };
}

/** Add a chat.completion.chunk to an answer, in place. */
export function addChunk(answer, chunk, now) {
  const choice = chunk.choices?.[0];
  if (choice) {
    const delta = choice.delta ?? {};
    if (delta.reasoning_content) {
      answer.reasoning += delta.reasoning_content;
      answer.reasoningEnded = now;
    }
    if (delta.content) answer.content += delta.content;
    for (const call of delta.tool_calls ?? []) addToolCall(answer.toolCalls, call);
    if (choice.finish_reason) answer.finishReason = choice.finish_reason;
  }
  if (chunk.usage) {
    answer.usage = { prompt: chunk.usage.prompt_tokens, completion: chunk.usage.completion_tokens };
  }
  const { predicted_n: tokens, predicted_per_second: speed } = chunk.timings ?? {};
  if (tokens >= FEWEST_TOKENS && Number.isFinite(speed)) answer.tokensPerSecond = speed;
}

function addToolCall(calls, delta) {
  const call = (calls[delta.index ?? 0] ??= { id: "", name: "", arguments: "" });
  if (delta.id) call.id = delta.id;
  call.name += delta.function?.name ?? "";
  call.arguments += delta.function?.arguments ?? "";
}

/** True if nothing of an answer has come. */
export function isEmpty(answer) {
  return !answer.content && !answer.reasoning && !answer.toolCalls?.length;
}

/** The messages of a request: what the model gets to see of a conversation. */
export function requestMessages(messages, systemPrompt) {
  const sent = systemPrompt ? [{ role: "system", content: systemPrompt }] : [];
  messages.forEach((message, index) => {
    const { role, content } = message;
    const last = sent.at(-1);
    if (role === "user" && isRefused(messages[index + 1])) return;
    // An answer that failed leaves two messages of the user in a row, which many templates refuse.
    if (role === "user" && last?.role === "user") last.content += `\n\n${content}`;
    else if (role === "tool") sent.push({ role, tool_call_id: message.callId, content });
    else if (message.toolCalls?.length && messages[index + 1]?.role === "tool") sent.push(withToolCalls(message));
    else if (role === "user" || content) sent.push({ role, content });
  });
  return sent;
}

function withToolCalls({ role, content, toolCalls }) {
  const calls = toolCalls.map((call) => (
    { id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }
  ));
  return { role, content: content || null, tool_calls: calls };
}

/** True for an answer that a server refuses to give, whenever it is asked: what it answers is not sent again. */
function isRefused(answer) {
  return answer?.status === "failed" && ["context", "refused"].includes(answer.error?.kind);
}
