// The page's questions, asked of the server that the page came from.

export const where = "on the server that this page comes from";

const pictures = new Map();
let token = sessionStorage.getItem("litune-token") ?? "";
let askForToken = async () => "";
let asking = null;

/** Who is asked when the server wants a token: a function that resolves to one, "" if there is none. */
export function onToken(ask) {
  askForToken = ask;
}

async function call(path, options = {}) {
  const sent = token;
  const headers = { ...options.headers, ...(sent ? { Authorization: `Bearer ${sent}` } : {}) };
  let response;
  try {
    response = await fetch(new URL(`../v1/${path}`, import.meta.url), { ...options, headers });
  } catch (why) {
    if (why.name === "AbortError") throw why;
    throw new Error("The server does not answer. Is it still running?");
  }
  if (response.status === 401) {
    // Several questions may be refused at once; one answer is for all.
    asking ??= askForToken(Boolean(sent)).finally(() => { asking = null; });
    if (sent === token) token = await asking;
    if (!token) throw new Error("The server asks for a token: reload the page to give it.");
    sessionStorage.setItem("litune-token", token);
    return call(path, options);
  }
  if (!response.ok) {
    const { error } = await response.json().catch(() => ({}));
    const line = error ? error.message : `the server answered ${response.status}`;
    throw new Error(`${line[0].toUpperCase()}${line.slice(1)}.`);
  }
  return response;
}

const get = async (path) => (await call(path)).json();
const post = async (path, body) =>
  (await call(path, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } })).json();

export const model = () => get("model");
export const columns = () => get("columns");
export const images = ({ offset, limit, where = [] }) =>
  get(`images?${new URLSearchParams([["offset", offset], ["limit", limit], ...where.map((one) => ["where", one])])}`);
export const match = (body) => post("match", body);
export const classify = (body) => post("classify", body);
export const search = (body) => post("search", body);

export async function encodeImages(files) {
  const form = new FormData();
  for (const file of files) form.append("images", file, file.name);
  return (await call("encode/image", { method: "POST", body: form })).json();
}

/** The address of a small picture of the store. A picture's own request carries no token, so that is done here. */
export async function picture(row) {
  const path = `images/${row}/picture?size=256`;
  if (!token) return new URL(`../v1/${path}`, import.meta.url).href;
  if (!pictures.has(row)) pictures.set(row, call(path).then((found) => found.blob()).then(URL.createObjectURL));
  return pictures.get(row);
}
