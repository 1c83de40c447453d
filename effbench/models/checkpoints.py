"""Checkpoints that others made: a folder (`path`) or a Hugging Face repository (`hub`). Torch-free; nothing is loaded.

A repository is brought to a folder of the local Hugging Face cache first, so both are one case from there on.
Its location is OWNER/NAME or OWNER/NAME@REVISION.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from effbench import families
from effbench.errors import EffbenchError, ModelError
from effbench.layout import Layout
from effbench.models.shapes import shape
from effbench.schema import ModelRef, digest

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
SNAPSHOT = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")  # weights, tokenizer, chat template


def config_values(model: ModelRef) -> tuple[str, Mapping[str, Any]]:
    """(model type, configuration values) of a shape of the catalogue or of a checkpoint's config.json."""
    if model.weights in ("random", "trained"):
        known = shape(model.name)
        return known.model_type, known.config
    values = _config_json(_config_file(model))
    return str(values["model_type"]), families.named(str(values["model_type"]), values)


def folder(model: ModelRef) -> Path:
    """The folder that holds the checkpoint's files, downloaded when it is a repository. Raises ModelError."""
    if model.weights == "hub":
        return _snapshot(_location(model))
    return _config_file(model).parent


def content_digest(model: ModelRef) -> str:
    """Identity of a checkpoint by content: of its files, or of the repository's commit."""
    if model.weights == "hub":
        file = _config_file(model)  # …/snapshots/<commit>/config.json
        return digest({"repository": _location(model).partition("@")[0], "commit": file.parent.name})
    return _folder_digest(_config_file(model).parent)


def has_tokenizer(model: ModelRef) -> bool:
    """Whether a checkpoint reads words: a model saved without a tokenizer reads bytes. Raises ModelError."""
    if model.weights == "hub":
        return _hub_has_tokenizer(_location(model))
    return holds_tokenizer(_config_file(model).parent)


def holds_tokenizer(root: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return any((root / name).is_file() for name in TOKENIZER_FILES)


def mismatch(model: ModelRef, layout: Layout) -> str | None:
    """Where the tensors in a folder's files are other than its own configuration says, as a sentence; None where they agree.

    `layout` is that of the configuration, before any technique. Only headers are read. Names that the files do not have are
    not judged, since libraries rename (a mixture's experts are stored one by one), unless layers are missing.
    """
    stored = _stored_shapes(folder(model))
    layers = {int(m.group(1)) for name in stored if (m := re.match(r"(?:model\.layers|(?:transformer\.)?h)\.(\d+)\.", name))}
    told = int(layout.config["num_hidden_layers"])
    if layers and max(layers) + 1 != told:
        return f"the checkpoint {folder(model)} holds {max(layers) + 1} decoder layers and its config.json says {told}"
    for weight in layout.weights:
        for name in {weight.path.replace("*", "0"), weight.path.replace("*", str(told - 1))}:
            if stored.get(name, weight.shape) != weight.shape:
                found, wanted = (" × ".join(map(str, shape)) for shape in (stored[name], weight.shape))
                return f"the checkpoint {folder(model)} holds {name} of {found} and its config.json asks for {wanted}"
    return None


@cache
def _stored_shapes(root: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of a folder, from the headers of its files; a file that cannot be read is left to the loader."""
    found: dict[str, tuple[int, ...]] = {}
    for file in root.glob("*.safetensors"):
        try:
            with file.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(min(size, file.stat().st_size)))
            found |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def _location(model: ModelRef) -> str:
    if not model.location:
        raise ModelError(f"Weights {model.weights!r} of {model.name!r} need a location: a folder, or a repository for hub.")
    return model.location


def _config_file(model: ModelRef) -> Path:
    location = _location(model)
    if model.weights == "hub":
        return _hub_config(location)
    root = Path(location).expanduser().resolve()
    if not root.is_dir():
        raise ModelError(f"There is no checkpoint folder {root}. Give a folder that holds config.json and *.safetensors.")
    if not (root / "config.json").is_file():
        raise ModelError(f"The folder {root} holds no config.json. Save a model there with save_pretrained.")
    if not any(root.glob("*.safetensors")):
        raise ModelError(
            f"The folder {root} holds no *.safetensors. Save the model there with save_pretrained of transformers."
        )
    return root / "config.json"


def _config_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ModelError(f"{path} names no model_type, so nobody knows how to build it.")
    return values


@cache
def _folder_digest(root: Path) -> str:
    """SHA-256 over config.json, every *.safetensors and the tokenizer's files, by name."""
    files = [root / "config.json", *sorted(root.glob("*.safetensors")), *(root / name for name in TOKENIZER_FILES)]
    files = [file for file in files if file.name not in TOKENIZER_FILES or file.is_file()]
    try:
        found = {}
        for file in files:
            with file.open("rb") as stream:
                found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"The checkpoint {root} cannot be read: {error.strerror} ({error.filename}).") from error
    return digest(found)


@cache
def _hub_config(location: str) -> Path:
    from huggingface_hub import hf_hub_download

    repository, _, revision = location.partition("@")
    try:
        return Path(hf_hub_download(repository, "config.json", revision=revision or None))
    except Exception as error:  # mapped once, here
        raise _hub_error(location, error) from error


@cache
def _hub_has_tokenizer(location: str) -> bool:
    from huggingface_hub import errors, hf_hub_download

    repository, _, revision = location.partition("@")
    try:
        hf_hub_download(repository, "tokenizer_config.json", revision=revision or None)
    except errors.RemoteEntryNotFoundError:
        return False
    except Exception as error:  # mapped once, here
        raise _hub_error(location, error) from error
    return True


@cache
def _snapshot(location: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = location.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(SNAPSHOT)))
    except Exception as error:  # mapped once, here
        raise _hub_error(location, error) from error


def _hub_error(location: str, error: Exception) -> EffbenchError:
    """One sentence for what the hub library raised, and what would work."""
    from huggingface_hub import errors

    cases: tuple[tuple[type[Exception], str], ...] = (
        (errors.GatedRepoError, "is gated. Accept its licence on huggingface.co and log in with: hf auth login"),
        (errors.RevisionNotFoundError, "has no such revision. Give a branch, tag or commit after @."),
        (
            errors.RepositoryNotFoundError,
            "was not found, or is private. Check the name OWNER/NAME, or log in with: hf auth login",
        ),
        (errors.EntryNotFoundError, "lacks a file that a model needs (config.json, *.safetensors)."),
        (errors.HFValidationError, "is no repository name. Write OWNER/NAME or OWNER/NAME@REVISION."),
    )
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | ConnectionError):
        reason = (
            "is not in the local cache and the hub cannot be reached. Download it where there is a network, and give its folder"
            " as weights: path."
        )
    else:
        fallback = f"cannot be had: {error or type(error).__name__}"
        reason = next((text for kind, text in cases if isinstance(error, kind)), fallback)
    return ModelError(f"The repository {location!r} {reason}")
