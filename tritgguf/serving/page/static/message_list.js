// The messages of the conversation that is shown, and the scrolling.

import { AnswerMessage, ToolMessage, UserMessage } from "./message_view.js";

const NEAR_THE_END = 48; // pixels
const PAUSE = 50; // milliseconds between two updates of a growing answer

export class MessageList {
  #views = [];
  #timer = null;
  #follows = true;

  /** actions: {edit(index, text), regenerate(), returnResults(messages), openSettings(), isLive(answer)}. */
  constructor(actions) {
    this.actions = actions;
    this.element = document.getElementById("messages");
    this.scroller = document.getElementById("scroller");
    this.toLatest = document.getElementById("to-latest");
    this.scroller.addEventListener("scroll", () => this.#noteScroll());
    this.toLatest.addEventListener("click", () => this.scrollToEnd());
    new ResizeObserver(() => this.#keepUp()).observe(this.scroller);
  }

  /** Show the messages of a conversation; views of messages that are shown already stay. */
  show(messages) {
    clearTimeout(this.#timer);
    this.#timer = null;
    const old = new Map(this.#views.map((view) => [view.message, view]));
    this.#views = messages.map((message, index) => old.get(message) ?? this.#viewOf(message, index));
    this.element.replaceChildren(...this.#views.map((view) => view.element));
    this.#views.forEach((view, index) => view.update?.(index === messages.length - 1));
    this.#keepUp();
  }

  /** Show what has come of the last answer, soon. */
  grow() {
    this.#timer ??= setTimeout(() => {
      this.#timer = null;
      this.#views.at(-1)?.update?.();
      this.#keepUp();
    }, PAUSE);
  }

  scrollToEnd() {
    this.#follows = true;
    this.#keepUp();
  }

  #viewOf(message, index) {
    if (message.role === "user") return new UserMessage(message, (text) => this.actions.edit(index, text));
    if (message.role === "tool") return new ToolMessage(message);
    return new AnswerMessage(message, this.actions);
  }

  #noteScroll() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    this.#follows = scrollHeight - scrollTop - clientHeight < NEAR_THE_END;
    this.toLatest.hidden = this.#follows;
  }

  #keepUp() {
    if (this.#follows) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.#noteScroll();
  }
}
