// One message of a conversation, as a list item.

import { isEmpty } from "./answer.js";
import { copyButton, el, fitHeight, icon, iconButton } from "./dom.js";
import { MarkdownView } from "./markdown.js";

/** A message of the user. onedit: called with the new text; null if it cannot be edited. */
export class UserMessage {
  element = el("li", { class: "message user" });

  constructor(message, onedit) {
    this.message = message;
    this.onedit = onedit;
    this.#show();
  }

  #show() {
    const edit = iconButton("edit", "Edit the message", () => this.#edit());
    const actions = el("div", { class: "actions" }, copyButton("Copy the message", () => this.message.content), edit);
    this.element.replaceChildren(
      el("h2", { class: "hidden" }, "You"),
      el("div", { class: "bubble" }, this.message.content),
      actions,
    );
  }

  #edit() {
    const area = el("textarea", { rows: 1, value: this.message.content, "aria-label": "Message" });
    const cancel = () => {
      this.#show();
      this.element.querySelector(".actions button:last-child").focus();
    };
    const send = () => area.value.trim() && this.onedit(area.value.trim());
    area.addEventListener("input", () => fitHeight(area));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    this.element.replaceChildren(
      el("div", { class: "editor" }, area, el("p", {}, "Sending it again replaces everything below."), el(
        "div",
        { class: "editor-buttons" },
        el("button", { type: "button", class: "quiet-button", onclick: cancel }, "Cancel"),
        el("button", { type: "button", class: "strong-button", onclick: send }, "Send"),
      )),
    );
    fitHeight(area);
    area.focus();
  }
}

const NOTES = {
  stopped: "You stopped this answer.",
  length: "The answer ends here: it has reached the maximum of tokens, or the context is full.",
  left: "The page was left while this answer was written. What had come is kept.",
};

/** What a tool has returned, as the user wrote it. */
export class ToolMessage {
  element = el("li", { class: "message" });

  constructor(message) {
    this.message = message;
    this.element.append(el("h2", { class: "hidden" }, "Tool"), toolFrame(message.name, "returned", message.content));
  }
}

function toolFrame(name, what, text) {
  const head = el("span", {}, icon("tool"), el("b", {}, name), ` ${what}`);
  const pre = el("pre", { tabIndex: 0, role: "region", "aria-label": `${name} ${what}` }, text);
  return el("div", { class: "code tool" }, el("div", { class: "code-head" }, head, copyButton("Copy", () => text)), pre);
}

/** An answer of the model. actions: {regenerate, returnResults, openSettings, isLive}, functions. */
export class AnswerMessage {
  #markdown = new MarkdownView();
  #reasoning = null;
  #tools = el("div", { class: "tools" });
  #shownTools = "";
  #foot = el("div", { class: "foot" });
  #waiting = el("p", { class: "waiting" }, el("span", {}, "Reading"));
  element = el("li", { class: "message answer" });

  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.element.append(el("h2", { class: "hidden" }, "Model"), this.#waiting, this.#markdown.element, this.#tools, this.#foot);
    this.update();
  }

  /** Show what has come since the last time. last: whether it is the last message of the conversation. */
  update(last = true) {
    const { message } = this;
    const live = message.status === "streaming" && this.actions.isLive(message);
    this.element.classList.toggle("live", live);
    this.#waiting.hidden = !(live && isEmpty(message));
    this.#showReasoning(live);
    this.#markdown.update(message.content, live);
    this.#showToolCalls(last && message.status === "done");
    this.#foot.replaceChildren(...(live ? [] : this.#footOf(last)));
  }

  #showReasoning(live) {
    const { message } = this;
    if (!message.reasoning) return;
    if (!this.#reasoning) {
      const summary = el("summary", {}, icon("chevron"), el("span"));
      this.#reasoning = el("details", { class: "reasoning" }, summary, el("div", { class: "thoughts" }));
      this.#markdown.element.before(this.#reasoning);
    }
    const thinking = live && !message.content && !message.toolCalls.length;
    const seconds = Math.round((message.reasoningEnded - message.started) / 1000);
    const took = seconds > 0 ? `Thought for ${seconds} ${seconds === 1 ? "second" : "seconds"}` : "Thought";
    this.#reasoning.classList.toggle("thinking", thinking);
    this.#reasoning.querySelector("summary span").textContent = thinking ? "Thinking" : took;
    this.#reasoning.querySelector(".thoughts").textContent = message.reasoning.trim();
  }

  #showToolCalls(asks) {
    const calls = (this.message.toolCalls ?? []).filter(Boolean);
    const shown = JSON.stringify([calls, asks]);
    if (shown === this.#shownTools) return; // a result may be half written
    this.#shownTools = shown;
    const frames = calls.map((call) => toolFrame(call.name || "…", "tool call", indented(call.arguments)));
    const oninput = (event) => fitHeight(event.target);
    const areas = calls.map((call) => (
      el("textarea", { rows: 1, placeholder: "What it returns", "aria-label": `Result of ${call.name}`, oninput })
    ));
    if (asks) frames.forEach((frame, index) => frame.append(areas[index]));
    this.#tools.replaceChildren(...frames);
    if (!asks || !calls.length) return;
    const send = () => this.actions.returnResults(calls.map((call, index) => (
      { role: "tool", callId: call.id, name: call.name, content: areas[index].value }
    )));
    const label = calls.length > 1 ? "Send the results" : "Send the result";
    this.#tools.append(el("button", { type: "button", class: "quiet-button", onclick: send }, label));
  }

  #footOf(last) {
    const { message, actions } = this;
    const parts = [];
    const note = this.#note(last);
    if (note) parts.push(note);
    const buttons = [];
    if (message.content) buttons.push(copyButton("Copy the answer", () => message.content));
    if (last && !this.#offersAgain) buttons.push(iconButton("again", "Answer again", actions.regenerate));
    const figures = this.#figures();
    if (buttons.length) parts.push(el("div", { class: last ? "actions shown" : "actions" }, ...buttons, figures));
    return parts;
  }

  /** Whether trying again may help with the error, and a button says so. */
  get #offersAgain() {
    return ["gone", "busy", "broken", "failed"].includes(this.message.error?.kind);
  }

  #note(last) {
    const { message, actions } = this;
    if (message.error) {
      const callout = el("div", { class: "callout", role: "alert" }, el("p", {}, message.error.message));
      const button = (label, onclick) => el("button", { type: "button", class: "quiet-button", onclick }, label);
      if (message.error.kind === "key") callout.append(button("Open the settings", actions.openSettings));
      else if (last && this.#offersAgain) callout.append(button("Try again", actions.regenerate));
      return callout;
    }
    const reason = { stopped: "stopped", streaming: "left" }[message.status] ?? message.finishReason;
    return NOTES[reason] ? el("p", { class: "note" }, NOTES[reason]) : null;
  }

  #figures() {
    const { usage, tokensPerSecond } = this.message;
    const parts = [];
    if (usage) parts.push(`${usage.completion.toLocaleString("en")} tokens`);
    if (tokensPerSecond) parts.push(inWords(tokensPerSecond));
    return el("span", { class: "figures" }, parts.join(" · "));
  }
}

/** A speed, with two digits at least. */
export function inWords(tokensPerSecond) {
  return `${tokensPerSecond.toFixed(tokensPerSecond < 10 ? 1 : 0)} tokens/s`;
}

function indented(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}
