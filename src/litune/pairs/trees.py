"""Trees of folders with pictures: classes, splits, texts beside pictures, and tables of captions in the folders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from litune.pairs.folders import read_file
from litune.pairs.outputs import is_output
from litune.pairs.sample import SPLITS, Damage, Options, Sample, SampleSource, count_passed_over, is_picture
from litune.pairs.tables import TABLE_SUFFIXES
from litune.prompts import canonicalize

Tree = Mapping[str, Sequence[str]]
"""The names of the files in each folder, by the folder's path from the tree's root ("" is the root itself)."""


def walk(root: Path, out: Path | None = None) -> dict[str, list[str]]:
    """The tree at a folder on this machine, without what is hidden, `out`, and what else litune wrote into it."""
    tree: dict[str, list[str]] = {}
    for place, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not is_output(Path(place, f), out))
        inside = Path(place).relative_to(root).as_posix()
        tree["" if inside == "." else inside] = sorted(names)
    return tree


def has_classes(tree: Tree) -> bool:
    """Whether there are pictures in folders of the root or of its splits, or anywhere below other pictures."""
    folders = _split_apart(_with_pictures(tree))
    return any(len(parts) == 1 for parts, _ in folders.values()) or ("" in folders and len(folders) > 1)


def has_splits(tree: Tree) -> bool:
    """Whether the folders at the top that have pictures are called as splits are."""
    return any(split for _, split in _split_apart(_with_pictures(tree)).values())


def tables_in(tree: Tree) -> list[str]:
    """The tables of captions in a tree's folders: metadata.csv and its like, or the one table of each split."""
    tables = [_join(inside, name) for inside in tree if inside for name in tree[inside] if _is_table(name)]
    metadata = [table for table in tables if PurePosixPath(table).stem.lower() == "metadata"]
    folders = [PurePosixPath(table).parent.as_posix() for table in tables]
    splits = all(folder.lower() in SPLITS for folder in folders) and len(set(folders)) == len(folders)
    return metadata or (tables if splits else [])


def tree_splits(files: Sequence[str]) -> list[str]:
    """The split of each file by the first folder on its path; empty where not all files are in such folders."""
    splits = [SPLITS.get(file.partition("/")[0].lower(), "") if "/" in file else "" for file in files]
    return splits if all(splits) else [""] * len(files)


def tree_source(root: str, tree: Tree, options: Options) -> SampleSource:
    """All pictures in a tree: with the texts beside them, where there are any, else with their folders as classes.

    Folders at the top that are all called as splits are (train, validation) are splits. A class is the first folder
    below them; pictures deeper in it are of that class, and those beside the classes of none.
    """
    folders = _split_apart(_with_pictures(tree))
    captioned = any(_has_texts(tree[inside]) for inside in folders)
    notes = Counter[str]()

    def read() -> Iterator[Sample | Damage]:
        for inside, (parts, split) in folders.items():
            names = set(tree[inside])
            for name in filter(is_picture, tree[inside]):
                key = _join(inside, name)
                if captioned or not parts:
                    for sample in read_file(f"{root}/{key}", key, names, options, notes):
                        yield _of_split(sample, split)
                else:
                    yield Sample(key, key, f"{root}/{key}", {"label": canonicalize(parts[0])}, "", split, parts[0])

    def about(count: int) -> str:
        splits = len({split for _, split in folders.values()} - {""})
        inside = f" of {splits:,} split{'s' * (splits > 1)}" if splits else ""
        if captioned:
            return f"a tree of {len(folders):,} folders{inside} with captions beside the images"
        return f"a tree of {len({parts[0] for parts, _ in folders.values() if parts}):,} class folders{inside}"

    passed_over = count_passed_over(name for names in tree.values() for name in names)
    takes = ("caption", "split", "lang") if captioned else ()
    return SampleSource(about, read(), name=root, passed_over=passed_over, notes=notes, takes=takes)


def _with_pictures(tree: Tree) -> list[str]:
    return [inside for inside in sorted(tree) if any(map(is_picture, tree[inside]))]


def _split_apart(folders: Sequence[str]) -> dict[str, tuple[tuple[str, ...], str]]:
    """For each folder its path below the split, and the split: "" where the folders at the top are no splits."""
    splits = all(tree_splits([f"{folder}/" for folder in folders if folder])) and any(folders)
    parts = {folder: PurePosixPath(folder).parts for folder in folders}
    return {f: (own[1:], SPLITS[own[0].lower()]) if splits and own else (own, "") for f, own in parts.items()}


def _of_split(sample: Sample | Damage, split: str) -> Sample | Damage:
    if isinstance(sample, Sample):
        sample.split = sample.split or split
    return sample


def _has_texts(names: Sequence[str]) -> bool:
    """Whether there is a text beside a picture in a folder."""
    texts = {PurePosixPath(name).stem for name in names if name.lower().endswith((".txt", ".json"))}
    return any(PurePosixPath(name).stem in texts for name in names if is_picture(name))


def _is_table(name: Any) -> bool:
    return PurePosixPath(name).suffix.lower() in TABLE_SUFFIXES and not name.startswith(".")


def _join(inside: str, name: str) -> str:
    return f"{inside}/{name}" if inside else name
