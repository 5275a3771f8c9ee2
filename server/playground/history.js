// The history of images, in IndexedDB; without a database in memory, until the page is closed.

export const LIMIT = 50;
const STORE = "pictures"; // as in the databases of existing users
const THUMB_SIDE = 192;

let opened;
let inMemory = null; // the records, without a database

function database() {
  opened ??= new Promise((resolve, reject) => {
    const opening = indexedDB.open("glimmer", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
  });
  return opened;
}

/** Resolves to the result of `use(store)` once the transaction is complete. */
async function transact(mode, use) {
  const transaction = (await database()).transaction(STORE, mode);
  const result = use(transaction.objectStore(STORE));
  await new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error);
  });
  return result.result;
}

/** Resolves to all records, the newest first. */
export async function all() {
  try {
    if (!inMemory) return (await transact("readonly", (store) => store.getAll())).reverse();
  } catch {
    inMemory = [];
  }
  return [...inMemory].reverse();
}

/**
 * Stores a record, {blob, fields, edits, seed, size, plan}, with a thumbnail, and deletes the oldest beyond the limit.
 * Resolves to its id.
 */
export async function add(record) {
  const stored = { ...record, at: Date.now(), thumb: await thumbnail(record.blob) };
  if (!inMemory) {
    try {
      return await transact("readwrite", (store) => {
        const adding = store.add(stored);
        const keys = store.getAllKeys();
        keys.onsuccess = () => keys.result.slice(0, -LIMIT).forEach((key) => store.delete(key));
        return adding;
      });
    } catch {
      inMemory = await all(); // no storage left: continue in memory with the records so far
      inMemory.reverse();
    }
  }
  const id = stored.at + Math.random();
  inMemory = [...inMemory, { ...stored, id }].slice(-LIMIT);
  return id;
}

export async function remove(id) {
  if (inMemory) inMemory = inMemory.filter((record) => record.id !== id);
  await transact("readwrite", (store) => store.delete(id)).catch(() => {});
}

export async function clear() {
  if (inMemory) inMemory = [];
  await transact("readwrite", (store) => store.clear()).catch(() => {});
}

async function thumbnail(blob) {
  const bitmap = await createImageBitmap(blob);
  const scale = Math.min(1, THUMB_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(bitmap.width * scale);
  canvas.height = Math.round(bitmap.height * scale);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return new Promise((resolve) => canvas.toBlob(resolve, "image/webp", 0.85));
}
