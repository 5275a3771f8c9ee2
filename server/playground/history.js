// The pictures of the past, in this browser's IndexedDB. Where it has none, they last as long as the page.

export const LIMIT = 50;
const STORE = "pictures";
const THUMB_SIDE = 192;

let opened;
let volatile = null; // the pictures where there is no database

function database() {
  opened ??= new Promise((resolve, reject) => {
    const opening = indexedDB.open("glimmer", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
  });
  return opened;
}

/** What `use` makes of the store, once it is safely there. */
async function transact(mode, use) {
  const transaction = (await database()).transaction(STORE, mode);
  const result = use(transaction.objectStore(STORE));
  await new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error);
  });
  return result.result;
}

/** All pictures, the newest first. */
export async function all() {
  try {
    if (!volatile) return (await transact("readonly", (store) => store.getAll())).reverse();
  } catch {
    volatile = [];
  }
  return [...volatile].reverse();
}

/**
 * Keeps a picture, {blob, fields, edits, seed, size, plan}, with a thumbnail. The oldest beyond the limit go.
 * Resolves to its id.
 */
export async function add(picture) {
  const kept = { ...picture, at: Date.now(), thumb: await thumbnail(picture.blob) };
  if (!volatile) {
    try {
      return await transact("readwrite", (store) => {
        const adding = store.add(kept);
        const keys = store.getAllKeys();
        keys.onsuccess = () => keys.result.slice(0, -LIMIT).forEach((key) => store.delete(key));
        return adding;
      });
    } catch {
      volatile = await all(); // the browser gives it no room: what is there stays, in memory, until it is closed
      volatile.reverse();
    }
  }
  const id = kept.at + Math.random();
  volatile = [...volatile, { ...kept, id }].slice(-LIMIT);
  return id;
}

export async function remove(id) {
  if (volatile) volatile = volatile.filter((picture) => picture.id !== id);
  await transact("readwrite", (store) => store.delete(id)).catch(() => {});
}

export async function clear() {
  if (volatile) volatile = [];
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
