// The page: which panel is open, the address, colours, errors. Each panel has a file of its own.

import * as backend from "./backend.js";
import { classifyPanel } from "./classify.js";
import { el } from "./dom.js";
import { matchPanel } from "./match.js";
import { searchPanel } from "./search.js";

const at = (id) => document.getElementById(id);
const PANELS = { match: matchPanel, classes: classifyPanel, search: searchPanel };
const panels = {};

// The address: #panel?what=is&asked=for. All that can be shared stands in it.

function read() {
  const [name, query = ""] = location.hash.slice(1).split("?");
  return { name: name in PANELS ? name : "match", asked: new URLSearchParams(query) };
}

function go(name, asked, { replace = false } = {}) {
  const query = asked.toString();
  const address = `#${name}${query ? `?${query}` : ""}`;
  if (address !== location.hash) history[replace ? "replaceState" : "pushState"](null, "", address);
  remembered[name] = address;
  if (!replace) show();
}

// A panel is left as it is found again: its tab leads to its last address.
const remembered = {};
let shown = "";

function show() {
  const { name, asked } = read();
  clearError();
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== `panel-${name}`;
  for (const link of document.querySelectorAll("nav a")) {
    const panel = link.getAttribute("href").slice(1).split("?")[0];
    if (remembered[panel]) link.setAttribute("href", remembered[panel]);
    if (panel === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (name !== shown) window.scrollTo(0, 0);
  shown = name;
  document.title = `${{ match: "Match", classes: "Classify", search: "Search" }[name]} · litune`;
  panels[name].show(asked);
}

// Errors stand at the top of the page until the next thing works, or they are put away.

function fail(why) {
  if (why.name === "AbortError") return;
  const close = el("button", { type: "button", class: "quiet", "aria-label": "Close", onclick: clearError }, "×");
  at("error").replaceChildren(el("p", {}, why.message), close);
  at("error").hidden = false;
}

function clearError() {
  at("error").hidden = true;
}

function say(text) {
  at("live").textContent = text;
}

// Colours.

const THEMES = { "": "as the system has them", light: "light", dark: "dark" };

function nextTheme() {
  const names = Object.keys(THEMES);
  const now = document.documentElement.dataset.theme ?? "";
  const next = names[(names.indexOf(now) + 1) % names.length];
  if (next) document.documentElement.dataset.theme = next;
  else delete document.documentElement.dataset.theme;
  try {
    localStorage.setItem("litune-theme", next);
  } catch {
    // It lasts until the page is closed.
  }
  nameTheme();
  say(`Colours: ${THEMES[next]}`);
}

function nameTheme() {
  const label = `Colours: ${THEMES[document.documentElement.dataset.theme ?? ""]}`;
  at("theme").setAttribute("aria-label", label);
  at("theme").title = label;
}

function askForToken(again) {
  at("token-why").textContent = again
    ? "The server did not accept that one."
    : "It was printed, or chosen, where the server was started.";
  at("token-value").value = "";
  at("token").showModal();
  return new Promise((resolve) => {
    at("token").addEventListener("close", () => resolve(at("token-value").value.trim()), { once: true });
  });
}

// Pictures from all over the store, as neighbours are often alike; `shift` from 0 to 1 moves to others.
async function sample(total, { parts, each, shift = 0 }) {
  if (!total) return [];
  const few = total <= parts * each;
  const offsets = few ? [0] : Array.from({ length: parts }, (_, i) => Math.floor(((i + shift) * (total - each)) / parts));
  const limit = few ? total : each;
  return (await Promise.all(offsets.map((offset) => backend.images({ offset, limit })))).flatMap(({ images }) => images);
}

function describe(info) {
  const fact = (name, value) => value && el("span", {}, `${name} `, el("b", {}, value));
  at("about").replaceChildren(
    fact("run", info.run), fact("images", info.images.toLocaleString("en")), fact("image tower", info.image_tower),
    fact("text tower", info.text_tower), fact("features", `${info.dim}-d`),
    el("span", {}, `Computed ${backend.where}.`),
  );
}

async function start() {
  nameTheme();
  at("theme").addEventListener("click", nextTheme);
  at("skip").addEventListener("click", (event) => { event.preventDefault(); at("main").focus(); });
  // A picture that misses its place must not replace the page.
  for (const kind of ["dragover", "drop"]) window.addEventListener(kind, (event) => event.preventDefault());
  backend.onToken?.(askForToken);
  backend.onProgress?.(({ got, total }) => {
    at("loading").querySelector("p").textContent = `Loading the model: ${(got / 1e6).toFixed(0)} of ${(total / 1e6).toFixed(0)} MB`;
  });
  try {
    const info = await backend.model();
    describe(info);
    const shared = { backend, info, sample: (many) => sample(info.images, many), own: null, go, fail, clearError, say };
    shared.some = await shared.sample({ parts: 12, each: 2, shift: 0.5 });
    for (const [name, panel] of Object.entries(PANELS)) panels[name] = panel(at(`panel-${name}`), shared);
  } catch (why) {
    at("loading").hidden = true;
    return fail(why);
  }
  at("loading").hidden = true;
  window.addEventListener("popstate", show);
  show();
}

start();
