# %% [markdown]
# # From tower to search
#
# An image tower that has learned to tell a thousand kinds of things apart can't be asked anything: it gives 1,280
# numbers for a picture, and no words. In the next minutes it gets a language: we store what it sees in 1,914 emoji,
# teach a text tower to read that from their names, and then sort and search 300 emoji that it was never shown.
#
# A processor with two cores will do. Everything comes as packages.

# %%
import importlib.util
import subprocess
import sys

LITUNE = "litune[quickstart]"  # or a clone's path, "./litune[quickstart]", or "litune[quickstart] @ git+https://…"
if importlib.util.find_spec("litune") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", LITUNE], check=True)

# %% tags=["parameters"]
TRAIN, HELD_OUT = 1614, 300  # emoji; fewer for a quick look
PAIRS = "16kpairs"  # how many pairs tuning sees
FOLDER = "tower-to-search"

# %% [markdown]
# ## Pairs
#
# All that is needed is pictures with captions. Here they are emoji, drawn by [OpenMoji](https://openmoji.org) (CC
# BY-SA 4.0), and their names. On disk they are what your own pairs would be: a folder of images, and a table beside
# it.

# %%
from itertools import islice
from pathlib import Path

from litune.studies.emoji import find_emoji, render

folder = Path(FOLDER)
emoji = find_emoji()
emoji = [
    *islice((one for one in emoji if one.split == "train"), TRAIN),
    *islice((one for one in emoji if one.split == "val"), HELD_OUT),
]
render(emoji, folder / "emoji", rendered=lambda: None)
print((folder / "emoji" / "captions.csv").read_text()[:160], "…", sep="")

# %%
from IPython.display import display
from PIL import Image, ImageDraw


def row_of(paths, size=88):
    """Pictures side by side."""
    row = Image.new("RGB", (size * len(paths), size), "white")
    for i, path in enumerate(paths):
        row.paste(Image.open(path).convert("RGB").resize((size, size)), (i * size, 0))
    return row


row_of([folder / "emoji" / "images" / one.key for one in emoji[-8:]])

# %% [markdown]
# ## The locked tower looks once
#
# EfficientNet-Lite0, trained on ImageNet, encodes every picture. Its weights will never change, so this is done once:
# whatever we try later reads the stored features.

# %%
import litune

store = litune.embed(folder / "emoji", image_tower="efficientnet-lite0", out=folder / "features")
print(store)
print(store.features([0])[0, :6], "…")

# %% [markdown]
# The features know a lot already. Subtract their mean (those of this network are all positive), and the nearest
# neighbours of a picture are pictures of similar things. But one has to ask with a picture: there is no word for
# anything yet.

# %%
import numpy as np

features = store.features(slice(0, len(store)))
features -= features.mean(0)
features /= np.linalg.norm(features, axis=1, keepdims=True)
paths = store.metadata["image_path"].to_pylist()
asked = len(store) // 3
nearest = np.argsort(-features @ features[asked])[:8]
row_of([paths[i] for i in nearest])

# %% [markdown]
# ## A text tower learns to read it
#
# MiniLM, a small pre-trained text encoder, is tuned so that each name's feature lies near that of its picture and far
# from those of the others in the batch. No pictures are read: only the store, and text. (These settings are for
# few pairs and heads that begin at random; `start="fit"` is quicker.)

# %%
log = []
model = litune.tune(
    folder / "features",
    text_tower="minilm",
    duration=PAIRS,
    start="random",
    learning_rate=3e-4,
    head_rate=10,
    image_map="whiten",
    shrinkage=10,
    out=folder / "run",
    on_log=log.append,
)
steps = [line for line in log if "loss" in line]
for line in (steps[0], steps[len(steps) // 2], steps[-1]):
    print(f"step {line['step']:>3}  loss {line['loss']:.2f}")

# %% [markdown]
# ## How well does it read?
#
# Each held-out name is asked for among the held-out pictures. R@1: how often its own picture comes first; R@10: how
# often it is among the first ten. Chance stands beside it.

# %%
found = litune.eval(folder / "run", store=folder / "features", split="val")["retrieval"]
for k in (1, 5, 10):
    at = f"recall@{k}"
    print(f"R@{k:<3}{found['text_to_image'][at]:>6.1%}   chance {found['chance']['text_to_image'][at]:.1%}")

# %% [markdown]
# ## Classes out of words
#
# A class is a text. Each held-out picture goes to the text that is nearest to it; none of these texts was any
# picture's name.

# %%
held_out = [i for i, split in enumerate(store.metadata["split"].to_pylist()) if split == "val"]
pictures = model.encode_features(store.features(held_out))  # [300, D], of length one
classifier = model.zero_shot(["flag", "clock", "animal", "vehicle", "smiling or frowning face"])
probabilities = classifier.probabilities(pictures)  # [300, 5]
for i, name in enumerate(classifier.class_names):
    surest = probabilities[:, i].argsort(descending=True)[:8].tolist()
    print(f"{name}: " + ", ".join(f"{probabilities[j, i]:.0%}" for j in surest))
    display(row_of([paths[held_out[j]] for j in surest]))

# %% [markdown]
# ## Search by free-form text
#
# The same dot product the other way round: one text against all pictures. No index is needed at this size, nor at a
# hundred thousand pictures.


# %%
def search(query, top=8):
    """The held-out pictures nearest to a text, best first."""
    scores = pictures @ model.encode_text(query)[0]
    return [paths[held_out[i]] for i in scores.argsort(descending=True)[:top].tolist()]


queries = ["something to eat", "a wild animal", "a way to travel", "music", "cold weather"]
sheet = Image.new("RGB", (8 * 88, len(queries) * 110), "white")
for i, query in enumerate(queries):
    ImageDraw.Draw(sheet).text((4, 110 * i + 4), query, fill="black", font_size=14)
    sheet.paste(row_of(search(query)), (0, 110 * i + 22))
sheet

# %% [markdown]
# Hits and misses are shown as they come. 1,614 names are few; a few thousand photos with captions of your own go much
# further.
#
# The run is a folder of plain files. `litune.load` opens it again, and all of this works from the command line too:
#
# ```bash
# litune search tower-to-search/run tower-to-search/features "something to eat" --sheet found.png
# litune export tower-to-search/run --to onnx
# ```
