// A brush over a picture: what is painted is drawn anew.

import { button, byId, element, newId } from "./dom.js";
import { encode } from "./pictures.js";

const PAINT = "#4f5de0"; // the mask as it is seen; only its alpha counts
const SOLID = 128; // alpha from which a pixel is painted

/**
 * Let somebody paint a mask over `picture`, starting from `mask` where it is as large.
 * @param {ImageBitmap} picture
 * @param {ImageBitmap | null} mask white is painted
 * @returns {Promise<File | null>} a PNG of the picture's size, white where it was painted and else black
 */
export function paintMask(picture, mask) {
  return new Promise((resolve) => new MaskEditor(picture, mask, resolve));
}

class MaskEditor {
  /** What was done, in order: to undo is to do all but the last again. @type {((context: any) => void)[]} */
  #done = [];
  #stroke = null; // the points of the one that is being painted
  #erases = false;

  constructor(picture, mask, resolve) {
    this.width = picture.width;
    this.height = picture.height;
    this.dialog = byId("mask");
    this.resolve = resolve;
    this.result = null;

    this.canvas = element("canvas", {
      width: this.width, height: this.height, tabIndex: 0, role: "application",
      "aria-label": "The mask. Arrow keys move the brush, the space bar paints, Control Z undoes.",
    });
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
    const below = element("canvas", { width: this.width, height: this.height, role: "img", "aria-label": "The picture" });
    below.getContext("2d").drawImage(picture, 0, 0);
    this.brush = element("div", { class: "brush", hidden: true });
    this.stage = element("div", { class: "stage" }, below, this.canvas, this.brush);
    this.at = { x: this.width / 2, y: this.height / 2 };

    const most = Math.max(this.width, this.height) / 2;
    const id = newId("brush");
    this.size = element("input", { type: "range", id, min: 1, max: Math.round(most), value: Math.round(most / 4) });
    this.size.addEventListener("input", () => this.#showBrush());
    const tool = (text, erases) => element("label", { class: "choice" },
      element("input", { type: "radio", name: "tool", checked: !erases, onchange: () => { this.#erases = erases; } }), text);
    this.undoButton = button("Undo", () => this.#undo(), { disabled: true });
    this.message = element("p", { class: "fault", role: "alert" });
    this.dialog.replaceChildren(
      element("div", { class: "tools" },
        element("div", { class: "choices", role: "radiogroup", "aria-label": "Tool" }, tool("Paint", false), tool("Erase", true)),
        element("label", { htmlFor: id, class: "size" }, "Size", this.size),
        this.undoButton,
        button("Clear", () => this.#do((context) => context.clearRect(0, 0, this.width, this.height))),
        button("Invert", () => this.#do((context) => this.#invert(context)))),
      element("div", { class: "room" }, this.stage),
      element("div", { class: "tools" }, element("p", { class: "quiet grow" }, "What is painted is drawn anew."), this.message,
        button("Cancel", () => this.dialog.close()), button("Use the mask", () => this.#finish(), { class: "primary" })));

    this.canvas.addEventListener("pointerdown", (event) => this.#down(event));
    this.canvas.addEventListener("pointermove", (event) => this.#move(event));
    this.canvas.addEventListener("pointerup", () => this.#up());
    this.canvas.addEventListener("pointercancel", () => this.#up());
    this.canvas.addEventListener("pointerleave", () => { this.brush.hidden = true; });
    this.canvas.addEventListener("focus", () => this.#showBrush());
    this.dialog.onkeydown = (event) => this.#key(event);
    this.dialog.onclose = () => { this.dialog.replaceChildren(); resolve(this.result); };
    if (mask?.width === this.width && mask.height === this.height) {
      const painted = alphaOf(mask);
      this.#do((context) => context.drawImage(painted, 0, 0));
    }
    this.dialog.showModal();
    this.#fit();
    this.observer = new ResizeObserver(() => this.#fit());
    this.observer.observe(this.dialog);
    this.canvas.focus();
  }

  /** As large as there is room, small pictures too. */
  #fit() {
    const room = this.stage.parentElement;
    if (!room) return this.observer.disconnect();
    const scale = Math.min(room.clientWidth / this.width, room.clientHeight / this.height);
    this.stage.style.width = `${this.width * scale}px`;
    this.stage.style.height = `${this.height * scale}px`;
  }

  #do(work) {
    this.#done.push(work);
    work(this.context);
    this.#changed();
  }

  #undo() {
    this.#done.pop();
    this.context.clearRect(0, 0, this.width, this.height);
    for (const work of this.#done) work(this.context);
    this.#changed();
  }

  #changed() {
    this.undoButton.disabled = !this.#done.length;
    this.message.textContent = "";
  }

  #invert(context) {
    context.globalCompositeOperation = "source-out";
    context.fillStyle = PAINT;
    context.fillRect(0, 0, this.width, this.height);
    context.globalCompositeOperation = "source-over";
  }

  /** A stroke through `points`, which may still grow. */
  #strokeOf(points, size, erases) {
    return (context) => {
      context.globalCompositeOperation = erases ? "destination-out" : "source-over";
      context.strokeStyle = PAINT;
      context.lineWidth = size;
      context.lineCap = context.lineJoin = "round";
      context.beginPath();
      context.moveTo(points[0].x, points[0].y);
      context.lineTo(points[0].x + 0.01, points[0].y); // a line without length leaves no dot
      for (const point of points) context.lineTo(point.x, point.y);
      context.stroke();
      context.globalCompositeOperation = "source-over";
    };
  }

  #place(event) {
    const box = this.canvas.getBoundingClientRect();
    return {
      x: (event.clientX - box.left) * this.width / box.width, y: (event.clientY - box.top) * this.height / box.height,
    };
  }

  #down(event) {
    if (event.button > 0) return;
    event.preventDefault();
    this.canvas.focus();
    this.canvas.setPointerCapture(event.pointerId);
    this.at = this.#place(event);
    this.#stroke = [this.at];
    this.#do(this.#strokeOf(this.#stroke, Number(this.size.value), this.#erases));
    this.#showBrush();
  }

  #move(event) {
    this.at = this.#place(event);
    this.#showBrush();
    if (!this.#stroke) return;
    const before = this.#stroke.at(-1);
    const passed = event.getCoalescedEvents?.() ?? [];
    const points = (passed.length ? passed : [event]).map((each) => this.#place(each));
    this.#stroke.push(...points);
    this.#strokeOf([before, ...points], Number(this.size.value), this.#erases)(this.context);
  }

  #up() { this.#stroke = null; }

  #key(event) {
    if ((event.ctrlKey || event.metaKey) && event.key === "z") {
      event.preventDefault();
      if (this.#done.length) this.#undo();
    }
    if (event.target !== this.canvas) return;
    const step = Math.max(1, Number(this.size.value) / 4);
    const [x, y] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
    if (!x && !y && event.key !== " ") return;
    event.preventDefault();
    this.at = {
      x: Math.min(this.width, Math.max(0, this.at.x + x * step)), y: Math.min(this.height, Math.max(0, this.at.y + y * step)),
    };
    this.#showBrush();
    if (event.key === " ") this.#do(this.#strokeOf([this.at], Number(this.size.value), this.#erases));
  }

  #showBrush() {
    const scale = this.canvas.clientWidth / this.width;
    const size = Number(this.size.value) * scale;
    this.brush.hidden = false;
    this.brush.style.width = this.brush.style.height = `${size}px`;
    this.brush.style.left = `${this.at.x * scale - size / 2}px`;
    this.brush.style.top = `${this.at.y * scale - size / 2}px`;
  }

  async #finish() {
    const pixels = this.context.getImageData(0, 0, this.width, this.height);
    let painted = 0;
    for (let i = 0; i < pixels.data.length; i += 4) {
      const white = pixels.data[i + 3] >= SOLID;
      if (white) painted++;
      pixels.data.fill(white ? 255 : 0, i, i + 3);
      pixels.data[i + 3] = 255;
    }
    if (!painted) {
      this.message.textContent = "Nothing is painted yet.";
      return;
    }
    const canvas = element("canvas", { width: this.width, height: this.height });
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    this.result = new File([await encode(canvas)], "mask.png", { type: "image/png" });
    this.dialog.close();
  }
}

/** A mask in black and white as paint on nothing. */
function alphaOf(mask) {
  const canvas = element("canvas", { width: mask.width, height: mask.height });
  const context = canvas.getContext("2d");
  context.drawImage(mask, 0, 0);
  const pixels = context.getImageData(0, 0, mask.width, mask.height);
  const colour = [1, 3, 5].map((i) => parseInt(PAINT.slice(i, i + 2), 16));
  for (let i = 0; i < pixels.data.length; i += 4) {
    const white = pixels.data[i] >= SOLID && pixels.data[i + 3] >= SOLID;
    pixels.data.set(white ? [...colour, 255] : [0, 0, 0, 0], i);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}
