"""Native sparse attention: each query attends to compressed blocks, to the raw tokens of a few selected ones, and to a window.

Paper: Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention (arXiv 2502.11089), section 3.
Changes: attention is replaced by one of three gated branches, each with keys and values of its own; new weights.
Should improve: the time of prefill and training at long context, and decode traffic by s / N, N = ⌊(s − l)/d⌋ + 1 + n·l' + w.
Costs: a cache somewhat larger than GQA's, three sets of key and value projections, and more work than full attention at
short context: N is less than s only beyond about n·l' + w tokens. Choices that the paper leaves open: effbench/modules/nsa.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from effbench import families, surgery
from effbench.costs import NSACost, query_heads
from effbench.modules.attention_forms import sparse_attention
from effbench.schema import Spec
from effbench.technique import YES, Context, Cost, Paper, Params, Support, Technique, no

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from effbench.flow import Flow
    from effbench.layout import Layout


class NSAParams(Params):
    """Parameters of `nsa`; the defaults are the paper's."""

    groups: int = Field(default=4, ge=1, description="G: key/value heads of each branch; divides the number of query heads")
    block: int = Field(default=32, ge=1, description="l: tokens of a compression block; not more than select_block")
    stride: int = Field(default=16, ge=1, description="d: tokens between compression blocks; divides block and select_block")
    select_block: int = Field(default=64, ge=1, description="l': tokens of a selection block")
    num_selected: int = Field(
        default=16, ge=1, description="n: selected blocks per query, the first and two local ones among them; at least 3"
    )
    window: int = Field(default=512, ge=1, description="w: tokens of the window, the query's own among them")
    shared_kv: bool = Field(
        default=False, description="one set of keys and values for the three branches, as public kernels have it; not the paper"
    )
    backend: Literal["auto", "masked", "gather", "flex"] = Field(
        default="auto", description="how the selected branch is computed; auto: flex on CUDA, else the cheaper of the others"
    )


class NSA(Technique):
    """Compressed, selected and window attention, gated per head."""

    name = "nsa"
    axis = "attention"
    summary = "native sparse attention: compressed blocks, selected blocks and a window, gated per head"
    paper = Paper(
        title="Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention",
        arxiv="2502.11089",
        where="section 3, equations 5 to 12",
        year=2025,
    )
    Params = NSAParams
    new_weights = "attention"
    own_kernels: ClassVar[bool] = True
    small_params: ClassVar[Mapping[str, Any]] = {
        "groups": 2,
        "block": 8,
        "stride": 4,
        "select_block": 8,
        "num_selected": 4,
        "window": 8,
    }

    def supports(self, context: Context) -> Support:
        answer = surgery.supports_replaced_attention(context)
        return (None if answer.ok else answer) or self._blocks() or self._context(context) or YES

    def _blocks(self) -> Support | None:
        """What is wrong with the parameters among themselves, or None."""
        p = self.params
        if p.block % p.stride:
            return no(f"stride {p.stride} does not divide block {p.block}; choose a divisor of {p.block}")
        if p.select_block % p.stride:
            return no(f"stride {p.stride} does not divide select_block {p.select_block}; choose a divisor of {p.select_block}")
        if p.block > p.select_block:
            return no(f"block {p.block} is longer than select_block {p.select_block}; choose block ≤ {p.select_block}")
        if p.num_selected < 3:
            return no(f"num_selected {p.num_selected} leaves no room for the first and two local blocks; choose 3 or more")
        return None

    def _context(self, context: Context) -> Support | None:
        """What of the model's shape, the device or the length stands in the way, or None."""
        p, heads, length = self.params, query_heads(context.config), surgery.longest_context(context)
        if heads % p.groups:
            fits = ", ".join(str(g) for g in range(1, heads + 1) if heads % g == 0)
            return no(f"{heads} query heads cannot share {p.groups} key/value heads evenly; choose groups from {fits}")
        if p.window > length:
            return no(f"window {p.window} is longer than the context of {length} tokens; choose window ≤ {length}")
        if p.backend == "flex" and not context.device.startswith("cuda"):
            return no(f"backend 'flex' runs on CUDA only, not on {context.device}; choose auto, masked or gather")
        return None

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        from effbench.modules.nsa import NSAAttention
        from effbench.modules.replace import replace_attention

        replace_attention(model, lambda config, layer: NSAAttention(config, layer, self.params))
        return model

    def layout(self, layout: Layout) -> None:
        cost, layers = NSACost.of(layout.config, self.params), int(layout.config["num_hidden_layers"])
        layout.remove(lambda w: w.kind == "attention")
        layout.weights += families.sparse_attention(cost, layers, bias=layout.model_type == "qwen2")

    def flow(self, flow: Flow) -> None:
        flow.mixer = sparse_attention(NSACost.of(flow.layout.config, self.params), self.params.backend)

    def cost(self, context: Context) -> Cost:
        return surgery.attention_cost(context, NSACost.of(context.config, self.params))

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return "mha", {}
