// Light and dark: the system decides until the switch is used.

import { icon } from "./dom.js";

export function setUpThemeSwitch(storage) {
  const root = document.documentElement;
  const button = document.getElementById("switch-theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => {
    button.setAttribute("aria-pressed", String(isDark()));
    button.title = isDark() ? "Light colours" : "Dark colours";
    button.replaceChildren(icon(isDark() ? "sun" : "moon"));
  };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      storage.setItem("tritgguf.theme", root.dataset.theme);
    } catch {
      // Full: the choice lasts as long as the page.
    }
    show();
  });
  system.addEventListener("change", show);
  show();
}
