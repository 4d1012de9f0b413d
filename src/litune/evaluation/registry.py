"""The registry of evaluation sets: what each is called, and what to get."""

from __future__ import annotations

from typing import Any

from litune.errors import ConfigError
from litune.evaluation.class_vectors import TRANSLATED
from litune.evaluation.task import Task

_TREE = "one folder of images per class, or another layout of docs/evaluation.md"
_IMAGENET = ("imagenet1k", "imagenet", "ILSVRC2012", "imagenet-1k", "imagenet1k-unverified")
_HUB = "clip-benchmark's webdataset shards or the original as class folders"


def _vtab(name: str, get: str, *, names: str | None = None, templates: str | None = None, **more: Any) -> Task:
    return Task(name, get, names=names, templates=templates or name, **more)


_ALL = [
    Task(
        "imagenet1k",
        f"the 50,000 validation images of ILSVRC 2012 in folders of WordNet ids under imagenet1k/val, or {_HUB}",
        names="imagenet1k", folders=_IMAGENET[1:],
    ),
    Task(
        "imagenet-v2", "ImageNetV2 matched-frequency (10,000 images in folders 0 to 999) under imagenet-v2",
        names="imagenet1k", templates="imagenet1k",
        folders=("imagenetv2", "ImageNetV2-matched-frequency", "imagenetv2-matched-frequency-format-val"),
    ),
    Task(
        "imagenet-r", "imagenet-r.tar (30,000 images in 200 folders of WordNet ids) unpacked under imagenet-r",
        names="imagenet1k", templates="imagenet1k", subset="imagenet-r",
    ),
    Task(
        "imagenet-a", "imagenet-a.tar (7,500 images in 200 folders of WordNet ids) unpacked under imagenet-a",
        names="imagenet1k", templates="imagenet1k", subset="imagenet-a",
    ),
    Task(
        "imagenet-sketch", "ImageNet-Sketch (50,889 images in 1,000 folders of WordNet ids) under imagenet-sketch",
        names="imagenet1k", templates="imagenet1k", folders=("imagenet_sketch", "sketch"),
    ),
    Task(
        "objectnet", "ObjectNet unpacked under objectnet: objectnet-1.0/images and mappings, both as they come",
        names="imagenet1k", templates="imagenet1k", truth="objectnet",
    ),
    Task(
        "imagenet-real",
        "the images of imagenet1k, their files called ILSVRC2012_val_00000001 and so on; the labels come with timm",
        names="imagenet1k", templates="imagenet1k", truth="real", folders=_IMAGENET,
    ),
    Task("cifar10", "cifar-10-batches-py (the Python version) under cifar10", folders=("cifar-10-batches-py",)),
    # VTAB, natural
    _vtab("caltech101", f"Caltech 101 under caltech101: {_TREE}", names="caltech101", metric="mean_per_class",
          sorted_names=True, folders=("caltech-101",)),
    _vtab("cifar100", "cifar-100-python (the Python version) under cifar100", folders=("cifar-100-python",)),
    _vtab("dtd", "the Describable Textures dataset under dtd: images and labels as they come, or class folders"),
    _vtab("flowers102", f"Oxford Flowers 102 under flowers102: {_TREE}, the folders called by name or 0 to 101",
          names="flowers", templates="flowers", metric="mean_per_class", folders=("flowers", "oxford_flowers102")),
    _vtab("pets", "Oxford-IIIT Pet under pets: images and annotations as they come, or class folders", names="pets",
          metric="mean_per_class", folders=("oxford-iiit-pet", "oxford_iiit_pet")),
    _vtab("sun397", f"SUN397's test split under sun397: {_TREE}"),
    _vtab("svhn", f"SVHN's test images under svhn: {_TREE}, the folders called 0 to 9", names="svhn"),
    # VTAB, specialized
    _vtab("eurosat", f"EuroSAT (RGB) under eurosat: {_TREE}", names="eurosat", sorted_names=True),
    _vtab("resisc45", f"RESISC45 under resisc45: {_TREE}"),
    _vtab("patch_camelyon", f"PatchCamelyon's test split under patch_camelyon: {_TREE}, the folders called 0 and 1",
          names="pcam", templates="pcam", folders=("pcam",)),
    _vtab("diabetic_retinopathy", f"Diabetic Retinopathy's test split: {_TREE}, the folders called 0 to 4",
          names="diabetic_retinopathy"),
    # VTAB, structured
    _vtab("clevr_count", f"CLEVR's test split by the number of objects: {_TREE}, the folders called 0 (three) to 7",
          names="clevr_count_all", templates="clevr_count_all", folders=("clevr_count_all",)),
    _vtab("clevr_distance", f"CLEVR's test split by the distance of the closest object: {_TREE}, called 0 to 5",
          names="clevr_closest_object_distance", templates="clevr_closest_object_distance",
          folders=("clevr_closest_object_distance",)),
    _vtab("dmlab", f"DMLab's test split under dmlab: {_TREE}, the folders called 0 to 5", names="dmlab"),
    _vtab("kitti_distance", f"KITTI's test split by the distance of the closest vehicle: {_TREE}, called 0 to 3",
          names="kitti_closest_vehicle_distance", templates="kitti_closest_vehicle_distance",
          folders=("kitti_closest_vehicle_distance",)),
    _vtab("dsprites_location", f"dSprites by x position in 16 bins: {_TREE}", templates="dsprites_label_x_position",
          folders=("dsprites_label_x_position",)),
    _vtab("dsprites_orientation", f"dSprites by orientation in 16 bins: {_TREE}",
          templates="dsprites_label_orientation", folders=("dsprites_label_orientation",)),
    _vtab("smallnorb_azimuth", f"SmallNORB by azimuth: {_TREE}", templates="smallnorb_label_azimuth",
          folders=("smallnorb_label_azimuth",)),
    _vtab("smallnorb_elevation", f"SmallNORB by elevation: {_TREE}", templates="smallnorb_label_elevation",
          folders=("smallnorb_label_elevation",)),
    # Retrieval
    Task(
        "coco", "COCO's 2014 images and Karpathy's dataset_coco.json (or coco_test_karpathy.json) under coco",
        kind="retrieval", metric="text_to_image recall@1", splits=("test",), folders=("mscoco_captions", "mscoco"),
    ),
    Task("flickr30k", "Flickr30k's images and dataset_flickr30k.json (or flickr30k_test_karpathy.txt) under flickr30k",
         kind="retrieval", metric="text_to_image recall@1"),
    Task("flickr8k", "Flickr8k's images and dataset_flickr8k.json, captions.csv or captions.txt under flickr8k",
         kind="retrieval", metric="text_to_image recall@1"),
    Task("wit", "a table of images, captions and their languages (column lang) with the images under wit",
         kind="retrieval", metric="text_to_image recall@1"),
    Task("babel-imagenet", "the images of imagenet1k; the names come with the package", names="imagenet1k",
         templates="imagenet1k", folders=_IMAGENET),
]  # fmt: skip

TASKS: dict[str, Task] = {task.name: task for task in _ALL}
GROUPS: dict[str, tuple[str, ...]] = {
    "imagenet": (
        "imagenet1k", "imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch", "objectnet", "imagenet-real",
    ),
    "vtab-natural": ("caltech101", "cifar100", "dtd", "flowers102", "pets", "sun397", "svhn"),
    "vtab-specialized": ("eurosat", "resisc45", "patch_camelyon", "diabetic_retinopathy"),
    "vtab-structured": (
        "clevr_count", "clevr_distance", "dmlab", "kitti_distance", "dsprites_location", "dsprites_orientation",
        "smallnorb_azimuth", "smallnorb_elevation",
    ),
    "retrieval": ("coco", "flickr30k", "flickr8k"),
}  # fmt: skip
GROUPS["vtab"] = GROUPS["vtab-natural"] + GROUPS["vtab-specialized"] + GROUPS["vtab-structured"]


def check_lang(task: Task, lang: str) -> None:
    """Raise `ConfigError` where a task has no class names in this language."""
    if lang and task.kind == "classification" and (not task.imagenet or lang not in TRANSLATED):
        raise ConfigError(f"{task.name} has no names in {lang!r}: imagenet1k has {', '.join(TRANSLATED)}")
