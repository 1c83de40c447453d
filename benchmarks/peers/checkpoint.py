"""Save the tiny model that both harnesses load: Llama, 4.87 M parameters, random weights of seed 0, and a tokenizer.

    python -m benchmarks.peers.checkpoint FOLDER

Saved by transformers 5 and read by 4 and 5. The rotary base is 10,000, which version 4 takes by default where it does
not find it. The tokenizer's files are written by hand, because version 5 names tokenizer classes that 4 does not know.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save(folder: Path) -> None:
    """Write model and tokenizer into `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate(words + [f"w{i}" for i in range(len(words), CONFIG["vocab_size"])])}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONFIG["max_position_embeddings"], **special}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


if __name__ == "__main__":
    save(Path(sys.argv[1]))
