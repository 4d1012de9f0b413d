"""Shards as webdataset and img2dataset write them: tars in which the files of one sample lie behind each other.

Only headers, captions and metadata are read here; pictures are passed over and read in order when they are encoded.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from litune.errors import DataError
from litune.files import decode_text
from litune.pairs.address import folder_of, open_file, size_of
from litune.pairs.reference import BLOCK, Member, absolute, first_line
from litune.pairs.sample import (
    CAPTION_COLUMNS,
    IMAGE_SUFFIXES,
    MOST_TEXT,
    Damage,
    Options,
    Sample,
    SampleSource,
    captions_in,
    each,
    splits_of,
)
from litune.prompts import canonicalize

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_LONG_NAME, _HEADERS = tarfile.GNUTYPE_LONGNAME, (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
TEXTS = ("txt", "text", "caption")
"""The suffixes of captions."""
_ZEROS = bytes(BLOCK)
_PASSED_OVER = (tarfile.DIRTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)


def tar_source(shards: Sequence[str], options: Options) -> SampleSource:
    """The samples in tar shards, in the shards' order."""
    folder = folder_of(shards[0])
    splits = splits_of(shards)
    notes = Counter[str]()
    takes = ("image", "caption", "split", "lang")

    def read() -> Iterator[Sample | Damage]:
        for shard, name, split in zip(each(shards, "shards"), short_names(shards), splits, strict=True):
            yield from _read_shard(absolute(shard), name, split, options, notes)

    def about(_: int) -> str:
        return f"{len(shards):,} webdataset shard{'s' * (len(shards) > 1)} in {folder}"

    return SampleSource(about, read(), name=folder, files=len(shards), notes=notes, takes=takes)


def short_names(files: Sequence[str]) -> list[str]:
    """Names that tell files apart: the last part of their paths without the suffix, and folders where needed."""
    parts = [PurePosixPath(file).with_suffix("").parts for file in files]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(set(files)):
            break
    return names


def _read_shard(shard: str, name: str, split: str, options: Options, notes: Counter[str]) -> Iterator[Sample | Damage]:
    """The samples of one shard; where it can't be read at all, that. Counts pictures that stand beside another one."""
    good = bad = 0
    try:
        with open_file(shard) as file:
            for group in _samples(shard, file):
                if isinstance(group, Damage):
                    bad += 1
                    yield group
                    continue
                for key, files in _apart(*group, options.image_column):
                    good += 1
                    for suffix in _second_pictures(files, options.image_column):
                        notes[f"second pictures (.{suffix}) left out"] += 1
                    yield from _read_sample(file, f"{name}/{key}", files, split, options, notes)
            empty = size_of(file) == 0
    except FileNotFoundError:
        yield Damage(shard, "the shard does not exist", whole_file=True)
    except (OSError, DataError) as why:
        yield Damage(shard, f"the shard can't be read: {first_line(why)}", whole_file=True)
    else:
        if empty or (bad and not good):
            yield Damage(shard, "the shard is empty" if empty else "nothing in it can be read", whole_file=True)


def _samples(shard: str, file: BinaryIO) -> Iterator[tuple[str, dict[str, Member]] | Damage]:
    """Each sample's name and its files by suffix: members behind each other that are called the same."""
    key, files = "", dict[str, Member]()
    for one in members(shard, file):
        if isinstance(one, Damage):
            yield one
            continue
        match = _NAME.fullmatch(one.name)
        if match is None or match[1].rpartition("/")[2].startswith("__"):
            continue  # no file of a sample: a README, webdataset's own __meta__
        suffix = match[2].lower()
        if match[1] != key or suffix in files:
            if files:
                yield key, files
            key, files = match[1], {}
        files[suffix] = one
    if files:
        yield key, files


def _apart(key: str, files: dict[str, Member], wanted: str | None) -> Iterator[tuple[str, dict[str, Member]]]:
    """The samples in files that have one name up to its first dot: several, where pictures have further dots in theirs.

    2020.01.00.jpg and 2020.01.01.jpg are samples, each with its 2020.01.00.txt or all without texts. 0.left.jpg and
    0.right.jpg with one 0.txt are one sample.
    """
    groups: dict[str, dict[str, Member]] = {}
    for suffix, member in files.items():
        middle, _, last = suffix.rpartition(".")
        groups.setdefault(middle, {})[last] = member
    pictures = {middle for middle, group in groups.items() if find_picture(group, None)}
    alone = pictures - {""}
    if "" in pictures or groups.keys() - pictures:
        alone = {middle for middle in alone if groups[middle].keys() & set(TEXTS)}
    if len(pictures) < 2 or not alone or (wanted is not None and wanted.lstrip(".").lower() in files):
        yield key, files
        return
    if rest := {suffix: member for suffix, member in files.items() if suffix.rpartition(".")[0] not in alone}:
        yield key, rest
    for middle in sorted(alone, key=list(groups).index):
        yield f"{key}.{middle}", groups[middle]


