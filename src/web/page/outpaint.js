// A frame around the picture to start from, whose edges are dragged: what lies between is drawn.

import { element } from "./dom.js";

const MULTIPLE = 8; // pixels: what the sides of a picture are multiples of
const HEIGHT = 240; // CSS pixels of the stage
const SPARE = 1.35; // how much larger the stage is than the frame, so that there is somewhere to drag to
const SIDES = ["left", "right", "top", "bottom"];

export class OutpaintFrame {
  #dragged = null; // while a handle is: where it began, and the scale of then

  /** @param {any} field the four borders @param {import("./picture_field.js").PictureField} init */
  constructor(field, init) {
    this.borders = Object.fromEntries(SIDES.map((side) => [side, field.find([side])]));
    this.field = field;
    this.init = init;
    this.picture = element("img", { alt: "", draggable: false });
    this.handles = SIDES.map((side) => element("div", {
      class: `handle ${side}`, onpointerdown: (event) => this.#down(event, side), onpointermove: (event) => this.#move(event),
      onpointerup: () => this.#up(), onpointercancel: () => this.#up(),
    }));
    this.frame = element("div", { class: "frame" }, ...this.handles);
    this.stage = element("div", { class: "outpaint", "aria-hidden": "true" }, this.picture, this.frame);
    this.size = element("p", { class: "about", role: "status" });
    field.inner.before(this.stage, this.size);
    new ResizeObserver(() => this.draw()).observe(this.stage);
  }

  #border(side) { return Number(this.borders[side].input.value) || 0; }

  /** Show the picture within its borders as they are now. */
  draw() {
    const pixels = this.init.pixels;
    this.stage.hidden = this.size.hidden = !pixels;
    if (!pixels || this.field.node.hidden || !this.stage.clientWidth) return;
    if (this.picture.src !== this.init.picture.src) this.picture.src = this.init.picture.src;
    const [left, right, top, bottom] = SIDES.map((side) => this.#border(side));
    const width = pixels.width + left + right, height = pixels.height + top + bottom;
    const scale = this.#dragged?.scale ?? Math.min(this.stage.clientWidth / width, HEIGHT / height) / SPARE;
    // While an edge is dragged the picture stays where it is.
    const origin = this.#dragged?.origin ?? {
      x: (this.stage.clientWidth - width * scale) / 2 + left * scale, y: (HEIGHT - height * scale) / 2 + top * scale,
    };
    place(this.picture, origin.x, origin.y, pixels.width * scale, pixels.height * scale);
    place(this.frame, origin.x - left * scale, origin.y - top * scale, width * scale, height * scale);
    const rounded = [width, height].map((side) => Math.ceil(side / MULTIPLE) * MULTIPLE);
    this.size.textContent = `${pixels.width}x${pixels.height} becomes ${rounded[0]}x${rounded[1]}.`;
    this.now = { scale, origin };
  }

  #down(event, side) {
    event.preventDefault();
    event.target.setPointerCapture(event.pointerId);
    this.#dragged = { ...this.now, side, x: event.clientX, y: event.clientY, border: this.#border(side) };
  }

  #move(event) {
    if (!this.#dragged) return;
    const { side, x, y, border, scale } = this.#dragged;
    const way = { left: x - event.clientX, right: event.clientX - x, top: y - event.clientY, bottom: event.clientY - y }[side];
    const input = this.borders[side].input;
    const wanted = Math.round((border + way / scale) / MULTIPLE) * MULTIPLE;
    const value = Math.min(Math.max(0, wanted), Number(input.max));
    if (value === this.#border(side)) return;
    input.value = value || "";
    input.dispatchEvent(new Event("input", { bubbles: true }));
  }

  #up() {
    this.#dragged = null;
    this.draw();
  }
}

function place(node, left, top, width, height) {
  Object.assign(node.style, { left: `${left}px`, top: `${top}px`, width: `${width}px`, height: `${height}px` });
}
