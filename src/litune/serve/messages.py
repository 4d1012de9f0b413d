"""The requests and answers of the API: the OpenAPI document is generated from them, and requests validated by them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from litune.serve.problems import Problem

MAX_TEXTS, MAX_IMAGES, MAX_CLASSES, MAX_TEMPLATES = 512, 256, 1000, 100
MAX_PAGE, MAX_OFFSET = 1000, 10_000_000
MAX_TEXT, MAX_NAME, MAX_WHERE, MAX_CONDITION = 10_000, 300, 16, 300

Text = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME)]
Template = Annotated[str, StringConstraints(max_length=300, pattern=r"^[^{}]*\{\}[^{}]*$")]
Where = Annotated[str, StringConstraints(min_length=1, max_length=MAX_CONDITION)]
Limit = Annotated[int, Field(ge=1, le=MAX_PAGE)]
Offset = Annotated[int, Field(ge=0, le=MAX_OFFSET)]
Weight = Annotated[float, Field(ge=-100, le=100)]


class Message(BaseModel):
    """The ground of all messages: exact types, no unknown fields, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Row(Message):
    """An image of the store, by its row."""

    row: Offset


class Features(Message):
    """An image by its features, as /v1/encode/image gives them."""

    features: Annotated[list[float], Field(min_length=1, max_length=8192)]


Image = Row | Features
Images = Annotated[list[Image], Field(min_length=1, max_length=MAX_IMAGES)]


class Part(Message):
    """Some of the store's images."""

    offset: Offset = 0
    limit: Limit = 50


class EncodeText(Message):
    """Texts to be encoded."""

    texts: Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]


class Match(Message):
    """Images and texts to be compared."""

    images: Images
    texts: Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]


class Classify(Message):
    """Images to be classified, by the names of classes alone."""

    images: Images | Literal["all"] | Part
    classes: Annotated[list[Name], Field(min_length=1, max_length=MAX_CLASSES, json_schema_extra={"uniqueItems": True})]
    templates: (
        Literal["auto", "bare", "short"] | Annotated[list[Template], Field(min_length=1, max_length=MAX_TEMPLATES)]
    ) = "auto"


class Search(Message):
    """A search by a text, an image, or the weighted sum of both."""

    text: Text | None = None
    image: Image | None = None
    text_weight: Weight = 1.0
    image_weight: Weight = 1.0
    top: Limit = 20
    offset: Annotated[int, Field(ge=0, le=100_000)] = 0
    where: Annotated[list[Where], Field(max_length=MAX_WHERE)] = []


class Encoded(BaseModel):
    """Features of length one, one line per text."""

    features: list[list[float]]


class EncodedImages(Encoded):
    """Features of length one, one line per file, and the files' names."""

    names: list[str]


class Matched(BaseModel):
    """Cosines, and per image the softmax over the texts at the model's temperature."""

    cosines: list[list[float]]
    probabilities: list[list[float]]


class Prediction(BaseModel):
    """The classes' probabilities for one image: of the store by its row, or else by its place in the request."""

    row: int | None = None
    index: int | None = None
    key: str | None = None
    label: str
    own_label: str | None = None
    probabilities: list[float]


class Classified(BaseModel):
    """Predictions, with the probabilities in the order of the classes."""

    classes: list[str]
    predictions: list[Prediction]


class FoundImage(BaseModel):
    """An image that was found."""

    row: int
    key: str
    score: float
    captions: list[str]


class FoundImages(BaseModel):
    """Images that were found, best first."""

    found: list[FoundImage]


class StoredImage(BaseModel):
    """An image of the store."""

    row: int
    key: str
    captions: list[str]
    label: str | None = None


class StoredImages(BaseModel):
    """Some of the store's images, and how many it has."""

    images: list[StoredImage]
    total: int


class Column(BaseModel):
    """A column that `where` can ask for; `values` are all that it has, where those are few texts."""

    name: str
    kind: Literal["text", "number", "truth"]
    values: list[str] | None


class Columns(BaseModel):
    """The columns of the store's metadata."""

    columns: list[Column]


class ModelFacts(BaseModel):
    """What is served."""

    run: str
    dim: int
    temperature: float
    text_tower: str | None
    image_tower: str | None
    can_encode_images: bool
    images: int
    templates: dict[str, list[str]]
    columns: list[str]


class Health(BaseModel):
    """That the server answers."""

    status: Literal["ok"]


class ErrorFacts(BaseModel):
    """What is wrong, with which part of the request, and what to do."""

    message: str
    what: str
    do: str


class Error(BaseModel):
    """The answer to a request that can't be answered."""

    error: ErrorFacts


REQUESTS: list[type[BaseModel]] = [EncodeText, Match, Classify, Search]
ANSWERS: list[type[BaseModel]] = [
    Encoded, EncodedImages, Matched, Classified, FoundImages, StoredImages, Columns, ModelFacts, Health, Error,
]  # fmt: skip

M = TypeVar("M", bound=Message)
_FIELDS = {name for kind in (EncodeText, Match, Classify, Search, Row, Features, Part) for name in kind.model_fields}


def read(kind: type[M], body: bytes) -> M:
    """A request's body as a message. Raises `Problem`: 400 for invalid JSON, 422 for what does not fit the schema."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as why:
        # Of the errors of a union's members, the deepest is about the member that was meant.
        first: Any = max(why.errors(include_url=False, include_input=False), key=lambda error: len(error["loc"]))
        path = [str(part) for part in first["loc"] if isinstance(part, int) or part in _FIELDS]
        where = ".".join(path) or "the body"
        if first["type"] == "json_invalid":
            reason = first["ctx"]["error"] if "ctx" in first else first["msg"]
            raise Problem(400, f"the body is not valid JSON: {reason}", "the body", "send UTF-8 JSON") from None
        message = f"{where}: {_in_words(first)}"
        raise Problem(422, message, where, "see the schema in /openapi.json") from None


def _in_words(error: Any) -> str:
    """A pydantic error in plain words."""
    match error["type"]:
        case "extra_forbidden":
            return f"there is no field {str(error['loc'][-1])[:40]!r} here"
        case "too_short":
            return f"needs at least {error['ctx']['min_length']}"
        case "string_too_long":
            return f"has more than {error['ctx']['max_length']:,} characters"
        case "string_pattern_mismatch":
            return "needs exactly one {}"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}"
