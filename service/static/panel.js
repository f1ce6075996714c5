// One of the models that answer: its embedding of the picture, its masks.

import { askPatiently } from "./api.js";
import { Stage } from "./stage.js";
import { fixed, isOriginal, size, times, whole } from "./words.js";

/** One model's view of the picture: its own embedding, its own answers. */
export class Panel {
  masks = [];
  #embedding = null; // of the picture by the model: {model, blob, control, awaited, imageId, refused}
  #asking = null;
  #again = false;
  #waits = new Set(); // what the busy sign says

  constructor(letter, desk) {
    this.desk = desk;
    this.root = document.getElementById("panel-template").content.cloneNode(true).firstElementChild;
    this.root.id = `panel-${letter}`;
    this.select = this.root.querySelector("select");
    this.select.id = `model-${letter}`;
    this.label = this.root.querySelector("label");
    this.label.htmlFor = this.select.id;
    this.canvas = this.root.querySelector("canvas");
    this.canvas.id = `stage-${letter}`;
    this.stage = new Stage(this.canvas, desk.hands);
    this.select.addEventListener("change", () => {
      desk.fail(null); // it was of the model chosen before
      this.embed();
    });
    desk.holder.append(this.root);
    this.name("Model");
  }

  get model() {
    return this.desk.models.find(({ id }) => id === this.select.value);
  }

  get mask() {
    return this.masks[Math.min(this.desk.candidate, this.masks.length - 1)];
  }

  name(text) {
    this.label.textContent = text;
    const { picture } = this.desk;
    const what = picture ? `Picture of ${picture.width} by ${picture.height} pixels` : "No picture yet";
    this.canvas.setAttribute("aria-label", `${text}. ${what}. Arrow keys move the crosshair, Enter acts, Backspace undoes.`);
  }

  show(picture) {
    this.root.querySelector(".empty").hidden = picture !== null;
    this.canvas.classList.toggle("ready", picture !== null);
    this.stage.show(picture);
    // On a phone the picture would lie below what was tapped to choose it.
    if (picture && !this.root.hidden) this.canvas.parentElement.scrollIntoView({ block: "nearest", behavior: "instant" });
  }

  /** Have the picture's embedding made, ahead of the first prompt; then answer the prompts there are. */
  async embed() {
    this.#embedding?.control.abort();
    this.#asking?.abort();
    this.#asking = this.#embedding = null;
    this.set([]);
    this.facts();
    const { picture, blob } = this.desk, { model } = this;
    if (!picture || !model || this.root.hidden) return;
    const own = { model, blob, control: new AbortController(), awaited: true, imageId: null, refused: null };
    this.#embedding = own;
    try {
      await this.#send(own, "embed", {}, own.control.signal);
      if (this.#embedding === own) this.desk.say(`${model.id} is ready.`);
    } catch (error) {
      if (this.#embedding === own) this.desk.fail(error);
    }
    own.awaited = false;
    if (this.#embedding === own && own.imageId) await this.ask();
  }

  /** Ask for the masks of the prompts. While a box is drawn (`live`) a running question is not given up for the next. */
  async ask(live = false) {
    if (live && this.#asking) {
      this.#again = true;
      return;
    }
    this.#asking?.abort();
    this.#asking = null;
    this.#again = false;
    const own = this.#embedding;
    if (own?.refused) return this.desk.fail(own.refused);
    if (!this.desk.prompted) return this.set([]);
    if (!own) return this.desk.say("There is no model yet.");
    if (own.awaited) return;
    const control = (this.#asking = new AbortController()), { prompts } = this.desk;
    const began = performance.now();
    let answer, problem;
    try {
      answer = await this.#question(own, prompts, "rle", control.signal);
    } catch (error) {
      problem = error;
    }
    if (this.#asking !== control) return; // something else is asked by now
    this.#asking = null;
    if (problem) {
      this.set([]);
      this.desk.fail(problem);
    } else this.set(answer.masks, performance.now() - began, prompts);
    if (this.#again) await this.ask(true);
  }

  /** The masks that are shown, in another form. */
  async again(format) {
    return (await this.#question(this.#embedding, this.prompts, format)).masks;
  }

  async #question(own, { points, box }, format, signal) {
    const fields = { multimask: points.length === 1 && !box, format };
    if (points.length) fields.points = points.map(({ x, y }) => [x, y]);
    if (points.length) fields.point_labels = points.map(({ label }) => label);
    if (box) fields.box = box;
    try {
      const body = { model: own.model.id, image_id: own.imageId, ...fields };
      if (own.imageId) return await this.#post("segment", body, signal);
    } catch (error) {
      if (error.code !== "unknown_image") throw error;
    }
    // Its embedding could not be made, or is no longer held; a service with little room for embeddings holds none.
    return this.#send(own, "segment", fields, signal);
  }

  /** Send the picture itself, and note by what id it is known from then on, or that it is refused. */
  async #send(own, path, fields, signal) {
    const form = new FormData();
    for (const [name, value] of Object.entries({ model: own.model.id, ...fields }))
      form.append(name, typeof value === "object" ? JSON.stringify(value) : value);
    form.append("image", own.blob, "picture");
    try {
      const answer = await this.#busy("Reading the picture…", this.#post(path, form, signal));
      own.imageId = answer.image_id;
      return answer;
    } catch (error) {
      if (error.refusesPicture) own.refused = error;
      throw error;
    }
  }

  #post(path, body, signal) {
    return askPatiently(path, { method: "POST", body, signal }, (pause, { message, wait }) => {
      const told = `${message} (asking again in ${wait / 1000} s)`;
      this.desk.say(told);
      return this.#busy(told, pause);
    });
  }

  /** Take an answer: `masks` of the `prompts`, which `took` milliseconds. */
  set(masks, took, prompts = null) {
    Object.assign(this, { masks, prompts });
    this.took = took ?? this.took;
    this.desk.answered();
  }

  /** Draw the chosen mask beside that of the `other` panel, if there is one. */
  draw(other) {
    const { mask } = this;
    this.stage.showMask(mask?.segmentation ?? null, other?.mask?.segmentation);
    this.root.querySelector(".figures").textContent = mask
      ? `${whole(mask.area)} pixels · predicted IoU ${fixed(mask.score, 3)} · ${Math.round(this.took)} ms`
      : "";
  }

  facts() {
    const { model } = this;
    const found = model?.report.fidelity?.models.compressed;
    const parts = [];
    if (model && isOriginal(model.report)) parts.push(size(model.artifact_bytes), "the weights as they were");
    else if (!model && this.desk.told) parts.push("No model yet: compress a checkpoint below.");
    else if (model) parts.push(`${times(model.report.ratio)} smaller`, `${fixed(model.report.bits_per_weight, 2)} bits a weight`);
    if (found && !isOriginal(model.report)) parts.push(`masks ${fixed(100 * found.mask_iou, 1)}\u00a0% those of the original`);
    this.root.querySelector(".facts").textContent = parts.join(" · ");
  }

  /** Show that something is waited for until `work` has ended. */
  async #busy(text, work) {
    const own = { text };
    this.#waits.add(own);
    this.#showBusy();
    try {
      return await work;
    } finally {
      this.#waits.delete(own);
      this.#showBusy();
    }
  }

  #showBusy() {
    const last = [...this.#waits].at(-1), sign = this.root.querySelector(".busy");
    sign.hidden = !last;
    sign.textContent = last?.text ?? "";
    this.canvas.setAttribute("aria-busy", Boolean(last));
  }
}
