"""What low-rank adapters have in common: which layers they adapt, what they refuse, how peft puts them in. Torch-free at import.

A method is peft's `LoraConfig` with a few options of its own. Adapted are the linear layers of the decoder's blocks, or those that
`target_modules` names, and stacked experts, one pair of matrices for each of them (peft's `target_parameters`). Left as they
are: embedding, output head, routers, gates of fewer than 16 outputs, and in the library's own mixtures the dense and shared
feed-forward layers, whose names peft takes for those of the experts.

Shapes: W (out, in), A (r, in), B (out, r).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from effbench import registry
from effbench.errors import did_you_mean
from effbench.layout import Layout, Weight
from effbench.schema import Spec
from effbench.technique import YES, Context, Params, Support, Technique, no

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

NARROW = 16  # outputs; gates and routers below it are left alone
EXPERTS = "experts"
ALL: Literal["all-linear"] = "all-linear"
Targets = Literal["all-linear"] | tuple[str, ...]


class AdapterParams(Params):
    """What every low-rank method can be told; names are peft's."""

    r: int = Field(default=16, ge=1, description="rank of the change")
    lora_alpha: int = Field(default=32, ge=1, description="α, of the scale")
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="dropout on the adapter's input")
    target_modules: Targets = Field(
        default=ALL, description="all-linear, or names of modules such as [q_proj, v_proj]; experts for stacked ones"
    )


