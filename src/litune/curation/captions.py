"""What captions look like, many at once: lengths, letters, boilerplate, repeats, rare words."""

from __future__ import annotations

import re
import urllib.parse

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from litune.pairs.cells import MISSING

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""Scripts without spaces between words."""
_WORD = rf"[{_UNSPACED}]|[^\s\pP\pS{_UNSPACED}]+(?:['’\-.,][^\s\pP\pS{_UNSPACED}]+)*"

# File names, camera names and placeholders. Each pattern is matched against the whole caption.
BOILERPLATE = (
    r"\S+\.(?:jpe?g|png|gif|webp|bmp|tiff?|heic|svg|psd|raw|cr2|nef|avif)",
    r"(?:dsc[nf]?|imgp?|pict|p\d{3}|mvi|gopro?|dji|pxl|_mg|cimg|hpim)[ _\-]?\d{3,}(?:[ _\-(].{0,8})?",
    r"(?:img|vid|screenshot|whatsapp image|photo|image|picture|foto|bild|file|scan)[ _\-]*[\d\s_\-.:()#]+"
    r"(?:at [\d.: apm]+)?",
    r"(?:image|picture|photo|photograph|img|pic|thumbnail|thumb|untitled|no title|no caption|no description|n/?a|none"
    r"|null|undefined|default|logo|icon|banner|unknown|ohne titel|sans titre|sin título|无标题)\W*",
    r"(?:https?://|www\.)\S+",
    r"[\d\s\pP\pS]+",
)


def characters(captions: pa.Array) -> np.ndarray:
    """The number of characters of each of N captions: [N]."""
    counts: np.ndarray = pc.utf8_length(captions).to_numpy(zero_copy_only=False)
    return counts


def words(captions: pa.Array) -> np.ndarray:
    """The number of words of each of N captions: [N]; in scripts without spaces every character is a word.

    >>> words(pa.array(["two dogs, playing", "两条狗 playing", "..."])).tolist()
    [3, 4, 0]
    """
    counts: np.ndarray = pc.count_substring_regex(captions, _WORD).to_numpy(zero_copy_only=False)
    return counts


def letter_share(captions: pa.Array) -> np.ndarray:
    """The share of letters (of any script, with their marks) among the characters that are not spaces: [N]."""
    letters = pc.count_substring_regex(captions, r"[\pL\pM]").to_numpy(zero_copy_only=False)
    others = pc.count_substring_regex(captions, r"\S").to_numpy(zero_copy_only=False)
    share: np.ndarray = letters / np.maximum(others, 1)
    return share


def is_boilerplate(captions: pa.Array) -> np.ndarray:
    """Which of N captions don't describe an image: file names, camera numbers, URLs, "untitled": bool [N].

    >>> is_boilerplate(pa.array(["IMG_2041.JPG", "DSC00112", "a photo", "photo", "2014-08-01", "dsc"])).tolist()
    [True, True, False, True, True, False]
    """
    missing = "|".join(map(re.escape, sorted(MISSING)))
    pattern = rf"(?i)^\s*(?:{'|'.join(BOILERPLATE)}|{missing})\s*$"
    matches: np.ndarray = pc.match_substring_regex(captions, pattern).to_numpy(zero_copy_only=False)
    return matches


def is_empty_title(captions: pa.Array) -> np.ndarray:
    """Which of N titles the LiT paper drops from YFCC: bool [N].

    Those that start with DSC, IMG or Picture, are just "image", or are more than half digits (arXiv
    2111.07991).

    >>> is_empty_title(pa.array(["DSC_0042", "Picture 7", "Image", "2008-05", "12 apostles"])).tolist()
    [True, True, True, True, False]
    """
    starts = pc.match_substring_regex(captions, r"^\s*(?:DSC|IMG|Picture)|^\s*(?i:image)\s*$")
    digits = pc.count_substring_regex(captions, r"\d").to_numpy(zero_copy_only=False)
    matches: np.ndarray = starts.to_numpy(zero_copy_only=False) | (2 * digits > characters(captions))
    return matches


def shuffle_tags(tags: str, random: np.random.Generator) -> str:
    """A list of tags as one text, in random order.

    Tags are separated by commas, or by spaces where there is no comma; in a tag, `+` is a space and %xx a byte, as in
    YFCC100M.
    """
    parts = tags.split(",") if "," in tags else tags.split()
    plain = [urllib.parse.unquote_plus(part).strip() for part in parts]
    plain = [part for part in plain if part]
    return " ".join(plain[i] for i in random.permutation(len(plain)))


def repeated(captions: pa.Array, owner: np.ndarray) -> np.ndarray:
    """For each of N captions, how many images have it, case and spaces aside: [N]; `owner` [N] is each one's image."""
    text = pc.utf8_lower(pc.replace_substring_regex(pc.utf8_trim_whitespace(captions), r"\s+", " "))
    code = text.dictionary_encode().indices.to_numpy()
    pairs = np.unique(np.stack([code, owner]), axis=1)
    images = np.bincount(pairs[0], minlength=int(code.max(initial=-1)) + 1)
    counts: np.ndarray = images[code]
    return counts


def rare(captions: pa.Array, vocabulary: int) -> np.ndarray:
    """Which of N captions have a word or a pair of neighbouring words that is not among the most frequent: bool [N].

    Known are the `vocabulary` most frequent of words and pairs together, counted over these captions; equally frequent
    ones are all known or all not. Words are lower-case, without punctuation.
    """
    lists = pc.split_pattern_regex(
        pc.utf8_trim_whitespace(pc.replace_substring_regex(pc.utf8_lower(captions), r"[\s\pP\pS]+", " ")), " "
    )
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    word = pc.list_flatten(lists).dictionary_encode().indices.to_numpy().astype(np.int64)
    text = np.repeat(np.arange(len(lengths)), lengths)
    # A pair is two word codes in one number; the last word of a caption starts none.
    inside = text[:-1] == text[1:]
    both = (word[:-1] << 31 | word[1:])[inside]
    _, word_of, word_counts = np.unique(word, return_inverse=True, return_counts=True)
    _, pair_of, pair_counts = np.unique(both, return_inverse=True, return_counts=True)
    counts = np.concatenate([word_counts, pair_counts])
    if len(counts) <= vocabulary:
        return np.zeros(len(lengths), bool)
    least = np.partition(counts, len(counts) - vocabulary)[len(counts) - vocabulary]
    unknown = np.zeros(len(lengths), bool)
    unknown[text[word_counts[word_of] < least]] = True
    unknown[text[:-1][inside][pair_counts[pair_of] < least]] = True
    return unknown
