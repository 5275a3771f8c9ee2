// LangChain's image tool. A method is one of the tool's, the fields are the tool's options.

import { DallEAPIWrapper } from "@langchain/openai";

import { serveCalls } from "./calls.mjs";

async function call({ url, key, method, positional, fields }) {
  return new DallEAPIWrapper({ baseUrl: `${url}/v1`, apiKey: key, ...fields })[method](...positional);
}

await serveCalls(call, {});
