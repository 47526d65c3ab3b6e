// The start: what the worker can do, the form for it, the pictures of this browser.

import { answerOf, follow, run } from "./api.js";
import { button, byId, element, notice } from "./dom.js";
import { stayHere, takePictures } from "./drop.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { Jobs } from "./jobs.js";
import { requestOfLink } from "./share.js";
import { Store } from "./store.js";
import { offerThemes } from "./theme.js";

/** What the worker says of itself; it may have to load its model first. */
async function describe() {
  const waiting = byId("waiting"), begun = Date.now();
  const tick = setInterval(() => {
    const seconds = Math.round((Date.now() - begun) / 1000);
    if (seconds > 2) waiting.textContent = `Asking the worker what it can do. It may be loading its model (${seconds} s).`;
  }, 1000);
  const trouble = (error, seconds) => {
    byId("connection").textContent = error ? `${error.message} Trying again in ${Math.ceil(seconds)} seconds.` : "";
  };
  try {
    const answer = answerOf(await follow(await run({ describe: true }), undefined, trouble), []);
    if ("error" in answer) throw new Error(answer.error);
    if (!answer.output?.describe) throw new Error("What it answers is no description: is it a worker of this kind?");
    return answer.output.describe;
  } finally {
    clearInterval(tick);
  }
}

async function start() {
  const store = await Store.open();
  let about;
  for (;;) {
    try {
      about = await describe();
      break;
    } catch (error) {
      await new Promise((again) => byId("waiting").replaceChildren(`The worker cannot say what it can do. ${error.message} `,
        button("Ask again", again)));
      byId("waiting").textContent = "Asking the worker what it can do…";
    }
  }
  byId("waiting").remove();
  byId("model").textContent = about.model;
  document.querySelector(".draw").hidden = false;

  const form = new Form(about);
  const previews = Object.values(about.modes).every((mode) => mode.takes.includes("preview"));
  const fill = async (request) => {
    const unknown = await form.fill(request);
    if (unknown.length) notice(`The form has no place for ${unknown.join(", ")}: left out.`, { error: true });
    byId("form").scrollIntoView({ block: "start" });
    form.field("prompt").focus();
  };
  const draw = (request) => jobs.draw(request);
  const begin = async (base64) => {
    await form.put("init_image", base64);
    form.field("init_image").node.scrollIntoView({ block: "nearest" });
    form.field("prompt").focus();
  };
  const gallery = new Gallery(store, { fill, draw, start: begin });
  const jobs = new Jobs(store, gallery, form, previews);

  const sending = new Set();
  byId("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const { request, faults } = form.read();
    if (faults.length) return form.showFaults(faults);
    form.clearFaults();
    const text = JSON.stringify(request);
    if (sending.has(text)) return; // nobody means to send the same twice before it is queued
    sending.add(text);
    await jobs.draw(request);
    sending.delete(text);
  });
  byId("draw").addEventListener("click", (event) => {
    if (event.detail > 1) event.preventDefault(); // the second click of a double one
  });
  byId("reset").addEventListener("click", () => fill({}));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    if (event.repeat || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    byId("form").requestSubmit();
  });
  takePictures(form, { fill, draw });

  const openLink = async () => {
    try {
      const request = requestOfLink();
      if (request) await fill(request);
    } catch (error) {
      notice(error.message, { error: true });
    }
  };
  addEventListener("hashchange", openLink);
  await gallery.load();
  await jobs.resume();
  await openLink();
  document.body.dataset.ready = "true";
}

offerThemes();
stayHere();
start();
