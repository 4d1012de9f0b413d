"""Which images of one or several stores are read, with which of their captions: by split, language, field; held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from litune.config import TuneConfig
from litune.errors import ConfigError, StoreError, nearest
from litune.image.tower import check_same_tower
from litune.pairs.sample import find_split
from litune.progress import say
from litune.store.captions import Captions, blocks, hash_digests, integers, join_texts, offsets_of
from litune.store.text_shards import Images, read_texts

if TYPE_CHECKING:
    from litune.store.store import FeatureStore

T = TypeVar("T")
HOLDOUT_MOST = 1000


class Selection:
    """Some of a store's images, with some of their captions.

    Captions stay where they are, in one Arrow array for all selections of a store: a selection is numbers.
    """

    def __init__(
        self, store: FeatureStore, rows: np.ndarray, captions: Captions, picks: np.ndarray | None, offsets: np.ndarray
    ) -> None:
        """Rows [n] of the store; `picks` [C] are their captions' places in `captions.texts`, None for all of them.

        Image i's captions are those from `offsets[i]` to `offsets[i + 1]`.
        """
        self.store, self.rows, self.offsets = store, rows, offsets
        self._captions, self._picks = captions, picks

    @classmethod
    def of(cls, store: FeatureStore, rows: np.ndarray, captions: Captions, keep: np.ndarray | None) -> Selection:
        """Those of the rows that have a caption; where `keep` [C] is given, only with the captions that it marks."""
        first, last = captions.offsets[rows], captions.offsets[rows + 1]
        if keep is None:
            counts = last - first
        else:
            marked = np.concatenate([[0], np.cumsum(keep)])
            counts = marked[last] - marked[first]
        there = counts > 0
        whole = len(rows) == len(captions.offsets) - 1 and bool((np.diff(rows) > 0).all())
        if keep is None and there.all() and whole:
            return cls(store, rows, captions, None, captions.offsets)
        rows, first, last = rows[there], first[there], last[there]
        picks = ranges(first, last - first)
        if keep is not None:
            picks = picks[keep[picks]]
        return cls(store, rows, captions, picks.astype(integers(len(captions.texts))), offsets_of(counts[there]))

    @property
    def sources(self) -> Sequence[Selection]:
        """The selections that this one is put together from, each of one store: this one alone."""
        return (self,)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def keys(self) -> list[str]:
        """The images' names, as their source has them."""
        return self._values("key")

    @property
    def image_files(self) -> list[str]:
        """The images' files."""
        return self._values("image_path")

    def _values(self, name: str) -> list[str]:
        column = self.column(name)
        assert column is not None  # of these two, every store has one
        values: list[str] = column.cast(pa.string()).to_pylist()
        return values

    def column(self, name: str) -> pa.Array | None:
        """A column of the metadata, one value per image; None where the store has none of that name."""
        whole = self.store.column(name)
        if whole is None:
            return None
        if pa.types.is_string(whole.type) and whole.nbytes >= 2**31:
            whole = whole.cast(pa.large_string())
        return whole.take(pa.array(self.rows)).combine_chunks()

    def image_hashes(self) -> np.ndarray | None:
        """Numbers that are equal for equal image files, [n]; None where the store does not have their hashes."""
        if "sha256" not in self.store.column_names:
            return None
        hashes = []
        for chunk in self.store.column_chunks("sha256"):
            if chunk.null_count:
                return None
            hashes.append(hash_digests(chunk))
        numbers: np.ndarray = np.concatenate(hashes)
        whole = self._picks is None and len(self) == len(self.store)
        return numbers if whole else numbers[self.rows]

    def also_in(self, other: Selection) -> np.ndarray:
        """The positions of the images whose files are equal to one of the other selection's, by their hashes."""
        ours, theirs = self.image_hashes(), other.image_hashes()
        if ours is None or theirs is None or not len(theirs):
            return np.zeros(0, np.int64)
        theirs = np.sort(theirs)
        place = np.minimum(np.searchsorted(theirs, ours), len(theirs) - 1)
        return np.flatnonzero((theirs[place] == ours) & (ours >= 0))  # below 0: without a hash

    @property
    def caption_array(self) -> pa.Array:
        """All captions, image by image."""
        texts = self._captions.texts
        return texts if self._picks is None else texts.take(pa.array(self._picks))

    def take_captions(self, numbers: np.ndarray) -> pa.Array:
        """The captions with these numbers in the selection, in this order. Raises `IndexError` for one it lacks."""
        check_range(numbers, int(self.offsets[-1]), "captions")
        places = numbers if self._picks is None else self._picks[numbers]
        return self._captions.texts.take(pa.array(places))

    def iterate_captions(self) -> Iterator[str]:
        """All captions, image by image, few in memory at a time."""
        return chain.from_iterable(blocks(self, int(self.offsets[-1])))

    @property
    def captions(self) -> list[str]:
        """All captions, image by image."""
        texts: list[str] = self.caption_array.to_pylist()
        return texts

    @property
    def langs(self) -> list[str] | None:
        """For each of `captions`, its language; None where the store does not know them."""
        return self._labels("langs")

    @property
    def fields(self) -> list[str]:
        """For each of `captions`, the text field that it is of."""
        labels = self._labels("fields")
        if labels is None:
            raise StoreError(f"{self.store.path} has one text field: embed with several --caption-column")
        return labels

    def _labels(self, name: str) -> list[str] | None:
        of_all = self._captions.labels(name)
        if of_all is None:
            return None
        labels: list[str] = (of_all if self._picks is None else of_all.take(pa.array(self._picks))).to_pylist()
        return labels

    def of_field(self, name: str) -> np.ndarray:
        """The numbers of the captions that are of this text field."""
        of_all = self._captions.labels("fields")
        if of_all is None or name not in (known := of_all.dictionary.to_pylist()):
            return np.zeros(0, np.int64)
        codes = of_all.indices.fill_null(-1).to_numpy()
        codes = codes if self._picks is None else codes[self._picks]
        return np.flatnonzero(codes == known.index(name))

    @property
    def owner(self) -> np.ndarray:
        """For each of `captions`, the position of its image in this selection."""
        return np.repeat(np.arange(len(self)), self.counts)

    @property
    def counts(self) -> np.ndarray:
        """The number of captions of each image."""
        return np.diff(self.offsets)

    def subset(self, positions: np.ndarray) -> Selection:
        """The images at these positions of the selection. Raises `IndexError` for one it lacks."""
        check_range(positions, len(self), "images")
        counts = self.offsets[positions + 1] - self.offsets[positions]
        numbers = ranges(self.offsets[positions], counts)
        picks = numbers if self._picks is None else self._picks[numbers]
        picks = picks.astype(integers(len(self._captions.texts)))
        return Selection(self.store, self.rows[positions], self._captions, picks, offsets_of(counts))

    def features(self, positions: np.ndarray | None = None) -> np.ndarray:
        """Raw float32 features of the images at these positions (all by default); `IndexError` for one it lacks."""
        if positions is not None:
            check_range(positions, len(self), "images")
        return self.store.features(self.rows if positions is None else self.rows[positions])

    def touch(self, positions: np.ndarray) -> None:
        """Have the system read these images' features into memory, so that `features` need not wait for the disk."""
        self.store.touch(self.rows[positions])

    def read_ahead(self, blocks: Sequence[range]) -> None:
        """Have the system begin to read blocks of neighbouring images."""
        for block in blocks:
            self.store.read_ahead(int(self.rows[block[0]]), int(self.rows[block[-1]]) + 1)

    def blocks(self) -> Iterator[np.ndarray]:
        """`features` of all images, block by block: flat memory."""
        return self.store.blocks(self.rows)


