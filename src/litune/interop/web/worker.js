// The model in the browser: answers what the server's API answers, from files beside the page.

import { decode, prepare } from "./pixels.js";
import { writeName, writePrompts } from "./prompts.js";
import { Tokenizer } from "./tokenizer.js";

const KEPT = 4000; // text features that are remembered
const BATCH = 32;

let ort, about, images, features, tokenizer, textSession, imageSession;
const known = new Map();

async function open(name) {
  const response = await fetch(new URL(`../../data/${name}`, import.meta.url));
  if (!response.ok) throw new Error(`data/${name} can't be read (${response.status}): put the whole export in place`);
  return response;
}

const file = async (name, kind) => (await open(name))[kind]();

// A large file, with word of how much of it is there.
async function largeFile(name) {
  const response = await open(name);
  const total = Number(response.headers.get("content-length"));
  const parts = [];
  let got = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return new Uint8Array(await new Blob(parts).arrayBuffer());
    parts.push(value);
    got += value.length;
    self.postMessage({ progress: { got, total: Math.max(total, got) } });
  }
}

// Messages are answered in turn, so that two never run the model at once.
const CALLS = { model: start, columns, images: list, encodeImages, match, classify, search, textFeatures };
let turn = Promise.resolve();
self.onmessage = ({ data: { id, call, body } }) => {
  turn = turn.then(async () => {
    try {
      self.postMessage({ id, result: await CALLS[call](body) });
    } catch (why) {
      self.postMessage({ id, error: why.message });
    }
  });
};

async function start() {
  if (about) return about.page;
  const [found, table, vocabulary, halves] = await Promise.all([
    file("model.json", "json"), file("images.json", "json"), file("tokenizer.json", "json"), file("features.f16", "arrayBuffer"),
  ]);
  images = table;
  tokenizer = new Tokenizer(vocabulary);
  features = widen(new Uint16Array(halves));
  ort = await import("./ort.wasm.bundle.min.mjs");
  ort.env.wasm.numThreads = 1; // more would need headers that plain file servers don't send
  ort.env.wasm.wasmPaths = { wasm: new URL("ort-wasm-simd-threaded.wasm", import.meta.url).href };
  ort.env.logLevel = "error";
  textSession = await ort.InferenceSession.create(await largeFile(found.text_file));
  about = found;
  return about.page;
}

// Half-precision numbers as float32, by a table of all of them.
function widen(halves) {
  const table = new Float32Array(1 << 16);
  for (let bits = 0; bits < 1 << 16; bits++) {
    const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
    table[bits] = sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
  }
  return Float32Array.from(halves, (bits) => table[bits]);
}

// Features of texts, each text encoded once.
async function encode(texts) {
  const dim = about.page.dim;
  const fresh = [...new Set(texts)].filter((text) => !known.has(text));
  for (let from = 0; from < fresh.length; from += BATCH) {
    const part = fresh.slice(from, from + BATCH);
    const { ids, mask, shape } = tokenizer.batch(part);
    const feed = { input_ids: new ort.Tensor("int64", ids, shape) };
    if (textSession.inputNames.includes("attention_mask")) feed.attention_mask = new ort.Tensor("int64", mask, shape);
    const { data } = (await textSession.run(feed)).features;
    part.forEach((text, i) => known.set(text, data.slice(i * dim, (i + 1) * dim)));
  }
  const found = texts.map((text) => known.get(text));
  for (const text of known.keys()) {
    if (known.size <= KEPT) break;
    known.delete(text);
  }
  return found;
}

async function textFeatures({ texts }) {
  return { features: (await encode(texts)).map((one) => Array.from(one)) };
}

async function encodeImages({ files }) {
  if (!about.image) throw new Error("this page was exported without its image tower: export it --with-image-tower");
  imageSession ??= await ort.InferenceSession.create(await largeFile("image.onnx"));
  const found = [];
  for (const one of files) {
    const pixels = new ort.Tensor("float32", prepare(await decode(one), about.image), [1, 3, ...about.image.size]);
    found.push(Array.from((await imageSession.run({ pixels })).features.data));
  }
  return { features: found, names: files.map((one) => one.name) };
}

function vector({ row, features: given }) {
  if (row === undefined) return given;
  if (row >= about.page.images) throw new Error(`There is no row ${row}: they go from 0 to ${about.page.images - 1}.`);
  return features.subarray(row * about.page.dim, (row + 1) * about.page.dim);
}

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

function unit(values) {
  const length = Math.sqrt(dot(values, values)) + 1e-8;
  return values.map((value) => value / length);
}

// Probabilities out of cosines, with the temperature that the run has learned.
function softmax(cosines) {
  const most = Math.max(...cosines);
  const powers = cosines.map((one) => Math.exp(about.page.temperature * (one - most)));
  const sum = powers.reduce((total, one) => total + one, 0);
  return powers.map((one) => one / sum);
}

