// A picture to click on: draws picture, mask and prompts, and turns mouse, touch and keys into prompts.

import { decode } from "./rle.js";

const DRAG = 5; // CSS pixels that make a press a drag
const LONG_PRESS = 500; // milliseconds
const LARGEST_OVERLAY = 1600; // pixels of its longer side
const MOST_HEIGHT = 0.56; // of the window's
const FILL = [0, 174, 239, 105], EDGE = [255, 255, 255, 235], ALONE = [255, 138, 0, 235]; // ALONE is also in page.css
const ADD = "#0a7d3c", REMOVE = "#c01f3a", LINE = "#ffffff", SHADE = "rgb(0 20 40 / 75%)";

/**
 * `on.point(x, y, label)`, `on.box(box, final)`, `on.dropBox()`, `on.undo()`, `on.say(text)` are called; `on.mode()` is
 * asked. Coordinates are pixels of the picture, whose first has its centre at 0.5, 0.5; a box is [x0, y0, x1, y1].
 */
export class Stage {
  #picture = null;
  #overlay = null;
  #prompts = { points: [], box: null };
  #cross = null; // the pixel that the crosshair is on
  #corner = null; // the pixel at which a box was begun by keys
  #press = null;
  #due = false;

  constructor(canvas, on) {
    this.canvas = canvas;
    this.on = on;
    new ResizeObserver(() => this.#fit()).observe(canvas.parentElement);
    addEventListener("resize", () => this.#fit());
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerup", (event) => this.#up(event));
    canvas.addEventListener("pointercancel", (event) => this.#press?.id === event.pointerId && this.#cancel());
    canvas.addEventListener("contextmenu", (event) => this.#picture && event.preventDefault());
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => this.#draw());
    canvas.addEventListener("focus", () => this.#draw());
  }

  show(picture) {
    this.#cancel();
    this.#picture = picture;
    this.#overlay = this.#corner = null;
    this.#cross = picture && { x: Math.floor(picture.width / 2), y: Math.floor(picture.height / 2), shown: false };
    this.#fit();
  }

  /** Show a mask; with the `other` of a comparison, what only this one has is marked. */
  showMask(rle, other = null) {
    this.#overlay = rle && overlayOf(rle, other);
    this.#draw();
  }

  showPrompts(prompts) {
    this.#prompts = prompts;
    this.#draw();
  }

  // --- drawing

  #fit() {
    if (!this.#picture) return;
    const { width, height } = this.#picture;
    const room = this.canvas.parentElement.clientWidth;
    const scale = Math.min(room / width, (MOST_HEIGHT * innerHeight) / height);
    this.canvas.style.width = `${Math.round(width * scale)}px`;
    this.canvas.style.height = `${Math.round(height * scale)}px`;
    this.canvas.width = Math.round(width * scale * devicePixelRatio);
    this.canvas.height = Math.round(height * scale * devicePixelRatio);
    this.#draw();
  }

  #draw() {
    if (this.#due) return;
    this.#due = true;
    requestAnimationFrame(() => {
      this.#due = false;
      this.#paint();
    });
  }

  #paint() {
    const context = this.canvas.getContext("2d");
    const { width, height } = this.canvas;
    context.clearRect(0, 0, width, height);
    if (!this.#picture) return;
    context.imageSmoothingQuality = "high";
    context.drawImage(this.#picture, 0, 0, width, height);
    if (this.#overlay) context.drawImage(this.#overlay, 0, 0, width, height);
    const scale = width / this.#picture.width, unit = devicePixelRatio;
    const begun = this.#corner && boxOfPixels(this.#corner, this.#cross);
    for (const box of [this.#prompts.box, begun]) if (box) frame(context, box.map((v) => v * scale), unit);
    for (const { x, y, label } of this.#prompts.points) dot(context, x * scale, y * scale, label, unit);
    if (this.#cross.shown && document.activeElement === this.canvas)
      cross(context, (this.#cross.x + 0.5) * scale, (this.#cross.y + 0.5) * scale, unit);
  }

  // --- mouse and touch

  #place(event) {
    const { width, height } = this.#picture;
    const x = (event.offsetX / this.canvas.clientWidth) * width, y = (event.offsetY / this.canvas.clientHeight) * height;
    const round = (value, most) => Math.round(Math.min(Math.max(value, 0), most) * 10) / 10;
    return { x: round(x, width), y: round(y, height) };
  }

  #down(event) {
    if (!this.#picture || event.button === 1 || !event.isPrimary) return;
    const touch = event.pointerType === "touch", mode = this.on.mode();
    const removes = event.button === 2 || (mode === "remove" && !event.shiftKey);
    this.#cancel();
    this.#press = { id: event.pointerId, from: this.#place(event), at: [event.clientX, event.clientY], removes };
    this.#press.drags = !touch || mode === "box";
    if (event.button === 2) this.#press.drags = false;
    this.#press.taps = mode !== "box" || event.button === 2;
    if (touch && mode !== "box")
      this.#press.timer = setTimeout(() => {
        const { from } = this.#press;
        this.#press = null;
        this.on.point(from.x, from.y, 0);
      }, LONG_PRESS);
    this.#cross.shown = false;
    if (this.#press.drags) this.canvas.setPointerCapture(event.pointerId);
  }

  #move(event) {
    const press = this.#press;
    if (press?.id !== event.pointerId) return;
    const far = Math.hypot(event.clientX - press.at[0], event.clientY - press.at[1]) > DRAG;
    if (far && !press.drags && press.timer) return this.#forget();
    if (!press.drags || !(far || press.dragged)) return;
    press.dragged = true;
    this.#drag(press, event, false);
  }

  #up(event) {
    const press = this.#press;
    if (press?.id !== event.pointerId) return;
    this.#forget();
    if (press.dragged) this.#drag(press, event, true);
    else if (press.taps) this.on.point(press.from.x, press.from.y, press.removes ? 0 : 1);
  }

  #drag({ from }, event, final) {
    const box = boxOf(from, this.#place(event));
    if (box[2] > box[0] && box[3] > box[1]) return this.on.box(box, final);
    this.on.dropBox(); // no model takes one without area
    if (final) this.on.say("A box needs two corners that differ in both directions.");
  }

  #cancel() {
    const dragged = this.#press?.dragged;
    this.#forget();
    if (dragged) this.on.dropBox();
  }

  #forget() {
    clearTimeout(this.#press?.timer);
    this.#press = null;
  }

  // --- keys

  #key(event) {
    if (!this.#picture || event.ctrlKey || event.metaKey || event.altKey) return;
    const { width, height } = this.#picture, cross = this.#cross;
    const step = event.shiftKey ? 1 : Math.max(1, Math.round(Math.max(width, height) / 48));
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    const acts = {
      Enter: () => this.#act(this.on.mode()),
      " ": () => this.#act(this.on.mode()),
      r: () => this.#act("remove"),
      b: () => this.#act("box"),
      Backspace: () => (this.#corner ? this.#drop() : this.on.undo()),
      Delete: () => (this.#corner ? this.#drop() : this.on.undo()),
      Escape: () => this.#drop(),
    };
    if (event.key in moves) {
      cross.x = Math.min(Math.max(cross.x + moves[event.key][0], 0), width - 1);
      cross.y = Math.min(Math.max(cross.y + moves[event.key][1], 0), height - 1);
      this.on.say(`${cross.x}, ${cross.y}`);
    } else if (event.key in acts) acts[event.key]();
    else return;
    event.preventDefault();
    cross.shown = true;
    this.#draw();
  }

  #act(mode) {
    const { x, y } = this.#cross;
    if (mode !== "box") return this.on.point(x + 0.5, y + 0.5, mode === "remove" ? 0 : 1);
    if (!this.#corner) {
      this.#corner = { x, y };
      return this.on.say(`Box begun at ${x}, ${y}. Move to the opposite corner and press again.`);
    }
    const box = boxOfPixels(this.#corner, { x, y });
    this.#corner = null;
    this.on.box(box, true);
  }

  #drop() {
    if (this.#corner) this.on.say("Box dropped.");
    this.#corner = null;
  }
}

const boxOf = (a, b) => [Math.min(a.x, b.x), Math.min(a.y, b.y), Math.max(a.x, b.x), Math.max(a.y, b.y)];

/** Of whole pixels, the two and what is between them. */
function boxOfPixels(a, b) {
  const [x0, y0, x1, y1] = boxOf(a, b);
  return [x0, y0, x1 + 1, y1 + 1];
}

function overlayOf(rle, other) {
  const step = Math.max(1, Math.ceil(Math.max(...rle.size) / LARGEST_OVERLAY));
  const { data, width, height } = decode(rle, step);
  const others = other && decode(other, step).data;
  const image = new ImageData(width, height);
  for (let y = 0, at = 0; y < height; y++)
    for (let x = 0; x < width; x++, at++) {
      if (!data[at]) continue;
      const within = (!x || data[at - 1]) && (x === width - 1 || data[at + 1]) && (!y || data[at - width]) && (y === height - 1 || data[at + width]);
      image.data.set(others && !others[at] ? ALONE : within ? FILL : EDGE, 4 * at);
    }
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function twice(context, unit, draw) {
  for (const [colour, width] of [[SHADE, 3.5], [LINE, 1.5]]) {
    context.strokeStyle = colour;
    context.lineWidth = width * unit;
    draw();
  }
}

function frame(context, [x0, y0, x1, y1], unit) {
  twice(context, unit, () => context.strokeRect(x0, y0, x1 - x0, y1 - y0));
}

// A sign besides the colour, for those who do not tell green from red.
function dot(context, x, y, label, unit) {
  context.beginPath();
  context.arc(x, y, 8 * unit, 0, 2 * Math.PI);
  context.fillStyle = label ? ADD : REMOVE;
  context.fill();
  context.strokeStyle = LINE;
  context.lineWidth = 2 * unit;
  context.stroke();
  context.beginPath();
  context.moveTo(x - 3.5 * unit, y);
  context.lineTo(x + 3.5 * unit, y);
  if (label) {
    context.moveTo(x, y - 3.5 * unit);
    context.lineTo(x, y + 3.5 * unit);
  }
  context.stroke();
}

function cross(context, x, y, unit) {
  twice(context, unit, () => {
    context.beginPath();
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      context.moveTo(x + 4 * dx * unit, y + 4 * dy * unit);
      context.lineTo(x + 16 * dx * unit, y + 16 * dy * unit);
    }
    context.stroke();
  });
}
