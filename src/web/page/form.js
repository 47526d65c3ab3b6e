// The form: every field that this model's modes take, in groups, and the request that was made of them.

import { button, byId, element } from "./dom.js";
import { inWords, makeField } from "./fields.js";
import { paintMask } from "./mask.js";
import { OutpaintFrame } from "./outpaint.js";
import { PictureField } from "./picture_field.js";

// Field by field, as they are shown; what is in no group is in the last one.
const GROUPS = [
  ["Pictures and seed", ["num_images", "seed"]],
  ["Size", ["aspect_ratio", "megapixels", "width", "height"]],
  ["Start from a picture", ["init_image", "strength", "mask_image", "preserve_unmasked", "outpaint", "init_images"]],
  ["Control", ["control_image", "control_type", "preprocess", "controlnet_conditioning_scale",
    "control_guidance_start", "control_guidance_end", "controls"]],
  ["Image prompt", ["image_prompt", "image_prompt_scale"]],
  ["LoRA", ["loras"]],
  ["Steps and guidance", ["num_inference_steps", "guidance_scale", "speed", "scheduler", "shift", "sigmas"]],
  ["Prompts", ["prompt_upsampling", "negative_prompt", "true_cfg_scale", "prompt_2",
    "max_sequence_length"]],
  ["File", ["output_format", "output_quality"]],
  ["More", []],
];
// Not for people: what the page asks for itself, and one entry of a list that is shown.
const HIDDEN = new Set(["describe", "dry_run", "preview", "lora_path", "lora_scale"]);
// Lists, and the field that holds their first entry.
const LISTS = { init_images: "init_image", controls: "control_image", loras: "lora_path" };
const PICTURES = ["init_image", "mask_image", "control_image", "image_prompt"];
const RATIOS = ["1:1", "4:3", "3:2", "16:9", "21:9", "3:4", "2:3", "9:16"];

/** The fields of pictures that some mode of this model takes. */
export function pictureUses(about) {
  const modes = Object.values(about.modes);
  return PICTURES.filter((name) => modes.some((mode) => mode.needs.includes(name) || mode.takes.includes(name)));
}

/** The names of the fields that this model's modes take. */
function usable(about) {
  const modes = Object.values(about.modes);
  const always = about.takes ?? Object.keys(about.schema.properties); // an older worker does not say
  const taken = new Set([...always, ...modes.flatMap((mode) => [...mode.needs, ...mode.takes])]);
  if (taken.has("control_image")) taken.add("controls");
  if (modes.some((mode) => mode.references > 1)) taken.add("init_images");
  return Object.keys(about.schema.properties).filter((name) => taken.has(name) && !HIDDEN.has(name));
}

/** By field, the pictures without which it says nothing: it is shown when they are there. */
function ownersOf(names, about) {
  const modes = Object.values(about.modes);
  const common = (rows) => PICTURES.filter((name) => rows.every((mode) => mode.needs.includes(name)));
  const everywhere = common(modes);
  const owners = {};
  for (const name of names) {
    const taking = modes.filter((mode) => mode.takes.includes(name));
    owners[name] = taking.length ? common(taking).filter((picture) => !everywhere.includes(picture)) : [];
    if (LISTS[name] && name !== "loras") owners[name] = [LISTS[name]];
  }
  if (owners.mask_image) owners.mask_image = ["init_image"];
  if (owners.outpaint) owners.outpaint = ["init_image"]; // it is a mask itself
  for (const rule of about.schema.anyOf?.[0]?.allOf ?? []) {
    const [name] = rule.if.required, [owner] = rule.then.required;
    if (owners[name] && names.includes(owner)) owners[name] = [owner];
  }
  return owners;
}

export class Form {
  /** @type {Map<string, import("./fields.js").Field>} */
  #fields = new Map();
  #groups = [];

  /** @param {any} about what the worker's `describe` says */
  constructor(about) {
    this.about = about;
    const { properties, $defs } = about.schema;
    const { schedulers, controlnets, adapters, defaults, limits } = about;
    const types = [...new Set(Object.values(controlnets).flatMap((net) => Object.keys(net.types)))];
    const context = {
      defs: $defs ?? {},
      defaults,
      most: { guidance_scale: limits.max_guidance_scale, max_sequence_length: limits.max_sequence_length },
      choices: { scheduler: Object.keys(schedulers), ...(types.length ? { control_type: types, type: types } : {}) },
      suggestions: { aspect_ratio: RATIOS, path: adapters.lora_dir },
    };
    this.names = Object.keys(properties);
    const names = usable(about);
    this.owners = ownersOf(names, about);
    for (const name of names) this.#fields.set(name, makeField(name, properties[name], context));

    const prompt = this.field("prompt");
    prompt.input.rows = 4;
    prompt.input.placeholder = "What the picture shows";
    byId("first").append(prompt.node);
    const grouped = new Set(["prompt", ...GROUPS.flatMap(([, members]) => members)]);
    for (const [title, members] of GROUPS) {
      const last = title === GROUPS.at(-1)[0];
      const fields = (last ? names.filter((name) => !grouped.has(name)) : members)
        .map((name) => this.field(name)).filter(Boolean);
      if (!fields.length) continue;
      const said = element("span", { class: "said" });
      const node = element("details", {}, element("summary", {}, element("span", {}, title), said),
        element("div", { class: "fields" }, ...fields.map((field) => field.node)));
      this.#groups.push({ node, said, fields });
      byId("groups").append(node);
    }
    this.#addEditors();
    byId("form").addEventListener("input", () => this.#arrange());
    this.#arrange();
  }

  field(name) { return this.#fields.get(name); }

  /** What belongs to a picture to start from: a brush for its mask, a frame for its borders. */
  #addEditors() {
    const init = this.field("init_image"), mask = this.field("mask_image"), outpaint = this.field("outpaint");
    if (mask instanceof PictureField) {
      const paint = async () => {
        if (!init.pixels) return mask.show("can only be painted over a picture that this browser can show");
        const painted = await paintMask(init.pixels, mask.pixels);
        if (painted) await mask.take(painted);
        mask.focus();
      };
      mask.empty.prepend(button("Paint a mask", paint, { class: "paint" }));
      mask.buttons.prepend(button("Paint", paint));
      init.node.addEventListener("input", () => {
        const fits = init.pixels && mask.pixels?.width === init.pixels.width && mask.pixels?.height === init.pixels.height;
        if (mask.get() && mask.pixels && !fits) mask.set(undefined);
      });
    }
    if (outpaint) this.frame = new OutpaintFrame(outpaint, init);
  }

  #has(name) {
    const given = (other) => this.field(other)?.get() !== undefined;
    return given(name) || (name === "mask_image" && given("outpaint"));
  }

