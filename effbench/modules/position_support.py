"""Where the position of a token can be given in another way than by rotation. Torch-free; one rule for the whole axis."""

from __future__ import annotations

from effbench.layout import Layout
from effbench.technique import YES, Context, Support, no

# Families whose decoder asks one `rotary_emb` for cosine and sine and hands both to every layer.
ROTARY_FAMILIES = ("llama", "mistral", "qwen2")


def supports_other_positions(context: Context, name: str) -> Support:
    """Whether the rotary embedding of this model can be replaced by `name`."""
    if context.model_type not in ROTARY_FAMILIES:
        families = ", ".join(ROTARY_FAMILIES)
        return no(
            f"the rotary embedding of model type {context.model_type!r} is not replaced; choose a model of type {families}"
        )
    if context.weights in ("path", "hub"):
        return no(
            f"weights from {context.weights} were trained with rotary embeddings and mean nothing under {name}; "
            "use random or trained weights, or rope"
        )
    if "mla" in context.stack:
        return no("the decoupled rotary keys of mla are part of it; use rope with mla, or another attention technique")
    return YES


def remove_rotation(layout: Layout) -> None:
    """Leave the table of rotary frequencies out of a model's tensors."""
    layout.remove(lambda w: "rotary_emb" in w.path)
