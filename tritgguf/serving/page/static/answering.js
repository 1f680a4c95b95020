// The answers that are being written. There is one for each conversation at most; it goes on while another is shown.

import { addChunk, isEmpty, newAnswer, requestMessages } from "./answer.js";
import { ServerError, streamChat } from "./api.js";
import { requestFields } from "./settings.js";

export class Answering {
  #running = new Map();

  /** Called with (conversation, answer): onpiece when something has come, onend when the answer has ended. */
  constructor({ onpiece, onend }) {
    this.onpiece = onpiece;
    this.onend = onend;
  }

  /** Whether a conversation, by its id, is being answered by this page. */
  has(id) {
    return this.#running.has(id);
  }

  isLive(answer) {
    return [...this.#running.values()].some((run) => run.answer === answer);
  }

  /** The conversations that are being answered. */
  conversations() {
    return [...this.#running.values()].map((run) => run.conversation);
  }

  stop(id) {
    this.#running.get(id)?.controller.abort();
  }

  /** Append an answer to a conversation and let the model write it. settings: those of settings.js, all of them right. */
  async start(conversation, settings) {
    const request = {
      messages: requestMessages(conversation.messages, settings.systemPrompt.trim()),
      stream: true,
      stream_options: { include_usage: true },
      timings_per_token: true,
      ...requestFields(settings),
    };
    const answer = newAnswer(Date.now());
    const controller = new AbortController();
    conversation.messages.push(answer);
    this.#running.set(conversation.id, { conversation, answer, controller });
    this.onpiece(conversation, answer);
    try {
      for await (const chunk of streamChat(request, settings.apiKey.trim(), controller.signal)) {
        addChunk(answer, chunk, Date.now());
        this.onpiece(conversation, answer);
      }
      answer.status = "done";
    } catch (error) {
      end(answer, error);
    } finally {
      this.#running.delete(conversation.id);
    }
    this.onend(conversation, answer);
  }
}

function end(answer, error) {
  if (error.name === "AbortError") {
    answer.status = "stopped";
    return;
  }
  const known = error instanceof ServerError;
  if (!known) console.error(error);
  const kind = known ? error.kind : "failed";
  answer.status = isEmpty(answer) ? "failed" : "broken";
  answer.error = { kind, message: known ? error.message : `This page failed: ${error.message}` };
}
