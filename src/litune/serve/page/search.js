// Search: by words, by a picture, or by both.

import { LONGEST, count, debounce, el, latest, picture } from "./dom.js";
import { filters } from "./filters.js";

const PAGE = 36;

export function searchPanel(root, shared) {
  const { backend, info, go, fail, say } = shared;
  const ask = latest(fail);
  let like = null; // {row} of the store, or the user's own {url, features}
  let found = 0;

  const words = el("input", {
    type: "search", maxLength: LONGEST.text, placeholder: "what you look for", autocomplete: "off", spellcheck: false, "aria-label": "What you look for",
    oninput: () => typed(),
  });
  const chip = el("div", { class: "chip", hidden: true });
  const weight = el("input", { type: "range", min: "0", max: "1", step: "0.05", value: "0.5", id: "weight", oninput: () => typed() });
  const balance = el("label", { class: "balance", hidden: true, for: "weight" }, "words", weight, "picture");
  const filter = filters({ backend, change: () => remember({ push: true }) });
  const ideas = el("p", { class: "ideas" });
  const grid = el("div", { class: "grid", role: "group", "aria-label": "Pictures found" });
  const empty = el("p", { class: "note", hidden: true }, "No picture meets the filters.");
  const more = el("button", { type: "button", class: "button", hidden: true, onclick: () => load(found) }, "More");

  root.append(
    el("div", { class: "intro" },
      el("h1", { id: "search-title" }, "Search by words"),
      el("p", {}, `Say what you look for among ${info.images.toLocaleString("en")} pictures. Click one for more like it; then add words to steer.`)),
    el("form", { class: "searchbar", role: "search", onsubmit: (event) => { event.preventDefault(); remember({ push: true }); } }, words, chip, balance, filter.button),
    filter.root, ideas, empty, grid, el("div", { class: "buttons center" }, more),
  );
  const captions = shared.some.flatMap((one) => one.captions?.slice(0, 1) ?? []).filter((text) => text.length < 60);
  if (captions.length) {
    ideas.append("Try ", ...captions.slice(0, 5).flatMap((text) => [
      el("button", { type: "button", class: "idea", onclick: () => { words.value = text; remember({ push: true }); } }, text), " ",
    ]));
  }

  const typed = debounce(() => { remember(); load(0); }, 180);

  function remember({ push = false } = {}) {
    const asked = new URLSearchParams();
    if (words.value.trim()) asked.set("q", words.value.trim());
    if (like) asked.set("like", like.features ? "own" : like.row);
    if (like && words.value.trim()) asked.set("w", weight.value);
    for (const one of filter.where()) asked.append("where", one);
    go("search", asked, { replace: !push });
  }

  function setLike(one) {
    like = one;
    chip.hidden = !one;
    chip.replaceChildren();
    if (!one) return;
    chip.append(
      picture(backend, { ...one, name: "the picture to be like" }), el("span", {}, "like this"),
      el("button", { type: "button", class: "quiet", title: "Describe it", "aria-label": "Describe this picture",
        onclick: () => go("match", new URLSearchParams(one.features ? {} : { img: one.row })) }, "↗"),
      el("button", { type: "button", class: "quiet", "aria-label": "Search without this picture",
        onclick: () => { setLike(null); remember({ push: true }); words.focus(); } }, "×"),
    );
  }

  function query() {
    const text = words.value.trim();
    const body = filter.where().length ? { where: filter.where() } : {};
    if (text) body.text = text;
    if (like) body.image = like.features ? { features: like.features } : { row: like.row };
    if (text && like) {
      body.image_weight = Number(weight.value);
      body.text_weight = 1 - body.image_weight;
    }
    return body;
  }

  function load(offset) {
    const body = query();
    balance.hidden = !(body.text && body.image);
    const asks = Boolean(body.text || body.image);
    ideas.hidden = asks || Boolean(body.where);
    if (ideas.hidden) empty.hidden = true;
    else {
      found = 0;
      more.hidden = empty.hidden = true;
      return ask(async () => shared.some, (some) => grid.replaceChildren(...some.map(tile)));
    }
    // Without words or a picture, filters leave the pictures in the store's order.
    const work = asks
      ? async () => (await backend.search({ ...body, top: PAGE, offset })).found
      : async () => (await backend.images({ where: body.where, offset, limit: PAGE })).images;
    return ask(work, (some) => {
      shared.clearError();
      // The picture itself is always the nearest to itself.
      const others = body.text ? some : some.filter((one) => one.row !== like?.row);
      const tiles = others.map(tile);
      if (offset) grid.append(...tiles);
      else grid.replaceChildren(...tiles);
      found = offset + some.length;
      more.hidden = some.length < PAGE || found >= info.images;
      empty.hidden = found > 0;
      if (!offset) announce(others.length ? `${count(others.length, "picture")}; first: ${others[0].captions?.[0] ?? others[0].key}` : "Nothing found");
      else tiles[0]?.focus();
    });
  }

  const announce = debounce(say, 700);

  function tile(one) {
    const name = one.captions?.[0] ?? one.key;
    return el("button", {
      type: "button", class: "tile", title: `${name}\nmore like this`, data: { row: one.row },
      onclick: () => { words.value = ""; setLike({ row: one.row }); remember({ push: true }); },
    },
    picture(backend, { row: one.row, name }),
    el("span", { class: "caption" }, name),
    one.score === undefined ? null : el("span", { class: "score" }, one.score.toFixed(3)));
  }

  // Arrows lead through the grid.
  grid.addEventListener("keydown", (event) => {
    const tiles = [...grid.children];
    const here = tiles.indexOf(document.activeElement);
    const across = tiles.filter((one) => one.offsetTop === tiles[0].offsetTop).length;
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across }[event.key];
    if (here < 0 || !step || !tiles[here + step]) return;
    event.preventDefault();
    tiles[here + step].focus();
  });

  return {
    show(asked) {
      words.value = asked.get("q") ?? "";
      weight.value = asked.get("w") ?? "0.5";
      filter.set(asked.getAll("where"));
      const row = asked.get("like");
      if (row === null) setLike(null);
      else if (row === "own") {
        if (!shared.own) fail(new Error("That address was about a picture of someone's own, which stays with them."));
        setLike(shared.own);
      } else setLike(/^\d+$/.test(row) ? { row: Number(row) } : null);
      if (info.images) return load(0);
      return fail(new Error("This server was started without images to search: start it with --images STORE."));
    },
  };
}
