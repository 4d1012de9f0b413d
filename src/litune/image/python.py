"""Any Python callable as an image tower."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from pathlib import Path

from torch import nn

from litune.errors import TowerError
from litune.image.pictures import ImageTransform
from litune.image.tower import ImageTower, weights_hash
from litune.towers.specs import no_more, reason


def python_tower(spec: str, name: str, options: dict[str, str]) -> ImageTower:
    """`python:module:function`: the function returns (encode, preprocess).

    `encode` takes a float or uint8 tensor [B, …] of stacked preprocessed pictures and gives features [B, W];
    if it is an `nn.Module` its weights are hashed, otherwise the module's source.
    """
    no_more(spec, options, [])
    module_name, colon, function_name = name.partition(":")
    if not colon:
        raise TowerError(f"{spec!r} should read python:MODULE:FUNCTION")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as why:
        raise TowerError(reason(f"the module {module_name!r} of {spec!r} can't be imported", why)) from why
    finally:
        sys.path.pop(0)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise TowerError(f"the module {module_name!r} has no function {function_name!r}")
    returned = function()
    if not (isinstance(returned, tuple) and len(returned) == 2 and all(callable(m) for m in returned)):
        raise TowerError(
            f"{name}() should return (encode, preprocess), two callables; it returned {type(returned).__name__}"
        )
    encode, preprocess = returned
    source = inspect.getsource(module).encode()
    weights = weights_hash(encode) if isinstance(encode, nn.Module) else hashlib.sha256(source).hexdigest()
    if isinstance(preprocess, ImageTransform):
        description = preprocess.describe()
    else:
        description = {"source": hashlib.sha256(source).hexdigest()}
    return ImageTower(spec, encode, preprocess, description=description, weights=weights, pooling="callable")