  #isShown(name) { return (this.owners[name] ?? []).every((owner) => this.#has(owner) && this.#isShown(owner)); }

  /** Show what has an effect now, and on each folded group what was changed in it. */
  #arrange() {
    for (const [name, field] of this.#fields) field.node.hidden = !this.#isShown(name);
    this.frame?.draw();
    for (const { node, said, fields } of this.#groups) {
      const changed = fields.filter((field) => !field.node.hidden && field.get() !== undefined);
      said.textContent = changed.map(inShort).join(", ");
      node.hidden = fields.every((field) => field.node.hidden);
    }
  }

  /** What was changed, as a request, and what cannot be sent. */
  read() {
    const request = {}, faults = [];
    for (const [name, field] of this.#fields) {
      if (field.node.hidden) continue;
      const fault = field.fault();
      if (fault) faults.push({ field: name, message: fault });
      const value = field.get();
      if (value !== undefined) request[name] = value;
    }
    if (request.prompt === undefined) faults.unshift({ field: "prompt", message: "must say what the picture shows" });
    return { request, faults };
  }

  /** Put a request into the form, in place of what is there; the names of what it has no input for. */
  async fill(request) {
    this.clearFaults();
    for (const field of this.#fields.values()) await field.set(undefined);
    const unknown = [];
    for (const [name, value] of Object.entries(request)) {
      const field = this.field(name);
      const fits = name === "prompt" ? typeof value === "string" : true;
      if (field && fits) await field.set(value);
      else if (!HIDDEN.has(name)) unknown.push(name);
    }
    this.#arrange();
    return unknown;
  }

  /** Put one value into its field, and show it. */
  async put(name, value) {
    await this.field(name).set(value);
    this.field(name).node.dispatchEvent(new Event("input", { bubbles: true }));
    this.open(name);
  }

  open(name) {
    const group = this.#groups.find(({ fields }) => fields.some((field) => field.name === name));
    if (group) group.node.open = true;
  }

  clearFaults() {
    for (const field of this.#fields.values()) field.show(null);
    byId("faults").hidden = true;
    byId("faults").replaceChildren();
  }

  /** Each fault at its field, its group unfolded, the first one's input in focus; the others above the groups. */
  showFaults(faults) {
    this.clearFaults();
    const shown = [], others = [];
    for (const { field: path, message } of faults) {
      const [name, ...rest] = path.split(".");
      const field = this.field(name);
      if (!field || field.node.hidden) {
        others.push(path ? `${path}: ${message}` : message);
        continue;
      }
      const inner = field.find(rest);
      inner.show(message);
      this.open(name);
      shown.push(inner);
    }
    const count = faults.length - others.length;
    const lines = others.map((text) => element("p", {}, text));
    if (count) lines.unshift(element("p", {}, count === 1 ? "One field cannot be used as it is:"
      : `${count} fields cannot be used as they are:`, " ", faults.filter(({ field }) => this.field(field.split(".")[0]))
      .map(({ field }) => inWords(field)).join(", ")));
    byId("faults").replaceChildren(...lines);
    byId("faults").hidden = !lines.length;
    const isBefore = (one, other) => one.node.compareDocumentPosition(other.node) & Node.DOCUMENT_POSITION_FOLLOWING;
    shown.sort((one, other) => (isBefore(one, other) ? -1 : 1))[0]?.focus();
  }
}

/** What a field says, for a folded group. */
function inShort(field) {
  const value = field.get(), kind = typeof value;
  if (field instanceof PictureField) return inWords(field.name).toLowerCase();
  if (Array.isArray(value)) return `${value.length} ${inWords(field.name).toLowerCase()}`;
  const text = kind === "object" ? Object.entries(value).map(([name, each]) => `${name} ${each}`).join(" ") : String(value);
  const cut = text.length > 24 ? `${text.slice(0, 23)}…` : text;
  return `${inWords(field.name).toLowerCase()} ${cut}`;
}

