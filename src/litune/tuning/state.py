"""A run's state on the disk: checkpoints to go on from, and where everything in the finished run came from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from litune import distributed
from litune.config import TuneConfig
from litune.errors import RunError
from litune.files import read_json, replace_folder, sweep_temporaries
from litune.image.registry import weights_hash
from litune.model.build import peak_rate
from litune.model.run_folder import MANIFEST, STATE, load_tensors, model_state, save_tensors
from litune.progress import say
from litune.sharding import FACTS, find_state, load_state, save_state
from litune.store.selection import Selection, source_names
from litune.store.store import library_versions
from litune.store.text_shards import shards
from litune.tuning.inputs import Micro
from litune.tuning.log import drop_lines_after

if TYPE_CHECKING:
    from litune.tuning.run import Tuning

BEST = "best"


@dataclass
class Progress:
    """How far a run is; kept in every checkpoint."""

    step: int = 0
    seconds: float = 0.0
    best: float = -1.0
    """The best held-out text→image recall@10 so far."""


class Checkpoints:
    """Writes checkpoints in a thread: tuning waits for the copy of the state, and not for the disk."""

    def __init__(self, run: Tuning) -> None:
        self.run = run
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.written: Future[None] | None = None

    def save(self) -> None:
        """Take a copy of what is needed to go on from this step and have it written."""
        run = self.run
        run.check()
        self.wait()
        if not run.takes_part:
            return
        tensors = _model_tensors(run)
        for name, parameter in named_tuned(run):
            for key, value in run.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = _of_all_ranks(run, name, torch.as_tensor(value).detach())
        facts = dataclasses.asdict(run.progress) | {
            "last_evaluation": run.last_evaluation,
            "fit": run.fit_settings,
            "about": about(run),
            "ranks": distributed.world_size(),
            "micro": dataclasses.asdict(run.micro),
        }
        if run.config.shard:  # all ranks write: what they tell each other meanwhile would cross that of the next step
            save_state(run.config.out, tensors, facts)
            return
        copies = {name: value.to("cpu", copy=True) for name, value in tensors.items()}
        self.written = self.pool.submit(save_tensors, run.config.out / STATE, copies, facts)

    def wait(self) -> None:
        """Return when all is written. Raises what kept a checkpoint from being written."""
        if self.written is not None:
            self.written.result()
            self.written = None

    def close(self) -> None:
        """Let what is being written end."""
        self.pool.shutdown()


def _model_tensors(run: Tuning) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in model_state(run.model).items()}


def _of_all_ranks(run: Tuning, name: str, state: Tensor) -> Tensor:
    """A tensor of the optimizer's state; of a parameter that ranks share, one that has the rows of all."""
    if name not in run.tuned.own_rows or state.ndim == 0:
        return state
    assert run.shards is not None
    return run.shards.shared(name.removeprefix("text."), state)


def about(run: Tuning) -> dict[str, Any]:
    """What must be the same for a checkpoint to be gone on from."""
    facts = {
        "steps": run.steps,
        "images": len(run.train),
        "captions": int(run.train.offsets[-1]),
        "tower": run.store.tower,
        "pairs": run.store.manifest.get("pairs"),
    }
    if len(run.sources) > 1 or run.config.texts:
        facts["sources"] = [
            [str(one.store.path), len(one), int(one.offsets[-1]), one.store.manifest.get("pairs")]
            for one in run.train.sources
        ]
        facts["texts"] = [[f.name, f.stat().st_size] for path in run.config.texts for f in shards(path)]
    return dict(json.loads(json.dumps(facts)))


