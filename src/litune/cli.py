"""argv → config → one function. Nothing here imports torch before it is needed."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from litune import arguments
from litune.config import (
    ClassifyConfig,
    Command,
    CompareConfig,
    DedupConfig,
    EmbedConfig,
    EvalConfig,
    ExportConfig,
    FetchConfig,
    FilterConfig,
    FitConfig,
    ImportConfig,
    InspectConfig,
    OverviewConfig,
    ProbeConfig,
    PushConfig,
    QuickstartConfig,
    SearchConfig,
    ServeConfig,
    TuneConfig,
)
from litune.errors import ConfigError, LituneError

DESCRIPTION = """Give any image model a language.

litune locks an image tower that already sees well, teaches a text tower to read it, and from then on classifies
and searches images by free-form text (locked-image tuning, LiT). The whole way on real data, then on your own:"""

# Each command's config and where its function is; a name of two words is a command of a group.
COMMANDS: dict[str, tuple[type[Any], str]] = {
    "quickstart": (QuickstartConfig, "litune.studies.quickstart:quickstart"),
    "embed": (EmbedConfig, "litune.store.embed:embed"),
    "fit": (FitConfig, "litune.tuning.fit:fit"),
    "tune": (TuneConfig, "litune.tuning.tune:tune"),
    "eval": (EvalConfig, "litune.evaluation.evaluate:evaluate"),
    "compare": (CompareConfig, "litune.studies.compare:compare"),
    "classify": (ClassifyConfig, "litune.evaluation.classify:classify"),
    "search": (SearchConfig, "litune.index.search:search"),
    "serve": (ServeConfig, "litune.serve.serve:serve"),
    "inspect": (InspectConfig, "litune.studies.inspect:inspect"),
    "probe": (ProbeConfig, "litune.studies.probe:probe"),
    "import": (ImportConfig, "litune.interop.import_:import_"),
    "export": (ExportConfig, "litune.interop.export:export"),
    "push": (PushConfig, "litune.interop.push:push"),
    "data inspect": (OverviewConfig, "litune.curation.inspect:inspect_data"),
    "data fetch": (FetchConfig, "litune.curation.fetch:fetch_data"),
    "data filter": (FilterConfig, "litune.curation.filter:filter_data"),
    "data dedup": (DedupConfig, "litune.curation.dedup:dedup_data"),
}
FIRST_STEPS = tuple(arguments.EXAMPLES[name] for name in ("quickstart", "embed", "tune", "search"))
GROUPS = {"data": "Look at pairs, fetch them, filter them, and remove near-duplicates."}

# Those that several processes do together, under torchrun.
ON_RANKS = (EmbedConfig, TuneConfig, EvalConfig)
# Seconds that a failed process waits for torchrun to end it, because the one that speaks for all has failed as well.
PATIENCE = 10.0

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def parse(argv: Sequence[str]) -> Any:
    """The config that the command line asks for; prints help and exits where that is asked for.

    Raises `ConfigError` with what can't be read.
    """
    commands = {name: config for name, (config, _) in COMMANDS.items()}
    group = argv[0] if argv and argv[0] in GROUPS else ""
    if list(argv[bool(group) :]) in ([], ["-h"], ["--help"]):
        names = arguments.names_under(group, commands, GROUPS)
        print(arguments.listing(group, GROUPS.get(group, DESCRIPTION), names, () if group else FIRST_STEPS))
        sys.exit(0)
    name, rest = arguments.find(argv, commands, GROUPS)
    return arguments.read(name, commands[name], rest)


def find_command(config: Any) -> Command[..., Any, Any]:
    """The command whose config this is."""
    place = next(where for kind, where in COMMANDS.values() if kind is type(config))
    module, _, name = place.partition(":")
    found: Command[..., Any, Any] = getattr(importlib.import_module(module), name)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 and one line on bad input, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a letter shows a question mark
    if list(argv) in (["--version"], ["-V"]):
        from litune import __version__

        print(f"litune {__version__}")
        return
    try:
        config = parse_on_ranks(argv)
        quiet_libraries()
        result = find_command(config).run(config)
        if several_ranks():
            importlib.import_module("litune.distributed").stop()
        show = SHOW.get(type(config))
        if show is not None and own_rank() == 0:
            show(config, result)
    except LituneError as why:
        fail(str(why))
    except KeyboardInterrupt:
        line = "litune: interrupted; the same command goes on where it was" if own_rank() == 0 else ""
        leave(line, "interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as why:
        if why.errno is None:
            raise
        fail(explain(why))
    except RuntimeError as why:
        if type(why).__name__ != "OutOfMemoryError":  # torch's: it is not imported here
            raise
        fail("the GPU's memory is too small for this model: end what else is on the GPU, or give --device cpu")


def explain(why: OSError) -> str:
    """What the system refused, and what to do; a temporary file is named as the file that it was to become."""
    name = re.sub(r"\.([^/]+)\.\d+\.tmp$", r"\1", os.fsdecode(why.filename)) if why.filename else ""
    if why.errno in FULL_DISK:
        where = f" while writing {name}" if name else ""
        return f"the disk is full{where} ({why.strerror}): what is finished is kept; free space, then the same command"
    return f"{name or 'a file'}: {why.strerror}: choose another path, or change what is there"


def parse_on_ranks(argv: Sequence[str]) -> Any:
    """The config, as `parse`; of several processes, one complains of what can't be read."""
    if own_rank() == 0:
        config = parse(argv)
    else:
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                config = parse(argv)
        except SystemExit:
            time.sleep(PATIENCE)
            raise
    if several_ranks() and not isinstance(config, ON_RANKS):
        raise ConfigError("embed, tune and eval alone run on several processes: start this one without torchrun")
    return config


