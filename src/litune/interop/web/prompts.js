// Class names and templates as prompts: what prompts.py does, for which the same golden cases are tested.

const PUNCTUATION = /[!"#$%&'()*+,\-./:;<=>?@[\\\]^_`{|}~]/g;
const SPACES = /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/; // Python's; \s differs

function canonicalize(text, keep) {
  const parts = text.replaceAll("_", " ").split(keep).map((part) => part.replace(PUNCTUATION, ""));
  return parts.join(keep).toLowerCase().split(SPACES).filter(Boolean).join(" ");
}

// A class name in canonical form with its commas, or as it is where nothing is left.
export const writeName = (name) => canonicalize(name, ",") || name;

// A template in canonical form with its {}.
export const writeTemplate = (template) => canonicalize(template, "{}");

// All prompts of the first name, then all of the second, …
export function writePrompts(names, templates) {
  const written = templates.map(writeTemplate);
  return names.flatMap((name) => written.map((one) => one.replace("{}", () => writeName(name))));
}
