"""What number formats that store weights have in common: which layers they take, how, and what they refuse.

Linear layers of the decoder's blocks are replaced one by one; the embedding, the norms, routers and the output head stay in the
compute dtype, as the libraries leave them. Stacked experts are no linear layers: a format that has an expert form
(`expert_kind`) puts them on the kernels' own 8- or 4-bit experts, any other refuses a model that has experts.
Torch-free at import, since techniques' declarations stand on it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from math import ceil, prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from effbench import registry
from effbench.costs import num_experts
from effbench.families import FAMILIES
from effbench.layout import ITEM_BYTES, Layout, Weight
from effbench.schema import Spec
from effbench.surgery import LAYER
from effbench.technique import YES, Context, Params, Support, Technique, no

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

NARROW = 16  # outputs; a gate of fewer is no matrix worth packing, and no kernel takes it
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
BLOCK = 64  # weights to a scale of bitsandbytes' 4-bit formats
TILE = 32  # outputs to a tile of its form for CPUs with AVX512-BF16
EXPERT_GROUP = 64  # weights along the input that share scale and zero, int4


class FormatParams(Params):
    """What every stored format can be told."""

    compute: Literal["bf16", "fp16", "fp32"] = Field(
        default="bf16", description="dtype of activations and of what is not packed"
    )


class StoredFormat(Technique):
    """A precision technique that stores weights in a form that takes no gradient."""

    axis = "precision"
    quantised = True
    library: str  # that packs, of the extra `quant`
    Params = FormatParams
    # The form of the kernels' experts that goes with it; "": none, and a model with experts is refused.
    expert_kind: ClassVar[Literal["", "int8", "int4"]] = ""
    group: int = 1  # weights along the input width that are packed together
    tile: ClassVar[int] = 1  # outputs that are packed together

    def supports(self, context: Context) -> Support:
        if find_spec(self.library) is None:
            return no(f"{self.name} needs {self.library}, which is not installed; try: pip install 'effbench[quant]'")
        if context.model_type == LAYER:
            return no(f"{self.name} packs the linear layers of whole models; choose a workload that runs one")
        kinds = [registry.technique(name) for name in context.stack]
        if any(kind.axis == "mixer" for kind in kinds):
            return no("attention-free mixers read their weights as plain numbers; choose a softmax model")
        if context.trains and not any(kind.axis == "peft" for kind in kinds):
            return no(f"weights in {self.name} take no gradient; train an adapter on them, such as lora")
        return self._supports_shapes(context)

    def _supports_shapes(self, context: Context) -> Support:
        """Every width must be whole groups, and experts need a form of their own."""
        if context.layout is None:
            return no(
                f"the tensors of model type {context.model_type!r} are not known, so what would stay at 16 bits is not either; "
                f"choose a model of type {', '.join(sorted(FAMILIES))}"
            )
        if self.expert_kind and "expert_kernels" in context.stack:
            return no(f"experts in {self.name} run on effbench's own kernels; leave expert_kernels out")
        experts = [w for w in context.layout.weights if w.kind == "experts"]
        if experts and not self.expert_kind:
            return no(
                f"the experts of {context.model_type} are stacked weights, which {self.library} leaves at 16 bits; "
                "choose int8 or int4, which have expert kernels"
            )
        group = max(self.group, EXPERT_GROUP if self.expert_kind == "int4" else 1)
        for weight in (*packed(context.layout), *(w for w in experts if len(w.shape) == 3)):
            wide, name = weight.inputs, weight.path.rpartition("*.")[2].removesuffix(".weight")
            unit = self.group if weight.kind != "experts" else group
            if wide % unit:
                return no(f"{name} has {wide} inputs, which are not whole groups of {unit}; choose another format or group")
            if weight.kind != "experts" and weight.shape[0] % self.tile:
                return no(
                    f"{name} has {weight.shape[0]} outputs, and {self.library} packs whole tiles of {self.tile}; "
                    "choose another format, such as int8"
                )
        return YES

    def configure(self, config: PretrainedConfig) -> None:
        config.dtype = DTYPES[self.params.compute]

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        if self.expert_kind and num_experts(vars(model.config)) and hasattr(model, "set_experts_implementation"):
            import effbench_kernels.transformers  # noqa: F401  (registers the implementation that reads packed experts)

            model.set_experts_implementation("effbench")
        return model

    def quantise(self, block: nn.Module) -> None:
        if self.expert_kind:
            quantise_experts(block, self.expert_kind)
        replace_linears(block, self.pack)

    def pack(self, layer: nn.Linear) -> nn.Module:
        """The stored form of one linear layer, whose weight lies on the device in the compute dtype."""
        raise NotImplementedError

    def bits(self, weight: Weight, item_bytes: int) -> float:
        """Stored bits a weight of one matrix, scales included."""
        raise NotImplementedError

    def layout(self, layout: Layout) -> None:
        item_bytes = ITEM_BYTES[DTYPES[self.params.compute]]
        layout.config = {**layout.config, "dtype": DTYPES[self.params.compute]}
        wanted = {id(w) for w in packed(layout)}
        for weight in list(layout.weights):
            if id(weight) in wanted:
                layout.change(lambda w, own=weight: w is own, bits=self.bits(weight, item_bytes))  # type: ignore[misc]
            elif weight.kind == "experts" and len(weight.shape) == 3 and self.expert_kind:
                bits = 8 + 16 / weight.inputs if self.expert_kind == "int8" else 4 + 32 / EXPERT_GROUP
                layout.change(lambda w, own=weight: w is own, bits=bits)  # type: ignore[misc]

    def baseline(self, spec: Spec) -> tuple[str, dict[str, Any]] | None:
        return "bf16", {}


class FourBitParams(FormatParams):
    """Parameters of bitsandbytes' 4-bit formats."""

    double_quant: bool = Field(default=False, description="store the scales in 8 bits, with scales of their own")