def members(shard: str, file: BinaryIO) -> Iterator[Member | Damage]:
    """The regular files of a tar, in order, and what else stands where a file should.

    After a damaged part it goes on with the next header that is whole. Reads headers only, forwards.
    """
    length, at, long_name, long_size = size_of(file), 0, "", -1
    lost, said = -1, False  # where a damaged part begins, and whether that was reported already
    ended = True  # whether there were zeros last, the mark of a tar's end
    if length and (packed := _compressed(file)):
        raise DataError(f"it is compressed with {packed}: unpack it to a plain .tar first")
    while at < length:
        file.seek(at)
        block = file.read(BLOCK)
        try:
            header = None if block == _ZEROS else read_header(block)
        except (tarfile.HeaderError, ValueError, OverflowError):
            lost, ended = at if lost < 0 else lost, False
            at += BLOCK
            continue
        if lost >= 0 and not said:
            yield Damage(shard, f"bytes {lost:,} to {at:,} are no tar: what was there is lost")
        lost, said = -1, False
        data, ended = at + BLOCK, header is None
        if header is None:  # zeros: the end of this tar, or of one of several in a row
            at = data
            continue
        name, size, kind = header
        if kind == _LONG_NAME or kind in _HEADERS:
            if size <= MOST_TEXT:
                value = file.read(size)
                longer, larger = _long(value) if kind == _LONG_NAME else _extended(value)
                long_name, long_size = longer or long_name, larger if larger >= 0 else long_size
            at = data + _blocks(size)
            continue
        name, size = (long_name or name).removeprefix("./"), long_size if long_size >= 0 else size
        long_name, long_size = "", -1
        if kind in _PASSED_OVER:
            at = data + (_blocks(size) if kind != tarfile.DIRTYPE else 0)
            continue
        if kind in _KINDS:
            yield Damage(f"{shard}::{name}", f"it is {_KINDS[kind]}, not a file: never followed")
            at = data + (_blocks(size) if kind == tarfile.GNUTYPE_SPARSE else 0)
            continue
        if data + size > length:
            yield Damage(f"{shard}::{name}", f"the shard ends in the middle of it, at byte {length:,}")
            # A wrong length in a header that looks whole would hide all that follows: look on behind the header.
            at, said = data, True
            continue
        yield Member(shard, data, size, name)
        at = data + _blocks(size)
    if lost >= 0 and not said:
        yield Damage(shard, f"bytes {lost:,} to {length:,} are no tar: what was there is lost")
    elif not ended and not said:
        yield Damage(shard, f"the shard has no end: what was behind byte {length:,} is lost")


def read_header(block: bytes) -> tuple[str, int, bytes]:
    """The name, size and type in a tar's header, read here where it is plain, by Python's tarfile (slower) where not.

    Raises `ValueError` or `tarfile.HeaderError` where it is none.
    """
    stored = block[148:156]
    if len(block) == BLOCK and not block[345]:
        try:
            if sum(block) - sum(stored) + 8 * 32 == int(stored.strip(b" \0"), 8):
                name = block[:100].partition(b"\0")[0].decode("utf-8", "replace")
                return name, int(block[124:136].strip(b" \0") or b"0", 8), block[156:157]
        except ValueError:  # numbers in another form
            pass
    header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
    if not 0 <= header.size < 1 << 50:  # base-256 numbers can be negative, or beyond all disks
        raise tarfile.HeaderError("bad size")
    kind: Any = header.type
    return header.name, header.size, kind


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _compressed(file: BinaryIO) -> str:
    magic = file.read(6)
    kinds = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
    return next((kind for start, kind in kinds.items() if magic.startswith(start)), "")


def _long(value: bytes) -> tuple[str, int]:
    """GNU's way: the data is the next file's name."""
    return value.split(b"\0", 1)[0].decode("utf-8", "replace"), -1


