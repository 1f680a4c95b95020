import assert from "node:assert/strict";
import test from "node:test";
import {
  DEFAULTS, loadSettings, problemOf, requestFields, saveSettings, wrongSettings,
} from "../../../tritgguf/serving/page/static/settings.js";
import { storageOf } from "./storage.mjs";

test("empty settings leave everything to the server", () => {
  assert.deepEqual(requestFields(DEFAULTS), {});
  assert.deepEqual(wrongSettings(DEFAULTS), []);
});

test("settings that are set are numbers and a schema", () => {
  const schema = { type: "object" };
  const fields = requestFields({ ...DEFAULTS, temperature: " 0 ", max_tokens: "64", jsonSchema: JSON.stringify(schema) });
  assert.deepEqual(fields, {
    temperature: 0,
    max_tokens: 64,
    response_format: { type: "json_schema", json_schema: { name: "answer", schema, strict: true } },
  });
});

test("tools may be functions alone", () => {
  const tool = { type: "function", function: { name: "first" } };
  const fields = requestFields({ ...DEFAULTS, tools: JSON.stringify([tool, { name: "second" }]) });
  assert.deepEqual(fields, { tools: [tool, { type: "function", function: { name: "second" } }] });
  assert.deepEqual(requestFields({ ...DEFAULTS, tools: "[]" }), {});
});

test("impossible values are named", () => {
  const wrong = [["temperature", "-1"], ["temperature", "warm"], ["top_p", "1.5"], ["top_k", "1.5"], ["max_tokens", "0"],
    ["jsonSchema", "{"], ["jsonSchema", "[1]"], ["jsonSchema", "null"],
    ["tools", "{}"], ["tools", "[{}]"], ["tools", "[null]"]];
  for (const [name, value] of wrong) {
    assert.equal(typeof problemOf(name, value), "string", `${name} = ${value}`);
    assert.deepEqual(wrongSettings({ ...DEFAULTS, [name]: value }), [name]);
  }
});

test("settings survive; damaged ones are the defaults", () => {
  const storage = storageOf();
  saveSettings(storage, { ...DEFAULTS, temperature: "0.5" });
  assert.equal(loadSettings(storage).temperature, "0.5");
  for (const text of ["{", "null", "3", '{"temperature": 7, "evil": "x"}']) {
    storage.setItem("tritgguf.settings", text);
    assert.deepEqual(loadSettings(storage), DEFAULTS);
  }
});
