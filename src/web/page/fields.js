// An input for each field of a request, by what its JSON Schema says.

import { button, element, newId } from "./dom.js";
import { PictureField } from "./picture_field.js";

const LONG = 5000; // characters from which a text has several lines
const MOST_STEPS = 400; // of a slider; what has more positions is typed

/**
 * @typedef {object} Field
 * @property {string} name
 * @property {HTMLElement} node
 * @property {() => any} get what to send, or undefined where nothing was changed
 * @property {(value: any) => void} set undefined: as it was at first
 * @property {() => string | null} fault why what stands in it cannot be sent
 * @property {(message: string | null) => void} show a fault, or none
 * @property {() => void} focus
 * @property {(path: string[]) => Field} find the innermost input that a fault's path names
 *
 * @typedef {object} Context what inputs need to know of the worker
 * @property {any} defs the schema's $defs
 * @property {Record<string, any>} defaults the model's, by field
 * @property {Record<string, number>} most the model's limits, by field
 * @property {Record<string, string[]>} choices all values that a field may have, by field
 * @property {Record<string, string[]>} suggestions some values of a field, by field
 */

/** The first kind of value that says something: schemas also allow null and "". */
export function kindOf(schema) {
  return (schema.anyOf ?? [schema]).find((kind) => kind.type !== "null" && !("const" in kind)) ?? schema;
}

/** A field's name in words. */
export function inWords(name) {
  const words = name.replaceAll("_", " ");
  return words[0].toUpperCase() + words.slice(1);
}

/** @returns {Field} */
export function makeField(name, schema, context) {
  const kind = kindOf(schema);
  const choices = context.choices[name] ?? kind.enum;
  if (kind.$ref) return new ObjectField(name, schema, context.defs[kind.$ref.split("/").at(-1)], context);
  if (kind.type === "array") {
    return kind.items.type === "number" ? new NumbersField(name, schema) : new ListField(name, schema, kind, context);
  }
  if (kind.type === "boolean") return new SwitchField(name, schema);
  if (choices) return new ChoiceField(name, schema, choices);
  if (kind.type === "integer" || kind.type === "number") return new NumberField(name, schema, kind, context);
  // A text without bounds is no text: pictures come as base64, as long as they are.
  if (kind.maxLength === undefined && !kind.pattern) return new PictureField(name, schema.description);
  return new TextField(name, schema, kind, context);
}

/** A labelled input with a hint and room for a fault: what most fields are. */
class Single {
  constructor(name, schema, input, { kind = "", after = [] } = {}) {
    this.name = name;
    this.input = input;
    this.allowed = schema.description;
    input.id = newId(name);
    input.name = name;
    this.hint = element("p", { class: "hint", id: newId("hint") }, schema.description ?? "");
    this.error = element("p", { class: "fault", id: newId("fault"), hidden: true });
    input.setAttribute("aria-describedby", `${this.hint.id} ${this.error.id}`);
    this.label = element("label", { htmlFor: input.id }, inWords(name));
    this.node = element("div", { class: `field ${kind}`, "data-field": name },
      this.label, element("div", { class: "input" }, input, ...after), this.hint, this.error);
    input.addEventListener("input", () => this.show(null));
  }

  fault() {
    if (this.input.validity.valid) return null;
    return this.allowed ? `must be ${this.allowed}` : this.input.validationMessage;
  }

  show(message) {
    this.error.textContent = message ?? "";
    this.error.hidden = !message;
    if (message) this.input.setAttribute("aria-invalid", "true");
    else this.input.removeAttribute("aria-invalid");
  }

  focus() { this.input.focus(); }
  find() { return this; }
}

class TextField extends Single {
  constructor(name, schema, kind, context) {
    const long = kind.maxLength >= LONG;
    const input = element(long ? "textarea" : "input", long ? { rows: 3 } : { type: "text", autocomplete: "off" });
    const suggested = context.suggestions[name] ?? [];
    const list = element("datalist", { id: newId("list") }, ...suggested.map((value) => element("option", { value })));
    if (suggested.length) input.setAttribute("list", list.id);
    super(name, schema, input, { kind: long ? "wide" : "", after: suggested.length ? [list] : [] });
  }