def _extended(value: bytes) -> tuple[str, int]:
    """The name and size in a pax header's records (length, key=value); empty and −1 where it has none."""
    name, size, at = "", -1, 0
    while (match := re.compile(rb"(\d{1,9}) ").match(value, at)) and int(match[1]) > 0:
        key, _, text = value[match.end() : at + int(match[1]) - 1].partition(b"=")
        if key == b"path":
            name = text.decode("utf-8", "replace")
        elif key == b"size" and text.isdigit() and len(text) < 16:
            size = int(text)
        at += int(match[1])
    return name, size


def _read_sample(
    file: BinaryIO, key: str, files: dict[str, Member], split: str, options: Options, notes: Counter[str]
) -> Iterator[Sample | Damage]:
    picture = find_picture(files, options.image_column)
    if picture is None:
        wanted = f" .{options.image_column.lstrip('.')}" if options.image_column else ""
        yield Damage(key, f"the sample has no picture{wanted}, only .{', .'.join(files)}")
        return
    facts: dict[str, Any] = {}
    about = next((suffix for suffix in sorted(files, key=len) if suffix.rpartition(".")[2] == "json"), None)
    if about is not None:
        found = _load(_read_text(file, files[about]))
        if isinstance(found, Damage):
            yield Damage(key, f"{found.reason}: the sample is kept without it")
        else:
            facts = found
    texts: dict[str, Any] = {}
    for name in (*TEXTS, "cls", *(suffix for suffix in files if suffix.rpartition(".")[2] in TEXTS)):
        if name in files and name not in texts:
            data = _read_text(file, files[name])
            # What is no text is kept as its bytes, so that the check of all captions names it.
            texts[name] = None if data is None else captions_in(data, notes)
    label = texts.pop("cls", None)
    texts = _plain(texts, options, notes)
    label = label.strip() if isinstance(label, str) else facts.get("cls_name")
    yield Sample(
        key,
        key,
        str(files[picture]),
        pick_texts(texts, facts, options, label),
        facts.get(options.lang_column) or "",
        facts.get(options.split_column) or split,
        label,
        {name: facts[name] for name in options.kept if name in facts},
    )


def _plain(texts: dict[str, Any], options: Options, notes: Counter[str]) -> dict[str, Any]:
    """The texts of a sample, .txt before all others; where there are only .en.txt and .de.txt, all as one field."""
    further = [name for name in texts if "." in name]
    if options.caption_columns or not further:
        return texts
    if len(further) == len(texts):
        return {"txt": list(texts.values())}
    for name in further:
        notes[f"further texts (.{name}) left out"] += 1
    return texts


def pick_texts(texts: dict[str, Any], facts: dict[str, Any], options: Options, label: Any = None) -> dict[str, Any]:
    """The captions beside a picture: the text fields that were asked for, else its text file, else its metadata's."""
    there = {**facts, **texts}
    if options.caption_columns:
        return {name: there[name] for name in dict.fromkeys(options.caption_columns) if name in there}
    for name in (*texts, *CAPTION_COLUMNS):
        if there.get(name) is not None:
            return {name: there[name]}
    return {"label": canonicalize(label)} if isinstance(label, str) and label else {}


def find_picture(files: dict[str, Any], wanted: str | None) -> str | None:
    """The suffix of a sample's picture: the one that is wanted, else the plainest of a picture's."""
    if wanted is not None:
        return wanted.lstrip(".").lower() if wanted.lstrip(".").lower() in files else None
    pictures = [suffix for suffix in files if "." + suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
    return min(pictures, key=lambda suffix: suffix.count("."), default=None)


def _second_pictures(files: dict[str, Any], wanted: str | None) -> list[str]:
    """The suffixes of a sample's further pictures."""
    if wanted is not None:
        return []
    taken = find_picture(files, None)
    return [suffix for suffix in files if suffix != taken and "." + suffix.rpartition(".")[2] in IMAGE_SUFFIXES]


def _read_text(file: BinaryIO, member: Member) -> bytes | None:
    if member.size > MOST_TEXT:
        return None
    file.seek(member.offset)
    return file.read(member.size)


def _load(data: bytes | None) -> dict[str, Any] | Damage:
    """A sample's metadata."""
    if data is None:
        return Damage("", f"its .json has more than {MOST_TEXT:,} bytes")
    return load_facts(data)


def load_facts(data: bytes) -> dict[str, Any] | Damage:
    """JSON metadata beside a picture; or why there is none."""
    try:
        found = json.loads(decode_text(data))
    except (ValueError, RecursionError) as why:
        return Damage("", f"its .json can't be read ({first_line(why)})")
    return found if isinstance(found, dict) else Damage("", f"its .json holds a {type(found).__name__}, not an object")
