// The official SDK. A method is named by its path, such as `images.generate`.

import { createReadStream } from "node:fs";

import OpenAI, { toFile } from "openai";

import { serveCalls } from "./calls.mjs";

async function call({ url, key, headers, method, positional, fields }) {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
  const path = method.split(".");
  const name = path.pop();
  const resource = path.reduce((owner, part) => owner[part], client);
  const body = Object.keys(fields).length ? [fields] : [];
  const value = await resource[name](...positional, ...body, { headers });
  if (value[Symbol.asyncIterator]) return value;
  return { ...value, _request_id: value._request_id }; // the SDK hides it from JSON
}

await serveCalls(call, { bytes: (buffer) => toFile(buffer, "upload"), path: createReadStream });
