// The Vercel AI SDK with its provider for OpenAI-compatible servers. A method is a function of the SDK, the fields are
// its options, with the model's name.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import * as ai from "ai";

import { serveCalls } from "./calls.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false; // they are in the result

async function call({ url, key, headers, method, fields }) {
  const provider = createOpenAICompatible({ name: "glimmer", baseURL: `${url}/v1`, apiKey: key });
  const model = provider.imageModel(fields.model);
  const { images, warnings, usage, responses } = await ai[method]({ maxRetries: 0, headers, ...fields, model });
  return { images: images.map(({ base64, mediaType }) => ({ base64, mediaType })), warnings, usage, responses };
}

await serveCalls(call, { bytes: (buffer) => buffer });
