// How the tests call a client in a process of its own: each line of standard input is a call as JSON, and the line of
// standard output that answers it says what came of it.

import { createInterface } from "node:readline";

/**
 * Answers calls until standard input ends.
 *
 * @param call makes one, {url, key, headers, method, positional, fields}; what it resolves to is the answer, and where
 *   that is an async iterable, the list of what it gives
 * @param files makes the client's own of a file, from a Buffer (`bytes`) or from its path (`path`)
 */
export async function answerCalls(call, files) {
  for await (const line of createInterface({ input: process.stdin })) {
    let answer;
    try {
      answer = { value: await collected(await call(await withFiles(JSON.parse(line), files))) };
    } catch (error) {
      answer = { error: { ...error, kind: error.constructor.name, message: error.message } };
    }
    console.log(JSON.stringify(answer));
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