class Mixture(Selection):
    """Images of several stores: those of the first, then those of the second, and so on. Nothing is copied."""

    def __init__(self, sources: Sequence[Selection]) -> None:
        self._sources = tuple(sources)
        self.store = known_store([source.store for source in sources])
        self.starts = np.cumsum([0, *map(len, sources)])
        self.caption_starts = np.cumsum([0, *(int(source.offsets[-1]) for source in sources)])
        ends = [source.offsets[1:] + start for source, start in zip(sources, self.caption_starts, strict=False)]
        self.offsets = np.concatenate([[0], *ends])

    @property
    def sources(self) -> Sequence[Selection]:
        """The selections that this one is put together from, each of one store."""
        return self._sources

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def keys(self) -> list[str]:
        """The images' names, as their sources have them."""
        return list(chain.from_iterable(source.keys for source in self._sources))

    @property
    def image_files(self) -> list[str]:
        """The images' files."""
        return list(chain.from_iterable(source.image_files for source in self._sources))

    def image_hashes(self) -> np.ndarray | None:
        """Numbers that are equal for equal image files; an image without a hash is equal to none."""
        of_sources = [source.image_hashes() for source in self._sources]
        if all(hashes is None for hashes in of_sources):
            return None
        return np.concatenate(
            [
                -1 - np.arange(first, last) if hashes is None else hashes  # hashes are 0 or more
                for hashes, first, last in zip(of_sources, self.starts, self.starts[1:], strict=False)
            ]
        )

    @property
    def caption_array(self) -> pa.Array:
        """All captions, image by image."""
        return pa.concat_arrays([source.caption_array for source in self._sources])

    def take_captions(self, numbers: np.ndarray) -> pa.Array:
        """The captions with these numbers, in this order."""
        order, parts = self._parts(numbers, self.caption_starts, lambda source, own: source.take_captions(own))
        return pa.concat_arrays([*parts, pa.array([], pa.large_string())]).take(pa.array(np.argsort(order)))

    @property
    def fields(self) -> list[str]:
        """For each caption, the text field that it is of."""
        return list(chain.from_iterable(source.fields for source in self._sources))

    def of_field(self, name: str) -> np.ndarray:
        """The numbers of the captions that are of this text field."""
        parts = zip(self._sources, self.caption_starts, strict=False)
        return np.concatenate([source.of_field(name) + start for source, start in parts])

    def features(self, positions: np.ndarray | None = None) -> np.ndarray:
        """Raw float32 features of the images at these positions (all by default)."""
        if positions is None:
            return np.concatenate([source.features() for source in self._sources])
        features = np.empty((len(positions), self.store.width), np.float32)
        order, parts = self._parts(positions, self.starts, lambda source, own: source.features(own))
        if parts:
            features[order] = np.concatenate(parts)
        return features

    def touch(self, positions: np.ndarray) -> None:
        """Have the system read these images' features into memory."""
        self._parts(positions, self.starts, lambda source, own: source.touch(own))

    def read_ahead(self, blocks: Sequence[range]) -> None:
        """Have the system begin to read blocks of neighbouring images."""
        for source, first, last in zip(self._sources, self.starts, self.starts[1:], strict=False):
            own = [range(max(block.start - first, 0), min(block.stop, last) - first) for block in blocks]
            source.read_ahead([block for block in own if block])

    def blocks(self) -> Iterator[np.ndarray]:
        """`features` of all images, block by block: flat memory."""
        return chain.from_iterable(source.blocks() for source in self._sources)

    def subset(self, positions: np.ndarray) -> Mixture:
        """The images at these positions, which must be in ascending order. Raises `IndexError` for one it lacks."""
        check_range(positions, len(self), "images")
        cuts = np.searchsorted(positions, self.starts)
        return Mixture(
            [
                source.subset(positions[begin:end] - first)
                for source, first, begin, end in zip(self._sources, self.starts, cuts, cuts[1:], strict=False)
            ]
        )

    def _parts(
        self, numbers: np.ndarray, starts: np.ndarray, take: Callable[[Selection, np.ndarray], T]
    ) -> tuple[np.ndarray, list[T]]:
        """What each source gives for those of the numbers that are its own; and which of the numbers they are.

        Raises `IndexError` for a number that none has.
        """
        check_range(numbers, int(starts[-1]), "captions" if starts is self.caption_starts else "images")
        owners = np.searchsorted(starts, numbers, "right") - 1
        order = np.argsort(owners, kind="stable")
        cuts = np.searchsorted(owners[order], np.arange(len(starts)))
        parts = []
        for source, start, begin, end in zip(self._sources, starts, cuts, cuts[1:], strict=False):
            if end > begin:
                parts.append(take(source, numbers[order[begin:end]] - start))
        return order, parts


