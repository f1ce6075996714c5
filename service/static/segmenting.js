// The picture, the prompts, and one or two models that answer to them.

import { Problem, ask, askJson, isAbort } from "./api.js";
import { compared } from "./rle.js";
import { Stage } from "./stage.js";
import { element, fillSelect, fixed, isOriginal, modelTitle, save, size, times, whole } from "./words.js";

const SAMPLES = [0, 1, 2, 3];
const $ = (id) => document.getElementById(id);
const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;

/** One model's view of the picture: its own embedding, its own answers. */
class Panel {
  masks = [];
  #embedding = null; // {control, imageId}
  #asking = null;
  #again = false;

  constructor(letter, desk) {
    this.desk = desk;
    this.root = $("panel-template").content.cloneNode(true).firstElementChild;
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

/** Everything of the section: what is shown, what was clicked, who answers. */
export class Desk {
  picture = null;
  blob = null;
  models = [];
  told = false; // whether the service has said which models there are
  prompts = { points: [], box: null };
  #title = "picture";
  #past = []; // the prompts before each change
  #before = null; // those before a box that is being drawn

  constructor() {
    this.holder = $("panels");
    this.hands = {
      mode: () => chosen("mode"),
      point: (x, y, label) => this.#change({ ...this.prompts, points: [...this.prompts.points, { x, y, label }] }),
      box: (box, final) => this.#box(box, final),
      undo: () => this.undo(),
      say: (text) => this.say(text),
    };
    this.panels = [new Panel("a", this), new Panel("b", this)];
    this.panels[1].root.hidden = true;
    $("undo").addEventListener("click", () => this.undo());
    $("clear").addEventListener("click", () => this.#change({ points: [], box: null }));
    $("compare").addEventListener("change", () => this.#compare());
    $("candidates").addEventListener("change", () => this.answered());
    for (const input of document.querySelectorAll("input[name=mode]")) input.addEventListener("change", () => this.#mode());
    $("get-png").addEventListener("click", () => this.#download("png"));
    $("get-rle").addEventListener("click", () => this.#download("rle"));
    $("get-geojson").addEventListener("click", () => this.#download("geojson"));
    $("picture").addEventListener("change", ({ target }) => {
      if (target.files[0]) this.open(target.files[0]);
      target.value = "";
    });
    $("samples").append(...SAMPLES.map((number) => this.#sample(number)));
    this.#mode();
  }

  get candidate() {
    return Number(chosen("candidate"));
  }

  get prompted() {
    return this.prompts.points.length > 0 || this.prompts.box !== null;
  }

  get #live() {
    return this.panels.filter(({ root }) => !root.hidden);
  }

  // --- picture and models

  /** Show a picture and have its embeddings made. */
  async open(blob) {
    this.fail(null);
    let picture;
    try {
      picture = await createImageBitmap(blob);
    } catch {
      return this.fail(new Problem(0, "", "This browser cannot show this file as a picture. PNG, JPEG, WebP, GIF and BMP work."));
    }
    this.picture?.close();
    Object.assign(this, { picture, blob });
    this.#title = (blob.name ?? "picture").replace(/\.[^.]*$/, "") || "picture";
    this.#past = [];
    this.prompts = { points: [], box: null };
    for (const panel of this.panels) {
      panel.show(picture);
      panel.name(panel.label.textContent);
      panel.stage.showPrompts(this.prompts);
    }
    this.say(`Picture of ${picture.width} by ${picture.height} pixels.`);
    await Promise.all(this.#live.map((panel) => panel.embed()));
  }

  /** Take the list of models; the left panel gets the original in a comparison, where there is one. */
  setModels(models) {
    const before = this.panels.map((panel) => panel.model?.artifact_sha256);
    this.models = models;
    this.told = true;
    const options = models.map((model) => [model.id, modelTitle(model)]);
    const first = models.find(({ report }) => !isOriginal(report)) ?? models[0];
    for (const panel of this.panels) fillSelect(panel.select, options, panel.select.value || first?.id);
    $("compare").disabled = models.length < 2;
    if (models.length < 2 && $("compare").checked) $("compare").click();
    this.panels.forEach((panel, k) => (panel.model?.artifact_sha256 === before[k] ? panel.facts() : panel.embed()));
  }

  #compare() {
    const on = $("compare").checked, [left, right] = this.panels;
    right.root.hidden = !on;
    this.holder.classList.toggle("two", on);
    if (on) {
      const { model } = left;
      const peers = this.models.filter(({ id }) => id !== model.id);
      const kin = peers.filter(({ source_sha256 }) => source_sha256 === model.source_sha256);
      const other = kin.find(({ report }) => isOriginal(report)) ?? kin[0] ?? peers[0];
      right.select.value = other.id;
      right.show(this.picture);
      right.stage.showPrompts(this.prompts);
      if (isOriginal(other.report)) {
        [left.select.value, right.select.value] = [other.id, model.id];
        left.embed();
      }
    }
    left.name(on ? "Left model" : "Model");
    right.name("Right model");
    $("downloads-of").textContent = on ? "Download the left mask" : "Download the mask";
    right.embed();
    this.answered();
  }

  #sample(number) {
    const url = `static/assets/scenes/scene_${number}.png`;
    const image = element("img", { src: url, alt: "", width: 40, height: 40 });
    const button = element("button", { type: "button", className: "sample", ariaLabel: `Sample picture ${number + 1}` }, image);
    button.addEventListener("click", async () => {
      try {
        this.open(new File([await (await ask(url)).blob()], `scene_${number}.png`));
      } catch (error) {
        this.fail(error);
      }
    });
    return button;
  }

  // --- prompts

  #change(prompts, { remember = true, live = false } = {}) {
    if (!this.picture) return;
    if (remember) this.#past.push(this.prompts);
    this.prompts = prompts;
    $("undo").disabled = this.#past.length === 0;
    $("clear").disabled = !this.prompted;
    this.fail(null);
    for (const panel of this.#live) {
      panel.stage.showPrompts(prompts);
      panel.ask(live);
    }
  }

  #box(box, final) {
    this.#before ??= this.prompts;
    if (final) {
      this.#past.push(this.#before);
      this.#before = null;
    }
    this.#change({ ...this.prompts, box }, { remember: false, live: !final });
  }

  undo() {
    if (this.#past.length) this.#change(this.#past.pop(), { remember: false });
    else this.say("Nothing to undo.");
  }

  #mode() {
    for (const { canvas } of this.panels) canvas.dataset.mode = chosen("mode");
  }

  // --- answers

  answered() {
    if (!this.panels) return;
    const live = this.#live, [left, right] = live;
    const alike = right && left.prompts === right.prompts; // one may have answered a question that the other has not
    left.draw(alike ? right : null);
    right?.draw(alike ? left : null);
    const several = Math.max(...live.map(({ masks }) => masks.length)) > 1;
    $("candidates").hidden = !several;
    if (!several && left.mask) document.querySelector("input[name=candidate]").checked = true;
    for (const id of ["get-png", "get-rle", "get-geojson"]) $(id).disabled = !left.mask;
    const masks = live.map(({ mask }) => mask).filter(Boolean);
    const both = alike && masks.length === 2 ? compared(masks[0].segmentation, masks[1].segmentation) : null;
    $("agreement").hidden = live.length < 2;
    $("iou").textContent = fixed(both?.iou ?? null, 3);
    $("differ").textContent = both?.differ ? `${whole(both.differ)} pixels differ, marked` : "";
    $("differ").classList.toggle("marked", Boolean(both?.differ));
    if (!masks.length || masks.length < live.length) return;
    const [{ area, score }] = masks;
    const share = (100 * area) / (this.picture.width * this.picture.height);
    const said = `Mask of ${whole(area)} pixels, ${fixed(share, 1)} percent of the picture, predicted IoU ${fixed(score, 2)}.`;
    this.say(both ? `${said} The two masks agree by an IoU of ${fixed(both.iou, 3)}; ${whole(both.differ)} pixels differ.` : said);
  }

  async #download(format) {
    const [panel] = this.#live, { mask, model } = panel;
    const stem = `${this.#title}-mask`, number = panel.masks.indexOf(mask);
    try {
      if (format === "rle") {
        const whole = { model: model.id, width: this.picture.width, height: this.picture.height, ...this.prompts, ...mask };
        return save(new Blob([JSON.stringify(whole, null, 1)], { type: "application/json" }), `${stem}.json`);
      }
      const answer = await panel.again(format);
      if (!answer) return;
      const { segmentation, ...properties } = answer.masks[number];
      if (format === "png") {
        const bytes = Uint8Array.from(atob(segmentation), (letter) => letter.charCodeAt(0));
        return save(new Blob([bytes], { type: "image/png" }), `${stem}.png`);
      }
      const features = [{ type: "Feature", geometry: segmentation, properties: { model: model.id, ...properties } }];
      const text = JSON.stringify({ type: "FeatureCollection", features });
      save(new Blob([text], { type: "application/geo+json" }), `${stem}.geojson`);
    } catch (error) {
      this.fail(error);
    }
  }

  say(text) {
    $("said").textContent = text;
  }

  /** Tell of an error, or with null take the last one away. */
  fail(error) {
    if (isAbort(error)) return;
    if (error && !(error instanceof Problem)) console.error(error);
    if (error?.code === "unauthorized") $("key-box").open = true;
    $("problem").hidden = !error;
    $("problem").textContent = error?.message ?? "";
  }
}
