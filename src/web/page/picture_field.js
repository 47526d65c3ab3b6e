// A field that holds a picture: a file of this machine, or an https address.

import { button, element, newId, notice } from "./dom.js";
import { decode, fromBase64, inWords, prepare, toBase64 } from "./pictures.js";

/** The first picture of what is dropped or pasted. @returns {File | null} */
export function fileOf(transfer) {
  return [...(transfer?.files ?? [])][0] ?? null;
}

export class PictureField {
  /** @type {string | undefined} base64, or an address */
  #value;
  #turn = 0; // of the picture that was chosen last: files are read at the same time
  /** Upright pixels, where this browser can read them. @type {ImageBitmap | null} */
  pixels = null;
  /** @type {Blob | null} */
  blob = null;

  constructor(name, description) {
    this.name = name;
    const title = name.replaceAll("_", " ").replace(/^./, (first) => first.toUpperCase());
    const id = newId(name);
    this.error = element("p", { class: "fault", id: `${id}-fault`, hidden: true });
    const said = (description ?? "").replace(/^a picture as base64, data URI or https URL[,;:]? ?/, "");
    this.hint = element("p", { class: "hint", id: `${id}-hint`, hidden: !said }, said);
    this.file = element("input", { type: "file", accept: "image/*", hidden: true, tabIndex: -1, "aria-label": title });
    this.choose = button("Choose a file", () => this.file.click(), {
      id, "aria-describedby": `${this.hint.id} ${this.error.id}`, "aria-label": `${title}: choose a file`,
    });
    this.address = element("input", {
      type: "url", placeholder: "or an https address", autocomplete: "off", "aria-label": `${title}: its https address`,
    });
    this.empty = element("div", { class: "input pick" }, this.choose, this.address);
    this.picture = element("img", { alt: title });
    this.about = element("p", { class: "about" });
    this.buttons = element("div", { class: "buttons" }, button("Remove", () => this.#give(undefined)));
    this.full = element("div", { class: "chosen", hidden: true }, this.picture,
      element("div", { class: "stack" }, this.about, this.buttons));
    this.node = element("div", { class: "field wide picture", role: "group", "aria-label": title, "data-field": name },
      element("p", { class: "label" }, title), this.empty, this.full, this.hint, this.error, this.file);

    this.file.addEventListener("change", () => { this.take(fileOf(this.file)); this.file.value = ""; });
    this.address.addEventListener("change", () => this.#give(this.address.value.trim() || undefined));
    this.address.addEventListener("input", (event) => event.stopPropagation());
    this.node.addEventListener("dragover", (event) => { event.preventDefault(); this.node.classList.add("over"); });
    this.node.addEventListener("dragleave", () => this.node.classList.remove("over"));
    this.node.addEventListener("drop", (event) => {
      this.node.classList.remove("over");
      const file = fileOf(event.dataTransfer);
      if (!file) return;
      event.preventDefault();
      event.stopPropagation(); // or the page asks what it is for
      this.take(file);
    });
  }

  /** Use a file of this machine. @param {File | null} file */
  async take(file) {
    if (!file) return;
    try {
      const { blob, note } = await prepare(file);
      await this.#give(await toBase64(blob), note);
    } catch (error) {
      this.show(error.message);
      notice(error.message, { error: true });
    }
  }

  async #give(value, note = "") {
    await this.set(value, note);
    this.node.dispatchEvent(new Event("input", { bubbles: true }));
  }

  get() { return this.#value; }

  /** Resolves when its pixels are known; what was set is got at once. */
  async set(value, note = "") {
    const turn = ++this.#turn;
    this.show(null);
    this.#value = value || undefined;
    URL.revokeObjectURL(this.picture.src);
    this.picture.hidden = true;
    this.pixels = this.blob = null;
    this.address.value = "";
    this.empty.hidden = Boolean(value);
    this.full.hidden = !value;
    if (!value) return;
    const isAddress = /^https?:/i.test(value);
    this.about.textContent = isAddress ? value : "Reading it";
    if (isAddress) return;
    try {
      this.blob = fromBase64(value);
    } catch {
      this.about.textContent = "Not base64: the worker says what is wrong.";
      return;
    }
    const pixels = await decode(this.blob);
    if (turn !== this.#turn) return;
    this.pixels = pixels;
    const size = pixels ? `${pixels.width}x${pixels.height}, ` : "";
    this.about.textContent = `${size}${inWords(this.blob.size)}. ${note}`;
    this.picture.hidden = !pixels;
    if (pixels) this.picture.src = URL.createObjectURL(this.blob);
  }

  fault() { return null; }

  show(message) {
    this.error.textContent = message ?? "";
    this.error.hidden = !message;
  }

  focus() { (this.empty.hidden ? this.buttons.querySelector("button") : this.choose).focus(); }
  find() { return this; }
}
