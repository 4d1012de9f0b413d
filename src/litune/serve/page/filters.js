// Conditions on the pictures' metadata: those that hold, as chips, and a form to add one.

import { LONGEST, el } from "./dom.js";

const WAYS = {
  text: { "=": "is", "!=": "is not", "~": "contains" },
  number: { "=": "=", "!=": "≠", "<": "<", "<=": "≤", ">": ">", ">=": "≥" },
  truth: { "=": "is", "!=": "is not" },
};
const MOST = 16;

/** A button and a form under it; `change` is called when a condition was added or taken away. Both are absent where
 * the store has no column that could be asked for. */
export function filters({ backend, change }) {
  let where = [];
  let known = [];

  const chips = el("div", { class: "chips", role: "group", "aria-label": "Filters" });
  const column = el("select", { id: "filter-column", onchange: offer });
  const way = el("select", { id: "filter-way", "aria-label": "How it compares", onchange: offerValues });
  const place = el("span", { class: "value" });
  const form = el("form", { id: "filter-form", class: "filter", hidden: true, onsubmit: add, onkeydown: escape },
    el("label", { for: "filter-column" }, "Only where"), column, way, place,
    el("button", { type: "submit", class: "button" }, "Add"));
  const button = el("button", {
    type: "button", class: "button", hidden: true, "aria-expanded": "false", "aria-controls": "filter-form",
    onclick: () => open(form.hidden),
  }, "Filter");

  function open(wanted) {
    form.hidden = !wanted;
    button.setAttribute("aria-expanded", String(wanted));
    if (wanted) column.focus();
  }

  function escape(event) {
    if (event.key !== "Escape") return;
    open(false);
    button.focus();
  }

  const chosen = () => known.find((one) => one.name === column.value);
  const value = () => place.firstElementChild;

  function offer() {
    way.replaceChildren(...Object.entries(WAYS[chosen().kind]).map(([sign, name]) => el("option", { value: sign }, name)));
    if (chosen().kind === "text" && !chosen().values) way.value = "~";
    offerValues();
  }

  function offerValues() {
    const { kind, values, name } = chosen();
    const all = kind === "truth" ? ["true", "false"] : way.value === "~" ? null : values;
    const asked = { "aria-label": `Value of ${name}`, required: true };
    place.replaceChildren(all
      ? el("select", asked, all.map((one) => el("option", { value: one }, one)))
      : el("input", {
        ...asked, type: kind === "number" ? "number" : "text", step: "any", autocomplete: "off", spellcheck: false,
        maxLength: LONGEST.filter - name.length - 2,
      }));
  }

  function add(event) {
    event.preventDefault();
    const one = `${column.value}${way.value}${value().value}`;
    if (!value().value.trim() || where.length >= MOST) return;
    set([...where.filter((other) => other !== one), one]);
    if (value().tagName === "INPUT") value().value = "";
    change();
  }

  function set(wanted) {
    where = wanted.slice(0, MOST);
    chips.replaceChildren(...where.map((one) => el("span", { class: "chip" }, el("span", {}, one),
      el("button", {
        type: "button", class: "quiet", "aria-label": `Take away the filter ${one}`,
        onclick: () => { set(where.filter((other) => other !== one)); change(); button.focus(); },
      }, "×"))));
  }

  backend.columns().then(({ columns }) => {
    known = columns.filter((one) => !one.values || one.values.length > 1);
    known.sort((a, b) => !a.values - !b.values); // those to choose from come first
    button.hidden = !known.length;
    if (!known.length) return;
    column.replaceChildren(...known.map((one) => el("option", { value: one.name }, one.name)));
    offer();
  }, () => {});

  return { button, root: el("div", {}, chips, form), where: () => where, set };
}
