// The list of conversations.

import { el, iconButton } from "./dom.js";

const DAY = 86_400_000;

/** Conversations in groups by age: pairs of a heading and entries. now: milliseconds. */
export function byAge(entries, now) {
  const today = new Date(now).setHours(0, 0, 0, 0);
  const ages = [["Today", today], ["Yesterday", today - DAY], ["Last week", today - 7 * DAY], ["Earlier", -Infinity]];
  const groups = ages.map(([name]) => [name, []]);
  for (const entry of entries) groups[ages.findIndex(([, since]) => entry.updated >= since)][1].push(entry);
  return groups.filter(([, members]) => members.length);
}

export class Sidebar {
  /** actions: {open, rename, remove}, functions of an id; isAnswering of an id. */
  constructor(actions) {
    this.actions = actions;
    this.element = document.getElementById("conversation-list");
    this.panel = document.getElementById("sidebar");
    this.shade = document.getElementById("sidebar-shade");
    this.opener = document.getElementById("open-sidebar");
    this.opener.addEventListener("click", () => this.slide(true));
    document.getElementById("close-sidebar").addEventListener("click", () => this.slide(false));
    this.shade.addEventListener("click", () => this.slide(false));
    this.panel.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.isOpen) {
        event.stopPropagation();
        this.slide(false);
      }
    });
  }

  get isOpen() {
    return this.panel.classList.contains("open");
  }

  /** Show or hide the list on a narrow screen, where it lies over the conversation. */
  slide(open) {
    if (open === this.isOpen) return;
    this.panel.classList.toggle("open", open);
    this.shade.hidden = !open;
    this.opener.setAttribute("aria-expanded", String(open));
    document.getElementById("main").inert = open;
    (open ? document.getElementById("close-sidebar") : this.opener).focus();
  }

  /** entries: as of Conversations.list; current: the id of the one that is open. */
  show(entries, current) {
    if (this.element.querySelector("input")) return; // a title is being edited
    const focused = this.element.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    const groups = byAge(entries, Date.now()).map(([name, members]) => el(
      "section",
      {},
      el("h2", {}, name),
      el("ul", {}, ...members.map((entry) => this.#item(entry, entry.id === current))),
    ));
    this.element.replaceChildren(...groups);
    if (focused) this.element.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
  }

  #item(entry, isCurrent) {
    const { open, remove, isAnswering } = this.actions;
    const link = el("button", { type: "button", class: "entry", title: entry.title, onclick: () => open(entry.id) });
    link.dataset.key = entry.id;
    link.append(el("span", {}, entry.title));
    if (isAnswering(entry.id)) link.append(el("span", { class: "dot", role: "img", "aria-label": "answering" }));
    if (isCurrent) link.setAttribute("aria-current", "page");
    const item = el("li", {}, link, el(
      "span",
      { class: "entry-actions" },
      iconButton("edit", `Rename “${entry.title}”`, () => this.#rename(item, entry)),
      iconButton("trash", `Delete “${entry.title}”`, () => remove(entry.id)),
    ));
    return item;
  }

  #rename(item, entry) {
    const input = el("input", { value: entry.title, maxLength: 120, "aria-label": "Title" });
    let ended = false;
    const end = (title) => {
      if (ended) return;
      ended = true;
      input.remove();
      this.actions.rename(entry.id, title || entry.title);
      this.element.querySelector(`[data-key="${CSS.escape(entry.id)}"]`)?.focus();
    };
    input.addEventListener("blur", () => end(input.value.trim()));
    input.addEventListener("keydown", (event) => {
      if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
      event.preventDefault(); // the key would press the button that gets the focus
      event.stopPropagation();
      end(event.key === "Enter" ? input.value.trim() : entry.title);
    });
    item.replaceChildren(input);
    input.select();
  }
}
