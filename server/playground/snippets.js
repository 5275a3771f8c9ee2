// A request as a curl command and as Python code.

const SDK_FIELDS = new Set(["prompt", "model", "n", "size", "quality", "output_format", "response_format"]);
const KEY_VARIABLE = "GLIMMER_API_KEY"; // copies end up in chats and tickets, so they never contain the key

const shell = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;
const extension = (fields) => fields.output_format ?? "png";

/** Returns placeholder names for the source images of an edit. */
const sourceNames = (count) => Array.from({ length: count }, (_, index) => `source-${index + 1}.png`);

/**
 * Returns a curl command.
 *
 * @param base URL of the API, ending in /v1
 * @param fields of the request
 * @param sources number of source images
 * @param hasKey whether the server requires an API key
 */
export function curl(base, fields, sources, hasKey) {
  const body = { ...fields, response_format: "b64_json" };
  const lines = [`curl --fail-with-body ${shell(`${base}/images/${sources ? "edits" : "generations"}`)}`];
  if (hasKey) lines.push(`  --header "Authorization: Bearer $${KEY_VARIABLE}"`);
  if (sources) {
    // --form would read a value that starts with @ from a file.
    for (const [name, value] of Object.entries(body)) lines.push(`  --form-string ${shell(`${name}=${value}`)}`);
    for (const name of sourceNames(sources)) lines.push(`  --form ${shell(`image[]=@${name}`)}`);
  } else {
    lines.push("  --header 'Content-Type: application/json'", `  --data-raw ${shell(JSON.stringify(body))}`);
  }
  const decode =
    (fields.n ?? 1) === 1
      ? ` \\\n  | jq --raw-output '.data[0].b64_json' | base64 --decode > image.${extension(fields)}`
      : " > images.json";
  return `${lines.join(" \\\n")}${decode}\n`;
}

/** Returns Python code that uses OpenAI's client. */
export function python(base, fields, sources, hasKey) {
  const entries = Object.entries({ ...fields, response_format: "b64_json" });
  const known = entries.filter(([name]) => SDK_FIELDS.has(name));
  const args = known.map(([name, value]) => `    ${name}=${literal(value)},`);
  const extra = entries.filter(([name]) => !SDK_FIELDS.has(name));
  if (sources) args.unshift(`    image=[${sourceNames(sources).map((name) => `open("${name}", "rb")`).join(", ")}],`);
  if (extra.length) {
    args.push(`    extra_body={${extra.map(([name, value]) => `"${name}": ${literal(value)}`).join(", ")}},`);
  }
  return [
    "import base64",
    ...(hasKey ? ["import os"] : []),
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(base)}, api_key=${hasKey ? `os.environ["${KEY_VARIABLE}"]` : '"none"'})`,
    `response = client.images.${sources ? "edit" : "generate"}(`,
    ...args,
    ")",
    "for number, image in enumerate(response.data, 1):",
    `    with open(f"image-{number}.${extension(fields)}", "wb") as file:`,
    "        file.write(base64.b64decode(image.b64_json))",
    "",
  ].join("\n");
}

/** JSON strings and numbers are also Python literals. */
const literal = (value) => JSON.stringify(value);
