// The requests of LibreChat's image tools, with the packages that it sends them with: `generate` goes through OpenAI's
// SDK, `edit` is a form that is streamed, so its length is not announced.

import { Readable } from "node:stream";

import axios from "axios";
import FormData from "form-data";
import OpenAI from "openai";

import { serveCalls } from "./calls.mjs";

const METHODS = {
  generate: (base, key, fields) => new OpenAI({ baseURL: base, apiKey: key, maxRetries: 0 }).images.generate(fields),

  async edit(base, key, { images, ...fields }) {
    const form = new FormData();
    for (const [name, value] of Object.entries(fields)) form.append(name, value);
    for (const image of images) {
      form.append("image[]", Readable.from([image]), { filename: "a photo (1).png", contentType: "image/png" });
    }
    const headers = { ...form.getHeaders(), Authorization: `Bearer ${key}` };
    return (await axios.post("/images/edits", form, { headers, baseURL: base })).data;
  },
};

const call = ({ url, key, method, fields }) => METHODS[method](`${url}/v1`, key, fields);

await serveCalls(call, { bytes: (buffer) => buffer });