def select(
    store: FeatureStore,
    split: str | None = None,
    lang: Sequence[str] = (),
    fields: Sequence[str] = (),
    captions: Captions | None = None,
) -> Selection:
    """The images of a split that have captions, with their captions in these languages and of these text fields.

    `captions` stand in for those of the store. Raises `StoreError` where there is no such split, language, field
    or caption.
    """
    missing, remedy = "captions", "embed its images with a table of captions"
    if captions is None:
        captions = store.captions
    else:
        missing, remedy = "texts for its images", "give --texts of this store"
    keep = np.ones(len(captions.texts), dtype=bool)
    rows = rows_of_split(store, split)
    if lang:
        keep &= _labelled(store, captions, lang, "langs")
    if fields:
        keep &= _labelled(store, captions, fields, "fields")
    selection = Selection.of(store, rows, captions, None if keep.all() else keep)
    if not len(selection):
        raise StoreError(f"{store.path} has no {missing}: {remedy}")
    return selection


def rows_of_split(store: FeatureStore, split: str | None) -> np.ndarray:
    """The rows of a store that are of a split, all for None. Raises `StoreError` for a split that there is not."""
    rows = np.arange(len(store), dtype=integers(len(store)))
    if split is None:
        return rows
    if "split" not in store.column_names:
        raise StoreError(f"{store.path} has no splits, {split!r} was asked for: embed with a split column")
    named = find_split(split, store.splits)
    if named is None:
        raise StoreError(f"{store.path} has no split {split!r} ({nearest(split, store.splits)})")
    chunks = (chunk.cast(pa.string()) for chunk in store.column_chunks("split"))
    of_split = [pc.equal(chunk, named).fill_null(False).to_numpy(zero_copy_only=False) for chunk in chunks]
    selected: np.ndarray = rows[np.concatenate(of_split)]
    return selected


