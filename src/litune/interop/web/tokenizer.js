// A tokenizer.json in JavaScript, with the ids that the Python library `tokenizers` gives.

import { isAccent, isChinese, isControl, isPunctuation, isSpace } from "./unicode.js";

// Letter by letter: the rule for the last sigma of a Greek word is not in the Python library.
const lower = (text) => Array.from(text, (c) => c.toLowerCase()).join("");
const stripAccents = (text) => Array.from(text.normalize("NFD")).filter((c) => !isAccent(c)).join("");

function unknown(what, type, known) {
  const name = typeof type === "string" ? type : "none";
  return new Error(`the ${what} ${name} is not one of those that run in the browser: ${Object.keys(known).join(", ")}`);
}

function pick(known, what, config) {
  if (!(config?.type in known)) throw unknown(what, config?.type, known);
  return known[config.type](config);
}

// Normalizers: text to text.

const NORMALIZERS = {
  Sequence: (config) => {
    const steps = config.normalizers.map((one) => pick(NORMALIZERS, "normalizer", one));
    return (text) => steps.reduce((now, step) => step(now), text);
  },
  BertNormalizer: (config) => (text) => {
    let characters = Array.from(text);
    if (config.clean_text) {
      characters = characters.filter(
        (c) => c !== "\0" && c !== "\ufffd" && ("\t\n\r".includes(c) || !isControl(c)),
      ).map((c) => (isSpace(c) ? " " : c));
    }
    if (config.handle_chinese_chars) characters = characters.map((c) => (isChinese(c) ? ` ${c} ` : c));
    let found = characters.join("");
    if (config.strip_accents ?? config.lowercase) found = stripAccents(found);
    return config.lowercase ? lower(found) : found;
  },
  NFC: () => (text) => text.normalize("NFC"),
  NFD: () => (text) => text.normalize("NFD"),
  NFKC: () => (text) => text.normalize("NFKC"),
  NFKD: () => (text) => text.normalize("NFKD"),
  Lowercase: () => lower,
  StripAccents: () => (text) => Array.from(text).filter((c) => !isAccent(c)).join(""),
  Strip: (config) => (text) => {
    let characters = Array.from(text);
    const first = config.strip_left ? characters.findIndex((c) => !isSpace(c)) : 0;
    characters = first < 0 ? [] : characters.slice(first);
    const last = config.strip_right ? characters.findLastIndex((c) => !isSpace(c)) + 1 : characters.length;
    return characters.slice(0, last).join("");
  },
  Replace: (config) => {
    const { String: plain, Regex: pattern } = config.pattern;
    const what = pattern === undefined ? plain : new RegExp(pattern, "gu");
    return (text) => text.replaceAll(what, () => config.content);
  },
  Prepend: (config) => (text) => (text ? config.prepend + text : text),
  Precompiled: (config) => precompiled(config.precompiled_charsmap),
};

// SentencePiece's own table: a double-array trie over UTF-8 bytes, its values places in a list of replacements.
function precompiled(encoded) {
  const bytes = Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const size = view.getUint32(0, true);
  const units = new Uint32Array(bytes.slice(4, 4 + size).buffer);
  const replacements = bytes.subarray(4 + size);
  const encoder = new TextEncoder();
  const decoder = new TextDecoder();
  const offset = (unit) => (unit >>> 10) << ((unit & 512) >>> 6);

  const replacement = (key) => {
    let place = offset(units[0]);
    for (const byte of key) {
      if (byte === 0) return null;
      place ^= byte;
      const unit = units[place];
      if ((unit & 0x800000ff) >>> 0 !== byte) return null;
      place ^= offset(unit);
      if (unit & 256) {
        const start = units[place] & 0x7fffffff;
        return decoder.decode(replacements.subarray(start, replacements.indexOf(0, start)));
      }
    }
    return null;
  };
  const graphemes = new Intl.Segmenter("und", { granularity: "grapheme" });
  return (text) => {
    let found = "";
    for (const { segment } of graphemes.segment(text)) {
      const key = encoder.encode(segment);
      const whole = key.length < 6 ? replacement(key) : null;
      found += whole ?? Array.from(segment, (c) => replacement(encoder.encode(c)) ?? c).join("");
    }
    return found;
  };
}

// Pre-tokenizers: a text to its words; `first` says whether the text begins what was typed.

const WORDS = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]+|[^\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}\p{White_Space}]+/gu;
const GPT2 = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;

