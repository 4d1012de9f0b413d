"""Images → labels with probabilities."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from litune.config import ClassifyConfig, command
from litune.errors import ConfigError
from litune.files import check_file, write_json
from litune.model.run_folder import load
from litune.pairs.pairs import pictures_at
from litune.prompts import read_labels
from litune.text.alike import find_alike


@dataclass(frozen=True)
class Classified:
    """One image's probabilities, the most probable label first."""

    image: str
    probabilities: dict[str, float]

    @property
    def label(self) -> str:
        """The most probable label."""
        return next(iter(self.probabilities))


@command(ClassifyConfig)
def classify(config: ClassifyConfig) -> list[Classified]:
    """Classify images with any labels; returns one result per image, in order.

    Raises `ConfigError` for a label given twice, or two that are read alike, `RunError` for the run, `DataError` for an
    image that can't be read, `OutputExistsError` where the file of `config.json` is there.
    """
    check_file(config.json, "--json", config.overwrite)
    labels = read_labels(config.labels)
    if alike := find_alike(labels):
        raise ConfigError(f"--labels has {alike}")
    model = load(config.run, image_tower=config.image_tower, device=config.device)
    classifier = model.zero_shot(labels, config.templates)
    found = []
    images = [picture for address in config.images for picture in pictures_at(str(address))]
    for image, row in zip(images, classifier(images).tolist(), strict=True):
        order = sorted(zip(labels, row, strict=True), key=lambda pair: -pair[1])
        found.append(Classified(image, dict(order)))
    if config.json:
        write_json(config.json, {"images": [asdict(one) for one in found], "templates": classifier.templates})
    return found