def go_on(run: Tuning) -> None:
    """Take up the last checkpoint, if there is one; lines logged after it are dropped."""
    out = run.config.out
    if distributed.is_main():
        sweep_temporaries(out)
        replace_folder(out / f"{BEST}.tmp", out / BEST, last=MANIFEST)  # if it was begun
    distributed.barrier()
    shared = distributed.from_main(partial(find_state, out))
    tensors: dict[str, Tensor] = {}
    if shared is not None:
        facts = read_json(shared / FACTS, RunError)
    elif (out / STATE).exists():
        tensors, facts = load_tensors(out / STATE)
    else:
        return
    if facts["about"] != about(run):
        differing = [k for k, v in about(run).items() if facts["about"].get(k) != v]
        raise RunError(
            f"{out} was begun on another store ({', '.join(differing)} differ from {run.config.store} "
            "as it is now): give --overwrite, or another --out"
        )
    if shared is not None:
        load_state(shared, partial(_to_fill, run))
    else:
        _fill(run, tensors)
    run.progress = Progress(facts["step"], facts["seconds"], facts["best"])
    run.last_evaluation = facts["last_evaluation"]
    run.fit_settings = facts.get("fit")
    if "micro" in facts:  # dropout's seeds follow from it
        run.micro = Micro(**facts["micro"])
    if distributed.is_main():
        drop_lines_after(out, run.progress.step)
    say(f"going on with {out} from step {run.progress.step:,} of {run.steps:,}")
    if facts["ranks"] != distributed.world_size():
        say(
            f"begun on {facts['ranks']} processes, now on {distributed.world_size()}: the batches and the loss are "
            "the same, dropout draws other random numbers, sums are rounded in another order"
        )


def _fill(run: Tuning, tensors: dict[str, Tensor]) -> None:
    run.model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for name, parameter in named_tuned(run):
        prefix = f"optimizer.{name}."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if state:
            run.optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in state.items()}


def _to_fill(run: Tuning, there: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the model, and new ones of the optimizer, for those that are `there` in a shared state."""
    tensors = _model_tensors(run)
    for name, parameter in named_tuned(run):
        prefix = f"optimizer.{name}."
        for key, like in ((key, like) for key, like in there.items() if key.startswith(prefix)):
            shape = parameter.shape if name in run.tuned.own_rows and like.ndim else like.shape
            state = torch.zeros(shape, dtype=like.dtype, device=parameter.device)
            run.optimizer.state[parameter][key.removeprefix(prefix)] = state
            tensors[key] = _of_all_ranks(run, name, state)
    return tensors


def named_tuned(run: Tuning) -> list[tuple[str, Tensor]]:
    """The parameters that the optimizer moves, by name."""
    return [
        (name, parameter)
        for group in run.optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    ]


def manifest(run: Tuning) -> dict[str, Any]:
    """Where everything in the run came from."""
    if run.model.image_tuned:
        assert run.model.image is not None
        weights = weights_hash(run.model.image)
        run.model.image_provenance = run.model.image.provenance | {"weights": weights}
    done = run.progress.step
    return {
        "complete": True,
        "text_tower": run.config.text_tower,
        "locking": run.config.locking,
        **describe_pairs(run.config, run.train, run.val),
        **({"fit": run.fit_settings} if run.fit_settings else {}),
        "tuned_parameters": run.tuned.parameters,
        "steps": done,
        "batch_size": run.size,
        "learning_rate": peak_rate(run.config),
        "pairs_seen": done * run.size,
        "seconds": round(run.progress.seconds, 1),
        "precision": "bfloat16" if run.bfloat16 else "float32",
        "ranks": distributed.world_size(),
        "seed": run.config.seed,
        "libraries": library_versions(),
        "held_out": run.last_evaluation,
    }


def describe_pairs(config: TuneConfig, train: Selection, val: Selection | None) -> dict[str, Any]:
    """Where a run's pairs came from."""
    store, sources = train.store, train.sources
    of_all = {
        "store": {
            "path": str(config.store),
            "images": len(store),
            "tower": store.tower,
            "pairs": store.manifest.get("pairs"),
        },
        "tuned_on": {
            "split": config.split if store.splits else None,
            "images": len(train),
            "captions": int(train.offsets[-1]),
            "held_out_images": len(val) if val else 0,
        },
    }
    return of_all | ({"sources": _describe_sources(sources)} if len(sources) > 1 else {})


def _describe_sources(sources: Sequence[Selection]) -> dict[str, dict[str, Any]]:
    """Where the images of each source came from."""
    names = source_names([source.store for source in sources])
    return {
        name: {
            "path": str(source.store.path),
            "images": len(source),
            "captions": int(source.offsets[-1]),
            "pairs": source.store.manifest.get("pairs"),
        }
        for name, source in zip(names, sources, strict=True)
    }
