"""Decode engines on a GPU make the tokens that eager decoding makes."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["static", "cuda_graph", "compile"])
def test_an_engine_makes_the_tokens_of_eager_decoding(name):
    import torch

    from effbench.models import builders
    from effbench.workloads import _decode
    from tests.factories import resolved

    model = builders.build(resolved("tiny-llama", device="cuda"), trains=False, seed=1, device="cuda").model.eval()
    with torch.inference_mode():
        engine = _decode.STATIC_ENGINES[name](model, 2, 64)
        for seed in (1, 2):  # the second request reuses the graph of the first
            prompt = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(seed)).cuda()
            expected = _decode.EagerEngine(model).generate(prompt, 16, lambda: None)
            assert torch.equal(engine.generate(prompt, 16, lambda: None), expected)
