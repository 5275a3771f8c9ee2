// The page: the form, the running job with its images, and the history.

import * as api from "./api.js";
import * as history from "./history.js";
import * as snippets from "./snippets.js";
import { Tile, clearTiles, listItem, prepareSaving, thumbButton } from "./tiles.js";

const RUNNING = "glimmer-running"; // key of the job this tab waits for, to find it again after a reload
const COPIED_MS = 1500;
const MAX_SOURCES = 4;

const $ = (id) => document.getElementById(id);
const form = $("form");
let sources = []; // Blobs to edit
let running = null; // {jobId, isCancelled} while waiting for a job
let viewed = null; // the record in the dialog

// --- form -------------------------------------------------------------------------------------------------------------

/** Returns the fields of the request. An invalid number is sent as it is: the API explains the error. */
function readFields() {
  const fields = {};
  for (const { name, value, type, dataset } of form.elements) {
    const text = value?.trim();
    if (!name || !text || type === "file") continue;
    fields[name] = "number" in dataset && Number.isFinite(Number(text)) ? Number(text) : name === "prompt" ? value : text;
  }
  return fields;
}

function writeFields(fields) {
  for (const control of form.elements) {
    if (control.name && control.type !== "file") control.value = fields[control.name] ?? "";
  }
  if (!$("model").value) $("model").selectedIndex = 0;
  clearErrors();
}

/** Appends a zone to the prompt and selects its placeholder. */
function addZone(zone) {
  const prompt = $("prompt");
  const before = prompt.value.trimEnd();
  const start = before + (before ? (/[,.;:]$/.test(before) ? " " : ", ") : "");
  prompt.value = start + zone;
  const placeholder = start.length + zone.indexOf("…");
  prompt.focus();
  prompt.setSelectionRange(placeholder, placeholder + 1);
}

function setSources(blobs) {
  sources = blobs.slice(0, MAX_SOURCES);
  $("sources").replaceChildren(
    ...sources.map((blob, index) => {
      const button = thumbButton(blob, `Remove image ${index + 1}`);
      button.classList.add("removable");
      button.addEventListener("click", () => {
        setSources(sources.filter((other) => other !== blob));
        $("image").focus();
      });
      return listItem(button);
    }),
  );
  $("submit").textContent = sources.length ? "Edit" : "Generate";
  if (blobs.length > MAX_SOURCES) showError(new api.ApiError(0, { message: `At most ${MAX_SOURCES} images.`, param: "image" }));
}

function editImage(record) {
  $("viewer").close();
  clearErrors();
  setSources([record.blob]);
  $("size").value = "";
  $("prompt").focus();
  $("prompt").select();
}

function clearErrors() {
  for (const message of form.querySelectorAll(".error")) message.remove();
  for (const control of form.querySelectorAll("[aria-invalid]")) {
    control.removeAttribute("aria-invalid");
    control.removeAttribute("aria-errormessage");
  }
}

