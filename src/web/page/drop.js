// A picture that is dropped, pasted or picked: what is it for?

import { parameters } from "./api.js";
import { ask, byId, element, notice } from "./dom.js";
import { inWords, prepare, toBase64 } from "./pictures.js";
import { fileOf } from "./picture_field.js";
import { pictureUses } from "./form.js";

const USES = {
  init_image: "Start from it", control_image: "Use it as control", image_prompt: "Use it as image prompt",
  mask_image: "Use it as mask",
};

const hasFiles = (event) => event.dataTransfer?.types.includes("Files");

/** Keep the browser from leaving the page for a picture that is dropped. */
export function stayHere() {
  for (const kind of ["dragover", "drop"]) {
    addEventListener(kind, (event) => { if (hasFiles(event)) event.preventDefault(); });
  }
}

/**
 * Listen for pictures on the whole page.
 * @param {import("./form.js").Form} form
 * @param {{fill: (request: any) => Promise<void>, draw: (request: any) => void}} actions
 */
export function takePictures(form, actions) {
  const take = (file) => file && use(file, form, actions);
  const dialogIsOpen = () => document.querySelector("dialog[open]") !== null;
  let depth = 0; // of elements that are dragged over: each is entered before the one around it is left
  const over = (change) => {
    depth = Math.max(0, change ? depth + change : 0);
    document.body.classList.toggle("over", depth > 0);
  };
  document.addEventListener("dragenter", (event) => { if (hasFiles(event)) over(1); });
  document.addEventListener("dragleave", (event) => { if (hasFiles(event)) over(-1); });
  document.addEventListener("drop", () => over(0), { capture: true });
  document.addEventListener("drop", (event) => {
    if (hasFiles(event) && !dialogIsOpen()) take(fileOf(event.dataTransfer));
  });
  document.addEventListener("paste", (event) => {
    const file = fileOf(event.clipboardData);
    if (!file || dialogIsOpen()) return;
    event.preventDefault();
    take(file);
  });
  byId("pick").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", () => { take(fileOf(byId("file"))); byId("file").value = ""; });
}

async function use(file, form, actions) {
  let prepared;
  try {
    prepared = await prepare(file);
  } catch (error) {
    return notice(error.message, { error: true });
  }
  const carried = await parameters(file).catch(() => null); // a picture of another's carries none
  const { request, missing } = carried?.input ? withoutReferences(carried.input) : {};
  const url = URL.createObjectURL(prepared.blob);
  const content = [element("img", { src: url, alt: "The picture", class: "asked" }),
    element("p", { class: "quiet" }, [file.name, inWords(file.size), prepared.note].filter(Boolean).join(", "))];
  const isExact = Number.isSafeInteger(request?.seed); // beyond that browsers round, in silence
  if (request) {
    content.push(element("p", {}, "It carries its request: ", element("q", {}, String(request.prompt))));
    if (carried.model !== form.about.model) {
      content.push(element("p", { class: "warning" },
        `It was drawn by ${carried.model}; ${form.about.model} draws another picture of it.`));
    }
    if (!isExact) content.push(element("p", { class: "warning" }, "Its seed is larger than browsers count: type another one."));
    if (missing.length) {
      content.push(element("p", { class: "warning" },
        `Files do not carry the pictures of their request: choose ${missing.join(", ")} again.`));
    }
  }
  const uses = pictureUses(form.about).filter((name) => name !== "mask_image" || form.field("init_image").get());
  const answer = await ask("What is this picture for?", content, [
    ...(request && !missing.length && isExact ? [["Draw it again", "draw", "primary"]] : []),
    ...(request ? [["Fill the form with its request", "fill"]] : []),
    ...uses.map((name) => [USES[name], name]),
    ["Nothing", null, "plain"],
  ]);
  URL.revokeObjectURL(url);
  if (answer === "draw") actions.draw(request);
  else if (answer === "fill") {
    await actions.fill(request);
    if (missing.length) {
      form.showFaults(missing.map((name) => ({ field: name, message: "must be chosen again: files do not carry it" })));
    }
  } else if (answer) {
    await form.put(answer, await toBase64(prepared.blob));
    if (answer === "mask_image") form.field(answer).focus();
  }
}

/** A file's request without the pictures that it names by their digests, and the fields of those. */
function withoutReferences(input) {
  const isReference = (value) => JSON.stringify(value)?.includes('"sha256:') ?? false;
  const entries = Object.entries(input);
  const named = (name) => ["init_image", "mask_image", "control_image", "image_prompt", "init_images", "controls"].includes(name);
  const missing = entries.filter(([name, value]) => named(name) && isReference(value)).map(([name]) => name);
  return { request: Object.fromEntries(entries.filter(([name]) => !missing.includes(name))), missing };
}