class FourBit(StoredFormat):
    """A 4-bit format of bitsandbytes: 16 levels, a scale (absmax) for every 64 weights."""

    library = "bitsandbytes"
    nominal_bits = 4.0
    Params = FourBitParams

    def pack(self, layer: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb
        import torch

        double, weight = self.params.double_quant, layer.weight
        new = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=weight.dtype, compress_statistics=double,
            quant_type=self.name, device="meta",
        )  # fmt: skip
        new.weight = bnb.nn.Params4bit(
            weight.data, requires_grad=False, compress_statistics=double, quant_type=self.name, module=new
        ).to(weight.device)
        new.bias = layer.bias
        # Its form for CPUs with AVX512-BF16 computes in bf16 whatever was asked, and fails on layers that are not whole tiles.
        tiled = weight.dtype == torch.bfloat16 and not weight.shape[0] % TILE and not weight.shape[1] % BLOCK
        new.support_avx512bf16_for_cpu = new.support_avx512bf16_for_cpu and tiled
        return new

    def bits(self, weight: Weight, item_bytes: int) -> float:
        """4 bits, absmax in fp32 (or 8 bits, with fp32 for every 256 of them), and the code books that each tensor carries."""
        size = prod(weight.shape)
        scales = ceil(size / BLOCK)
        beside = scales + 4 * ceil(scales / 256) + 4 * (256 + 1) if self.params.double_quant else 4 * scales
        return 8 * (size / 2 + beside + 4 * 16) / size


def packed(layout: Layout) -> list[Weight]:
    """The matrices that a stored format packs: linear layers of the blocks, but routers and narrow gates."""
    return [w for w in layout.linears() if "*" in w.path and w.kind != "router" and w.shape[0] >= NARROW]


def replace_linears(block: nn.Module, pack: Callable[[nn.Linear], nn.Module]) -> int:
    """Replace every linear layer of a block by `pack(layer)`, but routers and narrow gates; how many were replaced."""
    from torch import nn

    from effbench.surgery import replace_modules

    def make(name: str, module: nn.Module) -> nn.Module | None:
        wanted = type(module) is nn.Linear and name.rpartition(".")[2] not in ("router", "gate")
        return pack(module) if wanted and module.out_features >= NARROW else None

    return len(replace_modules(block, make))


def quantise_experts(block: nn.Module, kind: Literal["int8", "int4"]) -> None:
    """Put the stacked experts of a block in the kernels' own form: those of effbench's modules and those of the library's."""
    from effbench_kernels import transformers as library

    from effbench.modules.moe import Experts

    for module in block.modules():
        if isinstance(module, Experts):
            module.quantise(kind)
    if library.has_experts(block):
        library.quantise_experts(block, kind)
