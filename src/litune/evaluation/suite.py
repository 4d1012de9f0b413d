"""One run on one task → `Result`s: retrieval, or classification.

Features of a set are kept in a feature store that every later evaluation with the same tower shares; a `Result` has the
outcome of every example, so that reports can say how sure a figure is and what was wrong.
"""

from __future__ import annotations

from pathlib import Path

from litune import distributed
from litune.evaluation import published
from litune.evaluation.embedded import open_set
from litune.evaluation.result import Result
from litune.evaluation.set_classification import classify
from litune.evaluation.set_retrieval import retrieve
from litune.evaluation.subject import Evaluation, Protocol, Subject
from litune.evaluation.task import Task


def run_task(task: Task, subject: Subject, protocol: Protocol, data: Path | None, features: Path) -> list[Result]:
    """The results of one task: one, or one for each language of its captions.

    Under torchrun every process calls it alike and encodes its part of the images and texts; rank 0 measures. Raises
    `DataError` for a set that can't be read, `StoreError` for a store of another tower: on every process, whichever met
    it.
    """
    path = task.find(data)
    assert path is not None, "find_tasks has looked"
    images, embedded = distributed.together(lambda: open_set(task, path, subject.path, subject.model))
    evaluation = Evaluation(task, images, subject, protocol, features)
    if task.kind == "retrieval":
        several = protocol.by_lang or (task.name == "wit" and not task.lang)
        results = retrieve(evaluation, embedded, images.languages if several else ())
    else:
        results = [classify(evaluation, embedded)]
    for result in results:
        if known := published.published_shares(result.task, result.lang):
            result.extras["published"] = known
            result.extras["published_note"] = published.note(result)
    return results