def _labelled(store: FeatureStore, captions: Captions, names: Sequence[str], label: str) -> np.ndarray:
    """Which captions have one of these labels, [C]. Raises `StoreError` for a label that none has."""
    of_captions = captions.labels(label)
    if of_captions is None:
        lacks, remedy = {
            "langs": ("no languages", "a lang column"),
            "fields": ("one text field", "several --caption-column"),
        }[label]
        raise StoreError(f"{store.path} has {lacks}, {', '.join(names)} asked for: embed with {remedy}")
    known = of_captions.dictionary.to_pylist()
    for name in names:
        if name not in known:
            missing = "captions in" if label == "langs" else "text field"
            raise StoreError(f"{store.path} has no {missing} {name!r} ({nearest(name, map(str, known))})")
    codes = of_captions.indices.fill_null(-1).to_numpy()
    labelled: np.ndarray = np.isin(codes, [known.index(name) for name in names])
    return labelled


def choose_mixture(stores: Sequence[FeatureStore], config: TuneConfig) -> tuple[Selection, Selection | None]:
    """The pairs of all stores to tune on, and the held-out ones."""
    captions: Sequence[Captions | None] = [None] * len(stores)
    if config.texts:
        captions = texts_of(stores, config)
    pairs = [choose_pairs(store, config, texts) for store, texts in zip(stores, captions, strict=True)]
    if len(stores) == 1:
        return keep_apart(*pairs[0], config)
    held_out = [val for _, val in pairs if val is not None]
    if held_out and len(held_out) < len(stores):
        names = ", ".join(str(store.path) for store, (_, val) in zip(stores, pairs, strict=True) if val is None)
        say(f"nothing is held out of {names}: the others alone are evaluated")
    return keep_apart(Mixture([train for train, _ in pairs]), Mixture(held_out) if held_out else None, config)


def keep_apart(train: Selection, val: Selection | None, config: TuneConfig) -> tuple[Selection, Selection | None]:
    """The same pairs; of those to tune on whose file is held out too, by its hash, say so, or leave them out."""
    shared = train.also_in(val) if val is not None else np.zeros(0, np.int64)
    if not len(shared):
        return train, val
    if config.exclude_held_out:
        train = train.subset(np.setdiff1d(np.arange(len(train)), shared))
        for source in train.sources:
            _enough(source)
        say(f"{len(shared):,} images are left out of tuning: their files are held out too")
        return train, val
    first = next(source for source in train.subset(shared[:1]).sources if len(source))
    say(
        f"{len(shared):,} of {len(train):,} images to tune on are held out too, as equal files (the first: "
        f"{first.keys[0]} in {first.store.path}): recalls come out too high; leave them out with --exclude-held-out"
    )
    return train, val


