"""Text → the images of a store that match it."""

from __future__ import annotations

from dataclasses import asdict

from litune.checkpoint import check_store, load
from litune.config import SearchConfig, command
from litune.errors import OutputExistsError
from litune.features import FeatureStore
from litune.files import write_json
from litune.gallery import write_sheet
from litune.index import Found, nearest_images


@command(SearchConfig)
def search(config: SearchConfig) -> list[Found]:
    """The `config.top` images of a store that match the query best, best first.

    Raises `StoreError` where the store is of another tower than the run.
    """
    for file in (config.sheet, config.json):
        if file is not None and file.exists() and not config.overwrite:
            raise OutputExistsError(f"{file} exists: choose another name, or give --overwrite")
    store = FeatureStore(config.store)
    model = load(config.run, device=config.device)
    check_store(config.run, model, config.store, store.width, store.tower)
    found = nearest_images(model, store, model.encode_text(config.query), config.top)[0]
    if config.sheet:
        write_sheet(config.sheet, [(config.query, found)])
    if config.json:
        write_json(config.json, {"query": config.query, "found": [asdict(one) for one in found]})
    return found