/** Shows the message of an error beside the field that it names. */
function showError(error) {
  const name = error.status === 401 ? "key" : String(error.param ?? "").split(/[.[]/)[0];
  if (name === "key") $("key-field").hidden = false;
  const control = name && $(name)?.form === form && !$(name).closest("[hidden]") ? $(name) : null;
  const message = document.createElement("p");
  message.className = "error";
  message.id = "error";
  message.setAttribute("role", "alert");
  message.textContent = error instanceof api.ApiError ? error.message : "This page failed; reload it and try again.";
  (control?.closest(".field") ?? $("problem")).append(message);
  if (!control) return;
  control.closest("details")?.setAttribute("open", "");
  control.setAttribute("aria-invalid", "true");
  control.setAttribute("aria-errormessage", "error");
  control.focus();
}

async function copy(kind, fields, count, button) {
  const code = snippets[kind](new URL("v1", document.baseURI).href, fields, count, Boolean(api.apiKey()));
  const label = (button.dataset.label ??= button.textContent);
  button.textContent = (await toClipboard(code)) ? "Copied" : "Not copied";
  setTimeout(() => (button.textContent = label), COPIED_MS);
}

/** Copies a text. Browsers offer no `navigator.clipboard` to a page from another machine over plain HTTP. */
async function toClipboard(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(() => true, () => false);
  const area = document.createElement("textarea");
  area.value = text;
  const focused = document.activeElement;
  (document.querySelector("dialog[open]") ?? document.body).append(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return isCopied;
}

// --- job --------------------------------------------------------------------------------------------------------------

async function submit() {
  if (running) return;
  clearErrors();
  api.setApiKey($("key").value.trim());
  const fields = readFields();
  const request = { fields, edits: sources.length };
  running = { jobId: null, isCancelled: false };
  showRunning("Sending");
  try {
    const job = await api.start(fields, sources);
    sessionStorage.setItem(RUNNING, JSON.stringify({ jobId: job.id, request }));
    await watch(job.id, request);
  } catch (error) {
    fail(error);
  } finally {
    finish();
  }
}

/** Continues with the job of this tab after a reload. */
async function resume() {
  const saved = JSON.parse(sessionStorage.getItem(RUNNING) ?? "null");
  if (!saved) return;
  running = { jobId: null, isCancelled: false };
  showRunning("Looking for the job");
  try {
    await watch(saved.jobId, saved.request);
  } catch (error) {
    if (error.status === 404) say("");
    else fail(error);
  } finally {
    finish();
  }
}

async function cancel() {
  running.isCancelled = true; // `watch` cancels a job whose id is not known yet
  say("Cancelling");
  if (running.jobId) await api.cancel(running.jobId).catch(showError);
}

async function watch(jobId, request) {
  running.jobId = jobId;
  if (running.isCancelled) await api.cancel(jobId);
  const tiles = Array.from({ length: request.fields.n ?? 1 }, () => new Tile(request));
  clearTiles($("tiles"));
  $("tiles").append(...tiles.map((tile) => tile.figure));
  for await (const { name, data } of api.follow(jobId)) {
    if (name === "status") showStatus(data);
    else if (name === "progress") showProgress(data);
    else if (name === "partial_image") showPartial(data, tiles);
    else if (name === "reconnecting") say("Connection lost; reconnecting");
    else if (name === "completed") await showResult(data, tiles, request);
    else if (data.error.code === "job_cancelled") fail(null);
    else throw new api.ApiError(0, data.error);
  }
}

function showPartial(partial, tiles) {
  for (const tile of tiles) tile.setSize(partial.size); // also those without an image yet
  tiles[partial.image_index ?? 0].showPartial(partial);
}

async function showResult({ result }, tiles, request) {
  if (!result) throw new api.ApiError(0, { message: "The image was created, but is no longer kept." });
  say(tiles.length === 1 ? "Done" : `Done: ${tiles.length} images`);
  for (const [index, image] of result.data.entries()) {
    const record = {
      blob: api.toBlob(image.b64_json, result.output_format),
      fields: { ...request.fields, n: 1, seed: image.seed },
      edits: request.edits,
      seed: image.seed,
      size: result.size,
      plan: image.plan,
    };
    tiles[index].finish(record, ACTIONS);
    record.id = await history.add(record);
  }
  await showHistory();
}

function showRunning(text) {
  say(text);
  $("empty").hidden = true;
  $("cancel").hidden = false;
  const hadFocus = document.activeElement === $("submit");
  $("submit").disabled = true;
  if (hadFocus) $("cancel").focus({ preventScroll: true });
  $("status").scrollIntoView({ block: "nearest" });
}

function showStatus(job) {
  if (running.isCancelled) return;
  if (job.progress) return showProgress(job.progress);
  if (job.position === null) return say("Starting");
  const ahead = job.position === 0 ? "next in the queue" : `${job.position} ahead`;
  const estimate = job.estimated_seconds ? `, about ${Math.ceil(job.estimated_seconds)} s` : "";
  say(`Waiting: ${ahead}${estimate}`);
}

function showProgress({ phase, step, steps }) {
  if (running.isCancelled) return;
  const name = phase[0].toUpperCase() + phase.slice(1);
  if ($("status").textContent !== name) say(name); // a screen reader announces the phase, not every step
  $("step").textContent = `${step} / ${steps}`;
  $("progress").max = steps;
  $("progress").value = step;
  $("progress").hidden = false;
}

function say(text) {
  $("status").textContent = text;
  $("step").textContent = "";
  $("progress").hidden = !running;
  $("progress").removeAttribute("value");
}

/** Shows that a job ended without a result; `error` is null if it was cancelled. */
function fail(error) {
  say(!error ? "Cancelled" : running.jobId ? "Failed" : ""); // a refused request has not started
  for (const figure of $("tiles").querySelectorAll(".tile:not(.done)")) {
    if (figure.querySelector("img").hidden) figure.remove();
    else figure.classList.add("unfinished");
  }
  if (error) showError(error);
}

function finish() {
  running = null;
  sessionStorage.removeItem(RUNNING);
  $("progress").hidden = true;
  $("step").textContent = "";
  $("empty").hidden = $("tiles").childElementCount > 0;
  const hadFocus = document.activeElement === $("cancel");
  $("submit").disabled = false;
  $("cancel").hidden = true;
  if (hadFocus) $("submit").focus({ preventScroll: true });
}

// --- history ----------------------------------------------------------------------------------------------------------

async function showHistory() {
  const records = await history.all();
  $("history").hidden = !records.length;
  $("thumbs").replaceChildren(
    ...records.map((record) => {
      const button = thumbButton(record.thumb, `${record.fields.prompt}, seed ${record.seed}`);
      button.addEventListener("click", () => view(record));
      button.addEventListener("keydown", (event) => event.key === "Delete" && remove(record));
      return listItem(button);
    }),
  );
}

/** Deletes a record of the history and focuses the one that takes its place. */
async function remove(record) {
  const index = (await history.all()).findIndex(({ id }) => id === record.id);
  await history.remove(record.id);
  await showHistory();
  const thumbs = $("thumbs").querySelectorAll("button");
  (thumbs[Math.min(index, thumbs.length - 1)] ?? $("prompt")).focus();
}

/** Opens the dialog with a record. */
function view(record) {
  viewed = record;
  const viewer = $("viewer");
  const tile = new Tile(record);
  tile.finish(record, ACTIONS);
  tile.figure.querySelector(".actions").remove();
  viewer.querySelector(".view").replaceChildren(tile.figure);
  $("viewer-prompt").textContent = record.fields.prompt;
  const { prompt, n, seed, size, ...others } = record.fields;
  const facts = Object.entries(others).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`);
  $("viewer-facts").textContent = [record.size, ...(record.edits ? ["an edit"] : []), ...facts].join(" · ");
  prepareSaving(viewer.querySelector("[data-do=save]"), record, tile.image);
  viewer.showModal();
}

const ACTIONS = { edit: editImage, open: view };

const VIEWER = {
  edit: () => editImage(viewed),
  reuse: () => {
    writeFields(viewed.fields);
    $("viewer").close();
    $("prompt").focus();
  },
  curl: (button) => copy("curl", viewed.fields, viewed.edits, button),
  python: (button) => copy("python", viewed.fields, viewed.edits, button),
  delete: async () => {
    $("viewer").close();
    await remove(viewed);
  },
  close: () => $("viewer").close(),
};

// --- start ------------------------------------------------------------------------------------------------------------

/** Offers the models if there are several, and asks for an API key if the server requires one. */
async function showModels() {
  try {
    const names = await api.models();
    const chosen = $("model").value;
    $("model").replaceChildren(...names.map((name, index) => new Option(name, index ? name : "")));
    $("model").value = chosen;
    $("model").closest(".field").hidden = names.length < 2;
  } catch (error) {
    if (error.status === 401) $("key-field").hidden = false;
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
});
$("cancel").addEventListener("click", cancel);
$("key").addEventListener("change", () => {
  api.setApiKey($("key").value.trim());
  showModels();
});
$("image").addEventListener("change", () => {
  clearErrors();
  setSources([...sources, ...$("image").files]);
  $("image").value = ""; // the same file may be chosen again
});
$("clear").addEventListener("click", async () => {
  if (!confirm("Delete all images of the history?")) return;
  await history.clear();
  await showHistory();
  $("prompt").focus();
});
for (const button of document.querySelectorAll("[data-zone]")) {
  button.addEventListener("click", () => addZone(button.dataset.zone));
}
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", () => copy(button.dataset.copy, readFields(), sources.length, button));
}
$("viewer").addEventListener("click", (event) => {
  if (event.target === $("viewer")) $("viewer").close(); // the backdrop
  VIEWER[event.target.dataset.do]?.(event.target);
});
$("viewer").addEventListener("close", () => clearTiles($("viewer").querySelector(".view")));

$("key").value = api.apiKey();
$("key-field").hidden = !api.apiKey();
setSources([]);
showModels();
showHistory();
resume();