  get() { return this.input.value.trim() ? this.input.value : undefined; }
  set(value) { this.input.value = value ?? ""; this.show(null); }
}

class NumberField extends Single {
  constructor(name, schema, kind, context) {
    const { minimum: min, multipleOf } = kind;
    // Larger whole numbers a browser rounds, in silence.
    const max = Math.min(context.most[name] ?? Infinity, kind.maximum ?? Infinity, Number.MAX_SAFE_INTEGER);
    const step = multipleOf ?? (kind.type === "integer" ? 1 : "any");
    const preset = context.defaults[name] ?? schema.default;
    const input = element("input", {
      type: "number", min, max, step, inputMode: kind.type === "integer" ? "numeric" : "decimal",
      placeholder: preset ?? (name === "seed" ? "random" : "auto"),
    });
    const coarse = step === "any" ? roughly((max - min) / 40) : step;
    const slider = (max - min) / coarse <= MOST_STEPS && min !== undefined &&
      element("input", { type: "range", min, max, step: coarse, "aria-label": `${inWords(name)}, slider` });
    super(name, schema, input, { kind: slider ? "number" : "number plain", after: slider ? [slider] : [] });
    if (max === Number.MAX_SAFE_INTEGER && kind.maximum > max) {
      this.allowed = `an integer from ${min} to ${max.toLocaleString("en")}, which is as far as browsers count`;
    }
    this.type = kind.type;
    this.preset = schema.default;
    this.slider = slider || null;
    this.middle = preset ?? kind.default ?? min;
    if (slider) {
      slider.addEventListener("input", (event) => {
        event.stopPropagation();
        input.value = slider.value;
        input.dispatchEvent(new Event("input", { bubbles: true }));
      });
    }
    input.addEventListener("input", () => this.#follow());
    this.#follow();
  }

  #follow() {
    if (this.slider) this.slider.value = this.input.value === "" ? this.middle : this.input.value;
    this.node.classList.toggle("changed", this.input.value !== "");
  }

  get() {
    if (this.input.value === "") return undefined;
    const value = Number(this.input.value);
    return value === this.preset ? undefined : value;
  }

  fault() {
    const unsafe = this.type === "integer" && this.input.value && !Number.isSafeInteger(Number(this.input.value));
    return unsafe ? `must be ${this.allowed}` : super.fault();
  }

  set(value) {
    this.input.value = value ?? "";
    this.show(null);
    this.#follow();
  }
}

/** 1, 2 or 5 times a power of ten, near `value`. */
function roughly(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((times) => times * power).find((candidate) => candidate >= value * 0.99) ?? power;
}

class ChoiceField extends Single {
  constructor(name, schema, choices) {
    const preset = schema.default ?? null;
    const first = element("option", { value: "" }, preset === null ? "auto" : `${preset} (default)`);
    const others = choices.filter((value) => value !== preset).map((value) => element("option", { value }, value));
    super(name, schema, element("select", {}, first, ...others), { kind: "half" });
    this.preset = preset;
    this.hint.hidden = Boolean(schema.enum);
  }

  get() { return this.input.value || undefined; }

  set(value) {
    const wanted = value === undefined || value === null || value === this.preset ? "" : String(value);
    if (![...this.input.options].some((option) => option.value === wanted)) {
      this.input.append(element("option", { value: wanted }, wanted)); // the worker says what is wrong with it
    }
    this.input.value = wanted;
    this.show(null);
  }
}

class SwitchField extends Single {
  constructor(name, schema) {
    super(name, schema, element("input", { type: "checkbox" }), { kind: "switch" });
    this.hint.textContent = this.hint.textContent.replace(/^true or false[:;]? ?/, "");
    this.preset = schema.default ?? false;
    this.set(undefined);
  }

  get() { return this.input.checked === this.preset ? undefined : this.input.checked; }
  set(value) { this.input.checked = value ?? this.preset; this.show(null); }
}

/** Several numbers, as text with commas. */
class NumbersField extends Single {
  constructor(name, schema) {
    super(name, schema, element("input", { type: "text", autocomplete: "off", placeholder: "1, 0.75, 0.5, 0.25" }),
      { kind: "wide" });
  }