const PRE_TOKENIZERS = {
  Sequence: (config) => {
    const steps = config.pretokenizers.map((one) => pick(PRE_TOKENIZERS, "pre-tokenizer", one));
    return (text, first) =>
      steps.reduce((words, step) => words.flatMap((word, i) => step(word, first && i === 0)), [text]);
  },
  BertPreTokenizer: () => (text) => {
    const words = [];
    let word = "";
    const close = () => { if (word) words.push(word); word = ""; };
    for (const c of text) {
      if (isSpace(c)) close();
      else if (isPunctuation(c)) { close(); words.push(c); }
      else word += c;
    }
    close();
    return words;
  },
  Whitespace: () => (text) => text.match(WORDS) ?? [],
  WhitespaceSplit: () => (text) => text.split(/\p{White_Space}+/u).filter(Boolean),
  Split: ({ pattern, behavior, invert }) => {
    if (invert || !["Removed", "Isolated"].includes(behavior)) throw unknown("split", behavior, { Removed: 0, Isolated: 0 });
    const what = new RegExp(pattern.Regex ?? escape(pattern.String), "gu");
    return (text) => {
      const words = [];
      let done = 0;
      for (const match of text.matchAll(what)) {
        words.push(text.slice(done, match.index), behavior === "Isolated" ? match[0] : "");
        done = match.index + match[0].length;
      }
      return [...words, text.slice(done)].filter(Boolean);
    };
  },
  Metaspace: (config) => (text, first) => {
    const mark = config.replacement;
    const scheme = config.prepend_scheme ?? "always";
    let found = text.replaceAll(" ", mark);
    const wanted = scheme === "always" || (scheme === "first" && first);
    if (found && wanted && !found.startsWith(mark)) found = mark + found;
    if (config.split === false) return found ? [found] : [];
    return found.split(mark).map((part, i) => (i ? mark + part : part)).filter(Boolean);
  },
  ByteLevel: (config) => (text) => {
    const spaced = config.add_prefix_space && text && !text.startsWith(" ") ? ` ${text}` : text;
    const parts = (config.use_regex ?? true) ? (spaced.match(GPT2) ?? []) : [spaced];
    return parts.filter(Boolean).map((part) => Array.from(new TextEncoder().encode(part), (b) => BYTES[b]).join(""));
  },
};

// Byte-level vocabularies write each byte as a printable character.
const BYTES = (() => {
  const printable = (b) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let next = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCodePoint(printable(b) ? b : next++));
})();

// Models: a word to ids.

const MODELS = {
  WordPiece: ({ vocab, unk_token, continuing_subword_prefix: prefix, max_input_chars_per_word: longest }) => {
    const ids = new Map(Object.entries(vocab));
    return (word) => {
      const characters = Array.from(word);
      if (characters.length > longest) return [ids.get(unk_token)];
      const found = [];
      for (let start = 0; start < characters.length; ) {
        let end = characters.length;
        const piece = () => (start ? prefix : "") + characters.slice(start, end).join("");
        while (end > start && !ids.has(piece())) end--;
        if (end === start) return [ids.get(unk_token)];
        found.push(ids.get(piece()));
        start = end;
      }
      return found;
    };
  },

  BPE: (model) => {
    const ids = new Map(Object.entries(model.vocab));
    const ranks = new Map(model.merges.map((pair, rank) => [Array.isArray(pair) ? pair.join(" ") : pair, rank]));
    const unk = ids.get(model.unk_token);
    const [prefix, suffix] = [model.continuing_subword_prefix ?? "", model.end_of_word_suffix ?? ""];
    return (word) => {
      if (model.ignore_merges && ids.has(word)) return [ids.get(word)];
      const characters = Array.from(word);
      let pieces = [];
      characters.forEach((c, i) => {
        const piece = (i ? prefix : "") + c + (i === characters.length - 1 ? suffix : "");
        const bytes = model.byte_fallback ? byteTokens(c) : [];
        if (ids.has(piece)) pieces.push(piece);
        else if (bytes.length && bytes.every((b) => ids.has(b))) pieces.push(...bytes);
        else if (unk !== undefined && !(model.fuse_unk && pieces.at(-1) === null)) pieces.push(null);
      });
      for (;;) {
        let best = Infinity;
        let at = -1;
        for (let i = 0; i + 1 < pieces.length; i++) {
          const rank = pieces[i] === null || pieces[i + 1] === null ? undefined : ranks.get(`${pieces[i]} ${pieces[i + 1]}`);
          if (rank < best) [best, at] = [rank, i];
        }
        if (at < 0) return pieces.map((piece) => (piece === null ? unk : ids.get(piece)));
        pieces.splice(at, 2, pieces[at] + pieces[at + 1].slice(prefix.length));
      }
    };
  },

  // The most probable cut (Viterbi). A character that no piece begins with costs ten more than the rarest piece.
  Unigram: ({ vocab, unk_id, byte_fallback }) => {
    const ids = new Map(vocab.map(([piece], id) => [piece, id]));
    const scores = vocab.map(([, score]) => score);
    const longest = vocab.reduce((most, [piece]) => Math.max(most, Array.from(piece).length), 0);
    const penalty = scores.reduce((least, score) => Math.min(least, score), Infinity) - 10;
    return (word) => {
      const characters = Array.from(word);
      const best = Array.from({ length: characters.length + 1 }, () => ({ score: 0, start: -1, id: -1 }));
      const offer = (end, start, score, id) => {
        if (best[end].start < 0 || score > best[end].score) best[end] = { score, start, id };
      };
      for (let start = 0; start < characters.length; start++) {
        let piece = "";
        let single = false;
        for (let end = start + 1; end <= Math.min(start + longest, characters.length); end++) {
          piece += characters[end - 1];
          const id = ids.get(piece);
          if (id === undefined) continue;
          offer(end, start, scores[id] + best[start].score, id);
          single ||= end === start + 1;
        }
        if (!single) offer(start + 1, start, penalty + best[start].score, unk_id);
      }
      const found = [];
      for (let end = characters.length; end > 0; end = best[end].start) {
        const text = characters.slice(best[end].start, end).join("");
        if (best[end].id !== unk_id) found.push(text);
        else if (found.at(-1)?.unknown !== undefined) found.at(-1).unknown = text + found.at(-1).unknown;
        else found.push({ unknown: text });
      }
      return found.reverse().flatMap((one) => {
        if (one.unknown === undefined) return [ids.get(one)];
        const bytes = byte_fallback ? byteTokens(one.unknown).map((b) => ids.get(b)) : [undefined];
        return bytes.includes(undefined) ? [unk_id] : bytes;
      });
    };
  },
};

