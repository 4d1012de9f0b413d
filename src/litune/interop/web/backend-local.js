// The page's questions answered in the browser itself, by a worker beside it: nothing leaves the machine.

const worker = new Worker(new URL("local/worker.js", import.meta.url), { type: "module" });
const waiting = new Map();
let last = 0;

let tell = () => {};

/** Who is told how much of a large file is there: {got, total} in bytes. */
export function onProgress(listener) {
  tell = listener;
}

worker.onmessage = ({ data: { id, result, error, progress } }) => {
  if (progress) return tell(progress);
  const [resolve, reject] = waiting.get(id);
  waiting.delete(id);
  return error === undefined ? resolve(result) : reject(new Error(error));
};
worker.onerror = (event) => {
  event.preventDefault();
  for (const [, reject] of waiting.values()) {
    reject(new Error(`the model can't run in this browser: ${event.message ?? "a module worker can't be started"}`));
  }
  waiting.clear();
};

function ask(call, body = {}) {
  return new Promise((resolve, reject) => {
    waiting.set(++last, [resolve, reject]);
    worker.postMessage({ id: last, call, body });
  });
}

export const where = "in this browser: nothing you type or choose leaves your machine";
export const model = () => ask("model");
export const columns = () => ask("columns");
export const images = (range) => ask("images", range);
export const encodeImages = (files) => ask("encodeImages", { files });
export const match = (body) => ask("match", body);
export const classify = (body) => ask("classify", body);
export const search = (body) => ask("search", body);
export const textFeatures = (texts) => ask("textFeatures", { texts });
export const picture = async (row) => new URL(`../data/pictures/${row}.jpg`, import.meta.url).href;
