// The jobs that are open: each is followed until it is done, stopped or has failed, also over a reload.

import { answerOf, cancel, follow, Refusal, run } from "./api.js";
import { announce, button, byId, element, notice } from "./dom.js";
import { fromBase64 } from "./pictures.js";

const PHASES = {
  queued: "Waiting for its turn", load_adapters: "Loading adapters", load_controlnets: "Loading the ControlNet",
  upsample_prompt: "Writing the prompt out", encode_prompt: "Reading the prompt", denoise: "Drawing", decode: "Decoding", encode_images: "Writing the file",
  upload: "Uploading",
};

export class Jobs {
  /**
   * @param {import("./store.js").Store} store
   * @param {import("./gallery.js").Gallery} gallery
   * @param {import("./form.js").Form} form
   * @param {boolean} previews whether the model's modes show what they draw
   */
  constructor(store, gallery, form, previews) {
    this.store = store;
    this.gallery = gallery;
    this.form = form;
    this.previews = previews;
    this.open = 0;
    this.troubles = new Map(); // by job, what keeps its status from coming
  }

  /** Go on with what was open when the page was left. */
  async resume() {
    for (const { id, created, request } of await this.store.jobs.all()) new Job(this, request, created, id).follow();
  }

  /** Queue a request; resolves when it is queued, or is known not to be. */
  draw(request) { return new Job(this, request, Date.now()).send(); }

  /** Say when the server cannot be reached, and when it can again. */
  trouble(job, text) {
    if (text) this.troubles.set(job, text);
    else this.troubles.delete(job);
    const [first] = this.troubles.values();
    const shown = byId("connection");
    if (shown.textContent !== (first ?? "")) shown.textContent = first ?? "";
  }

  /** How many are under way, in the tab's title. */
  count(change) {
    this.open += change;
    document.title = this.open ? `(${this.open}) FLUX` : "FLUX";
  }
}

class Job {
  /** @param {Jobs} jobs */
  constructor(jobs, request, created, id = "") {
    this.jobs = jobs;
    this.request = request;
    this.created = created;
    this.id = id;
    this.preview = element("img", { alt: "What it looks like so far", hidden: true });
    this.bar = element("progress", { max: 100, "aria-label": `Progress of ${request.prompt}` });
    this.line = element("p", { class: "quiet line" }, "Sending");
    this.stop = button("Stop", () => this.#stop());
    this.buttons = element("div", { class: "buttons" }, this.stop);
    this.row = element("li", { class: "job" }, element("div", { class: "media" }, this.preview),
      element("div", { class: "words" },
        element("p", { class: "prompt" }, request.prompt), this.bar, this.line), this.buttons);
    byId("jobs").append(this.row);
    if (!id) this.row.scrollIntoView({ block: "nearest" });
    jobs.count(1);
  }

  async send() {
    const { store, previews } = this.jobs;
    this.stop.disabled = true;
    try {
      this.id = await run({ ...this.request, ...(previews ? { preview: true } : {}) });
    } catch (error) {
      return this.#fail(error.message);
    }
    this.line.textContent = "In the queue";
    this.stop.disabled = false;
    await store.jobs.put({ id: this.id, created: this.created, request: this.request }).catch(() => {});
    this.follow(); // not waited for: others may be queued meanwhile
  }

  async follow() {
    let status;
    try {
      status = await follow(this.id, (between) => this.#show(between), (error, seconds) => this.jobs.trouble(this,
        error && `${error.message} Trying again in ${Math.ceil(seconds)} seconds.`));
    } catch (error) {
      this.jobs.trouble(this, null);
      const lost = error instanceof Refusal && error.status === 404;
      return this.#fail(lost ? "The server does not know this job any more: it was started anew, or forgot it." : error.message);
    }
    if (status.status === "CANCELLED") return this.#fail("Stopped.", { stopped: true });
    const answer = answerOf(status, this.jobs.form.names);
    if ("error" in answer) return this.#fail(answer.error, { errors: answer.errors });
    await this.#done(answer.output);
  }

  #show(status) {
    if (status.status === "IN_QUEUE") {
      this.line.textContent = "In the queue";
      return;
    }
    const { phase, step, steps, percent, seconds_left: left, preview } = status.output ?? {};
    const parts = [PHASES[phase] ?? "At work"];
    if (steps) {
      this.bar.value = percent;
      parts.push(`step ${step} of ${steps}`);
      if (typeof left === "number") parts.push(`${left < 10 ? left.toFixed(1) : Math.round(left)} s left`);
    }
    this.line.textContent = this.stopping ? "Stopping" : parts.join(" · ");
    if (preview) {
      const before = this.preview.src;
      this.preview.src = URL.createObjectURL(fromBase64(preview, "image/jpeg"));
      this.preview.hidden = false;
      URL.revokeObjectURL(before);
    }
  }

  async #stop() {
    this.stopping = true;
    this.stop.disabled = true;
    this.line.textContent = "Stopping";
    try {
      await cancel(this.id);
    } catch (error) {
      this.stopping = false;
      this.stop.disabled = false;
      notice(`It could not be stopped. ${error.message}`, { error: true });
    }
  }

  async #end() {
    this.jobs.count(-1);
    URL.revokeObjectURL(this.preview.src);
    if (this.id) await this.jobs.store.jobs.remove(this.id).catch(() => {});
  }

  async #done({ metadata, images, image_urls: urls }) {
    const type = `image/${metadata.output_format.toLowerCase()}`;
    const pictures = metadata.seeds.map((seed, i) => ({
      seed, blob: images?.[i] ? fromBase64(images[i], type) : null, url: urls?.[i] ?? null,
    }));
    const focused = this.row.contains(document.activeElement);
    const bytes = JSON.stringify(this.request).length + pictures.reduce((sum, { blob }) => sum + (blob?.size ?? 0), 0);
    await this.jobs.gallery.add({ id: this.id, created: this.created, request: this.request, metadata, pictures, bytes });
    await this.#end();
    this.row.remove();
    if (focused) byId("tiles").querySelector("button")?.focus();
    const warned = metadata.warnings?.length ? ` Warnings: ${metadata.warnings.join("; ")}` : "";
    announce(`Done: ${this.request.prompt}.${warned}`);
  }

  /** Faults show in the form, where it still holds this request; else the row says them, until it is closed. */
  async #fail(reason, { stopped = false, errors = [] } = {}) {
    const { form } = this.jobs;
    const inForm = errors.length > 0 && JSON.stringify(form.read().request) === JSON.stringify(this.request);
    if (inForm) {
      this.row.remove();
      form.showFaults(errors);
      return this.#end();
    }
    this.row.classList.add(stopped ? "stopped" : "failed");
    this.bar.remove();
    this.line.textContent = reason;
    this.buttons.replaceChildren(
      button("Edit", () => this.#edit(errors)), button("Draw again", () => this.#again()),
      button("Close", () => this.row.remove(), { class: "plain" }));
    announce(`${reason} ${this.request.prompt}`);
    await this.#end();
  }

  async #edit(errors) {
    await this.jobs.form.fill(this.request);
    if (errors.length) this.jobs.form.showFaults(errors);
    else this.jobs.form.field("prompt").focus();
  }

  #again() {
    this.row.remove();
    this.jobs.draw(this.request);
  }
}
