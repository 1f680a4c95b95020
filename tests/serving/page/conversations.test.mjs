import assert from "node:assert/strict";
import test from "node:test";
import { Conversations, titleFrom } from "../../../tritgguf/serving/page/static/conversations.js";
import { byAge } from "../../../tritgguf/serving/page/static/sidebar.js";
import { storageOf } from "./storage.mjs";

const conversation = (id, updated, text = "Hi") => (
  { id, title: `Title ${id}`, updated, messages: [{ role: "user", content: text }] }
);

test("conversations are kept, newest first, and removed", () => {
  const store = new Conversations(storageOf());
  for (const [id, updated] of [["a", 1], ["b", 3], ["c", 2]]) assert.ok(store.save(conversation(id, updated)).kept);
  assert.deepEqual(store.list().map((entry) => entry.id), ["b", "c", "a"]);
  assert.deepEqual(store.get("c"), conversation("c", 2));
  assert.deepEqual(store.remove("c"), conversation("c", 2));
  assert.equal(store.get("c"), null);
  assert.deepEqual(store.list().map((entry) => entry.id), ["b", "a"]);
});

test("the oldest go when there are too many, and are named", () => {
  const storage = storageOf();
  const store = new Conversations(storage, { conversations: 2, characters: 1e6 });
  store.save(conversation("a", 1));
  store.save(conversation("b", 2));
  assert.deepEqual(store.save(conversation("c", 3)).removed, ["Title a"]);
  assert.deepEqual(store.list().map((entry) => entry.id), ["c", "b"]);
  assert.equal(storage.getItem("tritgguf.conversation.a"), null);
});

test("the oldest go when they are too long together, but none for one that is too long alone", () => {
  const store = new Conversations(storageOf(), { conversations: 9, characters: 1000 });
  store.save(conversation("a", 1, "x".repeat(400)));
  assert.deepEqual(store.save(conversation("b", 2, "x".repeat(2000))), { kept: false, removed: [] });
  assert.ok(store.get("a"));
  assert.deepEqual(store.save(conversation("b", 2, "x".repeat(600))), { kept: true, removed: ["Title a"] });
});

test("a full browser makes room, or says that it cannot", () => {
  const store = new Conversations(storageOf(2000));
  store.save(conversation("a", 1, "x".repeat(1000)));
  assert.deepEqual(store.save(conversation("b", 2, "x".repeat(1000))), { kept: true, removed: ["Title a"] });
  assert.deepEqual(store.save(conversation("c", 3, "x".repeat(5000))), { kept: false, removed: [] });
  assert.deepEqual(store.list().map((entry) => entry.id), ["b"]);
  assert.equal(store.save(conversation("b", 4, "x".repeat(5000))).kept, false);
  assert.equal(store.get("b").updated, 2);
});

test("damaged entries are passed over", () => {
  const storage = storageOf();
  const store = new Conversations(storage);
  store.save(conversation("a", 1));
  for (const messages of ["3", "[null]", "[{}]", '[{"role": "assistant", "content": "x"}]', '[{"role": "x", "content": ""}]']) {
    storage.setItem("tritgguf.conversation.a", `{"messages": ${messages}}`);
    assert.equal(store.get("a"), null, messages);
  }
  for (const text of ["{", "3", "null", "[1, null, {}]"]) {
    storage.setItem("tritgguf.conversations", text);
    assert.deepEqual(store.list(), []);
  }
});

test("a title is the first words", () => {
  assert.equal(titleFrom(" Two\nlines "), "Two lines");
  assert.equal(titleFrom(" "), "New conversation");
  const title = titleFrom("word ".repeat(40));
  assert.ok(title.length <= 61 && title.endsWith("word…"), title);
});

test("groups by age", () => {
  const now = new Date(2026, 4, 20, 12).getTime();
  const entry = (days) => ({ id: String(days), updated: now - days * 86_400_000 });
  const groups = byAge([0, 1, 3, 30].map(entry), now);
  assert.deepEqual(groups.map(([name, members]) => [name, members.map(({ id }) => id)]), [
    ["Today", ["0"]], ["Yesterday", ["1"]], ["Last week", ["3"]], ["Earlier", ["30"]],
  ]);
});
