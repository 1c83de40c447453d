"""Where weights come from: random, trained once here on real text, a checkpoint folder, or the Hugging Face hub.

random    new weights of the configuration's own initialisation, made on the device in the target dtype
trained   a small shape trained once by a fixed recipe (effbench.models.training); quality figures stand on it
path, hub a checkpoint; another number of key/value heads is reached by converting its attention

A format that stores weights packs the decoder block by block. Random weights are made that way from the start: the model is laid
out without memory, and each block is made on the device, drawn, and packed before the next one. Loaded weights lie on the host
first and go to the device one block at a time. Either way no more than one block is ever at full size on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from effbench.costs import key_value_heads
from effbench.errors import ModelError
from effbench.models import checkpoints
from effbench.models.context import architecture, context, stack
from effbench.models.shapes import shape
from effbench.models.training import RECIPE, Recipe, train_once, trained_digest, trained_folder
from effbench.schema import ModelRef, Spec
from effbench.surgery import convert_key_value_heads
from effbench.technique import Technique

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    Formats = Sequence[Callable[[nn.Module], None]]


def weights_digest(spec: Spec) -> str:
    """Identity of a spec's weights: of the shape, of the recipe, or of the checkpoint's content. Raises ModelError."""
    if spec.model.weights == "random":
        return shape(spec.model.name).digest
    return trained_digest(spec) if spec.model.weights == "trained" else checkpoints.content_digest(spec.model)


def prepare(spec: Spec, recipe: Recipe = RECIPE) -> None:
    """Make what `load` needs and a measurement must not pay for: download, or train once."""
    if spec.model.weights == "hub":
        checkpoints.folder(spec.model)
    if spec.model.weights != "trained":
        return

    def make() -> PreTrainedModel:
        techniques = architecture(stack(spec))
        config = configuration(spec.model)
        for technique in techniques:
            technique.configure(config)
        config.dtype = "float32"
        return fresh(spec, config, spec.device, techniques)

    train_once(spec, make, recipe)


def configuration(model: ModelRef) -> PretrainedConfig:
    """transformers' configuration of a shape or checkpoint, before any technique."""
    from transformers import AutoConfig

    if model.weights in ("path", "hub"):
        return AutoConfig.from_pretrained(checkpoints.folder(model))
    model_type, values = checkpoints.config_values(model)
    return AutoConfig.for_model(model_type, **values)


def load(
    spec: Spec, config: PretrainedConfig, device: str, techniques: Sequence[Technique] = (), formats: Formats = ()
) -> PreTrainedModel:
    """The model with its weights on `device` in `config.dtype`, the architecture `techniques` applied and its blocks packed."""
    if not formats:
        return _load(spec, config, device, techniques)
    if spec.model.weights == "random" and not any(_replaces(technique) for technique in techniques):
        return _drawn_block_by_block(config, device, formats)
    model = _load(spec, config, "cpu", techniques)
    for block in blocks(model):
        _pack(block.to(device), formats)
    return model.to(device)


def _load(spec: Spec, config: PretrainedConfig, device: str, techniques: Sequence[Technique]) -> PreTrainedModel:
    if spec.model.weights == "random":
        return fresh(spec, config, device, techniques)
    if spec.model.weights == "trained":
        return _load_trained(spec, fresh(spec, config, device, techniques), device)
    return applied(_load_checkpoint(spec.model, config, device), techniques)


def blocks(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The decoder's layers, in order."""
    decoder = model.get_decoder()
    yield from decoder.h if model.config.model_type == "bloom" else decoder.layers


def fresh(spec: Spec, config: PretrainedConfig, device: str, techniques: Sequence[Technique]) -> PreTrainedModel:
    """A model with new weights and these architecture techniques; one of them may build all of it (an attention-free mixer)."""
    known = context(spec)
    built = next((model for technique in techniques if (model := technique.load(known)) is not None), None)
    return applied(new_model(config, device) if built is None else built.to(device), techniques)


def applied(model: PreTrainedModel, techniques: Sequence[Technique]) -> PreTrainedModel:
    """`model` after the `apply` of each technique."""
    for technique in techniques:
        model = technique.apply(model)
    return model


def new_model(config: PretrainedConfig, device: str) -> PreTrainedModel:
    """A model with new weights, made on the device in `config.dtype` and initialised once (torch's own pass is skipped)."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with torch.device(device):
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config)
        model.init_weights()
    return model


def _drawn_block_by_block(config: PretrainedConfig, device: str, formats: Formats) -> PreTrainedModel:
    """`new_model` packed as it is made; the same random numbers in the same order, so the same weights before packing."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    layers = {id(block) for block in blocks(model)}

    def draw(module: nn.Module) -> None:
        for child in module.children():
            draw(child)
        if any(tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            module.to_empty(device=device, recurse=False)
        model._initialize_weights(module)
        if id(module) in layers:
            _pack(module, formats)

    with torch.no_grad(), torch.device(device):
        draw(model)
    model.tie_weights()
    return model


def _pack(block: nn.Module, formats: Formats) -> None:
    for pack in formats:
        pack(block)


def _replaces(technique: Technique) -> bool:
    """Whether a technique puts modules of its own into a model, or builds all of it."""
    return type(technique).apply is not Technique.apply or type(technique).load is not Technique.load


def _load_trained(spec: Spec, model: PreTrainedModel, device: str) -> PreTrainedModel:
    from safetensors.torch import load_model

    file = trained_folder(spec) / "model.safetensors"
    if not file.is_file():
        raise ModelError(
            f"The weights of {spec.model.name!r} are not trained yet ({file.parent} is missing). Let effbench run prepare them."
        )
    load_model(model, file, device=device)
    return model


def _load_checkpoint(model: ModelRef, config: PretrainedConfig, device: str) -> PreTrainedModel:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = checkpoints.folder(model)
    native = configuration(model)
    wanted, own = (key_value_heads(c.to_dict()) for c in (config, native))
    place = {} if device == "cpu" else {"device_map": {"": device}}
    try:
        if wanted == own:
            return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=config.dtype, **place)
        source = AutoModelForCausalLM.from_pretrained(folder, config=native, dtype=config.dtype)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"The checkpoint {folder} cannot be loaded: {error}") from error
    changed = new_model(config, device)
    changed.load_state_dict(convert_key_value_heads(source.state_dict(), native.to_dict(), wanted))
    return changed.eval()