class Adapter(Technique):
    """A low-rank change of linear layers, the weights themselves frozen."""

    axis = "peft"
    Params = AdapterParams
    # Whether the method reads the frozen weights: "never", at the start ("initial") or at every step ("always").
    reads_weights: ClassVar[Literal["never", "initial", "always"]] = "never"
    vectors: ClassVar[int] = 0  # trained vectors of `out` numbers beside A and B

    def supports(self, context: Context) -> Support:
        if not context.trains:
            return no(f"{self.name} changes training; choose a training workload such as finetune")
        return self._supports_base(context) or self._supports_shapes(context) or YES

    def options(self) -> Mapping[str, Any]:
        """Arguments of peft's LoraConfig that make this method of it."""
        return {}

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        from peft import LoraConfig, get_peft_model

        names, stacks = adapted_names(model, self.params.target_modules)
        kinds = {type(module).__name__ for module in model.modules()}
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = "Linear4bit" in kinds, "Linear8bitLt" in kinds  # what peft asks
        for module in model.modules():
            # bitsandbytes 0.50 repacks 4-bit weights at the first forward in inference mode on a CPU with AVX512-BF16, and no
            # gradient passes that form: after one validation loss, training would silently lose most of its backward pass.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.params.r,
            lora_alpha=self.params.lora_alpha,
            lora_dropout=self.params.lora_dropout,
            target_modules=names,
            target_parameters=stacks or None,
            **self.options(),
        )
        with warnings.catch_warnings():
            # peft 0.21 still asks for `is_gradient_checkpointing`, which transformers 5.23 has renamed.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")  # of merging, which nobody asks
            return get_peft_model(model, config)

    def layout(self, layout: Layout) -> None:
        adapted = adapted_weights(layout, self.params.target_modules)
        layout.change(lambda w: True, trained=False)
        layout.weights += [self._added(w) for w in adapted]

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return "lora", {key: value for key, value in self.params.model_dump().items() if key in AdapterParams.model_fields}

    def _added(self, weight: Weight) -> Weight:
        """A and B of one weight, for every expert of a stack, and the method's vectors; peft keeps them in fp32."""
        stacks = weight.shape[0] if len(weight.shape) == 3 else 1
        out, into = weight.shape[-2:]
        size = stacks * self.params.r * (out + into) + self.vectors * out
        return Weight(path=f"{weight.path}.adapter", kind="adapter", shape=(size,), count=weight.count, bits=32)

    def _supports_base(self, context: Context) -> Support | None:
        """What of the frozen weights' form stands in the way, or None."""
        packed = next((name for name in context.stack if registry.technique(name).quantised), "")
        if packed and self.reads_weights == "initial":
            return no(
                f"{self.name} starts from the singular vectors of plain weights and {packed} packs them; use a 16-bit format, or lora"
            )
        if packed and self.reads_weights == "always" and not registry.technique(packed).readable:
            return no(
                f"{self.name} reads the frozen weights at every step, and {packed} gives them back only before the first one; "
                "use nf4, or lora"
            )
        return None

    def _supports_shapes(self, context: Context) -> Support | None:
        """What of the model's layers stands in the way, or None."""
        if context.layout is None:
            return None
        targets, wanted = self.params.target_modules, adapted_weights(context.layout, self.params.target_modules)
        if targets != ALL:
            there = {w.module for w in adapted_weights(context.layout, ALL)} | ({EXPERTS} if _stacks(context.layout) else set())
            absent = [name for name in targets if name not in there]
            if absent or not targets:
                given = ", ".join(absent) or "no name"
                near = did_you_mean(absent[0], sorted(there)) if absent else ""
                return no(
                    f"target_modules: {given} matches no layer that can be adapted.{near} Choose from {', '.join(sorted(there))}"
                )
        stacked = [w for w in wanted if len(w.shape) == 3]
        if stacked:
            answer = self._supports_experts(context)
            if answer:
                return answer
        narrow = min(wanted, key=lambda w: min(w.shape[-2:]), default=None)
        if narrow is not None and self.params.r > min(narrow.shape[-2:]):
            out, into = narrow.shape[-2:]
            return no(
                f"r is {self.params.r} and {narrow.module} is {out} × {into}, so no change of it has that rank; "
                f"choose r up to {min(out, into)}, or target_modules without it"
            )
        return None

    def _supports_experts(self, context: Context) -> Support | None:
        """What stands in the way of adapting stacked experts, or None."""
        packed = next((name for name in context.stack if getattr(registry.technique(name), "expert_kind", "")), "")
        if packed:
            return no(f"experts in {packed} are packed and cannot be adapted; choose target_modules such as [q_proj, v_proj]")
        if self.reads_weights != "never":
            return no(
                f"peft has no {self.name} for stacked experts; use lora, or choose target_modules such as [q_proj, v_proj]"
            )
        if self.params.lora_dropout:
            return no(
                f"experts are adapted by their weights, where a dropout of {self.params.lora_dropout:g} on inputs has no place; "
                "choose lora_dropout 0, or target_modules without experts"
            )
        return None


def adapted_weights(layout: Layout, targets: Targets) -> list[Weight]:
    """The matrices and stacks of a layout that are adapted."""
    own = _stacks(layout) and not any(w.path.endswith("w_in") for w in layout.weights)  # the library's mixture, not ours
    kinds = ("attention",) if own else ("attention", "feed_forward")
    linears = [w for w in layout.linears() if w.kind in kinds and w.shape[0] >= NARROW]
    found = [*linears, *_stacks(layout)]
    return found if targets == ALL else [w for w in found if w.module in targets]


def _stacks(layout: Layout) -> list[Weight]:
    return [w for w in layout.weights if w.kind == "experts" and len(w.shape) == 3]


def adapted_names(model: nn.Module, targets: Targets) -> tuple[list[str], list[str]]:
    """Full names of the linear modules, and of the stacked parameters, of a model that are adapted."""
    from torch import nn

    stacks = [name for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3]
    mixture = bool(stacks) and not any(name.endswith("w_in") for name in stacks)
    head = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and module.out_features >= NARROW
        and name.rpartition(".")[2] not in ("gate", "router")
        and not (mixture and ".self_attn." not in name)
    ]
    if targets == ALL:
        return names, stacks
    return [n for n in names if n.rpartition(".")[2] in targets], stacks if EXPERTS in targets else []
