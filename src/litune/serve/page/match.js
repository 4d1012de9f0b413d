// Match: one picture, several descriptions, and how well each fits, as you type.

import { LONGEST, debounce, dropZone, el, latest, percent, picture } from "./dom.js";

const MOST = 12;

export function matchPanel(root, shared) {
  const { backend, info, go, fail, say } = shared;
  const ask = latest(fail);
  const read = latest(fail); // a picture that is being read: what is typed meanwhile doesn't make it late
  let chosen = null; // {row, key, captions} of the store, or {url, name, features}: the user's own
  let strip = shared.some.filter((_, i) => shared.some.length <= 8 || i % 3 === 0).slice(0, 8);

  const shown = el("div", { class: "shown" });
  const film = el("div", { class: "film", role: "group", "aria-label": "Pictures to choose from" });
  const list = el("ol", { class: "descriptions" });
  const add = el("button", { type: "button", class: "button", onclick: () => addRow("", true) }, "Add a description");
  const note = el("p", { class: "note" });
  const drop = info.can_encode_images && dropZone({
    text: "or drop a picture of your own here", fail,
    use: ([{ file }]) => read(async () => ({ file, answer: await backend.encodeImages([file]) }), ({ file, answer }) => {
      shared.own = { url: URL.createObjectURL(file), name: file.name, features: answer.features[0] };
      choose(shared.own);
      exchangeExamples();
      remember({ push: true });
    }),
  });

  root.append(
    el("div", { class: "intro" },
      el("h1", { id: "match-title" }, "Which description fits?"),
      el("p", {}, "Choose a picture, describe it in several ways, and see what the model takes it for.")),
    el("div", { class: "split" },
      el("div", { class: "card" }, shown, film,
        el("div", { class: "buttons" },
          el("button", { type: "button", class: "button", hidden: !info.images, onclick: others }, "Other pictures"),
          el("button", { type: "button", class: "button", hidden: !info.images, onclick: alike }, "Find similar")),
        drop),
      el("div", { class: "card" }, list, el("div", { class: "buttons" }, add), note)),
  );

  const texts = () => [...list.querySelectorAll("input")].map((input) => input.value);
  const reference = () => (chosen.features ? { features: chosen.features } : { row: chosen.row });

  function addRow(value, focus = false, example = false) {
    if (list.children.length >= MOST) return;
    const input = el("input", {
      type: "text", value, maxLength: LONGEST.text, data: example ? { example } : {}, placeholder: "a description", autocomplete: "off", spellcheck: false,
      oninput: () => { delete input.dataset.example; typed(); },
      onkeydown: (event) => {
        const rows = [...list.querySelectorAll("input")];
        const here = rows.indexOf(input);
        if (event.key === "Enter") {
          event.preventDefault();
          if (rows[here + 1]) rows[here + 1].focus();
          else addRow("", true);
        }
        if (event.key === "Backspace" && !input.value && rows.length > 1) {
          event.preventDefault();
          removeRow(item);
          (rows[here - 1] ?? rows[1]).focus();
        }
      },
    });
    const item = el("li", {},
      el("div", { class: "line" }, input, el("output", {}),
        el("button", { type: "button", class: "quiet", "aria-label": "Remove this description", onclick: () => removeRow(item) }, "×")),
      el("div", { class: "bar", "aria-hidden": "true" }, el("i", {})));
    list.append(item);
    number();
    if (focus) input.focus();
  }

  function removeRow(item) {
    item.remove();
    number();
    if (!list.children.length) addRow("", true);
    typed();
  }

  function number() {
    [...list.querySelectorAll("input")].forEach((input, i) => input.setAttribute("aria-label", `Description ${i + 1}`));
    add.hidden = list.children.length >= MOST;
  }

  const typed = debounce(() => { remember(); score(); }, 120);

  function remember({ push = false } = {}) {
    const asked = new URLSearchParams();
    if (chosen?.row !== undefined) asked.set("img", chosen.row);
    for (const text of texts().filter((one) => one.trim())) asked.append("t", text);
    go("match", asked, { replace: !push });
  }

  function choose(one) {
    chosen = one;
    const name = one.name ?? one.key ?? `picture ${one.row}`;
    const absent = () => shown.replaceChildren(
      el("p", { class: "note" }, `Picture ${one.row} can't be shown: it is not in this collection, or its file is gone.`));
    shown.replaceChildren(picture(backend, { ...one, name }, { loading: "eager", onerror: () => one === chosen && absent() }));
    for (const button of film.children) button.setAttribute("aria-pressed", String(button.dataset.row === String(one.row)));
    note.textContent = one.features ? "Your own picture is not part of this page's address." : "";
  }

  function draw() {
    film.replaceChildren(...strip.map((one) => el(
      "button", {
        type: "button", data: { row: one.row }, title: one.captions?.[0] ?? one.key, "aria-pressed": String(one.row === chosen?.row),
        onclick: () => { read(() => null); choose(one); exchangeExamples(); remember({ push: true }); },
      }, picture(backend, { row: one.row, name: one.captions?.[0] ?? one.key }))));
  }

  function others() {
    return shared.sample({ parts: 8, each: 1, shift: Math.random() }).then((images) => { strip = images; draw(); }, fail);
  }

  function alike() {
    if (chosen) go("search", new URLSearchParams({ like: chosen.features ? "own" : chosen.row }));
  }

  function score() {
    const rows = [...list.children];
    const filled = rows.filter((row) => row.querySelector("input").value.trim());
    for (const row of rows) if (!filled.includes(row)) paint(row, null);
    if (!filled.length || !chosen) return;
    const asked = filled.map((row) => row.querySelector("input").value.trim());
    ask(() => backend.match({ images: [reference()], texts: asked }), ({ cosines: [cosines], probabilities: [shares] }) => {
      shared.clearError();
      const best = shares.indexOf(Math.max(...shares));
      filled.forEach((row, i) => paint(row, shares[i], cosines[i], filled.length > 1 && i === best));
      announce(`Best: ${asked[best]}, ${percent(shares[best])}`);
    });
  }

  const announce = debounce(say, 700);

  function paint(row, share, cosine, best = false) {
    row.classList.toggle("best", best);
    row.querySelector(".bar i").style.setProperty("--share", share ?? 0);
    row.querySelector("output").textContent = share === null ? "" : percent(share);
    row.querySelector("output").title = share === null ? "" : `cosine ${cosine.toFixed(3)}`;
  }

  const middle = () => strip[strip.length >> 1];

  // What there is to see before anything was typed: a picture's own caption among those of others.
  function example(one) {
    const own = one?.captions?.[0];
    const foreign = strip.flatMap((one) => one.captions?.slice(0, 1) ?? []).filter((one) => one !== own);
    return own ? [foreign[0], own, ...foreign.slice(1, 3)].filter(Boolean) : ["a photo of a person", "a photo of an animal", "a drawing"];
  }

  // Another picture gets other examples; what was typed, or came with the address, stays.
  function exchangeExamples() {
    const old = [...list.children].filter((row) => row.querySelector("input").dataset.example);
    for (const row of old) row.remove();
    if (old.length) for (const text of example(chosen)) if (!texts().includes(text)) addRow(text, false, true);
    number();
  }

  return {
    async show(asked) {
      const row = asked.get("img");
      const wanted = asked.getAll("t");
      if (/^\d+$/.test(row ?? "")) choose(strip.find((one) => one.row === Number(row)) ?? { row: Number(row) });
      else if (!chosen && strip.length) choose(middle());
      else if (!chosen) shown.replaceChildren(el("p", { class: "note" }, "Drop or choose a picture."));
      if (!wanted.length && !texts().length) example(chosen).forEach((text) => addRow(text, false, true));
      else if (wanted.length && wanted.join("\n") !== texts().filter((one) => one.trim()).join("\n")) {
        list.replaceChildren();
        wanted.slice(0, MOST).forEach((text) => addRow(text));
      }
      draw();
      score();
    },
  };
}
