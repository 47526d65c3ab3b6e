// The pictures of this browser: a tile for each job, open or done, and one picture large with its request.

import { announce, ask, button, byId, copy, element, notice } from "./dom.js";
import { fromBase64, toBase64 } from "./pictures.js";
import { asCurl, asLink, asPython, filesOf, withoutFiles } from "./share.js";
import { MOST_BYTES, MOST_PICTURES } from "./store.js";

const EXAMPLES = [
  "a picture of one red star in front of a blue background",
  "could you draw a small yellow circle on green paper?",
  "Draw me a triangle, please. Make it green, with orange behind.",
  "a large purple diamond surrounded by white",
];

/** The request that makes picture `i` of an entry again, and that alone. */
export function requestOf(entry, i) {
  const { num_images: _, prompt, ...rest } = entry.request;
  return { prompt, ...rest, seed: entry.pictures[i].seed };
}

/** The whole request of an entry, with the seed that was picked for it. */
const again = ({ request, metadata }) => ({ ...request, seed: metadata.seed });

const suffix = (entry) => entry.metadata.output_format.toLowerCase();

export class Gallery {
  /** @type {import("./store.js").Entry[]} */
  #entries = [];
  #urls = new Map(); // object URLs of pictures, by the ids of their entries and by seeds
  #tiles = new Map(); // by the ids of entries
  #shown = { id: "", i: 0 }; // in the viewer

