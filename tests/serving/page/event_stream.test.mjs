import assert from "node:assert/strict";
import test from "node:test";
import { EventParser, eventData } from "../../../tritgguf/serving/page/static/event_stream.js";

const STREAM = 'data: {"a": "ä"}\n\n: comment\ndata:two\r\ndata: lines\r\n\r\nevent: x\nretry: 1\n\ndata: [DONE]\n\n';
const EVENTS = ['{"a": "ä"}', "two\nlines", "[DONE]"];

test("a stream gives the same events however it is cut", () => {
  for (let size = 1; size <= STREAM.length; size += 1) {
    const parser = new EventParser();
    const found = [];
    for (let start = 0; start < STREAM.length; start += size) found.push(...parser.push(STREAM.slice(start, start + size)));
    assert.deepEqual(found, EVENTS, `pieces of ${size}`);
  }
});

test("bytes may be cut inside a character", async () => {
  const bytes = new TextEncoder().encode(STREAM);
  const pieces = Array.from(bytes, (byte) => Uint8Array.of(byte));
  const found = [];
  for await (const data of eventData(ReadableStream.from(pieces))) found.push(data);
  assert.deepEqual(found, EVENTS);
});

test("an event that is not complete is no event", () => {
  assert.deepEqual(new EventParser().push("data: half"), []);
  assert.deepEqual(new EventParser().push("data: half\n"), []);
});
