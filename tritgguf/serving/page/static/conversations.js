// The conversations that this browser keeps: one entry of the storage for each, and an index of their titles.

const INDEX = "tritgguf.conversations";
const PREFIX = "tritgguf.conversation.";

/** Browsers keep about five million characters for a page. */
export const LIMITS = { conversations: 200, characters: 4_000_000 };

const LONGEST_TITLE = 60;

/** A title for a conversation that begins with a message: its first words. */
export function titleFrom(text) {
  const line = text.trim().replace(/\s+/g, " ");
  if (line.length <= LONGEST_TITLE) return line || "New conversation";
  const cut = line.slice(0, LONGEST_TITLE);
  const end = cut.lastIndexOf(" ");
  return `${cut.slice(0, end > LONGEST_TITLE / 2 ? end : LONGEST_TITLE).trimEnd()}…`;
}

export class Conversations {
  #storage;
  #limits;

  constructor(storage, limits = LIMITS) {
    this.#storage = storage;
    this.#limits = limits;
  }

  /** The index, newest first: objects with id, title, updated (milliseconds) and size (characters). */
  list() {
    const index = this.#read(INDEX);
    const entries = Array.isArray(index) ? index.filter((entry) => typeof entry?.id === "string") : [];
    return entries.sort((a, b) => b.updated - a.updated);
  }

  /** A conversation by its id; null if there is none or it is damaged. */
  get(id) {
    const found = this.#read(PREFIX + id);
    return Array.isArray(found?.messages) && found.messages.every(isMessage) ? found : null;
  }

  /**
   * Write a conversation, and remove the oldest others while there is no room for it. One that needs more than there is
   * removes none. Returns {kept, removed}: whether it is stored, and the titles that had to go.
   */
  save(conversation) {
    const text = JSON.stringify(conversation);
    const { id, title, updated } = conversation;
    if (text.length > this.#limits.characters) return { kept: false, removed: [] };
    const index = [{ id, title, updated, size: text.length }, ...this.list().filter((entry) => entry.id !== id)];
    const removed = [];
    while (!this.#fits(index) || !this.#write(index, text)) {
      if (index.length === 1) {
        this.#restore(removed);
        return { kept: false, removed: [] };
      }
      const oldest = index.pop();
      removed.push({ ...oldest, text: this.#storage.getItem(PREFIX + oldest.id) });
      this.#storage.removeItem(PREFIX + oldest.id);
    }
    return { kept: true, removed: removed.map((entry) => entry.title) };
  }

  #fits(index) {
    const size = index.reduce((sum, entry) => sum + entry.size, 0);
    return index.length <= this.#limits.conversations && size <= this.#limits.characters;
  }

  /** Write the text of the first conversation of an index, and the index; false if the storage is full. */
  #write(index, text) {
    const key = PREFIX + index[0].id;
    const before = this.#storage.getItem(key);
    try {
      this.#storage.setItem(key, text);
      this.#storage.setItem(INDEX, JSON.stringify(index));
      return true;
    } catch {
      if (before === null) this.#storage.removeItem(key);
      else this.#storage.setItem(key, before);
      return false;
    }
  }

  #restore(removed) {
    for (const { id, text } of removed) if (text !== null) this.#storage.setItem(PREFIX + id, text);
  }

  /** Remove a conversation and return it; null if there was none. */
  remove(id) {
    const conversation = this.get(id);
    this.#storage.removeItem(PREFIX + id);
    try {
      this.#storage.setItem(INDEX, JSON.stringify(this.list().filter((entry) => entry.id !== id)));
    } catch {
      // A full storage still lets go of the conversation; its entry leads nowhere and goes with the next change.
    }
    return conversation;
  }

  #read(key) {
    try {
      return JSON.parse(this.#storage.getItem(key));
    } catch {
      return null;
    }
  }
}

function isMessage(message) {
  if (typeof message?.content !== "string") return false;
  if (message.role === "assistant") return typeof message.reasoning === "string" && Array.isArray(message.toolCalls);
  return message.role === "user" || message.role === "tool";
}

/** The browser's storage, or if it is blocked, one that lasts as long as the page. */
export function openStorage() {
  try {
    localStorage.setItem("tritgguf.test", "");
    localStorage.removeItem("tritgguf.test");
    return { storage: localStorage, lasting: true };
  } catch {
    const entries = new Map();
    const storage = {
      getItem: (key) => entries.get(key) ?? null,
      setItem: (key, value) => void entries.set(key, value),
      removeItem: (key) => void entries.delete(key),
    };
    return { storage, lasting: false };
  }
}
