// The page: which conversation is open, and what the buttons do.

import { Answering } from "./answering.js";
import { ServerError, fetchProperties } from "./api.js";
import { Conversations, openStorage, titleFrom } from "./conversations.js";
import { el, fitHeight, icon } from "./dom.js";
import { MessageList } from "./message_list.js";
import { inWords } from "./message_view.js";
import { loadSettings, saveSettings, wrongSettings } from "./settings.js";
import { SettingsPanel } from "./settings_panel.js";
import { Sidebar } from "./sidebar.js";
import { setUpThemeSwitch } from "./theme_switch.js";

const SAVING_PAUSE = 1000; // milliseconds between two savings of a growing answer
const NOTICE_TIME = 8000;
const SUGGESTIONS = [
  "What is balanced ternary?",
  "Reverse a sentence in Python",
  "Find a name for a quiet café",
];

const byId = (id) => document.getElementById(id);
const { storage, lasting } = openStorage();
const store = new Conversations(storage);
const settings = loadSettings(storage);
const properties = { model: "", context: 0 };
let current = newConversation();
let savingTimer = null;
let leaving = false; // the browser ends the streams of a page that is left; that is no error

const answering = new Answering({ onpiece, onend });
const list = new MessageList({
  edit: editMessage,
  regenerate,
  returnResults,
  openSettings: () => panel.open("apiKey"),
  isLive: (answer) => answering.isLive(answer),
});
const sidebar = new Sidebar({
  open: (id) => go(id),
  rename,
  remove: removeConversation,
  isAnswering: (id) => answering.has(id),
});
const panel = new SettingsPanel(settings, () => {
  if (!saveSettings(storage, settings)) notify("The browser's storage is full. The settings last until you leave.");
  showStatus();
});
const message = byId("message");

function newConversation() {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  const id = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, title: "New conversation", updated: Date.now(), messages: [] };
}

// Sending and answering

function send(text) {
  if (answering.has(current.id)) return notify("Stop the answer first: Escape.");
  if (!settingsAreRight()) return undefined;
  if (!current.messages.length) current.title = titleFrom(text);
  current.messages.push({ role: "user", content: text });
  message.value = "";
  fitHeight(message);
  return answer();
}

function settingsAreRight() {
  const [wrong] = wrongSettings(settings);
  if (!wrong) return true;
  panel.open(wrong);
  return false;
}

function answer() {
  current.updated = Date.now();
  list.scrollToEnd();
  announce("The model is answering.");
  if (location.hash.slice(1) !== current.id) history.replaceState(null, "", `#${current.id}`);
  answering.start(current, settings);
  save(current);
  show();
}

function regenerate() {
  if (answering.has(current.id) || !settingsAreRight()) return;
  if (current.messages.at(-1)?.role === "assistant") current.messages.pop();
  answer();
  message.focus();
}

function returnResults(results) {
  if (answering.has(current.id) || !settingsAreRight()) return;
  current.messages.push(...results);
  answer();
  message.focus();
}

function editMessage(index, text) {
  if (answering.has(current.id)) {
    notify("Stop the answer first: Escape.");
    return;
  }
  if (!settingsAreRight()) return;
  if (index === 0 && current.title === titleFrom(current.messages[0].content)) current.title = titleFrom(text);
  current.messages.splice(index, Infinity, { role: "user", content: text });
  answer();
  message.focus();
}

function onpiece(conversation, answer) {
  if (conversation === current) {
    list.grow();
    showKeys(answer);
  }
  savingTimer ??= setTimeout(saveRunning, SAVING_PAUSE);
}

function onend(conversation, answer) {
  if (leaving) return;
  conversation.updated = Date.now();
  save(conversation);
  announce(answer.status === "done" ? answer.content : "The answer has ended.");
  if (conversation === current) show();
  else showSidebar();
}

function saveRunning() {
  clearTimeout(savingTimer);
  savingTimer = null;
  answering.conversations().forEach(save);
}

function save(conversation) {
  const { kept, removed } = store.save(conversation);
  if (!kept) notify("The browser's storage is full. This conversation is lost when you leave the page.");
  if (removed.length) notify(`To make room, the oldest conversation was removed: “${removed.join("”, “")}”.`);
}

// Conversations

function go(id) {
  sidebar.slide(false);
  if (id === current.id) message.focus();
  else location.hash = id;
}

function openFromAddress() {
  const id = location.hash.slice(1);
  if (id === current.id) return;
  const running = answering.conversations().find((conversation) => conversation.id === id);
  current = running ?? (id ? store.get(id) : null) ?? newConversation();
  list.scrollToEnd();
  show();
  message.focus();
}

function rename(id, title) {
  const conversation = id === current.id ? current : store.get(id);
  if (conversation && conversation.title !== title) {
    conversation.title = title;
    save(conversation);
  }
  show();
}

function removeConversation(id) {
  answering.stop(id);
  const removed = store.remove(id);
  if (id === current.id) {
    history.replaceState(null, "", location.pathname);
    current = newConversation();
  }
  show();
  message.focus();
  if (!removed) return;
  notify(`“${removed.title}” is deleted.`, "Undo", () => {
    save(removed);
    if (location.hash.slice(1) === id) openFromAddress();
    else location.hash = id;
  });
}

