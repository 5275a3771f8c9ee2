// A request as code that makes it again, for a shell and for Python.

const SDK_FIELDS = new Set(["prompt", "model", "n", "size", "quality", "output_format", "response_format"]);
const KEY_VARIABLE = "GLIMMER_API_KEY"; // the key itself is not for copies, which end up in chats and tickets

const shell = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;
const extension = (fields) => fields.output_format ?? "png";

/** Names of the files that stand for the pictures of an edit. */
const sourceNames = (count) => Array.from({ length: count }, (_, index) => `source-${index + 1}.png`);

/**
 * @param base where the API is, ending in /v1
 * @param fields of the request
 * @param sources how many pictures it edits
 * @param hasKey whether the server asks for a key
 */
export function curl(base, fields, sources, hasKey) {
  const body = { ...fields, response_format: "b64_json" };
  const lines = [`curl --fail-with-body ${shell(`${base}/images/${sources ? "edits" : "generations"}`)}`];
  if (hasKey) lines.push(`  --header "Authorization: Bearer $${KEY_VARIABLE}"`);
  if (sources) {
    // --form would take a text that starts with @ for a file's name.
    for (const [name, value] of Object.entries(body)) lines.push(`  --form-string ${shell(`${name}=${value}`)}`);
    for (const name of sourceNames(sources)) lines.push(`  --form ${shell(`image[]=@${name}`)}`);
  } else {
    lines.push("  --header 'Content-Type: application/json'", `  --data-raw ${shell(JSON.stringify(body))}`);
  }
  const decode =
    (fields.n ?? 1) === 1
      ? ` \\\n  | jq --raw-output '.data[0].b64_json' | base64 --decode > picture.${extension(fields)}`
      : " > pictures.json";
  return `${lines.join(" \\\n")}${decode}\n`;
}

/** The same for Python, with OpenAI's client. */
export function python(base, fields, sources, hasKey) {
  const entries = Object.entries({ ...fields, response_format: "b64_json" });
  const own = entries.filter(([name]) => SDK_FIELDS.has(name)).map(([name, value]) => `    ${name}=${literal(value)},`);
  const extra = entries.filter(([name]) => !SDK_FIELDS.has(name));
  if (sources) own.unshift(`    image=[${sourceNames(sources).map((name) => `open("${name}", "rb")`).join(", ")}],`);
  if (extra.length) {
    own.push(`    extra_body={${extra.map(([name, value]) => `"${name}": ${literal(value)}`).join(", ")}},`);
  }
  return [
    "import base64",
    ...(hasKey ? ["import os"] : []),
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(base)}, api_key=${hasKey ? `os.environ["${KEY_VARIABLE}"]` : '"none"'})`,
    `answer = client.images.${sources ? "edit" : "generate"}(`,
    ...own,
    ")",
    "for number, image in enumerate(answer.data, 1):",
    `    with open(f"picture-{number}.${extension(fields)}", "wb") as file:`,
    "        file.write(base64.b64decode(image.b64_json))",
    "",
  ].join("\n");
}

/** Texts and numbers of JSON are Python's, too. */
const literal = (value) => JSON.stringify(value);
