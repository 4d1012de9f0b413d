"""Run folders: the model, its tokenizer and where everything came from; and the state to go on from.

    config.json         the command's config, whole
    manifest.json       towers, heads, provenance, counts, versions, metrics; `complete` when tuning is done
    model.safetensors   text tower, heads, temperature, centre
    tokenizer.json      the tokenizer (and pieces.model, where it was made from one)
    metrics.jsonl       one JSON object per logged step and per evaluation
    README.md           the model card
    bank.safetensors    features of tuning captions and images, float16, by which hubs are told (see litune.model.hubs)
    state.safetensors   weights, optimizer moments and step while tuning goes on; gone when it is done
    state-STEP/         the same with --shard, each rank's part in files of its own (see litune.sharding)
    best/               a run folder of its own: the model as it was best on the held-out pairs

Every file is written under a temporary name and renamed. There is no pickle.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from litune import distributed
from litune.devices import pick_device
from litune.errors import RunError, TowerError
from litune.files import atomic, read_json, write_json
from litune.image.features import Features, parse_features, with_features
from litune.image.registry import (
    ImageTower,
    MadeWith,
    check_same_tower,
    load_image_tower,
    with_random_weights,
)
from litune.model.heads import make_head
from litune.model.hubs import Bank
from litune.model.lit import LiT
from litune.sharding import is_shared, own_part, whole_tensor
from litune.text.registry import TextTower, build_text_tower
from litune.text.rows import DrawnRows, without_weights
from litune.text.tokenizers import load_tokenizer
from litune.towers.locking import lock

FORMAT = 1
MANIFEST, CONFIG, MODEL, TOKENIZER = "manifest.json", "config.json", "model.safetensors", "tokenizer.json"
METRICS, STATE, BANK = "metrics.jsonl", "state.safetensors", "bank.safetensors"


def model_state(model: LiT) -> dict[str, Tensor]:
    """What a run keeps of a model: all but a locked image tower. Tied weights are one tensor by several names."""
    kept = {n: v for n, v in model.state_dict().items() if model.image_tuned or not n.startswith("image.")}
    return {name: value.detach() for name, value in kept.items()}


def _place(value: Tensor) -> tuple[Any, ...]:
    return value.device, own_part(value).data_ptr(), value.shape, value.stride(), value.dtype


DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""What safetensors calls the types of tensors, in the order in which its own writer lays tensors out."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and JSON facts as one safetensors file, atomically; what has several names is written once.

    The bytes are those of `safetensors.torch.save_file`, but tensors are copied and written one by one. Those that
    ranks share are gathered one by one, too: where there are any, all ranks call this, and rank 0 writes.
    """
    first: dict[tuple[Any, ...], str] = {}
    also = {k: name for k, v in tensors.items() if v.numel() and (name := first.setdefault(_place(v), k)) != k}
    shared = any(is_shared(value) for value in tensors.values())
    if shared:
        also = distributed.broadcast_object(also)  # rank 0 has rows of every tensor, others may have none
    types = list(DTYPES)
    names = sorted(tensors.keys() - also.keys(), key=lambda name: (types.index(tensors[name].dtype), name))
    whole = (whole_tensor(tensors[name]) for name in names)
    if shared and not distributed.is_main():
        deque(whole, maxlen=0)
        return
    about = {"litune": json.dumps(facts | ({"also": also} if also else {}))}
    with atomic(path) as temporary, open(temporary, "wb") as file:
        file.write(_header({name: tensors[name] for name in names}, about))
        for value in whole:
            file.write(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _header(tensors: dict[str, Tensor], about: dict[str, str]) -> bytes:
    """What a safetensors file begins with: where each tensor lies, in this order, as JSON padded to eight bytes."""
    places: dict[str, Any] = {"__metadata__": about}
    end = 0
    for name, value in tensors.items():
        begin, end = end, end + value.numel() * value.itemsize
        places[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(places, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote. Raises `RunError` where the file is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("litune", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors | {k: tensors[name] for k, name in facts.pop("also", {}).items()}, facts
    except FileNotFoundError:
        raise RunError(f"{path} is missing: the run folder is incomplete") from None
    except (SafetensorError, json.JSONDecodeError) as why:
        raise RunError(f"{path} is damaged ({why}): tune again, or restore it") from None


def save_model(folder: Path, model: LiT, manifest: dict[str, Any]) -> None:
    """Write a run folder's model, tokenizer and manifest; the manifest last, so that it vouches for the rest.

    Where ranks share a tower, all call this, and rank 0 writes.
    """
    save_tensors(folder / MODEL, model_state(model), {"format": FORMAT})
    if not distributed.is_main():
        return
    model.tokenizer.save(folder / TOKENIZER)
    write_json(folder / MANIFEST, {"format": FORMAT, **manifest, "model": describe_model(model)})


def save_bank(folder: Path, bank: Bank) -> None:
    """Write the bank by which a run tells hubs; its manifest says whether it ranks with it."""
    save_tensors(folder / BANK, {"images": bank.images, "texts": bank.texts}, {"format": FORMAT})


def _bank_in_use(folder: Path) -> Bank | None:
    """A run's bank, where its manifest says that it ranks with it."""
    if not read_json(folder / MANIFEST, RunError).get("hub_correction", {}).get("on"):
        return None
    tensors, _ = load_tensors(folder / BANK)
    return Bank(tensors["texts"], tensors["images"])


def describe_model(model: LiT) -> dict[str, Any]:
    """What is needed to build the model again, without weights."""
    return {
        "image_tower": model.image_provenance,
        "image_tuned": model.image_tuned,
        "image_width": model.image_width,
        "image_map": model.image_map,
        "image_head": _head_kind(model.image_head),
        "text_tower": model.text.architecture,
        "text_head": _head_kind(model.text_head),
        "dim": model.dim,
        "bias": model.logit_bias is not None,
        "tokenizer": model.tokenizer.describe(),
        **({"origin": model.origin} if model.origin is not None else {}),
    }


def _head_kind(head: torch.nn.Module) -> str:
    if isinstance(head, torch.nn.Sequential):
        return {2: "gated", 3: "mlp"}[len(head)]
    return {"Identity": "none", "Linear": "linear"}[type(head).__name__]


def load(run: Path | str, *, image_tower: str | None = None, device: str = "auto") -> LiT:
    """The model of a run folder, in evaluation mode: `encode_image`, `encode_text`, `zero_shot`.

    The image tower is loaded when the first picture is encoded, from `image_tower` or the run's own spec.
    Raises `RunError` where the folder is missing, unfinished, damaged or of another version.
    """
    folder = Path(run)
    model = _model_of(folder, build_text_tower)
    tensors, _ = load_tensors(folder / MODEL)
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as why:
        raise RunError(f"{folder / MODEL} does not fit its manifest: {str(why).splitlines()[-1].strip()}") from None
    if model.image_tuned and image_tower is not None:
        raise TowerError(f"{folder} has trained its own image tower: leave out --image-tower")
    model.find_image_tower = image_tower_finder(model, image_tower)
    model.bank = _bank_in_use(folder)
    return model.eval().to(pick_device(device))


def load_without_text(run: Path | str) -> LiT:
    """The model of a run folder, the parameters of its text tower on the meta device: still to be filled in."""
    folder = Path(run)

    def build(architecture: dict[str, Any]) -> TextTower:
        with without_weights(DrawnRows()):  # as many random numbers are drawn as by `load`
            return build_text_tower(architecture)

    model = _model_of(folder, build)
    with safe_open(folder / MODEL, framework="pt") as file:
        others = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("text.")}  # noqa: SIM118
    model.load_state_dict(others, strict=False)
    return model.eval()


def _model_of(folder: Path, build: Callable[[dict[str, Any]], TextTower]) -> LiT:
    """The model of a run folder, its weights still to be filled in."""
    if not folder.is_dir():
        raise RunError(f"there is no run at {folder}: make one with litune tune")
    if not (folder / MANIFEST).exists():
        unfinished = (folder / CONFIG).exists()
        hint = "tuning has not finished, run the same litune tune again" if unfinished else "it is not a run folder"
        raise RunError(f"{folder} has no {MANIFEST}: {hint}")
    manifest = read_json(folder / MANIFEST, RunError)
    if manifest.get("format") != FORMAT:
        raise RunError(f"{folder} has the run format {manifest.get('format')!r}, this litune reads {FORMAT}")
    made = manifest["model"]
    tokenizer = load_tokenizer(folder / TOKENIZER, made["tokenizer"]["layout"], made["tokenizer"]["max_tokens"])
    text = build(made["text_tower"])
    model = LiT(
        text,
        make_head(made["text_head"], text.width, made["dim"]),
        make_head(made["image_head"], made["image_width"], made["dim"]),
        tokenizer,
        image_width=made["image_width"],
        dim=made["dim"],
        logit_scale=0.0,
        logit_bias=0.0 if made.get("bias") else None,
        image_map=made["image_map"],
        image_provenance=made["image_tower"],
        image=_tuned_tower(made["image_tower"]) if made.get("image_tuned") else None,
    )
    model.origin = made.get("origin")
    return model


def _tuned_tower(provenance: dict[str, Any]) -> ImageTower:
    """The architecture of an image tower whose weights a run has trained and keeps."""
    tower = load_image_tower(with_random_weights(provenance["spec"]))
    _check_tower(
        provenance,
        tower.provenance | {"weights": provenance["weights"]},
        "take the libraries' versions that its manifest.json names",
    )
    tower.provenance = provenance
    return tower


def find_image_tower(spec: str) -> ImageTower:
    """The locked image tower that `spec` names; `run:RUN` is the one that a run has trained."""
    kind, _, folder = spec.partition(":")
    if kind != "run":
        return load_image_tower(spec)
    folder, _, asked = folder.partition("?features=")
    features = parse_features(asked or "pooled")
    if features.size is not None:
        raise TowerError(f"{spec!r} can't be given another size: leave out size:{features.size}")
    model = load(folder, device="cpu")
    tower = model.load_image_tower()
    if features != Features():
        tower = with_features(tower, features)
    lock(tower)
    tower.spec = spec
    tower.provenance = tower.provenance | {"spec": spec}
    return tower


def image_tower_finder(model: LiT, spec: str | None) -> Callable[[], ImageTower] | None:
    """How the model gets its image tower: `spec`, else the run's own; None where neither names one."""
    provenance = model.image_provenance
    wanted = spec or (provenance or {}).get("spec")
    if wanted is None:
        return None

    def find() -> ImageTower:
        tower = find_image_tower(wanted)
        if provenance is not None:
            _check_tower(provenance, tower.provenance, "name the run's own tower with --image-tower")
        return tower

    return find


def _check_tower(known: dict[str, Any], tower: dict[str, Any], remedy: str) -> None:
    """Raise `TowerError` where this is not the tower that a run was made with."""
    check_same_tower(MadeWith("the run", known), MadeWith("", tower), remedy, error=TowerError)


def check_store(run: Path, model: LiT, store: MadeWith) -> None:
    """Raise `StoreError` naming both sides where a store's features are not those the run was tuned on."""
    tower = model.image_provenance
    spec = f"run:{run}" if model.image_tuned else (tower or {}).get("spec", "the run's image tower")
    needed = MadeWith(f"the run {run}", tower, model.image_width)
    check_same_tower(store, needed, f"embed the images with {spec}")