// What is shown

function show() {
  const answered = answering.has(current.id);
  list.show(current.messages);
  byId("title").textContent = current.title;
  document.title = current.messages.length ? `${current.title} · tritgguf` : "tritgguf";
  byId("empty").hidden = current.messages.length > 0;
  byId("main").classList.toggle("is-empty", !current.messages.length);
  const button = byId("send");
  button.setAttribute("aria-label", answered ? "Stop" : "Send");
  button.classList.toggle("stops", answered);
  button.replaceChildren(icon(answered ? "stop" : "send"));
  showSidebar();
  showStatus();
  showKeys(answered ? current.messages.at(-1) : null);
}

/** Tell which keys do what. answer: the one that is being written, or null. */
function showKeys(answer) {
  const speed = answer?.tokensPerSecond ? inWords(answer.tokensPerSecond) : "";
  const keys = answer ? "Escape stops" : "Enter sends, Shift + Enter starts a line";
  const hasKeys = !matchMedia("(hover: none)").matches; // a phone has none of them
  const text = [hasKeys ? keys : "", speed].filter(Boolean).join(" · ");
  if (byId("keys").textContent !== text) byId("keys").textContent = text;
}

function showSidebar() {
  sidebar.show(store.list(), current.id);
}

function showStatus() {
  const inUse = [["systemPrompt", "System prompt"], ["jsonSchema", "JSON schema"], ["tools", "Tools"]];
  byId("in-use").replaceChildren(...inUse.filter(([name]) => settings[name].trim()).map(([name, label]) => el(
    "button", { type: "button", class: "chip", title: "In use; see the settings", onclick: () => panel.open(name) }, label,
  )));
  const usage = current.messages.findLast((each) => each.usage)?.usage;
  const used = usage ? usage.prompt + usage.completion : 0;
  byId("context").hidden = !(used && properties.context);
  byId("context-text").textContent = `${used.toLocaleString("en")} of ${properties.context.toLocaleString("en")} tokens`;
  byId("context-meter").value = properties.context ? Math.min(1, used / properties.context) : 0;
}

/** Show a short message above the message box for some seconds, perhaps with a button. */
function notify(text, label, act) {
  const notice = el("div", { class: "notice" }, el("span", {}, text));
  const leave = () => notice.remove();
  if (label) notice.append(el("button", { type: "button", class: "quiet-button", onclick: () => { leave(); act(); } }, label));
  byId("notices").replaceChildren(notice);
  setTimeout(leave, NOTICE_TIME);
}

/** Have a text read by screen readers. */
function announce(text) {
  byId("announcer").textContent = text;
}

async function showServer() {
  try {
    const said = await fetchProperties(settings.apiKey.trim());
    const defaults = said.default_generation_settings ?? {};
    properties.model = said.model_alias || (said.model_path ?? "").split(/[\\/]/).pop();
    properties.context = defaults.n_ctx ?? 0;
    panel.showServerDefaults({ max_tokens: defaults.n_predict, ...defaults, ...defaults.params });
    byId("model").textContent = properties.model;
    byId("model").title = properties.model;
    byId("empty-model").textContent = properties.model ? `You are talking to ${properties.model}.` : "";
    showStatus();
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    if (error.kind === "key") notify(error.message, "Open the settings", () => panel.open("apiKey"));
    else notify(error.message, "Try again", showServer);
  }
}

// What the person does

function setUp() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (answering.has(current.id)) answering.stop(current.id);
    else if (message.value.trim()) send(message.value.trim());
    message.focus();
  });
  message.addEventListener("input", () => fitHeight(message));
  message.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (message.value.trim()) send(message.value.trim());
  });
  byId("new-chat").addEventListener("click", () => {
    sidebar.slide(false);
    if (location.hash) location.hash = "";
    message.focus();
  });
  byId("open-settings").addEventListener("click", () => panel.open());
  byId("settings").addEventListener("close", showServer);
  byId("suggestions").append(...SUGGESTIONS.map((text) => (
    el("li", {}, el("button", { type: "button", onclick: () => { send(text); message.focus(); } }, text))
  )));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !byId("settings").open) answering.stop(current.id);
  });
  addEventListener("hashchange", openFromAddress);
  addEventListener("pagehide", () => {
    saveRunning();
    leaving = true;
  });
  addEventListener("pageshow", () => { leaving = false; });
  document.addEventListener("visibilitychange", () => document.hidden && saveRunning());
  addEventListener("storage", onOtherPage);
  setUpThemeSwitch(storage);
}

/** Another page of this browser has changed the storage. */
function onOtherPage() {
  if (!answering.has(current.id) && current.messages.length) current = store.get(current.id) ?? current;
  show();
}

setUp();
openFromAddress();
show();
showServer();
message.focus();
if (!lasting) notify("This browser keeps nothing for the page. Conversations are lost when you leave it.");
