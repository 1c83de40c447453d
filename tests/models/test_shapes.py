"""The catalogue: published values, published sizes, and a reader that loads nothing heavy."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from effbench.errors import UnknownName
from effbench.models.shapes import CATALOGUE, shape, shape_names

PUBLISHED = (
    "llama-3.1-8b", "llama-3.2-1b", "llama-3.2-3b", "mistral-7b-v0.1", "mistral-7b-v0.3", "mistral-small-24b", "phi-3.5-mini",
    "phi-4", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-14b", "qwen2.5-32b", "qwen2.5-3b", "qwen2.5-72b", "qwen2.5-7b", "yi-34b",
    "deepseek-r1-distill-qwen-1.5b", "deepseek-r1-distill-llama-8b", "deepseek-r1-distill-qwen-14b",
    "mixtral-8x7b", "olmoe-1b-7b", "qwen1.5-moe-a2.7b", "qwen3-30b-a3b", "deepseek-v2-lite", "deepseek-v3", "gpt-oss-20b",
)  # fmt: skip
OWN = ("small-llama", "tiny-llama", "tiny-mistral", "tiny-mixtral", "tiny-qwen2")
KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def test_catalogue_holds_the_promised_shapes() -> None:
    assert set(shape_names()) == {*PUBLISHED, *OWN}
    assert {name for name in shape_names() if shape(name).is_published} == set(PUBLISHED)


@pytest.mark.parametrize("name", shape_names())
def test_file_is_named_like_its_shape_and_says_its_source(name: str) -> None:
    found = shape(name)
    assert found.name == name
    assert found.family
    assert set(KEYS) <= set(found.config)
    if found.is_published:
        assert found.source.startswith("https://huggingface.co/")
        assert found.source.endswith("/config.json")
    else:
        assert "of this project" in found.source


@pytest.mark.parametrize("name", shape_names())
def test_transformers_takes_every_value_without_a_warning(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = shape(name)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # else its warnings never reach the test
    with caplog.at_level(logging.WARNING):
        config = AutoConfig.for_model(found.model_type, **found.config)
    assert not caplog.records
    kept = config.to_dict()
    unknown = set(found.config) - set(type(config)().to_dict()) - set(config.attribute_map) - {"head_dim"}
    assert not unknown, "keys that the configuration class does not know"
    for key, value in found.config.items():
        if isinstance(value, dict):
            assert value.items() <= kept[key].items(), key
        elif key != "sliding_window" or found.config.get("use_sliding_window", True):
            assert getattr(config, key) == value, key


@pytest.mark.parametrize("name", shape_names())
def test_number_of_parameters_is_the_published_one(name: str) -> None:
    """Built on the meta device; publications round, the sum of the tensors does not: 1 % would pass, equality is found."""
    found = shape(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(found.model_type, **found.config))
    counted = sum(p.numel() for p in model.parameters())
    assert counted == pytest.approx(found.num_parameters, rel=0.01)
    assert counted == found.num_parameters


@pytest.mark.parametrize("name", OWN)
def test_own_shapes_suit_a_cpu_and_every_number_of_key_value_heads(name: str) -> None:
    config = shape(name).config
    assert config["vocab_size"] == 256
    assert config["num_attention_heads"] == 8
    assert config["max_position_embeddings"] >= 512
    assert 0.5e6 <= shape(name).num_parameters <= (1.5e6 if name.startswith("tiny") else 6e6)


def test_unknown_shape_is_refused_with_near_misses() -> None:
    with pytest.raises(UnknownName, match=r"Unknown model 'tiny-lama'. Did you mean: tiny-llama"):
        shape("tiny-lama")


def test_digest_is_of_the_content() -> None:
    digests = {shape(name).digest for name in shape_names()}
    twins = {"deepseek-r1-distill-llama-8b": "llama-3.1-8b", "deepseek-r1-distill-qwen-14b": "qwen2.5-14b"}
    assert all(shape(one).digest == shape(other).digest for one, other in twins.items()), "distilled into the same shape"
    assert len(digests) == len(shape_names()) - len(twins)
    assert shape("tiny-llama").digest == shape("tiny-llama").digest


def test_values_are_read_as_yaml_1_2_writes_them() -> None:
    text = (CATALOGUE / "qwen2.5-0.5b.yaml").read_text()
    assert "rms_norm_eps: 1.0e-6" in text
    values = shape("qwen2.5-0.5b").config
    assert values["rms_norm_eps"] == 1e-6
    assert values["tie_word_embeddings"] is True
    assert json.loads(json.dumps(values)) == values, "plain JSON values only"


def test_reading_the_catalogue_loads_no_torch() -> None:
    program = (
        "import sys; from effbench.models.shapes import shape, shape_names; [shape(n) for n in shape_names()]\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
