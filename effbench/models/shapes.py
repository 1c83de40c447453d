"""The catalogue of model shapes: one YAML file each, read without torch or transformers.

A published shape carries the values of its Hugging Face `config.json` (named in `source`) with its published vocabulary,
and the published number of parameters; a shape of this project says so in `source`. Values are written the way
transformers 5 takes them: the rotary base lives in `rope_parameters`.

`catalogue/layers/` holds layers of experts of published models with their widths divided, for `moe_layer` on CPUs: the values that
describe the layer, under the names of the model's configuration, and no whole model. Of a whole shape `moe_layer` takes the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from effbench.errors import UnknownName
from effbench.schema import digest

CATALOGUE = Path(__file__).parent / "catalogue"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One shape. `config` holds the keyword arguments of transformers' configuration class of `model_type`."""

    name: str
    family: str
    source: str
    model_type: str
    num_parameters: int  # all weights, tied ones counted once
    config: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Identity by content: what is built, not what it is called."""
        return digest({"model_type": self.model_type, "config": dict(self.config)})

    @property
    def is_published(self) -> bool:
        """Whether somebody publishes weights of this shape."""
        return self.source.startswith("https://")


def shape_names() -> tuple[str, ...]:
    """Every shape of a whole model, sorted; lists files and reads none."""
    return _names(CATALOGUE)


def layer_names() -> tuple[str, ...]:
    """Every shape of one layer, sorted."""
    return _names(CATALOGUE / "layers")


@cache
def shape(name: str) -> Shape:
    """The shape of this name, of a model or of a layer. Raises UnknownName with near misses."""
    models, layers = shape_names(), layer_names()
    if name not in (*models, *layers):
        raise UnknownName("model", name, (*models, *layers))
    from ruamel.yaml import YAML

    folder = CATALOGUE if name in models else CATALOGUE / "layers"
    return Shape(**YAML(typ="safe", pure=True).load(folder / f"{name}.yaml"))


def _names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name.removesuffix(".yaml") for path in folder.glob("*.yaml")))
