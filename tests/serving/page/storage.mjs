/** A Storage that holds so many characters, like a browser's. */
export function storageOf(capacity = Infinity) {
  const entries = new Map();
  const size = () => [...entries].reduce((sum, [key, value]) => sum + key.length + value.length, 0);
  return {
    entries,
    getItem: (key) => entries.get(key) ?? null,
    removeItem: (key) => void entries.delete(key),
    setItem(key, value) {
      if (size() - (entries.get(key)?.length ?? 0) + value.length > capacity) throw new Error("QuotaExceededError");
      entries.set(key, value);
    },
  };
}
