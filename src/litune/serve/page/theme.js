// Before anything is drawn: the colours that were chosen here last time.
try {
  const chosen = localStorage.getItem("litune-theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
} catch {
  // Storage can be forbidden: then the system's colours.
}
