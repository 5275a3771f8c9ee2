// Tiles, which show images in progress and finished ones.

import { toBlob } from "./api.js";
import { drawPlan } from "./plan.js";

const MAX_ENLARGEMENT = 2; // of small images
const MAX_HEIGHT_VH = 70; // of large images

/** Shows one image: its plan, each partial image, then the finished image with its actions. */
export class Tile {
  constructor(request) {
    this.figure = document.getElementById("tile").content.firstElementChild.cloneNode(true);
    this.frame = this.figure.querySelector(".frame");
    this.image = this.figure.querySelector("img");
    this.prompt = request.fields.prompt;
    this.setSize(request.fields.size ?? "");
    this.planButton = this.figure.querySelector(".plan");
    this.planButton.addEventListener("click", () => togglePlan(this.planButton, this.frame));
  }

  setSize(size) {
    const [width, height] = size.split("x").map(Number);
    if (!width || !height) return;
    this.frame.style.aspectRatio = `${width} / ${height}`;
    this.frame.style.maxWidth = `min(${MAX_ENLARGEMENT * width}px, ${(MAX_HEIGHT_VH * width) / height}vh)`;
  }

  showPlan(plan) {
    if (!plan) return;
    for (const canvas of this.figure.querySelectorAll("canvas")) drawPlan(canvas, plan);
    this.planButton.hidden = false;
  }

  show(blob, kind) {
    showBlob(this.image, blob);
    this.image.alt = `${kind}: ${this.prompt}`;
    const isFirst = this.image.hidden && !this.figure.previousElementSibling;
    this.image.hidden = false;
    if (isFirst) this.figure.scrollIntoView({ block: "nearest" }); // on a phone, it is below the form
  }

  showPartial(partial) {
    this.showPlan(partial.plan);
    this.show(toBlob(partial.b64_json, partial.output_format), "Preview");
    this.figure.dataset.partials = partial.partial_image_index + 1;
    this.figure.querySelector(".caption").textContent = `preview ${partial.partial_image_index + 1}`;
  }

  /** Shows a finished image and its actions, of which `edit` and `open` are callbacks. */
  finish(record, { edit, open }) {
    this.setSize(record.size);
    this.showPlan(record.plan);
    this.show(record.blob, "Image");
    this.figure.classList.add("done");
    this.figure.querySelector(".caption").textContent = `seed ${record.seed}`;
    this.figure.querySelector(".actions").hidden = false;
    this.figure.querySelector("[data-do=edit]").addEventListener("click", () => edit(record));
    this.figure.querySelector("[data-do=open]").addEventListener("click", () => open(record));
    prepareSaving(this.figure.querySelector("[data-do=save]"), record, this.image);
  }
}

function togglePlan(button, frame) {
  button.setAttribute("aria-pressed", String(frame.classList.toggle("shows-plan")));
}

function showBlob(image, blob) {
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(blob);
}

/** Removes tiles and frees the memory of their images. */
export function clearTiles(container) {
  for (const image of container.querySelectorAll("img")) URL.revokeObjectURL(image.src);
  container.replaceChildren();
}

export function prepareSaving(link, record, image) {
  link.href = image.src;
  link.download = `glimmer-${record.seed}.${record.fields.output_format ?? "png"}`;
}

export function thumbButton(blob, label) {
  const button = document.createElement("button");
  const image = document.createElement("img");
  button.type = "button";
  button.setAttribute("aria-label", label);
  image.alt = "";
  image.addEventListener("load", () => URL.revokeObjectURL(image.src));
  image.src = URL.createObjectURL(blob);
  button.append(image);
  return button;
}

export function listItem(child) {
  const item = document.createElement("li");
  item.append(child);
  return item;
}
