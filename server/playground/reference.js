// The API reference: what /openapi.json says, for a person to read.

import * as snippets from "./snippets.js";

const METHODS = ["get", "post", "put", "patch", "delete"];
const FIRST_ERROR = 400;

let hasKey = false; // whether the server asks for a key

// --- building blocks --------------------------------------------------------------------------------------------------

/** An element with attributes and children; texts stay texts. */
function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.flat());
  return made;
}

const code = (text) => element("code", {}, text);

/** A text of the document: what stands in backticks is code. */
const prose = (text = "") => text.split("`").map((part, index) => (index % 2 ? code(part) : part));

/** What is told by `tell` of each of `items`, with a word in between. */
const joined = (items, tell, word) => items.flatMap((item, index) => (index ? [word, ...tell(item)] : tell(item)));

function table(headings, rows) {
  const head = element("tr", {}, headings.map((heading) => element("th", { scope: "col" }, heading)));
  const body = rows.map((cells) => element("tr", {}, cells.map((cell) => element("td", {}, cell))));
  const made = element("table", {}, element("thead", {}, head), element("tbody", {}, body));
  return element("div", { class: "scroll" }, made);
}

function details(summary, isOpen, ...children) {
  return element("details", isOpen ? { open: "" } : {}, element("summary", {}, summary), ...children);
}

// --- schemas ----------------------------------------------------------------------------------------------------------

const isNull = (schema) => schema.type === "null";
const nameOf = (schema) => schema.$ref?.split("/").at(-1);
const link = (name) => element("a", { href: `#${name}` }, name);

/** The type of a value in words. That null stands for an absent field goes without saying. */
function typeOf(schema) {
  if (schema.$ref) return [link(nameOf(schema))];
  if (schema.anyOf) return joined(schema.anyOf.filter((kind) => !isNull(kind)), typeOf, " or ");
  if (schema.itemSchema) return typeOf(schema.itemSchema.properties.data.contentSchema);
  if ("const" in schema) return [code(JSON.stringify(schema.const))];
  if (schema.enum) return joined(schema.enum, (value) => [code(JSON.stringify(value))], " ");
  if (schema.type === "array") return ["list of ", ...typeOf(schema.items)];
  return [schema.format === "binary" ? "file" : (schema.type ?? "")];
}

function about({ description = "", default: value }) {
  const isTold = value === undefined || value === null || value === "";
  return [...prose(description), ...(isTold ? [] : [description && "; ", "default ", code(JSON.stringify(value))])];
}

/** The fields of an object; its name is what links lead to. */
function fields(name, schema) {
  const rows = Object.entries(schema.properties ?? {}).map(([field, kind]) => {
    const required = schema.required?.includes(field) ? [element("span", { class: "required" }, "required")] : [];
    return [[code(field), ...required], typeOf(kind), about(kind)];
  });
  const text = element("p", { id: name, class: "hint" }, prose(schema.description));
  return rows.length ? [text, table(["Field", "Type", ""], rows)] : [text, element("p", {}, typeOf(schema))];
}

// --- routes -----------------------------------------------------------------------------------------------------------

const label = (method, path) => [element("span", { class: `method ${method}` }, method.toUpperCase()), code(path)];

function parameters(operation) {
  if (!operation.parameters?.length) return [];
  const rows = operation.parameters.map((it) => [code(it.name), it.in, prose(it.description)]);
  return [table(["Parameter", "In", ""], rows)];
}

/** The fields of each kind of body; the first lies open. */
function bodies(operation, schemas) {
  return Object.entries(operation.requestBody?.content ?? {}).map(([kind, { schema }], index) =>
    details(["Body, ", code(kind)], index === 0, ...fields(nameOf(schema), schemas[nameOf(schema)])),
  );
}

function example(path, operation) {
  const given = Object.values(operation.requestBody?.content ?? {}).find((content) => content.example)?.example;
  if (!given) return [];
  const base = new URL("v1", document.baseURI).href;
  const sources = path.endsWith("/edits") ? 1 : 0;
  return [
    details("curl", true, element("pre", {}, snippets.curl(base, given, sources, hasKey))),
    details("Python", false, element("pre", {}, snippets.python(base, given, sources, hasKey))),
  ];
}

function answers(operation) {
  const rows = Object.entries(operation.responses).map(([status, { description, content = {}, headers = {} }]) => {
    const kinds = joined(Object.entries(content), ([kind, it]) => [code(kind), " ", ...typeOf(it.schema ?? it)], ", ");
    const named = Object.entries(headers).flatMap(([name, it]) => [" ", code(name), ": ", ...prose(it.description)]);
    return [Number(status), [status, [...prose(description), ...named], kinds]];
  });
  const told = (isError) => rows.filter(([status]) => status >= FIRST_ERROR === isError).map(([, cells]) => cells);
  const headings = ["Status", "", "Answer"];
  const [good, errors] = [told(false), told(true)];
  if (!errors.length) return [table(headings, good)];
  const list = errors.map(([status]) => status).join(", ");
  return [table(headings, good), details(`Errors: ${list}`, false, table(headings, errors))];
}

function route(method, path, operation, schemas) {
  const bearer = element("p", { class: "hint" }, "Needs a key: ", code("Authorization: Bearer KEY"));
  return element(
    "section",
    { id: method + path, class: "route" },
    element("h2", {}, label(method, path)),
    element("p", {}, prose(operation.description)),
    ...(operation.security ? [bearer] : []),
    ...parameters(operation),
    ...bodies(operation, schemas),
    ...example(path, operation),
    ...answers(operation),
  );
}

// --- the page ---------------------------------------------------------------------------------------------------------

function show({ info, paths, components: { schemas } }) {
  const operations = Object.entries(paths).flatMap(([path, methods]) =>
    METHODS.filter((method) => method in methods).map((method) => [method, path, methods[method]]),
  );
  hasKey = operations.some(([, , operation]) => operation.security);
  const inBodies = operations.flatMap(([, , { requestBody }]) => Object.values(requestBody?.content ?? {}));
  const shown = new Set(inBodies.map(({ schema }) => nameOf(schema)));
  const place = (id, ...children) => document.getElementById(id).append(...children);
  place("about", `${info.description} Version ${info.version}.`);
  for (const [method, path] of operations) {
    place("contents", element("a", { href: `#${method}${path}` }, label(method, path)));
  }
  place("routes", ...operations.map(([method, path, operation]) => route(method, path, operation, schemas)));
  for (const [name, schema] of Object.entries(schemas).filter(([name]) => !shown.has(name))) {
    place("kinds", element("section", { class: "route" }, element("h3", {}, name), ...fields(name, schema)));
  }
}

/** Goes where the address points, which was not there yet when the page was loaded. */
function goToTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  target?.closest("details")?.setAttribute("open", "");
  target?.scrollIntoView();
}

try {
  show(await (await fetch("openapi.json")).json());
  goToTarget();
} catch {
  document.getElementById("about").textContent = "The server cannot be reached; reload this page.";
}
window.addEventListener("hashchange", goToTarget);