def several_ranks() -> bool:
    """Whether this is one of several processes that torchrun started."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def own_rank() -> int:
    """The number of this process among those that torchrun started; 0 is the one that speaks."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def fail(message: str) -> None:
    """Print one line and exit with 2. Where all processes fail alike, rank 0 alone has the time to say so."""
    message = " ".join(message.split())
    leave(f"litune: error: {f'rank {own_rank()}: ' if own_rank() else ''}{message}", message, 2)


def leave(line: str, why: str, code: int) -> None:
    """Print `line` and exit; of several processes, the others end as well and are told `why`."""
    if several_ranks() and "litune.distributed" in sys.modules:
        sys.modules["litune.distributed"].leave(line, why, code)  # does not return from a group
    if own_rank() > 0:
        time.sleep(PATIENCE)
    if line:
        print(line, file=sys.stderr)
    sys.exit(code)


def quiet_libraries() -> None:
    """Keep the hub's library from drawing bars of its own, and the tokenizers' from asking about forks."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def show_eval(config: EvalConfig, results: dict[str, Any]) -> None:
    """Print the figures beside chance, with what they mean; exits with 1 where a task failed, after naming it."""
    runs = results.get("runs", {"": results})
    for name, found in runs.items():
        if name:
            print(f"\n{name}")
        show_run(found)
    if config.json:
        print(f"written to {config.json}")
    if config.out:
        print(f"reports in {config.out}")
    if failed := {one["task"]: one["reason"] for found in runs.values() for one in found.get("failed", ())}:
        for task, reason in failed.items():
            print(f"litune: failed: {task}: {reason}", file=sys.stderr)
        sys.exit(1)


def show_run(results: dict[str, Any]) -> None:
    """Print the figures of one run."""
    if found := results.get("retrieval"):
        print(f"retrieval: {found['images']:,} images, {found['captions']:,} captions")
        ks = list(found["text_to_image"])
        print(f"{'':16}" + "".join(f"{k:>12}" for k in ks))
        show_recalls(found)
        for lang, one in found.get("by_lang", {}).items():
            print(f"{lang}: {one['images']:,} images, {one['captions']:,} captions")
            show_recalls(one, "  ")
        print(found["definition"])
    if found := results.get("zero_shot"):
        print(f"zero-shot: {found['images']:,} images, {found['classes']:,} classes, templates {found['templates']}")
        for name in ("accuracy", "mean_per_class", "top5", "chance"):
            if name in found:
                ends = f"   {_ends(found['interval'][name])}" if name in found["interval"] else ""
                print(f"{name:16}{found[name]:>11.1%}{ends}")
        print(found["definition"])
    if rows := results.get("tasks"):
        show_tasks(rows, results["means"])


def show_recalls(found: dict[str, Any], indent: str = "") -> None:
    """Print both ways' recalls, each with its interval and chance."""
    for way, name in (("text_to_image", "text → image"), ("image_to_text", "image → text")):
        interval, chance = found["interval"][way], found["chance"][way]
        print(f"{indent + name:16}" + "".join(f"{value:>11.1%} " for value in found[way].values()))
        print(f"{indent + '  95% interval':16}" + "".join(f"{_ends(interval[k]):>11} " for k in found[way]))
        print(f"{indent + '  chance':16}" + "".join(f"{chance[k]:>11.1%} " for k in found[way]))