def texts_of(stores: Sequence[FeatureStore], config: TuneConfig) -> list[Captions]:
    """The captions of --texts for each of the stores."""
    names = source_names(stores)
    images = [
        Images(tuple({name, store.path.name, str(store.path)}), len(store), partial(_keys, store))
        for name, store in zip(names, stores, strict=True)
    ]
    return read_texts(config.texts, images, config.max_damaged)


def _keys(store: FeatureStore) -> pa.Array:
    column = store.column("key")
    assert column is not None  # every store has one
    return join_texts(column.chunks, column.nbytes)


def choose_pairs(
    store: FeatureStore, config: TuneConfig, captions: Captions | None = None
) -> tuple[Selection, Selection | None]:
    """The pairs to tune on and, where there are any, the held-out ones; with `captions` instead of the store's."""
    select = partial(store.select, lang=config.lang, fields=config.fields, captions=captions)
    if store.splits:
        pairs = select(config.split)
        if find_split(config.val_split, store.splits) not in (None, find_split(config.split, store.splits)):
            return _enough(pairs), held_out_split(store, config, captions)
        if config.val_split != TuneConfig.val_split:
            select(config.val_split)  # says which splits there are
            raise ConfigError(f"--split and --val-split are both {config.split!r}: evaluate on pairs not tuned on")
    else:
        pairs = select()
    held_out = min(HOLDOUT_MOST, round(config.holdout * len(pairs)))
    if held_out < 2:
        return _enough(pairs), None
    # By the seed of the store's order alone: another run's seed holds out the same images.
    order = np.random.default_rng(0).permutation(np.arange(len(pairs), dtype=integers(len(pairs))))
    return _enough(pairs.subset(np.sort(order[held_out:]))), pairs.subset(np.sort(order[:held_out]))


def held_out_split(store: FeatureStore, config: TuneConfig, captions: Captions | None) -> Selection | None:
    """The pairs of the split to evaluate on; where `captions` has none for it, with the store's own, if it has any."""
    select = partial(store.select, config.val_split, config.lang, config.fields)
    if captions is None:
        return select()
    try:
        return select(captions=captions)
    except StoreError:
        say(f"{store.path} has no texts of the split {config.val_split!r}: its own captions are evaluated")
    try:
        return select()
    except StoreError as why:
        say(f"{why}: nothing of it is evaluated")
        return None


def _enough(pairs: Selection) -> Selection:
    if len(pairs) < 2:
        images = "1 image" if len(pairs) == 1 else f"{len(pairs)} images"
        raise ConfigError(f"{pairs.store.path} has {images} to tune on: contrastive tuning needs two or more")
    return pairs


def source_names(stores: Sequence[FeatureStore]) -> list[str]:
    """What stores are called in messages and metrics: their folders' names, or their paths where two are alike."""
    names = [store.path.resolve().name for store in stores]
    return names if len(set(names)) == len(names) else [str(store.path) for store in stores]


def known_store(stores: Sequence[FeatureStore]) -> FeatureStore:
    """The first store that knows its tower; the first of all where none does."""
    return next((store for store in stores if store.tower), stores[0])


def check_one_tower(stores: Sequence[FeatureStore]) -> None:
    """Raise `StoreError` where the stores' features are not all of one tower, or one store is there twice."""
    first = known_store(stores)
    for number, store in enumerate(stores):
        if store.path.resolve() in [other.path.resolve() for other in stores[:number]]:
            raise StoreError(f"{store.path} is given twice: give each store once, and weigh it with --mix")
        check_same_tower(
            store.made_with, first.made_with, "stores that are tuned on together must be of one image tower"
        )


def check_range(numbers: np.ndarray, count: int, what: str) -> None:
    """Raise `IndexError` unless all numbers are from 0 to `count` − 1. Negative ones do not count from the end."""
    numbers = np.asarray(numbers)
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < count):
        wrong = next(int(number) for number in numbers if not 0 <= number < count)
        raise IndexError(f"{wrong} is out of range: there are {count:,} {what}, from 0")


def ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers from each first on, as many as the count, one range after the other.

    >>> ranges(np.array([7, 2]), np.array([2, 3])).tolist()
    [7, 8, 2, 3, 4]
    """
    begins = np.cumsum(counts) - counts
    numbers: np.ndarray = np.arange(int(counts.sum())) + np.repeat(first - begins, counts)
    return numbers
