// Elements, notices and questions. Text goes in as text, never as HTML.

/**
 * An element with properties, attributes and listeners ("onclick"); children that are false or null are left out.
 * @param {string} tag
 * @param {Record<string, any>} [attributes]
 * @param {...(Node | string | false | null | undefined)} children
 * @returns {any}
 */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name in node && name !== "list" && name !== "form") node[name] = value;
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== false && child !== null && child !== undefined));
  return node;
}

/** @returns {any} the element of this id */
export const byId = (id) => document.getElementById(id);

let count = 0;
/** An id that nothing else on the page has. */
export const newId = (name) => `${name.replace(/\W+/g, "-")}-${++count}`;

/** A button that says `text` and does `work`. */
export function button(text, work, attributes = {}) {
  return element("button", { type: "button", onclick: work, ...attributes }, text);
}

/** Tell those who do not see the page. */
export function announce(text) {
  byId("announcer").textContent = text;
}

/** Say `text` at the bottom of the page: for a while, or until it is closed where it is an `error`. */
export function notice(text, { error = false } = {}) {
  const shown = element("div", { class: error ? "notice error" : "notice" }, element("p", {}, text));
  const close = () => shown.remove();
  shown.append(button("×", close, { class: "plain close", "aria-label": "Close this notice" }));
  if (!error) setTimeout(close, 6000);
  // A dialog covers all that lies outside of it.
  const place = document.querySelector("dialog[open]");
  if (place) shown.classList.add("within");
  (place ?? byId("notices")).append(shown);
}

/**
 * Ask in a dialog: `content` under `title`, and buttons [text, value, kind]. Escape and a click outside answer null.
 * @returns {Promise<any>} the value of the button that was pressed
 */
export function ask(title, content, buttons, { closable = true } = {}) {
  const dialog = byId("question");
  return new Promise((resolve) => {
    let answer = null;
    const row = buttons.map(([text, value, kind = ""], i) =>
      element("button", { class: kind, value: String(i), type: "submit" }, text));
    const form = element("form", { method: "dialog", class: "stack" },
      element("h2", { id: "question-title" }, title), ...content, element("div", { class: "buttons" }, ...row));
    form.addEventListener("submit", (event) => {
      answer = buttons[Number(event.submitter?.value ?? 0)]?.[1] ?? null;
    });
    dialog.replaceChildren(form);
    dialog.oncancel = (event) => { if (!closable) event.preventDefault(); };
    dialog.onclose = () => { dialog.replaceChildren(); resolve(answer); };
    dialog.onclick = (event) => { if (closable && event.target === dialog) dialog.close(); };
    if (dialog.open) dialog.close();
    dialog.showModal();
  });
}

/** Put `text` into the clipboard, or show it where the browser does not let a page do that. */
export async function copy(text, said) {
  try {
    await navigator.clipboard.writeText(text);
    notice(said);
  } catch {
    const area = element("textarea", { value: text, rows: 12, readOnly: true, "aria-label": "The text", class: "code" });
    const asked = ask("Copy this", [area], [["Close", null]]);
    area.select();
    await asked;
  }
}
