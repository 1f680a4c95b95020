// Markdown of a model, which nobody can trust, as elements.
//
// Two walls: HTML in the Markdown is shown as text, and what marked makes of the rest passes DOMPurify with a short list
// of elements. Pictures become links, so that showing an answer loads nothing.

import { Marked } from "./vendor/marked/marked.esm.js";
import DOMPurify from "./vendor/dompurify/purify.es.mjs";
import { copyButton, el } from "./dom.js";

const PURIFY = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
    "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["align", "class", "href", "start", "title"],
  ALLOWED_URI_REGEXP: /^(?:https?:\/\/|mailto:)/i,
  ADD_URI_SAFE_ATTR: ["align", "start"], // these hold no address
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escape = (text) => text.replace(/[&<>"']/g, (character) => ESCAPES[character]);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escape(text),
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

const UNSETTLED = 4; // blocks at the end that more text may change: a list, the space behind it, and what follows

/** An element that shows a growing Markdown text. While it grows, only its end is read again. */
export class MarkdownView {
  #shown = []; // the source of each block
  element = el("div", { class: "prose" });

  /** Show a text. grows: whether more of it will come. */
  update(text, grows) {
    try {
      this.#update(text, grows);
    } catch (error) {
      // Text that is nested thousands of levels deep exceeds the browser's stack.
      if (!(error instanceof RangeError)) throw error;
      this.#shown = [];
      this.element.replaceChildren(el("div", { class: "block unformatted" }, text));
    }
  }

  #update(text, grows) {
    let settled = this.#shown.slice(0, grows ? -UNSETTLED : 0);
    if (!text.startsWith(settled.join(""))) settled = [];
    let blocks = marked.lexer(text.slice(settled.join("").length));
    const defines = Object.keys(blocks.links).length > 0;
    if (defines && settled.length) {
      settled = [];
      blocks = marked.lexer(text);
    }
    const sources = [...settled, ...blocks.map((block) => block.raw)];
    // A definition of a link changes blocks above it, whose source stays the same.
    let same = settled.length;
    while (!defines && same < this.#shown.length && sources[same] === this.#shown[same]) same += 1;
    while (this.element.childElementCount > same) this.element.lastElementChild.remove();
    for (const block of blocks.slice(same - settled.length)) {
      this.element.append(el("div", { class: "block" }, elementsOf(block)));
    }
    this.#shown = sources;
  }
}

function elementsOf(block) {
  const fragment = DOMPurify.sanitize(marked.parser([block]), PURIFY);
  for (const link of fragment.querySelectorAll("a")) protect(link);
  for (const code of fragment.querySelectorAll("pre > code")) frame(code);
  for (const table of fragment.querySelectorAll("table")) {
    const scroller = el("div", { class: "table", tabIndex: 0, role: "region", "aria-label": "Table" });
    table.replaceWith(scroller);
    scroller.append(table);
  }
  return fragment;
}

function protect(link) {
  if (!link.hasAttribute("href")) return link.replaceWith(...link.childNodes);
  link.rel = "noopener noreferrer";
  link.target = "_blank";
  link.title = link.href;
}

function frame(code) {
  const language = /(?:^|\s)language-([\w+#.-]{1,24})/.exec(code.className)?.[1] ?? "";
  code.removeAttribute("class");
  const pre = code.parentElement;
  pre.tabIndex = 0;
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
  const figure = el("div", { class: "code" });
  pre.replaceWith(figure);
  const copy = copyButton("Copy the code", () => code.textContent.replace(/\n$/, ""));
  figure.append(el("div", { class: "code-head" }, el("span", {}, language), copy), pre);
}