async function match({ images: refs, texts }) {
  const towards = await encode(texts);
  const cosines = refs.map((ref) => towards.map((text) => dot(vector(ref), text)));
  return { cosines, probabilities: cosines.map(softmax) };
}

async function classify({ images: which, classes, templates = "auto" }) {
  const chosen = Array.isArray(templates) ? templates : about.page.templates[templates];
  const read = new Map();
  for (const name of classes) {
    const alike = read.get(writeName(name));
    if (alike !== undefined) throw new Error(`Classes has “${name}” beside “${alike}”, which is read alike: leave one of them out.`);
    read.set(writeName(name), name);
  }
  const encoded = await encode(writePrompts(classes, chosen));
  const weights = classes.map((_, c) => {
    const mean = new Float64Array(about.page.dim);
    for (const one of encoded.slice(c * chosen.length, (c + 1) * chosen.length)) one.forEach((v, d) => { mean[d] += v / chosen.length; });
    return unit(mean);
  });
  const predictions = rows(which).map((ref) => {
    const probabilities = softmax(weights.map((weight) => dot(weight, vector(ref))));
    const label = classes[probabilities.indexOf(Math.max(...probabilities))];
    const own = ref.row === undefined ? undefined : images.labels?.[ref.row];
    return { ...describe(ref), label, ...(own == null ? {} : { own_label: own }), probabilities };
  });
  return { classes, predictions };
}

function rows(which) {
  if (Array.isArray(which)) return which.map((ref, index) => (ref.row === undefined ? { ...ref, index } : ref));
  const { offset = 0, limit = Infinity } = which === "all" ? {} : which;
  const count = Math.max(Math.min(limit, about.page.images - offset), 0);
  return Array.from({ length: count }, (_, i) => ({ row: offset + i }));
}

const describe = ({ row, index }) => (row === undefined ? { index } : { row, key: images.keys[row] });

async function search({ text, image, text_weight = 1, image_weight = 1, top = 24, offset = 0, where = [] }) {
  const query = new Float64Array(about.page.dim);
  if (text) (await encode([text]))[0].forEach((v, d) => { query[d] += text_weight * v; });
  if (image) vector(image).forEach((v, d) => { query[d] += image_weight * v; });
  const towards = unit(query);
  const scores = Float64Array.from({ length: about.page.images }, (_, row) => dot(vector({ row }), towards));
  const order = Uint32Array.from(rowsWhere(where)).sort((a, b) => scores[b] - scores[a] || a - b);
  const found = Array.from(order.subarray(offset, offset + top), (row) => ({
    row, key: images.keys[row], score: scores[row], captions: images.captions[row],
  }));
  return { found };
}

async function list({ offset = 0, limit = 50, where = [] }) {
  const all = rowsWhere(where);
  const found = all.slice(offset, offset + limit).map((row) => ({
    row, key: images.keys[row], captions: images.captions[row], label: images.labels?.[row] ?? null,
  }));
  return { images: found, total: all.length };
}

// Conditions, as the server's: COLUMN OPERATOR VALUE. Every column here is of texts, or of lists of them.

const FEW = 100; // so many values can be listed to choose from
const table = () => ({ key: images.keys, captions: images.captions, ...(images.labels ? { label: images.labels } : {}) });
const COMPARE = {
  "=": (one, value) => one === value,
  "<": (one, value) => one < value,
  "<=": (one, value) => one <= value,
  ">": (one, value) => one > value,
  ">=": (one, value) => one >= value,
  "~": (one, value) => one.toLowerCase().includes(value.toLowerCase()),
};

async function columns() {
  const found = Object.entries(table()).map(([name, column]) => {
    const values = [...new Set(column.flat())].filter((one) => one != null).sort();
    return { name, kind: "text", values: values.length > FEW ? null : values };
  });
  return { columns: found };
}

function rowsWhere(where) {
  const checks = where.map((text) => {
    const [, name, op, value] = /^\s*([^=!<>~]*?)\s*(==|!=|<=|>=|=|<|>|~)\s*(.*?)\s*$/s.exec(text) ?? [];
    if (!name) throw new Error(`The filter “${text}” can't be read: write COLUMN OPERATOR VALUE, as in label=cat.`);
    const column = table()[name];
    if (!column) throw new Error(`The filter “${text}” names no column: there are ${Object.keys(table()).join(", ")}.`);
    const values = (row) => (Array.isArray(column[row]) ? column[row] : [column[row]].filter((one) => one != null));
    if (op === "!=") return (row) => column[row] != null && !values(row).includes(value);
    return (row) => values(row).some((one) => COMPARE[op === "==" ? "=" : op](one, value));
  });
  return Array.from({ length: about.page.images }, (_, row) => row).filter((row) => checks.every((check) => check(row)));
}
