// The settings: what they are called, what may be entered, and what a request gets of them.

/** Sampling options. An empty field leaves the choice to the server. */
export const SAMPLING = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.1, help: "0 always takes the likeliest token" },
  { name: "top_p", label: "Top-p", min: 0, max: 1, step: 0.05, help: "Likeliest tokens up to this sum of probability" },
  { name: "top_k", label: "Top-k", min: 0, max: 100000, step: 1, integer: true, help: "Only the k likeliest tokens; 0: all" },
  { name: "min_p", label: "Min-p", min: 0, max: 1, step: 0.01, help: "At least this share of the likeliest token" },
  { name: "max_tokens", label: "Max. tokens", min: 1, max: 10000000, step: 1, integer: true, help: "Length of an answer" },
];

export const DEFAULTS = {
  systemPrompt: "", jsonSchema: "", tools: "", apiKey: "",
  ...Object.fromEntries(SAMPLING.map(({ name }) => [name, ""])),
};

const KEY = "tritgguf.settings";

/** Read the settings from a Storage; unknown and damaged ones are replaced by their defaults. */
export function loadSettings(storage) {
  let stored = {};
  try {
    stored = JSON.parse(storage.getItem(KEY)) ?? {};
  } catch {
    // Damaged or blocked: the defaults are used.
  }
  const known = Object.keys(DEFAULTS).map((name) => [name, stored[name]]);
  return { ...DEFAULTS, ...Object.fromEntries(known.filter(([, value]) => typeof value === "string")) };
}

/** Write the settings; false if the browser keeps nothing. */
export function saveSettings(storage, settings) {
  try {
    storage.setItem(KEY, JSON.stringify(settings));
    return true;
  } catch {
    return false;
  }
}

/** What is wrong with a setting, in a sentence; null if nothing is. */
export function problemOf(name, value) {
  const text = value.trim();
  if (text === "") return null;
  if (name === "jsonSchema") return problemOfJson(text, isObject, 'A JSON schema is an object, such as {"type": "object"}.');
  if (name === "tools") return problemOfJson(text, isListOfTools, "Tools are a list of functions, each with a name.");
  const rule = SAMPLING.find((option) => option.name === name);
  if (!rule) return null;
  const number = Number(text);
  const kind = rule.integer ? "a whole number" : "a number";
  const fits = Number.isFinite(number) && (!rule.integer || Number.isInteger(number));
  return fits && number >= rule.min && number <= rule.max ? null : `This must be ${kind} from ${rule.min} to ${rule.max}.`;
}

function problemOfJson(text, fits, otherwise) {
  try {
    return fits(JSON.parse(text)) ? null : otherwise;
  } catch (error) {
    return `This is not JSON: ${error.message}`;
  }
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const functionOf = (tool) => (isObject(tool?.function) ? tool.function : tool);
const isListOfTools = (value) => (
  Array.isArray(value) && value.every((tool) => isObject(tool) && typeof functionOf(tool).name === "string")
);

/** The names of the settings that are wrong. */
export function wrongSettings(settings) {
  return Object.keys(DEFAULTS).filter((name) => problemOf(name, settings[name]) !== null);
}

/** The fields of a request that come from the settings, the messages excepted. */
export function requestFields(settings) {
  const set = SAMPLING.filter(({ name }) => settings[name].trim() !== "");
  const fields = Object.fromEntries(set.map(({ name }) => [name, Number(settings[name])]));
  if (settings.jsonSchema.trim()) {
    const schema = JSON.parse(settings.jsonSchema);
    fields.response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
  }
  const tools = settings.tools.trim() ? JSON.parse(settings.tools) : [];
  if (tools.length) fields.tools = tools.map((tool) => ({ type: "function", function: functionOf(tool) }));
  return fields;
}
