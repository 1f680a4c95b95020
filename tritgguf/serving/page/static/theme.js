// Runs before the page is drawn, so that it never flashes in the other colours.
(() => {
  try {
    const theme = localStorage.getItem("tritgguf.theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // Storage is blocked: the system's colours are used.
  }
})();
