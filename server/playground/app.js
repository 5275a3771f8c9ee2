// The page: a form that becomes a job, the job's pictures as they come, and those of the past.

import * as api from "./api.js";
import * as history from "./history.js";
import * as snippets from "./snippets.js";
import { Tile, clearTiles, listItem, prepareSaving, thumbButton } from "./tiles.js";

const RUNNING = "glimmer-running"; // the job that this tab waits for, so that a reload finds it again
const COPIED_MS = 1500;
const MAX_SOURCES = 4;

const $ = (id) => document.getElementById(id);
const form = $("form");
let sources = []; // Blobs to edit
let running = null; // {jobId, isCancelled} while a job is waited for
let viewed = null; // the picture in the dialog

// --- the form ---------------------------------------------------------------------------------------------------------

/** What the form says, as fields of a request. A number that is none goes out as it is: the API says what is wrong. */
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

/** Adds a zone to the end of the prompt, with the part that is to be filled in selected. */
function addZone(zone) {
  const prompt = $("prompt");
  const before = prompt.value.trimEnd();
  const start = before + (before ? (/[,.;:]$/.test(before) ? " " : ", ") : "");
  prompt.value = start + zone;
  const gap = start.length + zone.indexOf("…");
  prompt.focus();
  prompt.setSelectionRange(gap, gap + 1);
}

function setSources(blobs) {
  sources = blobs.slice(0, MAX_SOURCES);
  $("sources").replaceChildren(
    ...sources.map((blob, index) => {
      const button = thumbButton(blob, `Do not edit picture ${index + 1}`);
      button.classList.add("removable");
      button.addEventListener("click", () => {
        setSources(sources.filter((other) => other !== blob));
        $("image").focus();
      });
      return listItem(button);
    }),
  );
  $("submit").textContent = sources.length ? "Edit" : "Generate";
  if (blobs.length > MAX_SOURCES) showError(new api.ApiError(0, { message: "At most 4 pictures.", param: "image" }));
}

function editPicture(picture) {
  $("viewer").close();
  clearErrors();
  setSources([picture.blob]);
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

/** Says what is wrong in the API's words, beside the field that it names. */
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

/** Browsers have no `navigator.clipboard` on a page that comes by plain HTTP from another machine. */
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

// --- a job ------------------------------------------------------------------------------------------------------------

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

/** Takes up the job of before a reload. */
async function resume() {
  const saved = JSON.parse(sessionStorage.getItem(RUNNING) ?? "null");
  if (!saved) return;
  running = { jobId: null, isCancelled: false };
  showRunning("Looking for the picture");
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
  running.isCancelled = true; // before the job is known, `watch` cancels it
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
    else if (name === "reconnecting") say("The connection broke; trying again");
    else if (name === "completed") await showResult(data, tiles, request);
    else if (data.error.code === "job_cancelled") fail(null);
    else throw new api.ApiError(0, data.error);
  }
}

function showPartial(partial, tiles) {
  for (const tile of tiles) tile.setSize(partial.size); // also those that have nothing to show yet
  tiles[partial.image_index ?? 0].showPartial(partial);
}

async function showResult({ result }, tiles, request) {
  if (!result) throw new api.ApiError(0, { message: "The picture was made, but it is not kept any more." });
  say(tiles.length === 1 ? "Done" : `Done: ${tiles.length} pictures`);
  for (const [index, image] of result.data.entries()) {
    const picture = {
      blob: api.toBlob(image.b64_json, result.output_format),
      fields: { ...request.fields, n: 1, seed: image.seed },
      edits: request.edits,
      seed: image.seed,
      size: result.size,
      plan: image.plan,
    };
    tiles[index].finish(picture, ACTIONS);
    picture.id = await history.add(picture);
  }
  await showPast();
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
  const ahead = job.position === 0 ? "next in line" : `${job.position} before this one`;
  const rest = job.estimated_seconds ? `, about ${Math.ceil(job.estimated_seconds)} s` : "";
  say(`Waiting: ${ahead}${rest}`);
}

function showProgress({ phase, step, steps }) {
  if (running.isCancelled) return;
  const name = phase[0].toUpperCase() + phase.slice(1);
  if ($("status").textContent !== name) say(name); // a screen reader is told of the phase, not of every step
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

/** Ends what is shown of a job that made no picture; `error` is null where that was wanted. */
function fail(error) {
  say(!error ? "Cancelled" : running.jobId ? "Failed" : ""); // what was refused has not begun
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

// --- pictures ---------------------------------------------------------------------------------------------------------

async function showPast() {
  const pictures = await history.all();
  $("past").hidden = !pictures.length;
  $("thumbs").replaceChildren(
    ...pictures.map((picture) => {
      const button = thumbButton(picture.thumb, `${picture.fields.prompt}, seed ${picture.seed}`);
      button.addEventListener("click", () => view(picture));
      button.addEventListener("keydown", (event) => event.key === "Delete" && forget(picture));
      return listItem(button);
    }),
  );
}

/** Deletes a picture of the past; the focus goes on to the one that takes its place. */
async function forget(picture) {
  const place = (await history.all()).findIndex(({ id }) => id === picture.id);
  await history.remove(picture.id);
  await showPast();
  const left = $("thumbs").querySelectorAll("button");
  (left[Math.min(place, left.length - 1)] ?? $("prompt")).focus();
}

/** Opens the dialog with a picture, of the past or just made. */
function view(picture) {
  viewed = picture;
  const viewer = $("viewer");
  const tile = new Tile(picture);
  tile.finish(picture, ACTIONS);
  tile.figure.querySelector(".actions").remove();
  viewer.querySelector(".view").replaceChildren(tile.figure);
  $("viewer-prompt").textContent = picture.fields.prompt;
  const { prompt, n, seed, size, ...others } = picture.fields;
  const facts = Object.entries(others).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`);
  $("viewer-facts").textContent = [picture.size, ...(picture.edits ? ["an edit"] : []), ...facts].join(" · ");
  prepareSaving(viewer.querySelector("[data-do=save]"), picture, tile.image);
  viewer.showModal();
}

const ACTIONS = { edit: editPicture, open: view };

const VIEWER = {
  edit: () => editPicture(viewed),
  reuse: () => {
    writeFields(viewed.fields);
    $("viewer").close();
    $("prompt").focus();
  },
  curl: (button) => copy("curl", viewed.fields, viewed.edits, button),
  python: (button) => copy("python", viewed.fields, viewed.edits, button),
  delete: async () => {
    $("viewer").close();
    await forget(viewed);
  },
  close: () => $("viewer").close(),
};

// --- the start --------------------------------------------------------------------------------------------------------

/** A choice where there is one. A server that asks for keys makes the page ask, too. */
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
  if (!confirm("Delete all pictures of the history?")) return;
  await history.clear();
  await showPast();
  $("prompt").focus();
});
for (const button of document.querySelectorAll("[data-zone]")) {
  button.addEventListener("click", () => addZone(button.dataset.zone));
}
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", () => copy(button.dataset.copy, readFields(), sources.length, button));
}
$("viewer").addEventListener("click", (event) => {
  if (event.target === $("viewer")) $("viewer").close(); // beside the dialog: its backdrop
  VIEWER[event.target.dataset.do]?.(event.target);
});
$("viewer").addEventListener("close", () => clearTiles($("viewer").querySelector(".view")));

$("key").value = api.apiKey();
$("key-field").hidden = !api.apiKey();
setSources([]);
showModels();
showPast();
resume();