const byteTokens = (text) =>
  Array.from(new TextEncoder().encode(text), (b) => `<0x${b.toString(16).toUpperCase().padStart(2, "0")}>`);

// What comes before and after the pieces of one text, as ids.
function frame(config) {
  if (!config || config.type === "ByteLevel") return [[], []];
  if (config.type !== "TemplateProcessing") throw unknown("post-processor", config.type, { TemplateProcessing: 0 });
  const at = config.single.findIndex((part) => part.Sequence);
  const ids = (parts) => parts.flatMap((part) => config.special_tokens[part.SpecialToken.id].ids);
  return [ids(config.single.slice(0, at)), ids(config.single.slice(at + 1))];
}

const escape = (text) => text.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&");

// A function that cuts a text at added tokens: [text or the token's id, …]. Those that are longer win.
function addedTokens(tokens, spell) {
  const known = tokens.map((token) => [spell(token.content), token]).filter(([text]) => text);
  if (!known.length) return (text) => [text];
  const byText = new Map(known);
  const pattern = new RegExp(
    known.sort(([a], [b]) => b.length - a.length).map(([text, token]) => {
      const whole = token.single_word ? [String.raw`(?<![\p{L}\p{N}_])`, String.raw`(?![\p{L}\p{N}_])`] : ["", ""];
      const space = [token.lstrip, token.rstrip].map((wanted) => (wanted ? String.raw`\p{White_Space}*` : ""));
      return space[0] + whole[0] + `(?:${escape(text)})` + whole[1] + space[1];
    }).join("|"),
    "gu",
  );
  return (text) => {
    const parts = [];
    let done = 0;
    for (const match of text.matchAll(pattern)) {
      const token = byText.get(match[0]) ?? byText.get(match[0].trim());
      parts.push(text.slice(done, match.index), token.id);
      done = match.index + match[0].length;
    }
    parts.push(text.slice(done));
    return parts.filter((part) => part !== "");
  };
}

/** One tokenizer.json: `encode` gives the ids of a text, cut and framed, without padding. */
export class Tokenizer {
  constructor(config) {
    this.normalize = config.normalizer ? pick(NORMALIZERS, "normalizer", config.normalizer) : (text) => text;
    this.words = config.pre_tokenizer ? pick(PRE_TOKENIZERS, "pre-tokenizer", config.pre_tokenizer) : (text) => [text];
    this.model = pick(MODELS, "model", config.model);
    [this.before, this.after] = frame(config.post_processor);
    this.longest = config.truncation?.max_length ?? Infinity;
    this.pad = config.padding?.pad_id ?? 0;
    this.length = config.padding?.strategy?.Fixed ?? null;
    const added = config.added_tokens ?? [];
    this.asTyped = addedTokens(added.filter((token) => !token.normalized), (text) => text);
    this.asNormal = addedTokens(added.filter((token) => token.normalized), this.normalize);
  }

  encode(text) {
    const pieces = [];
    // As in Python, a lone half of a surrogate pair is no character.
    this.asTyped(text.toWellFormed()).forEach((part, i) => {
      if (typeof part === "number") return pieces.push(part);
      return this.asNormal(this.normalize(part)).forEach((inner, j) => {
        if (typeof inner === "number") return pieces.push(inner);
        for (const word of this.words(inner, i === 0 && j === 0)) pieces.push(...this.model(word));
      });
    });
    const room = this.longest - this.before.length - this.after.length;
    return [...this.before, ...pieces.slice(0, room), ...this.after];
  }

  /** N texts as a rectangle: `ids` and `mask` [N, T], row by row, padded on the right. */
  batch(texts) {
    const rows = texts.map((text) => this.encode(text));
    const width = this.length ?? Math.max(...rows.map((row) => row.length), 1);
    const ids = new BigInt64Array(rows.length * width).fill(BigInt(this.pad));
    const mask = new BigInt64Array(rows.length * width);
    rows.forEach((row, i) => row.forEach((id, j) => {
      ids[i * width + j] = BigInt(id);
      mask[i * width + j] = 1n;
    }));
    return { ids, mask, shape: [rows.length, width] };
  }
}
