// Calls from the tests to a client in its own process: each line of standard input is a call as JSON, each line of
// standard output its result.

import { createInterface } from "node:readline";

/**
 * Serves calls until standard input ends.
 *
 * @param call makes one call, {url, key, headers, method, positional, fields}, and resolves to its result; an async
 *   iterable is returned as a list
 * @param files convert a Buffer (`bytes`) or a path (`path`) to the client's type of a file
 */
export async function serveCalls(call, files) {
  for await (const line of createInterface({ input: process.stdin })) {
    let result;
    try {
      result = { value: await collected(await call(await withFiles(JSON.parse(line), files))) };
    } catch (error) {
      result = { error: { ...error, kind: error.constructor.name, message: error.message } };
    }
    console.log(JSON.stringify(result));
  }
}

async function collected(value) {
  if (!value?.[Symbol.asyncIterator]) return value;
  const items = [];
  for await (const item of value) items.push(item);
  return items;
}

async function withFiles(value, files) {
  if (typeof value !== "object" || value === null) return value;
  if (Array.isArray(value)) return Promise.all(value.map((item) => withFiles(item, files)));
  if ("$bytes" in value) return files.bytes(Buffer.from(value.$bytes, "base64"));
  if ("$path" in value) return files.path(value.$path);
  const entries = Object.entries(value).map(async ([name, item]) => [name, await withFiles(item, files)]);
  return Object.fromEntries(await Promise.all(entries));
}
