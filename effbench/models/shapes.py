"""The catalogue of model shapes: one YAML file each, read without torch or transformers.

A published shape carries the values of its Hugging Face `config.json` (named in `source`) with its published vocabulary,
and the published number of parameters; a shape of this project says so in `source`. Values are written the way
transformers 5 takes them: the rotary base lives in `rope_parameters`.
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
    """Every shape of the catalogue, sorted; lists files and reads none."""
    return tuple(sorted(path.name.removesuffix(".yaml") for path in CATALOGUE.glob("*.yaml")))


@cache
def shape(name: str) -> Shape:
    """The shape of this name. Raises UnknownName with near misses."""
    if name not in shape_names():
        raise UnknownName("model", name, shape_names())
    from ruamel.yaml import YAML

    return Shape(**YAML(typ="safe", pure=True).load(CATALOGUE / f"{name}.yaml"))
