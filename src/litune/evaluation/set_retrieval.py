"""Retrieval on a set: its images embedded, its captions encoded, each ranked among the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from litune import distributed
from litune.devices import send
from litune.evaluation import extras, retrieval
from litune.evaluation.embedded import Embedded
from litune.evaluation.result import Result
from litune.evaluation.subject import Evaluation
from litune.model.hubs import Bank
from litune.model.lit import scoring_device

KS = (1, 5, 10)


def retrieve(evaluation: Evaluation, embedded: Embedded | None, langs: Sequence[str] = ()) -> list[Result]:
    """Retrieval both ways among a set's images and captions, those of each language by themselves.

    Without languages, or for "", it is among all captions. `embedded` are the images where their features are known.
    """
    if embedded is None:
        embedded = evaluation.embed(evaluation.images, evaluation.task.name)
    captions = [caption for row in embedded.rows for caption in evaluation.images.captions[row]]
    with evaluation.timed("texts"):
        texts = evaluation.subject.encode_captions(captions)
    measure = partial(_rank, evaluation, embedded, captions, texts, langs or [""])
    return distributed.from_main(measure)


def _rank(
    evaluation: Evaluation, embedded: Embedded, captions: list[str], texts: Float[Tensor, "N D"], langs: Sequence[str]
) -> list[Result]:
    """One result for each of the languages; a further one with the hub correction, where the run has it on."""
    images, model = evaluation.images, evaluation.subject.model
    features = torch.cat([torch.empty(0, model.dim), *embedded.blocks(model)])
    owner = np.repeat(np.arange(len(embedded.rows)), [len(images.captions[row]) for row in embedded.rows])
    lang_of = np.array([lang for row in embedded.rows for lang in images.langs[row]] if images.langs else [])
    results = []
    for lang in (lang for lang in langs if not lang or lang in lang_of):  # others have no picture that can be read
        chosen = np.flatnonzero(lang_of == lang) if lang else np.arange(len(captions))
        rows, own = np.unique(owner[chosen], return_inverse=True)
        of_lang, taken = [captions[i] for i in chosen], embedded.take(rows)
        x = send(features[torch.from_numpy(rows)], scoring_device(model))
        t = send(texts[torch.from_numpy(chosen)], scoring_device(model))
        with evaluation.timed("scores"):
            ranks = retrieval.rank(x, t, torch.from_numpy(own))
        result = _retrieval_result(evaluation, taken, ranks, own, of_lang, lang)
        results.append(result)
        if model.bank is not None and evaluation.protocol.hub_correction:
            with evaluation.timed("corrected scores"):
                ranks = retrieval.rank(*model.bank.corrected(x, t), torch.from_numpy(own))
            results.append(_corrected(result, ranks, model.bank))
    return results


def _corrected(bare: Result, ranks: retrieval.Ranks, bank: Bank) -> Result:
    """A result with these ranks, of a task of its own: neither bare nor published figures stand beside it."""
    hits = _hits(ranks)
    return replace(
        bare,
        task=bare.task + retrieval.HUBS_CORRECTED,
        values={figure: float(hit.mean()) for figure, hit in hits.items()},
        outcomes=hits,
        best_images=ranks.best_images,
        extras=dict(bare.extras),  # what is published on the set is added to one of them
        definition=bare.definition + retrieval.CORRECTED,
        protocol=bare.protocol
        | {"hub_correction": {"method": "CSLS", "captions": len(bank.texts), "images": len(bank.images)}},
    )


def _hits(ranks: retrieval.Ranks) -> dict[str, np.ndarray]:
    return {figure: hit.astype(np.float64) for figure, hit in ranks.hits(KS).items()}


def _retrieval_result(
    evaluation: Evaluation,
    embedded: Embedded,
    ranks: retrieval.Ranks,
    owner: np.ndarray,
    captions: list[str],
    lang: str,
) -> Result:
    hits = _hits(ranks)
    by_chance = retrieval.figures(ranks, owner, KS)["chance"]
    keys, pictures = evaluation.describe(embedded)
    return Result(
        task=evaluation.task.name,
        kind="retrieval",
        metric="text_to_image recall@1",
        values={figure: float(hit.mean()) for figure, hit in hits.items()},
        chance={f"{way} {k}": share for way, row in by_chance.items() for k, share in row.items()},
        definition=retrieval.DEFINITION,
        images=len(keys),
        protocol=evaluation.facts(embedded, lang) | {"captions": len(captions)},
        outcomes=hits,
        groups={figure: owner for figure in hits if figure.startswith("text_to_image")},
        keys=keys,
        pictures=pictures,
        hashes=embedded.hashes,
        captions=captions,
        owner=owner,
        best_images=ranks.best_images,
        lang=lang or evaluation.task.lang,
        extras={"seconds": dict(evaluation.seconds), "texts": len(set(captions))}
        | extras.contamination(evaluation, embedded),
    )
