"""Pairs of source and target in 65 made languages, and the two orders in which training takes them.

    row      [tag  source  target] once, twice or four times, one language a row, always L tokens
    stage    when a row first comes in the curriculum: rank of its language and length of its pairs, 0 … 1

The curriculum is ours, the paper's schedule being unknown: at the share p of a pass a row is drawn from those with stage ≤ p that
are left; where none is, the one of the next stage comes. Both orders are permutations of the same rows.

Shapes: R rows, L tokens of a row, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from effbench.models.text import Part, Text
from effbench.workloads.fuximt import LANGUAGES, LONGEST_PACK, NUM_BYTES

PACKS = (LONGEST_PACK, 2, 1)  # pairs in a row, shortest pairs first
STRIDE = 7919  # an odd prime: the shifts of 65 languages differ modulo 256
IGNORED = -100  # a target that is none


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """ids and targets (R, L), a target being the next id where that belongs to a target text; language and stage (R,)."""

    ids: np.ndarray
    targets: np.ndarray
    language: np.ndarray
    stage: np.ndarray


def languages(number: int, skew: float, random: np.random.Generator) -> np.ndarray:
    """Ranks from 0, with probability ∝ 1 / (rank + 1)^skew."""
    weight = 1.0 / np.arange(1, LANGUAGES + 1) ** skew
    return random.choice(LANGUAGES, size=number, p=weight / weight.sum())


def sources(text: Text, params: Any, vocabulary: int, language: np.ndarray, seed: int, part: Part) -> np.ndarray:
    """Long sources (R, S): a tag, and a text in its language."""
    plain = _plain(text, params, vocabulary, len(language), params.prompt_tokens, seed, part)
    return _in_language(plain, language, params, vocabulary)[:, : params.prompt_tokens]


def rows(text: Text, params: Any, vocabulary: int, seed: int) -> Rows:
    """The rows of a pass, in the order in which they were drawn."""
    random, number = np.random.default_rng(seed), params.pass_steps * params.batch_size
    language, level = languages(number, params.skew, random), random.integers(0, len(PACKS), size=number)
    length = params.seq_len
    plain = _plain(text, params, vocabulary, number * LONGEST_PACK, length, seed, "train").reshape(number, LONGEST_PACK, -1)
    ids, is_target = np.empty((number, length), dtype=np.int64), np.zeros((number, length), dtype=bool)
    for row in range(number):
        pack = PACKS[level[row]]
        source, target = params.prompt_tokens // pack, params.new_tokens // pack
        foreign = _in_language(plain[row, :pack], np.full(pack, language[row]), params, vocabulary)
        pairs = np.concatenate([foreign[:, :source], plain[row, :pack, :target]], axis=1)
        ids[row] = pairs.reshape(-1)
        is_target[row] = np.tile(np.arange(source + target) >= source, pack)
    targets = np.full_like(ids, IGNORED)
    targets[:, :-1] = np.where(is_target[:, 1:], ids[:, 1:], IGNORED)
    stage = np.maximum(language / LANGUAGES, level / len(PACKS))
    return Rows(ids=ids, targets=targets, language=language, stage=stage)


def curriculum(stage: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A permutation of the rows that widens with the share of the pass that is done."""
    waiting, number = list(np.argsort(stage, kind="stable")), len(stage)
    sorted_stage, order = list(stage[waiting]), []
    for place in range(number):
        open_rows = int(np.searchsorted(sorted_stage, place / number, side="right"))
        chosen = int(random.integers(open_rows)) if open_rows else 0
        order.append(waiting.pop(chosen))
        sorted_stage.pop(chosen)
    return np.asarray(order)


def batches(found: Rows, batch_size: int, order: str, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless batches of ids and targets (B, L), a pass after the other."""
    random = np.random.default_rng((seed, 1))
    number = len(found.ids)
    places = curriculum(found.stage, random) if order == "curriculum" else random.permutation(number)
    while True:
        for first in range(0, number, batch_size):
            chosen = places[first : first + batch_size]
            yield found.ids[chosen], found.targets[chosen]


def _plain(text: Text, params: Any, vocabulary: int, number: int, length: int, seed: int, part: Part) -> np.ndarray:
    """(number, length) ids of text, or drawn."""
    if params.ids == "drawn":
        return np.random.default_rng((seed, 2)).integers(0, vocabulary - LANGUAGES, size=(number, length))
    return next(text.batches(part, batch_size=number, seq_len=length, seed=seed))[:, :length]


def _in_language(plain: np.ndarray, language: np.ndarray, params: Any, vocabulary: int) -> np.ndarray:
    """(…, 1 + length): the tag of each row's language, and its ids shifted within those that stand for text."""
    size = NUM_BYTES if params.ids == "text" else vocabulary - LANGUAGES
    tag = (vocabulary - LANGUAGES + language)[:, None]
    return np.concatenate([tag, (plain + STRIDE * language[:, None]) % size], axis=1)
