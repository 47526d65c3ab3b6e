// Light, dark, or as the system has it.

import { byId } from "./dom.js";

export function offerThemes() {
  const choice = byId("theme");
  try { choice.value = localStorage.getItem("theme") ?? ""; } catch { /* as the system has it */ }
  const apply = () => {
    if (choice.value) document.documentElement.dataset.theme = choice.value;
    else delete document.documentElement.dataset.theme;
  };
  choice.addEventListener("change", () => {
    apply();
    try { localStorage.setItem("theme", choice.value); } catch { /* until the page is closed */ }
  });
  apply();
}