def show_tasks(rows: Sequence[dict[str, Any]], means: dict[str, Any]) -> None:
    """Print each task's figures, what was published, and each definition once."""
    for one in rows:
        asked = one["protocol"]
        about = f"{asked['captions']:,} captions" if "captions" in asked else f"{asked['classes']:,} classes"
        prompts = f", templates: {asked['templates']} ({asked['template_set']})" if "templates" in asked else ""
        languages = f" in {', '.join(asked['languages'])}" if asked.get("languages") else ""
        print(f"{one['name']}: {one['images']:,} images, {about}{languages}{prompts}")
        for figure, value in one["values"].items():
            ends = f"   {_ends(one['interval'][figure])}" if figure in one["interval"] else ""
            chance = f"   chance {one['chance'][figure]:.1%}" if figure in one["chance"] else ""
            print(f"  {figure:26}{value:>7.1%}{ends}{chance}")
        if fitted := one["extras"].get("calibration"):
            error, after = fitted["ece_before"], fitted["ece_after"]
            print(f"  {'calibration error':26}{error:>7.1%}   {after:.1%} at a fitted temperature")
        for system, row in one["extras"].get("published", {}).items():
            print(f"    published: {system}: " + ", ".join(f"{figure} {value:.1%}" for figure, value in row.items()))
        if note := one["extras"].get("published_note"):
            print(f"    {note}")
        for probe in ("ridge", "linear", "knn"):
            if learned := one["extras"].get(probe):
                about = f"{_ends(learned['interval'])}   chance {learned['chance']:.1%}"
                images = f"{learned['train_images']:,} images"
                print(f"  {probe + ' probe':26}{learned['accuracy']:>7.1%}   {about}   from {images}")
        if unchecked := one["extras"].get("unchecked"):
            print(f"  {unchecked}")
        if looked := one["extras"].get("contamination"):
            print("  " + (looked["warning"] or f"no copy among the {looked['tuned_images']:,} images it was tuned on"))
    for group, mean in means.items():
        print(
            f"{group}: {mean['mean']:.1%} over {mean['sets']} sets",
            *(f"{k} {v:.1%}" for k, v in mean["published"].items()),
        )
        if mean["note"]:
            print(f"    {mean['note']}")
    for definition in dict.fromkeys(one["definition"] for one in rows):
        print(definition)


def _ends(interval: Sequence[float]) -> str:
    """An interval of shares, in percent."""
    low, high = interval
    return f"{100 * low:.1f}–{100 * high:.1f}"


def show_compare(config: CompareConfig, results: dict[str, Any]) -> None:
    """Print the table; exits with 1 where a run failed, after naming it."""
    print((config.out / "table.md").read_text(encoding="utf-8"))
    print(f"written to {config.out}: table.md, results.json and the run folders")
    for one in results["failed"]:
        print(f"litune: failed: {one['row']}, seed {one['seed']}: {one['reason']}", file=sys.stderr)
    if results["failed"]:
        sys.exit(1)


