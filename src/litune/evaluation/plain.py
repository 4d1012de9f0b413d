"""Results as plain JSON values: what the command returns, prints and writes."""

from __future__ import annotations

from typing import Any

from litune.evaluation.figures import figures
from litune.evaluation.result import Result
from litune.evaluation.retrieval import HUBS_CORRECTED

KEPT = ("task", "kind", "metric", "lang", "values", "chance", "definition", "images", "protocol", "extras")
WAYS = ("text_to_image", "image_to_text")


def plain(result: Result) -> dict[str, Any]:
    """The figures of a result, without the examples."""
    return {"name": heading(result)} | {name: getattr(result, name) for name in KEPT} | {"interval": intervals(result)}


def plain_retrieval(result: Result) -> dict[str, Any]:
    """The figures of a retrieval, each way by itself."""
    return {
        **_each_way(result.values),
        "chance": _each_way(result.chance),
        "images": result.images,
        "captions": len(result.captions),
        "interval": _each_way(intervals(result)),
    }


def _each_way(by_figure: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`{"text_to_image recall@1": …}` as `{"text_to_image": {"recall@1": …}, …}`."""
    return {way: {name.split()[1]: value for name, value in by_figure.items() if name.startswith(way)} for way in WAYS}


def plain_classification(result: Result) -> dict[str, Any]:
    """The figures of a classification in which every image has one class."""
    ends = intervals(result)
    return result.values | {
        "chance": result.chance["accuracy"],
        "images": result.images,
        "classes": len(result.class_names),
        "interval": {name: ends[name] for name in ("accuracy", "mean_per_class")},
    }


def heading(result: Result) -> str:
    """The task, and the language where its name does not say it."""
    task = result.task.removesuffix(HUBS_CORRECTED)
    named = task if result.lang in ("", *task.split(":")[1:]) else f"{task} {result.lang}"
    return named + result.task.removeprefix(task)


def intervals(result: Result) -> dict[str, list[float]]:
    """The ends of the 95% bootstrap interval of each figure whose examples' outcomes are known."""
    by_name = figures(result).items()
    return {
        name: [figure.low, figure.high]
        for name, figure in by_name
        if figure.low is not None and figure.high is not None
    }
