// The settings as a dialog at the right edge.

import { el, fitHeight } from "./dom.js";
import { DEFAULTS, SAMPLING, problemOf } from "./settings.js";

const TEXTS = [
  { name: "systemPrompt", label: "System prompt", help: "Told to the model before every conversation.", rows: 4,
    placeholder: "You are a helpful assistant." },
  { name: "jsonSchema", label: "JSON schema", help: "Answers are JSON that follows it.", rows: 5, code: true,
    placeholder: '{"type": "object", "properties": {…}}' },
  { name: "tools", label: "Tools", help: "Functions that the model may call. You write what they return.", rows: 5, code: true,
    placeholder: '[{"name": "get_weather", "parameters": {…}}]' },
];

export class SettingsPanel {
  #dialog = document.getElementById("settings");
  #inputs = new Map();

  /** settings: changed in place; onchange: called after each change. */
  constructor(settings, onchange) {
    this.settings = settings;
    this.onchange = onchange;
    const [systemPrompt, jsonSchema, tools] = TEXTS.map((text) => this.#textField(text));
    document.getElementById("settings-fields").append(
      systemPrompt,
      el("fieldset", {}, el("legend", {}, "Sampling"), el("p", { class: "help" }, "Empty: as the server is set."),
        el("div", { class: "numbers" }, ...SAMPLING.map((rule) => this.#numberField(rule)))),
      jsonSchema,
      tools,
      this.#keyField(),
    );
    this.#dialog.addEventListener("click", (event) => {
      if (event.target === this.#dialog) this.#dialog.close(); // beside the sheet
    });
    document.getElementById("close-settings").addEventListener("click", () => this.#dialog.close());
    document.getElementById("reset-settings").addEventListener("click", () => this.#reset());
  }

  /** Open the dialog. name: the setting to go to, or nothing. */
  open(name) {
    if (!this.#dialog.open) this.#dialog.showModal();
    for (const { name: text } of TEXTS) fitHeight(this.#inputs.get(text));
    for (const [each, input] of this.#inputs) this.#check(each, input);
    this.#inputs.get(name)?.focus();
  }

  /** Show what the server uses where a field is empty. defaults: numbers by name. */
  showServerDefaults(defaults) {
    for (const { name } of SAMPLING) {
      const value = defaults[name];
      if (Number.isFinite(value) && value >= 0) this.#inputs.get(name).placeholder = String(Math.round(value * 1e4) / 1e4);
    }
  }

  #reset() {
    Object.assign(this.settings, DEFAULTS);
    for (const [name, input] of this.#inputs) {
      input.value = "";
      this.#check(name, input);
    }
    this.onchange();
  }

  #field({ name, label, help }, input) {
    const id = `setting-${name}`;
    Object.assign(input, { id, value: this.settings[name], spellcheck: false });
    input.setAttribute("aria-describedby", `${id}-help ${id}-problem`);
    this.#inputs.set(name, input);
    const field = el(
      "div",
      { class: "field" },
      el("label", { htmlFor: id }, label),
      input,
      el("p", { class: "help", id: `${id}-help` }, help),
      el("p", { class: "problem", id: `${id}-problem`, role: "alert" }),
    );
    input.addEventListener("input", () => {
      this.settings[name] = input.value;
      if (input.getAttribute("aria-invalid") === "true") this.#check(name, input, field);
      this.onchange();
    });
    input.addEventListener("change", () => this.#check(name, input, field)); // not while it is half written
    this.#check(name, input, field);
    return field;
  }

  #check(name, input, field = input.closest(".field")) {
    const problem = problemOf(name, input.value);
    input.setAttribute("aria-invalid", String(problem !== null));
    field.querySelector(".problem").textContent = problem ?? "";
  }

  #numberField(rule) {
    const inputMode = rule.integer ? "numeric" : "decimal";
    return this.#field(rule, el("input", { type: "text", inputMode, autocomplete: "off", placeholder: "default" }));
  }

  #textField(text) {
    const area = el("textarea", { rows: text.rows, placeholder: text.placeholder, class: text.code ? "mono" : "" });
    area.addEventListener("input", () => fitHeight(area));
    return this.#field(text, area);
  }

  #keyField() {
    const input = el("input", { type: "password", autocomplete: "off", placeholder: "none" });
    return this.#field({ name: "apiKey", label: "API key", help: "Kept in this browser, sent to this server only." }, input);
  }
}
