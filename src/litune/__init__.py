"""litune: give any image model a language, by locked-image tuning (LiT, arXiv 2111.07991).

The commands are functions of the same names (`embed`, `tune`, `eval`, `compare`, `classify`, `search`, `inspect`,
`probe`, `import_`, `export`, `push`, `quickstart`, and for `litune data`: `inspect_data`, `fetch_data`, `filter_data`,
`dedup_data`); `load` opens a run. Names are imported when they are first used: `import litune` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litune.checkpoint import load as load
    from litune.commands.classify import classify as classify
    from litune.commands.compare import compare as compare
    from litune.commands.data_dedup import dedup_data as dedup_data
    from litune.commands.data_filter import filter_data as filter_data
    from litune.commands.data_inspect import inspect_data as inspect_data
    from litune.commands.embed import embed as embed
    from litune.commands.evaluate import evaluate as eval  # noqa: F401
    from litune.commands.export import export as export
    from litune.commands.fetch import fetch_data as fetch_data
    from litune.commands.import_ import import_ as import_
    from litune.commands.inspect_ import inspect as inspect
    from litune.commands.probe import probe as probe
    from litune.commands.push import push as push
    from litune.commands.quickstart import quickstart as quickstart
    from litune.commands.search import search as search
    from litune.commands.tune import tune as tune
    from litune.data.images import ImageTransform as ImageTransform
    from litune.errors import LituneError as LituneError
    from litune.features import FeatureStore as FeatureStore
    from litune.index import Index as Index
    from litune.losses import sigmoid_loss as sigmoid_loss
    from litune.losses import softmax_loss as softmax_loss
    from litune.model import LiT as LiT
    from litune.towers.image import ImageTower as ImageTower

__version__ = "0.1.0"

_HOME = {
    "FeatureStore": "litune.features",
    "ImageTower": "litune.towers.image",
    "ImageTransform": "litune.data.images",
    "Index": "litune.index",
    "LiT": "litune.model",
    "LituneError": "litune.errors",
    "classify": "litune.commands.classify",
    "compare": "litune.commands.compare",
    "dedup_data": "litune.commands.data_dedup",
    "embed": "litune.commands.embed",
    "eval": "litune.commands.evaluate",
    "inspect": "litune.commands.inspect_",
    "inspect_data": "litune.commands.data_inspect",
    "import_": "litune.commands.import_",
    "export": "litune.commands.export",
    "fetch_data": "litune.commands.fetch",
    "filter_data": "litune.commands.data_filter",
    "load": "litune.checkpoint",
    "probe": "litune.commands.probe",
    "push": "litune.commands.push",
    "quickstart": "litune.commands.quickstart",
    "search": "litune.commands.search",
    "sigmoid_loss": "litune.losses",
    "softmax_loss": "litune.losses",
    "tune": "litune.commands.tune",
}
__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'litune' has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    value = getattr(module, "evaluate" if name == "eval" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