  /**
   * @param {import("./store.js").Store} store
   * @param {{fill: (request: any) => void, draw: (request: any) => void, start: (base64: string) => void}} actions
   */
  constructor(store, actions) {
    this.store = store;
    this.actions = actions;
    this.dialog = byId("viewer");
    store.onChange = () => this.load();
    byId("clear").addEventListener("click", () => this.#clear());
    byId("examples").append(...EXAMPLES.map((prompt) =>
      element("li", {}, button(prompt, () => actions.fill({ prompt }), { class: "example" }))));
    this.dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") this.#turn(-1);
      if (event.key === "ArrowRight") this.#turn(1);
    });
    this.dialog.addEventListener("click", (event) => { if (event.target === this.dialog) this.dialog.close(); });
    this.dialog.addEventListener("close", () => {
      this.dialog.replaceChildren();
      this.#tiles.get(this.#shown.id)?.querySelector("button")?.focus();
    });
  }

  /** Show what is kept. */
  async load() { this.#showAll(await this.store.all()); }

  #showAll(entries) {
    const before = new Map(this.#entries.map((entry) => [entry.id, entry.pictures.length]));
    this.#entries = entries.sort((a, b) => b.created - a.created);
    const same = new Set(entries.filter(({ id, pictures }) => before.get(id) === pictures.length).map(({ id }) => id));
    for (const id of before.keys()) if (!same.has(id)) this.#remove(id);
    for (const entry of entries) if (!same.has(entry.id)) this.#show(entry);
    this.#count();
  }

  #remove(id) {
    this.#tiles.get(id)?.remove();
    this.#tiles.delete(id);
    for (const [key, url] of this.#urls) {
      if (!key.startsWith(`${id} `)) continue;
      URL.revokeObjectURL(url);
      this.#urls.delete(key);
    }
  }

  /** Keep what was drawn. */
  async add(entry) {
    let gone = [entry.id]; // another tab may have followed the job too
    try {
      gone = [...gone, ...await this.store.put(entry)];
    } catch {
      notice("This browser has no room for the picture: it is kept until the page is closed.", { error: true });
    }
    this.#showAll([entry, ...this.#entries.filter(({ id }) => !gone.includes(id))]);
  }

  #count() {
    const count = this.#entries.reduce((sum, entry) => sum + entry.pictures.length, 0);
    byId("empty").hidden = false; // until there is a job or a picture: page.css sees to that
    byId("clear").hidden = !count;
    const limit = this.store.lasts
      ? `This browser keeps the latest ${MOST_PICTURES}, up to ${MOST_BYTES / 1e6} MB.`
      : "This browser keeps nothing: they are gone when the page is closed.";
    byId("kept").textContent = count || !this.store.lasts ? `${count || "No"} picture${count === 1 ? "" : "s"}. ${limit}` : "";
  }

  #url(id, { blob, seed }) {
    const key = `${id} ${seed}`;
    if (!this.#urls.has(key)) this.#urls.set(key, URL.createObjectURL(blob));
    return this.#urls.get(key);
  }

  /** A picture, or where it lies: pictures of a bucket are not fetched by this page. */
  #image(id, picture, alt) {
    const { blob, url, seed } = picture;
    if (blob) return element("img", { src: this.#url(id, picture), alt, loading: "lazy", decoding: "async" });
    return element("span", { class: "elsewhere" }, url ? "In the bucket" : `Seed ${seed} is not here`);
  }

  #show(entry) {
    const { request, metadata, pictures } = entry;
    const grid = element("div", { class: `media of-${Math.min(pictures.length, 4)}` }, ...pictures.map((picture, i) =>
      button("", () => this.open(entry.id, i), { class: "open", "aria-label": `Picture ${i + 1} of ${pictures.length}: ${request.prompt}` })));
    pictures.forEach((picture, i) => grid.children[i].append(this.#image(entry.id, picture, "")));
    const facts = `${metadata.width}x${metadata.height} · seed ${pictures[0].seed}`;
    const count = metadata.warnings?.length ?? 0;
    const warned = count > 0 && button(count === 1 ? "1 warning" : `${count} warnings`,
      () => this.open(entry.id, 0), { class: "plain warned" });
    const tile = element("li", { class: "tile", "data-created": entry.created }, grid,
      element("div", { class: "words" },
        element("p", { class: "prompt" }, request.prompt), element("p", { class: "quiet" }, facts), warned,
        element("div", { class: "buttons" },
          button("Again", () => this.actions.fill(again(entry))),
          button("Vary", () => this.#vary(again(entry))),
          button("As start", () => this.#start(pictures[0])))));
    const older = [...byId("tiles").children].find((other) => Number(other.dataset.created) < entry.created);
    byId("tiles").insertBefore(tile, older ?? null);
    this.#tiles.set(entry.id, tile);
  }

  /** The next seeds. */
  #vary(request) { this.actions.draw({ ...request, seed: request.seed + (request.num_images ?? 1) }); }

  async #start(picture) {
    if (!picture.blob) return notice("This picture lies in the bucket: open it there, and drop it here.", { error: true });
    this.dialog.close();
    this.actions.start(await toBase64(picture.blob));
  }

  // ---- one picture

  open(id, i) {
    const entry = this.#entries.find((other) => other.id === id);
    if (!entry) return;
    this.#shown = { id, i };
    const picture = entry.pictures[i], request = requestOf(entry, i);
    const closing = (work) => () => { this.dialog.close(); work(); };
    const where = picture.blob ? this.#url(id, picture) : picture.url;
    const name = `${picture.seed}.${suffix(entry)}`;
    const large = element("div", { class: "large" }, picture.blob
      ? element("img", { src: where, alt: request.prompt, width: entry.metadata.width, height: entry.metadata.height })
      : this.#image(id, picture, ""));
    const flat = this.#flat();
    const here = flat.findIndex((other) => other.id === id && other.i === i);
    const turn = (text, label, way) => button(text, () => this.#turn(way),
      { "aria-label": label, class: "turn", disabled: !flat[here + way] });
    const link = () => {
      const { address, left } = asLink(request);
      copy(address, left.length ? `Link copied. It leaves out ${left.join(", ")}: pictures do not fit into a link.` : "Link copied.");
    };
    this.dialog.replaceChildren(
      large,
      element("div", { class: "side" },
        element("div", { class: "buttons top" }, turn("‹", "The picture before", -1), turn("›", "The picture after", 1),
          element("span", { class: "grow" }), button("Close", () => this.dialog.close(), { class: "plain" })),
        element("h2", {}, request.prompt),
        ...(entry.metadata.warnings ?? []).map((text) => element("p", { class: "warning" }, text)),
        element("div", { class: "buttons pairs" },
          button("Again", closing(() => this.actions.fill(request)), { class: "primary" }),
          button("Vary", closing(() => this.#vary(request))),
          button("As start", () => this.#start(picture)),
          where && element("a", picture.blob ? { href: where, download: name, class: "button" }
            : { href: where, target: "_blank", rel: "noopener noreferrer", class: "button" },
          picture.blob ? "Download" : "Open in the bucket")),
        element("div", { class: "buttons copy" }, element("span", { class: "quiet" }, "Copy as"),
          button("curl", () => copy(asCurl(request), "Command copied."), { "aria-label": "Copy as curl" }),
          button("Python", () => copy(asPython(request), "Program copied."), { "aria-label": "Copy as Python" }),
          button("link", link, { "aria-label": "Copy as link" })),
        this.#facts(entry, request),
        element("div", { class: "buttons" },
          button("Delete", () => this.#delete(entry, i), { class: "plain danger" }))));
    if (!this.dialog.open) this.dialog.showModal();
  }

  /** The request and what became of it, a line each. */
  #facts(entry, request) {
    const { metadata } = entry;
    const files = filesOf(request);
    const said = { ...withoutFiles(request, () => undefined), mode: metadata.mode, width: metadata.width,
      height: metadata.height, num_inference_steps: metadata.num_inference_steps, model: metadata.model };
    const { prompt: _, ...lines } = said;
    const rows = Object.entries(lines).filter(([, value]) => value !== null).map(([name, value]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, typeof value === "string" ? value : JSON.stringify(value))));
    for (const [name, base64] of files) {
      const url = URL.createObjectURL(fromBase64(base64));
      const link = element("a", { href: url, download: `${name}.png` }, `${name}.png`);
      rows.push(element("div", {}, element("dt", {}, name), element("dd", {}, link)));
    }
    rows.push(element("div", {}, element("dt", {}, "seconds"), element("dd", {}, metadata.inference_time.toFixed(2))));
    return element("dl", { class: "facts" }, ...rows);
  }

  #flat() { return this.#entries.flatMap((entry) => entry.pictures.map((_, i) => ({ id: entry.id, i }))); }

  #turn(way) {
    const flat = this.#flat();
    const next = flat[flat.findIndex(({ id, i }) => id === this.#shown.id && i === this.#shown.i) + way];
    if (!next) return;
    this.open(next.id, next.i);
    const buttons = [...this.dialog.querySelectorAll(".turn")];
    const wanted = buttons[way < 0 ? 0 : 1];
    (wanted.disabled ? buttons.find((other) => !other.disabled) : wanted)?.focus();
  }

  async #delete(entry, i) {
    this.dialog.close();
    const pictures = entry.pictures.filter((_, other) => other !== i);
    const others = this.#entries.filter(({ id }) => id !== entry.id);
    if (pictures.length) await this.store.put({ ...entry, pictures }).catch(() => {});
    else await this.store.remove(entry.id).catch(() => {});
    this.#showAll(pictures.length ? [{ ...entry, pictures }, ...others] : others);
    announce("The picture is deleted.");
    byId("pictures").focus();
  }

  async #clear() {
    const count = this.#flat().length;
    const text = `${count} picture${count === 1 ? "" : "s"} of this browser will be gone, with their requests.`;
    if (!await ask("Clear all?", [element("p", {}, text)], [["Keep them", null], ["Clear all", true, "danger"]])) return;
    await this.store.clear().catch(() => {});
    this.#showAll([]);
    byId("pictures").focus();
  }
}
