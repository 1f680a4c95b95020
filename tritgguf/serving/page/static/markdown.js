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

/** An element that shows a growing Markdown text, and leaves the blocks alone that have not changed. */
export class MarkdownView {
  #shown = [];
  element = el("div", { class: "prose" });

  update(text) {
    const blocks = marked.lexer(text);
    // A definition of a link changes blocks above it, whose text stays the same.
    const defines = Object.keys(blocks.links).length > 0;
    let same = 0;
    while (!defines && same < this.#shown.length && blocks[same]?.raw === this.#shown[same]) same += 1;
    while (this.element.childElementCount > same) this.element.lastElementChild.remove();
    for (const block of blocks.slice(same)) {
      this.element.append(el("div", { class: "block" }, elementsOf(block)));
    }
    this.#shown = blocks.map((block) => block.raw);
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