def show_classified(config: ClassifyConfig, results: Sequence[Any]) -> None:
    """Print each image's labels, the most probable first."""
    for one in results:
        print(one.image)
        for label, probability in one.probabilities.items():
            print(f"  {probability:>6.1%}  {label}")


def show_inspected(config: InspectConfig | OverviewConfig, found: dict[str, Any], indent: str = "") -> None:
    """Print what is known, one line per fact."""
    for name, value in found.items():
        label = f"{indent}{name.replace('_', ' ')}"
        if value == {}:
            continue
        if isinstance(value, dict):
            print(label)
            show_inspected(config, value, indent + "  ")
        elif value is not None and value != []:
            several = value if isinstance(value, list) else [value]
            print(f"{label:43} " + ", ".join(f"{v:,}" if type(v) is int else _short(v) for v in several))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show_probe(config: ProbeConfig, results: dict[str, Any]) -> None:
    """Print the table, best first, with what it means."""
    print(importlib.import_module("litune.studies.probe").table(results))


def show_found(config: SearchConfig, results: Sequence[Any]) -> None:
    """Print scores, paths and first captions, or captions alone, best first."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for one in results:
        print(importlib.import_module("litune.index.search").line(one, width))


def show_export(config: ExportConfig, about: dict[str, Any]) -> None:
    """Print what the export could not take over, and what 8-bit integers cost."""
    for note in about.get("notes", []):
        print(note)
    if found := about.get("int8"):
        sizes = found["bytes"]
        print(f"text.int8.onnx: {sizes['text.int8.onnx'] / 1e6:.1f} MB instead of {sizes['text.onnx'] / 1e6:.1f} MB")
        if "recall" not in found:
            more = "; give --store for recall@k" if config.to == "onnx" else ""
            print(f"cosines with the float32 features: least {found['cosine']['least']:.4f}{more}")
        else:
            before, after = found["recall"]["float32"], found["recall"]["int8"]
            for way, name in (("text_to_image", "text → image"), ("image_to_text", "image → text")):
                print(f"{name:16}" + "  ".join(f"{k} {before[way][k]:.1%} → {after[way][k]:.1%}" for k in before[way]))


def show_filtered(config: FilterConfig, found: dict[str, Any]) -> None:
    """Print what each rule dropped, with an example."""
    print(f"{'rule':28}{'tested':>12}{'images':>12}{'captions':>12}  dropped, as")
    for rule in found["rules"]:
        counts = rule["tested"], rule["dropped_images"], rule["dropped_captions"]
        example: dict[str, str] = next(iter(rule["examples"]), {})
        print(
            f"{rule['rule']:28}" + "".join(f"{n:>12,}" for n in counts),
            "",
            example.get("caption", example.get("key", "")),
        )
    print(f"{'kept':28}{'':12}{found['kept_images']:>12,}{found['kept_captions']:>12,}")


def show_dedup(config: DedupConfig, found: dict[str, Any]) -> None:
    """Print what was removed, and why."""
    print(f"{'duplicates':40}{'equal bytes':>14}{'by pixels':>14}")
    for name, counts in found["removed"].items():
        where = "within the pairs" if name == "pairs" else f"of {name}"
        print(f"{where:40}{counts['exact']:>14,}{counts['near']:>14,}")
    print(f"{found['damaged']:,} damaged; {found['kept']:,} of {found['images']:,} images kept")


SHOW: dict[type[Any], Callable[[Any, Any], None]] = {
    EvalConfig: show_eval,
    CompareConfig: show_compare,
    ClassifyConfig: show_classified,
    SearchConfig: show_found,
    InspectConfig: show_inspected,
    ProbeConfig: show_probe,
    ExportConfig: show_export,
    OverviewConfig: show_inspected,
    FilterConfig: show_filtered,
    DedupConfig: show_dedup,
}
