// The API reference, made from /openapi.json.

import * as snippets from "./snippets.js";

const METHODS = ["get", "post", "put", "patch", "delete"];
const FIRST_ERROR = 400;

let hasKey = false; // whether the server requires an API key

// --- building blocks --------------------------------------------------------------------------------------------------

/** Creates an element with attributes and children; strings become text. */
function element(tag, attributes, ...children) {
  const result = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) result.setAttribute(name, value);
  result.append(...children.flat());
  return result;
}

const code = (text) => element("code", {}, text);

/** Splits a description into text and code, which is in backticks. */
const prose = (text = "") => text.split("`").map((part, index) => (index % 2 ? code(part) : part));

/** Joins the lists that `render` returns for `items`, with `separator` in between. */
const joined = (items, render, separator) =>
  items.flatMap((item, index) => (index ? [separator, ...render(item)] : render(item)));

function table(headings, rows) {
  const head = element("tr", {}, headings.map((heading) => element("th", { scope: "col" }, heading)));
  const body = rows.map((cells) => element("tr", {}, cells.map((cell) => element("td", {}, cell))));
  const grid = element("table", {}, element("thead", {}, head), element("tbody", {}, body));
  return element("div", { class: "scroll" }, grid);
}

function details(summary, isOpen, ...children) {
  return element("details", isOpen ? { open: "" } : {}, element("summary", {}, summary), ...children);
}

// --- schemas ----------------------------------------------------------------------------------------------------------

const isNull = (schema) => schema.type === "null";
const nameOf = (schema) => schema.$ref?.split("/").at(-1);
const link = (name) => element("a", { href: `#${name}` }, name);

/** Describes the type of a value, without null, which means that a field is absent. */
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
  const isOmitted = value === undefined || value === null || value === "";
  return [...prose(description), ...(isOmitted ? [] : [description && "; ", "default ", code(JSON.stringify(value))])];
}

/** Renders the fields of an object; links lead to its name. */
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

/** Renders the fields of each body; the first is open. */
function bodies(operation, schemas) {
  return Object.entries(operation.requestBody?.content ?? {}).map(([kind, { schema }], index) =>
    details(["Body, ", code(kind)], index === 0, ...fields(nameOf(schema), schemas[nameOf(schema)])),
  );
}

function example(path, operation) {
  const contents = Object.values(operation.requestBody?.content ?? {});
  const request = contents.find((content) => content.example)?.example;
  if (!request) return [];
  const base = new URL("v1", document.baseURI).href;
  const sources = path.endsWith("/edits") ? 1 : 0;
  return [
    details("curl", true, element("pre", {}, snippets.curl(base, request, sources, hasKey))),
    details("Python", false, element("pre", {}, snippets.python(base, request, sources, hasKey))),
  ];
}

function responses(operation) {
  const rows = Object.entries(operation.responses).map(([status, { description, content = {}, headers = {} }]) => {
    const kinds = joined(Object.entries(content), ([kind, it]) => [code(kind), " ", ...typeOf(it.schema ?? it)], ", ");
    const named = Object.entries(headers).flatMap(([name, it]) => [" ", code(name), ": ", ...prose(it.description)]);
    return [Number(status), [status, [...prose(description), ...named], kinds]];
  });
  const cellsOf = (isError) => rows.filter(([status]) => status >= FIRST_ERROR === isError).map(([, cells]) => cells);
  const headings = ["Status", "", "Response"];
  const [successes, errors] = [cellsOf(false), cellsOf(true)];
  if (!errors.length) return [table(headings, successes)];
  const list = errors.map(([status]) => status).join(", ");
  return [table(headings, successes), details(`Errors: ${list}`, false, table(headings, errors))];
}

function route(method, path, operation, schemas) {
  const bearer = element("p", { class: "hint" }, "Requires a key: ", code("Authorization: Bearer KEY"));
  return element(
    "section",
    { id: method + path, class: "route" },
    element("h2", {}, label(method, path)),
    element("p", {}, prose(operation.description)),
    ...(operation.security ? [bearer] : []),
    ...parameters(operation),
    ...bodies(operation, schemas),
    ...example(path, operation),
    ...responses(operation),
  );
}

// --- page -------------------------------------------------------------------------------------------------------------

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

/** Scrolls to the target of the URL, which did not exist when the page was loaded. */
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
