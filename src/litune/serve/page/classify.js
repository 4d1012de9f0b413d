// Classify: name the classes, see pictures sorted into columns.

import { count, debounce, dropZone, el, latest, percent, picture } from "./dom.js";

const PARTS = 10; // a sample is this many runs of neighbours from all over the store
const STEP = 250; // pictures of the store in one question
const SENT = 64; // features of own pictures in one question
const ENCODED = 4; // own pictures in one question
const MOST_DAMAGED = 10; // own pictures that can't be read, before it stops
const MOST = 50_000; // pictures of the store that a browser may sort
const SHOWN = 30; // pictures of a column before all are asked for

export function classifyPanel(root, shared) {
  const { backend, info, go, fail, say } = shared;
  const ask = latest((why) => { progress.hidden = true; fail(why); });
  let own = null; // [{file, path, url, features, label}]: a folder of the user's own
  let results = null; // {classes, predictions}

  const names = el("textarea", { id: "names", rows: 6, spellcheck: false, oninput: () => typed() });
  const kind = el("select", { id: "kind", onchange: () => { custom.hidden = kind.value !== "own"; typed(); } },
    el("option", { value: "auto" }, "those of the run"), el("option", { value: "bare" }, "the bare name"),
    el("option", { value: "short" }, "a short list"), el("option", { value: "own" }, "my own"));
  const custom = el("textarea", {
    rows: 3, hidden: true, spellcheck: false, value: "a photo of a {}.", "aria-label": "Templates, one a line, {} for the name", oninput: () => typed(),
  });
  const amounts = [200, 1000, 5000].filter((n) => n < info.images);
  const amount = el("select", { id: "amount", onchange: () => { own = null; typed(); } },
    amounts.map((n) => el("option", { value: n }, `${n.toLocaleString("en")} from all over it`)),
    info.images <= MOST && el("option", { value: "all" }, `all ${info.images.toLocaleString("en")}`));
  const back = el("button", { type: "button", class: "button", hidden: true, onclick: () => { own = null; run(); } }, "Back to the store's");
  const drop = info.can_encode_images && dropZone({
    text: "or drop a folder of your own here; folders named like a class are taken as labels", folder: true, fail, use: encodeAll,
  });
  const progress = el("progress", { hidden: true, max: 1, value: 0, "aria-label": "Pictures classified" });
  const summary = el("p", { class: "summary" });
  const columns = el("div", { class: "columns" });
  const confusion = el("div", { class: "scroll" });
  const take = el("div", { class: "buttons", hidden: true },
    el("button", { type: "button", class: "button", onclick: download }, "Download CSV"),
    el("button", { type: "button", class: "button", onclick: copy }, "Copy the Python for this"));
  const code = el("pre", { class: "code", hidden: true, tabIndex: 0, "aria-label": "Python that does the same" });

  root.append(
    el("div", { class: "intro" },
      el("h1", { id: "classes-title" }, "Make a classifier"),
      el("p", {}, "Name some classes. Nothing is trained: each picture goes to the class whose name fits it best.")),
    el("div", { class: "split narrow" },
      el("div", { class: "card form" },
        el("label", { for: "names" }, "Classes, one a line"), names,
        el("label", { for: "kind" }, "Templates"), kind, custom,
        info.images && [el("label", { for: "amount" }, "Pictures of the store"), amount], drop, back),
      el("div", {}, progress, summary, columns, confusion, take, code)),
  );

  const lines = (area) => [...new Set(area.value.split("\n").map((line) => line.trim()).filter(Boolean))];
  const templates = () => (kind.value === "own" ? lines(custom) : kind.value);
  const typed = debounce(() => { remember(); run(); }, 350);

  function remember() {
    const asked = new URLSearchParams();
    for (const name of lines(names)) asked.append("c", name);
    if (kind.value !== "auto") asked.set("templates", kind.value);
    if (kind.value === "own") for (const one of lines(custom)) asked.append("as", one);
    if (amount.value !== amount.options[0].value) asked.set("n", amount.value);
    go("classes", asked, { replace: true });
  }

  function encodeAll(files) {
    for (const one of own ?? []) URL.revokeObjectURL(one.url);
    own = null;
    const damaged = [];
    ask(async (current) => {
      const read = [];
      for (let from = 0; from < files.length && current(); from += ENCODED) {
        advance(from, files.length);
        read.push(...await encode(files.slice(from, from + ENCODED), damaged));
      }
      return read;
    }, async (read) => {
      own = read.map((one) => ({ ...one, url: URL.createObjectURL(one.file) }));
      await run();
      if (damaged.length) fail(new Error(`Left out: ${damaged.map(({ path, why }) => `${path} (${why.message})`).join("; ")}`));
    });
  }

  // Some pictures with their features. Where one of them can't be read, it is left out and named in `damaged`.
  async function encode(part, damaged) {
    try {
      const { features } = await backend.encodeImages(part.map(({ file }) => file));
      return part.map((one, i) => ({ ...one, features: features[i] }));
    } catch (why) {
      if (part.length > 1) {
        const alone = [];
        for (const one of part) alone.push(...await encode([one], damaged));
        return alone;
      }
      damaged.push({ path: part[0].path, why });
      if (damaged.length >= MOST_DAMAGED) throw why;
      return [];
    }
  }

  // The pictures of the store that are asked for, as offsets and numbers of neighbours.
  function questions() {
    if (amount.value === "all") {
      return Array.from({ length: Math.ceil(info.images / STEP) }, (_, i) => ({ offset: i * STEP, limit: STEP }));
    }
    const limit = Number(amount.value) / PARTS;
    return Array.from({ length: PARTS }, (_, i) => ({ offset: Math.floor((i * info.images) / PARTS), limit }));
  }

  function advance(done, total) {
    progress.hidden = false;
    progress.max = total;
    progress.value = done;
  }

  function run() {
    const classes = lines(names);
    const wrong = kind.value === "own" && (lines(custom).find((one) => one.split("{}").length !== 2) ?? (lines(custom).length ? null : "none"));
    if (wrong) return fail(new Error(`The template “${wrong}” needs exactly one {}, as in “a photo of a {}.”`));
    back.hidden = !(own && info.images);
    if (classes.length < 2 || !(own?.length || info.images)) {
      results = null;
      columns.replaceChildren();
      confusion.replaceChildren();
      take.hidden = code.hidden = true;
      summary.textContent = classes.length < 2 ? "Name two classes or more." : "Drop or choose pictures to be classified.";
      return undefined;
    }
    return ask(async (current) => {
      const asked = { classes, templates: templates() };
      if (own) {
        const all = [];
        for (let from = 0; from < own.length && current(); from += SENT) {
          const some = own.slice(from, from + SENT);
          const { predictions } = await backend.classify({ ...asked, images: some.map(({ features }) => ({ features })) });
          all.push(...predictions.map((one, i) => (
            { ...one, key: some[i].path, url: some[i].url, own_label: folderLabel(some[i].path, classes) })));
        }
        return all;
      }
      const all = [];
      const wanted = questions();
      for (const [i, images] of wanted.entries()) {
        if (!current()) break;
        advance(i, wanted.length);
        all.push(...(await backend.classify({ ...asked, images })).predictions);
      }
      return all;
    }, (predictions) => {
      shared.clearError();
      progress.hidden = true;
      results = { classes, predictions: predictions.map((one) => ({ ...one, share: Math.max(...one.probabilities) })) };
      draw();
    });
  }

  // The innermost folder that is called like a class.
  function folderLabel(path, classes) {
    const plain = (name) => name.toLowerCase().replace(/[\s_-]+/g, " ");
    const folders = path.split("/").slice(0, -1).reverse().map(plain);
    return folders.map((folder) => classes.find((name) => plain(name) === folder)).find(Boolean);
  }

  function draw() {
    const { classes, predictions } = results;
    const judged = predictions.filter((one) => classes.includes(one.own_label));
    const right = judged.filter((one) => one.own_label === one.label).length;
    summary.replaceChildren(
      `${count(predictions.length, "picture")} in ${count(classes.length, "class", "classes")}. `,
      judged.length ? el("b", {}, `${percent(right / judged.length)} as labelled`) : "",
      judged.length ? ` (${right.toLocaleString("en")} of ${judged.length.toLocaleString("en")} that have a label among these).` : "");
    columns.replaceChildren(...classes.map((name) => column(name, predictions.filter((one) => one.label === name))));
    confusion.replaceChildren(judged.length ? table(classes, judged) : "");
    take.hidden = false;
    code.hidden = true;
    announce(summary.textContent);
  }

  const announce = debounce(say, 700);

  function column(name, inside) {
    inside.sort((a, b) => b.share - a.share);
    const pictures = el("div", { class: "pile" }, inside.slice(0, SHOWN).map(small));
    const rest = inside.length - SHOWN;
    const all = rest > 0 && el("button", {
      type: "button", class: "button", onclick: () => { pictures.append(...inside.slice(SHOWN).map(small)); all.remove(); },
    }, `${rest.toLocaleString("en")} more`);
    return el("section", { class: "card column", "aria-label": `${name}: ${count(inside.length, "picture")}` },
      el("h2", {}, name, el("span", {}, inside.length.toLocaleString("en"))), pictures, all);
  }

  function small(one) {
    const wrong = results.classes.includes(one.own_label) && one.own_label !== one.label;
    const name = `${one.key}: ${one.label}, ${percent(one.share)}${wrong ? `; labelled ${one.own_label}` : ""}`;
    const image = picture(backend, { row: one.row, url: one.url, name });
    if (one.row === undefined) return el("span", { class: wrong ? "small wrong" : "small", title: name }, image);
    return el("button", {
      type: "button", class: wrong ? "small wrong" : "small", title: name,
      onclick: () => {
        const asked = new URLSearchParams({ img: one.row });
        for (const text of results.classes.slice(0, 12)) asked.append("t", text);
        go("match", asked);
      },
    }, image);
  }

  function table(classes, judged) {
    const cells = classes.map((label) => classes.map((found) => judged.filter((one) => one.own_label === label && one.label === found).length));
    return el("table", {},
      el("caption", {}, "Rows: the label. Columns: the class found."),
      el("thead", {}, el("tr", {}, el("td", {}), classes.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, classes.map((label, i) => {
        const total = cells[i].reduce((sum, n) => sum + n, 0);
        return el("tr", {}, el("th", { scope: "row" }, label), cells[i].map((n, j) => {
          const cell = el("td", { class: i === j ? "right" : n ? "off" : "" }, n.toLocaleString("en"));
          cell.style.setProperty("--share", total ? n / total : 0);
          return cell;
        }));
      })));
  }

  function download() {
    const quote = (value) => `"${String(value ?? "").replaceAll('"', '""')}"`;
    const rows = [["picture", "label", "own_label", ...results.classes.map((name) => `p(${name})`)]];
    for (const one of results.predictions) {
      rows.push([one.key, one.label, one.own_label, ...one.probabilities.map((share) => share.toFixed(6))]);
    }
    const file = new Blob([rows.map((row) => row.map(quote).join(",")).join("\n") + "\n"], { type: "text/csv" });
    const link = el("a", { href: URL.createObjectURL(file), download: "classified.csv" });
    link.click();
    URL.revokeObjectURL(link.href);
  }

  function python() {
    const chosen = templates();
    const list = (values) => `[${values.map((one) => JSON.stringify(one)).join(", ")}]`;
    const rows = amount.value === "all"
      ? ["rows = np.arange(len(store))"]
      : [`starts = np.arange(${PARTS}) * len(store) // ${PARTS}`, `rows = (starts[:, None] + np.arange(${amount.value / PARTS})).ravel()`];
    const head = [
      ...(own ? [] : ["import numpy as np", ""]),
      "import litune", "",
      `model = litune.load(${JSON.stringify(info.run)})`,
      `classes = ${list(results.classes)}`,
      `templates = ${list(Array.isArray(chosen) ? chosen : info.templates[chosen])}`,
      "classifier = model.zero_shot(classes, templates)",
    ];
    const body = own
      ? ["from pathlib import Path", "", 'pictures = sorted(p for p in Path("my-folder").rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))',
        "for picture, row in zip(pictures, classifier(pictures).tolist()):", "    print(picture, classes[row.index(max(row))], max(row))"]
      : ['store = litune.FeatureStore("my-features")  # the folder that litune embed wrote',
        ...rows,
        "probabilities = classifier.probabilities(model.encode_features(store.features(rows)))",
        'for key, row in zip(store.metadata["key"].take(rows).to_pylist(), probabilities.tolist()):', "    print(key, classes[row.index(max(row))], max(row))"];
    return [...head, ...body].join("\n") + "\n";
  }

  async function copy() {
    code.textContent = python();
    code.hidden = false;
    try {
      await navigator.clipboard.writeText(code.textContent);
      say("The Python is copied.");
    } catch {
      // No clipboard without HTTPS: it stands there to be selected.
      getSelection().selectAllChildren(code);
    }
  }

  // Before classes are named: the labels that the first pictures have, or some that most collections have.
  function example() {
    const labels = [...new Set(shared.some.map((one) => one.label).filter(Boolean))];
    return labels.length > 1 ? labels.slice(0, 8) : ["animal", "food", "vehicle", "smiling face", "flag"];
  }

  return {
    show(asked) {
      const wanted = asked.getAll("c");
      names.value = (wanted.length ? wanted : lines(names).length ? lines(names) : example()).join("\n");
      kind.value = asked.get("templates") ?? "auto";
      if (asked.getAll("as").length) custom.value = asked.getAll("as").join("\n");
      custom.hidden = kind.value !== "own";
      amount.value = asked.get("n") ?? amount.options[0].value;
      if (!amount.value) amount.selectedIndex = 0;
      run();
    },
  };
}
