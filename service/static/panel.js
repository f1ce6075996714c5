// One of the models that answer: its embedding of the picture, its masks.

import { Problem, askJson, isAbort } from "./api.js";
import { Stage } from "./stage.js";
import { fixed, isOriginal, size, times, whole } from "./words.js";

/** One model's view of the picture: its own embedding, its own answers. */
export class Panel {
  masks = [];
  #embedding = null; // {control, imageId}
  #asking = null;
  #again = false;

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
    this.select.addEventListener("change", () => this.embed());
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
    this.#embedding = null;
    this.set([]);
    this.facts();
    const { picture, blob } = this.desk;
    if (!picture || !this.model || this.root.hidden) return;
    const own = { control: new AbortController(), imageId: null };
    this.#embedding = own;
    this.busy(true);
    const form = new FormData();
    form.append("model", this.model.id);
    form.append("image", blob, "picture");
    try {
      own.imageId = (await askJson("embed", { method: "POST", body: form, signal: own.control.signal })).image_id;
      this.desk.say(`${this.model.id} is ready.`);
      await this.ask();
    } catch (error) {
      this.desk.fail(error);
    } finally {
      if (this.#embedding === own) this.busy(false);
    }
  }

  /** Ask for the masks of the prompts. While a box is drawn (`live`) a running question is not given up for the next. */
  async ask(live = false) {
    const imageId = this.#embedding?.imageId;
    if (live && this.#asking) {
      this.#again = true;
      return;
    }
    this.#asking?.abort();
    this.#asking = null;
    this.#again = false;
    if (!this.desk.prompted) return this.set([]);
    if (!imageId) return this.model || this.desk.say("There is no model yet.");
    const control = (this.#asking = new AbortController());
    const began = performance.now();
    try {
      const { prompts } = this.desk;
      const answer = await this.question("rle", control.signal);
      if (this.#asking === control) this.set(answer.masks, performance.now() - began, prompts);
    } catch (error) {
      if (error instanceof Problem && error.code === "unknown_image") return this.embed(); // no longer held
      if (!isAbort(error)) this.set([]);
      this.desk.fail(error);
    } finally {
      if (this.#asking === control) this.#asking = null;
    }
    if (this.#again) await this.ask(true);
  }

  /**
   * The answer to the prompts in another form; the embedding is made anew where it is no longer held. Null where that
   * failed, which was told, or where something else is asked by then.
   */
  async again(format) {
    const { prompts } = this.desk, { model } = this;
    try {
      return await this.question(format);
    } catch (error) {
      if (!(error instanceof Problem) || error.code !== "unknown_image") throw error;
    }
    await this.embed();
    const same = this.#embedding?.imageId && this.desk.prompts === prompts && this.model?.id === model.id;
    return same ? this.question(format) : null;
  }

  question(format, signal) {
    const { points, box } = this.desk.prompts;
    const body = { model: this.model.id, image_id: this.#embedding.imageId, multimask: points.length === 1 && !box, format };
    if (points.length) Object.assign(body, { points: points.map(({ x, y }) => [x, y]), point_labels: points.map(({ label }) => label) });
    if (box) body.box = box;
    return askJson("segment", { method: "POST", body, signal });
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

  busy(on) {
    this.root.querySelector(".busy").hidden = !on;
    this.canvas.setAttribute("aria-busy", on);
  }
}
