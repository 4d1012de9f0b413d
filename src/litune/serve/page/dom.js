// The few helpers that all panels share.

/** How many characters the server takes of a text, and of a filter. */
export const LONGEST = { text: 10000, filter: 300 };

/** An element: properties, `on…` listeners, `class`, `data`, `aria-…` and other attributes; then children. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "data") Object.assign(node.dataset, value);
    else if (name in node && !name.includes("-") && name !== "list") node[name] = value;
    else node.setAttribute(name === "class" ? "class" : name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** `work`, once calls to it have stopped for so many milliseconds. */
export function debounce(work, milliseconds) {
  let timer;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...given), milliseconds);
  };
}

/** Runs one question after the other and uses the answer to the latest alone, whatever order they come in. */
export function latest(fail) {
  let asked = 0;
  return async (work, use) => {
    const mine = ++asked;
    const current = () => mine === asked;
    try {
      const answer = await work(current);
      if (current()) use?.(answer);
    } catch (why) {
      if (current()) fail(why);
    }
  };
}

export const percent = (share) => `${(100 * share).toFixed(1)} %`;
export const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

/** A picture of the store, or one of the user's own; a grey tile with its name where it can't be shown. */
export function picture(backend, { row, url, name }, properties = {}) {
  const image = el("img", { alt: name ?? "", loading: "lazy", decoding: "async", draggable: false, ...properties });
  image.addEventListener("error", () => image.classList.add("missing"));
  if (url) image.src = url;
  else backend.picture(row).then((found) => { image.src = found; }, () => image.dispatchEvent(new Event("error")));
  return image;
}

/** A place to drop pictures on, with a button for those who can't: `use` gets [{file, path}]. */
export function dropZone({ text, folder = false, use, fail }) {
  const chosen = (list) => {
    const found = [...list].map((file) => ({ file, path: file.webkitRelativePath || file.name }));
    take(found);
  };
  const take = (found) => {
    const pictures = found.filter(({ file }) => file.type.startsWith("image/"));
    if (pictures.length) use(pictures);
    else if (found.length) fail(new Error(`${found[0].path} is not a picture: choose JPEG, PNG, WebP or GIF files.`));
  };
  const chooser = (label, folders) => {
    const input = el("input", { type: "file", accept: "image/*", multiple: folder, class: "unseen", "aria-label": label });
    if (folders) input.webkitdirectory = true;
    input.addEventListener("change", () => { chosen(input.files); input.value = ""; });
    return el("label", { class: "button" }, input, el("span", {}, label));
  };
  const zone = el(
    "div", { class: "drop" },
    el("p", {}, text),
    el("div", { class: "buttons" },
      folder && chooser("Choose a folder", true),
      chooser(folder ? "Choose pictures" : "Choose a picture", false)),
  );
  zone.addEventListener("dragover", (event) => { event.preventDefault(); zone.classList.add("over"); });
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", async (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    take(await dropped(event.dataTransfer));
  });
  return zone;
}

async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map((file) => ({ file, path: file.name }));
  return (await Promise.all(entries.map(walk))).flat();
}

async function walk(entry) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    return [{ file, path: entry.fullPath.replace(/^\//, "") }];
  }
  const reader = entry.createReader();
  const inside = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) break;
    inside.push(...some);
  }
  return (await Promise.all(inside.map(walk))).flat();
}
