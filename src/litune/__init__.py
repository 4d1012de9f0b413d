"""litune: give any image model a language, by locked-image tuning (LiT, arXiv 2111.07991).

The commands are functions of the same names (`embed`, `fit`, `tune`, `eval`, `compare`, `classify`, `search`,
`inspect`, `probe`, `import_`, `export`, `push`, `quickstart`, and for `litune data`: `inspect_data`, `fetch_data`,
`filter_data`, `dedup_data`); `load` opens a run. Names are imported when they are first used: `import litune` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litune.curation.dedup import dedup_data as dedup_data
    from litune.curation.fetch import fetch_data as fetch_data
    from litune.curation.filter import filter_data as filter_data
    from litune.curation.inspect import inspect_data as inspect_data
    from litune.errors import LituneError as LituneError
    from litune.evaluation.classify import classify as classify
    from litune.evaluation.evaluate import evaluate as eval  # noqa: F401
    from litune.image.pictures import ImageTransform as ImageTransform
    from litune.image.registry import ImageTower as ImageTower
    from litune.index.index import Index as Index
    from litune.index.search import search as search
    from litune.interop.export import export as export
    from litune.interop.import_ import import_ as import_
    from litune.interop.push import push as push
    from litune.model.lit import LiT as LiT
    from litune.model.run_folder import load as load
    from litune.store.embed import embed as embed
    from litune.store.store import FeatureStore as FeatureStore
    from litune.studies.compare import compare as compare
    from litune.studies.inspect import inspect as inspect
    from litune.studies.probe import probe as probe
    from litune.studies.quickstart import quickstart as quickstart
    from litune.tuning.fit import fit as fit
    from litune.tuning.losses import sigmoid_loss as sigmoid_loss
    from litune.tuning.losses import softmax_loss as softmax_loss
    from litune.tuning.tune import tune as tune

__version__ = "0.1.0"

_HOME = {
    "FeatureStore": "litune.store.store",
    "ImageTower": "litune.image.registry",
    "ImageTransform": "litune.image.pictures",
    "Index": "litune.index.index",
    "LiT": "litune.model.lit",
    "LituneError": "litune.errors",
    "classify": "litune.evaluation.classify",
    "compare": "litune.studies.compare",
    "dedup_data": "litune.curation.dedup",
    "embed": "litune.store.embed",
    "eval": "litune.evaluation.evaluate",
    "inspect": "litune.studies.inspect",
    "inspect_data": "litune.curation.inspect",
    "import_": "litune.interop.import_",
    "export": "litune.interop.export",
    "fit": "litune.tuning.fit",
    "fetch_data": "litune.curation.fetch",
    "filter_data": "litune.curation.filter",
    "load": "litune.model.run_folder",
    "probe": "litune.studies.probe",
    "push": "litune.interop.push",
    "quickstart": "litune.studies.quickstart",
    "search": "litune.index.search",
    "sigmoid_loss": "litune.tuning.losses",
    "softmax_loss": "litune.tuning.losses",
    "tune": "litune.tuning.tune",
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