  get() {
    const parts = this.input.value.split(/[\s,;]+/).filter(Boolean);
    return parts.length ? parts.map(Number) : undefined;
  }

  fault() { return this.get()?.some(Number.isNaN) ? `must be ${this.allowed}` : null; }
  set(value) { this.input.value = (value ?? []).join(", "); this.show(null); }
}

/** Fields within a field. */
class ObjectField {
  constructor(name, schema, definition, context, title = inWords(name)) {
    this.name = name;
    this.fields = Object.entries(definition.properties).map(([part, inner]) => makeField(part, inner, context));
    this.hint = element("p", { class: "hint" }, schema.description ?? "");
    this.error = element("p", { class: "fault", hidden: true });
    this.legend = element("legend", {}, title);
    this.inner = element("div", { class: "fields" }, ...this.fields.map((field) => field.node));
    this.node = element("fieldset", { class: "field wide object", "data-field": name },
      this.legend, this.hint, this.inner, this.error);
  }

  get() {
    const said = this.fields.map((field) => [field.name, field.get()]).filter(([, value]) => value !== undefined);
    return said.length ? Object.fromEntries(said) : undefined;
  }

  set(value) {
    for (const field of this.fields) field.set(value?.[field.name]);
    this.show(null);
  }

  fault() {
    for (const field of this.fields) {
      const fault = field.fault();
      if (fault) return `${field.name} ${fault}`;
    }
    return null;
  }

  show(message) {
    this.error.textContent = message ?? "";
    this.error.hidden = !message;
    if (!message) for (const field of this.fields) field.show(null);
  }

  focus() { this.fields[0].focus(); }

  find([part, ...rest]) {
    const inner = this.fields.find((field) => field.name === part);
    return inner ? inner.find(rest) : this;
  }
}

/** Several of one kind: objects or pictures, each with a button to take it out. */
class ListField {
  constructor(name, schema, kind, context) {
    this.name = name;
    this.most = kind.maxItems ?? 10;
    this.definition = kind.items.$ref ? context.defs[kind.items.$ref.split("/").at(-1)] : null;
    this.context = context;
    /** @type {Field[]} */
    this.rows = [];
    this.list = element("div", { class: "rows" });
    this.add = button(`Add ${name === "loras" ? "a LoRA" : "another"}`, () => { this.#append().focus(); this.#changed(); });
    this.hint = element("p", { class: "hint" }, schema.description ?? "");
    this.error = element("p", { class: "fault", hidden: true });
    this.node = element("fieldset", { class: "field wide list", "data-field": name },
      element("legend", {}, inWords(name)), this.hint, this.list, this.add, this.error);
  }

  #append() {
    const title = `${inWords(this.name).replace(/s$/, "")} ${this.rows.length + 1}`;
    const row = this.definition
      ? new ObjectField(this.name, {}, this.definition, this.context, title)
      : new PictureField(title, "");
    const remove = button("Remove", () => {
      this.rows.splice(this.rows.indexOf(row), 1);
      shown.remove();
      this.#changed();
      this.add.focus();
    }, { class: "plain" });
    const shown = element("div", { class: "row" }, row.node, remove);
    this.rows.push(row);
    this.list.append(shown);
    return row;
  }

  #changed() {
    this.add.disabled = this.rows.length >= this.most;
    this.show(null);
    this.node.dispatchEvent(new Event("input", { bubbles: true }));
  }

  get() {
    return this.rows.length ? this.rows.map((row) => row.get() ?? (this.definition ? {} : "")) : undefined;
  }

  set(values) {
    this.rows = [];
    this.list.replaceChildren();
    for (const value of values ?? []) this.#append().set(value);
    this.add.disabled = this.rows.length >= this.most;
    this.show(null);
  }

  fault() { return this.rows.map((row) => row.fault()).find(Boolean) ?? null; }

  show(message) {
    this.error.textContent = message ?? "";
    this.error.hidden = !message;
    if (!message) for (const row of this.rows) row.show(null);
  }

  focus() { (this.rows[0] ?? this.add).focus(); }

  find([part, ...rest]) {
    const row = this.rows[Number(part)];
    return row ? row.find(rest) : this;
  }
}
