"use strict";
// Before anything is drawn: dark or light, as chosen here before, else as the system has it.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => {
    try {
      return localStorage.getItem("jaxtrain-theme");
    } catch {
      return null; // storage is off
    }
  };
  const apply = () => (document.documentElement.dataset.theme = chosen() ?? (dark.matches ? "dark" : "light"));
  dark.addEventListener("change", apply);
  apply();
})();
