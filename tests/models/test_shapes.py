"""The catalogue: published values, published sizes, and a reader that loads nothing heavy."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
from transformers import AutoConfig

from effbench.errors import UnknownName
from effbench.models.shapes import CATALOGUE, shape, shape_names

# 10⁹ parameters, as the model's card says; where it rounds to fewer than three digits, as Hugging Face shows for its safetensors.
PUBLISHED = {
    "llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21, "llama-3.1-8b": 8.03, "qwen2.5-0.5b": 0.494, "qwen2.5-1.5b": 1.54,
    "qwen2.5-3b": 3.09, "qwen2.5-7b": 7.61, "qwen2.5-14b": 14.7, "qwen2.5-32b": 32.5, "qwen2.5-72b": 72.7,
    "mistral-7b-v0.1": 7.24, "mistral-7b-v0.3": 7.25, "mistral-small-24b": 23.6, "phi-3.5-mini": 3.82, "phi-4": 14.7,
    "yi-34b": 34.4, "deepseek-r1-distill-qwen-1.5b": 1.78, "deepseek-r1-distill-llama-8b": 8.03,
    "deepseek-r1-distill-qwen-14b": 14.8, "mixtral-8x7b": 46.7, "olmoe-1b-7b": 6.92, "qwen1.5-moe-a2.7b": 14.3,
    "qwen3-30b-a3b": 30.5, "deepseek-v2-lite": 15.7, "deepseek-v3": 671, "gpt-oss-20b": 20.91,
    "bloomz-560m": 0.559, "bloomz-1b1": 1.07, "bloomz-1b7": 1.72, "bloomz-3b": 3.00, "bloomz-7b1": 7.07,
}  # fmt: skip
OWN = ("small-llama", "tiny-bloom", "tiny-llama", "tiny-mistral", "tiny-mixtral", "tiny-olmoe-64", "tiny-qwen2")
KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
# What a family always has and its configuration does not say, so that the file does.
IMPLIED = {"bloom": {"intermediate_size", "num_key_value_heads", "gated_feed_forward", "max_position_embeddings"}}
VOCABULARY = {"tiny-bloom": 256 + 65}  # bytes and language tags; else bytes


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
    unknown -= IMPLIED.get(found.model_type, set())
    assert not unknown, "keys that the configuration class does not know"
    for key, value in found.config.items():
        if isinstance(value, dict):
            assert value.items() <= kept[key].items(), key
        elif key != "sliding_window" or found.config.get("use_sliding_window", True):
            assert getattr(config, key) == value, key


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters_is_the_published_one(name: str) -> None:
    """To 1 %, what publications round; tests/test_families.py finds the exact number on the meta device."""
    assert shape(name).num_parameters == pytest.approx(1e9 * PUBLISHED[name], rel=0.01)


# Values that are not those of the library's configuration class, whose defaults describe one published model of the family.
DIFFERENT = {
    "mistral-7b-v0.1": {"max_position_embeddings", "rms_norm_eps"},
    "phi-3.5-mini": {"max_position_embeddings", "sliding_window"},  # of Phi-3-mini-4k
    "mixtral-8x7b": {"max_position_embeddings", "router_aux_loss_coef"},
    "olmoe-1b-7b": {"intermediate_size"},  # the class has 2048; the published experts have 1024
    "qwen1.5-moe-a2.7b": {
        "max_position_embeddings", "sliding_window", "max_window_layers", "rope_parameters", "bos_token_id", "eos_token_id",
    },
    "deepseek-v3": {"max_position_embeddings", "rope_parameters"},
    "gpt-oss-20b": {  # of gpt-oss-120b
        "num_hidden_layers", "layer_types", "num_local_experts", "router_aux_loss_coef", "eos_token_id", "pad_token_id",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_values_are_the_library_s_defaults_where_these_describe_the_model(name: str) -> None:
    found = shape(name)
    defaults = type(AutoConfig.for_model(found.model_type))().to_dict()
    same = {
        key: value.items() <= defaults[key].items() if isinstance(value, dict) else value == defaults[key]
        for key, value in found.config.items()
    }
    assert {key for key, is_same in same.items() if not is_same} == DIFFERENT[name]


@pytest.mark.parametrize("name", OWN)
def test_own_shapes_suit_a_cpu_and_every_number_of_key_value_heads(name: str) -> None:
    config = shape(name).config
    assert config["vocab_size"] == VOCABULARY.get(name, 256)
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
