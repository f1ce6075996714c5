// The picture, the prompts, and one or two models that answer to them.

import { Problem, ask, isAbort } from "./api.js";
import { Panel } from "./panel.js";
import { compared } from "./rle.js";
import { element, fillSelect, fixed, isOriginal, modelTitle, save, whole } from "./words.js";

const SAMPLES = [0, 1, 2, 3];
const $ = (id) => document.getElementById(id);
const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;

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
  #opening = null; // the picture chosen last

  /** `reload()` is called when a model turns out to be gone. */
  constructor(reload) {
    this.reload = reload;
    this.holder = $("panels");
    this.hands = {
      mode: () => chosen("mode"),
      point: (x, y, label) => this.#change({ ...this.#settled, points: [...this.#settled.points, { x, y, label }] }),
      box: (box, final) => this.#change({ ...this.#settled, box }, { live: !final }),
      dropBox: () => this.#before && this.undo(),
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

  /** The prompts without a box that is still being drawn. */
  get #settled() {
    return this.#before ?? this.prompts;
  }

  get #live() {
    return this.panels.filter(({ root }) => !root.hidden);
  }

  // --- picture and models

  /** Show a picture, a blob or the promise of one, and have its embeddings made; the one chosen last stays. */
  async open(source) {
    this.fail(null);
    const own = (this.#opening = {});
    let blob, picture, problem;
    try {
      blob = await source;
      picture = await createImageBitmap(blob);
    } catch (error) {
      const unreadable = "This browser cannot show this file as a picture. PNG, JPEG, WebP, GIF and BMP work.";
      problem = error instanceof Problem ? error : new Problem(0, "", unreadable);
    }
    if (this.#opening !== own) return picture?.close();
    if (problem) return this.fail(problem);
    this.picture?.close();
    Object.assign(this, { picture, blob });
    this.#title = (blob.name ?? "picture").replace(/\.[^.]*$/, "") || "picture";
    this.#past = [];
    this.#before = null;
    for (const panel of this.panels) {
      panel.show(picture);
      panel.name(panel.label.textContent);
    }
    this.#setPrompts({ points: [], box: null });
    this.say(`Picture of ${picture.width} by ${picture.height} pixels.`);
    await Promise.all(this.#live.map((panel) => panel.embed()));
  }

  /** Take the list of models; the left panel gets the original in a comparison, where there is one. */
  setModels(models) {
    // A name may get another artifact, and two names may be of one.
    const identity = ({ model }) => model && `${model.id} ${model.artifact_sha256}`;
    const before = this.panels.map(identity);
    this.models = models;
    this.told = true;
    const options = models.map((model) => [model.id, modelTitle(model)]);
    const first = models.find(({ report }) => !isOriginal(report)) ?? models[0];
    for (const { select } of this.panels) {
      const kept = models.some(({ id }) => id === select.value);
      fillSelect(select, options, kept ? select.value : first?.id);
    }
    // Before it is disabled: then a click does nothing.
    if (models.length < 2 && $("compare").checked) $("compare").click();
    $("compare").disabled = models.length < 2;
    this.panels.forEach((panel, k) => (identity(panel) === before[k] ? panel.facts() : panel.embed()));
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
    const file = async () => new File([await (await ask(url)).blob()], `scene_${number}.png`);
    button.addEventListener("click", () => this.open(file()));
    return button;
  }

  // --- prompts

  #change(prompts, { remember = true, live = false } = {}) {
    if (!this.picture) return;
    if (remember && !live) this.#past.push(this.#settled);
    this.#before = live ? this.#settled : null;
    this.#setPrompts(prompts);
    this.fail(null);
    if (!this.prompted) this.say("No prompts are left, and no mask.");
    for (const panel of this.#live) panel.ask(live);
  }

  #setPrompts(prompts) {
    this.prompts = prompts;
    $("undo").disabled = this.#past.length === 0;
    $("clear").disabled = !this.prompted;
    for (const { stage } of this.panels) stage.showPrompts(prompts);
  }

  /** Take back the box that is being drawn, or else the last change. */
  undo() {
    const prompts = this.#before ?? this.#past.pop();
    if (prompts) this.#change(prompts, { remember: false });
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
    if (!several && (left.mask || !this.prompted)) document.querySelector("input[name=candidate]").checked = true;
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
    const [panel] = this.#live, { mask, model, prompts } = panel;
    const stem = `${this.#title}-mask`, number = panel.masks.indexOf(mask);
    try {
      if (format === "rle") {
        const whole = { model: model.id, width: this.picture.width, height: this.picture.height, ...prompts, ...mask };
        return save(new Blob([JSON.stringify(whole, null, 1)], { type: "application/json" }), `${stem}.json`);
      }
      const { segmentation, ...properties } = (await panel.again(format))[number];
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
    if (error) this.say(""); // what was said of a mask no longer holds
    if (error?.code === "unknown_model") this.reload();
  }
}
