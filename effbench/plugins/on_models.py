"""The clauses of the contract that need a model: `clause(technique, shape)` builds one and raises ContractError with what is wrong.

NotAsked is raised where the technique refuses, so that there is nothing to try.
"""

from __future__ import annotations

from effbench import registry
from effbench.errors import ContractError
from effbench.models import builders, context
from effbench.plugins.small import NotAsked, built, instance, logits_of, modes, some_bytes, spec_of, wake
from effbench.technique import Support

LEAST_REASON = 20  # characters of a refusal that a person can act on
# Largest difference between a cached decode and a full forward, over the standard deviation of the logits, by dtype.
DECODE_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01}
ROUNDS_ACTIVATIONS = ("int8", "fp8")  # a last bit of bf16 may round to another step of 8 bits
PROMPT = 16  # tokens that are decoded from
TRAINING_STEPS, LEARNING_RATE = 4, 1e-3
PLAN_TOLERANCE = 1e-6  # of a plan's counts: bits a weight need not be whole numbers


def supported_or_says_why_not(technique: str, shape: str) -> None:
    if belongs := registry.technique(technique).workloads:
        raise NotAsked(f"it is part of {' or '.join(belongs)} alone, and these models are not that work")
    for trains in (False, True):
        spec = spec_of(shape, technique, trains=trains)
        answer = instance(spec, technique).supports(builders.context(spec))
        if not isinstance(answer, Support):
            raise ContractError(f"supports returned {answer!r}; return YES, or no(reason)")
        if not answer.ok and len(answer.reason) <= LEAST_REASON:
            raise ContractError(f"a refusal without a usable reason: {answer.reason!r}; say what to change")
        refused = builders.refusal(spec)
        if (refused is None) != answer.ok:
            raise ContractError(f"supports says {'yes' if answer.ok else 'no'} and the stack says {refused or 'yes'}")


def forward(technique: str, shape: str) -> None:
    import torch

    model = built(technique, shape).eval()
    ids_BT = some_bytes()
    with torch.inference_mode(), builders.mixed_precision(model):
        logits_BTV = model(input_ids=ids_BT).logits
    wanted = (*ids_BT.shape, model.config.vocab_size)
    if tuple(logits_BTV.shape) != wanted:
        raise ContractError(f"logits of shape {tuple(logits_BTV.shape)} instead of {wanted}")
    if not bool(torch.isfinite(logits_BTV).all()):
        raise ContractError("the logits are not all finite")


def cached_decode(technique: str, shape: str) -> None:
    import torch

    model = built(technique, shape).eval()
    wake(model)
    ids_BT = some_bytes()
    full_BTV = logits_of(model).float()
    with torch.inference_mode(), builders.mixed_precision(model):
        out = model(input_ids=ids_BT[:, :PROMPT], use_cache=True)
        parts = [out.logits.float()]
        for position in range(PROMPT, ids_BT.shape[1]):
            step_B1 = ids_BT[:, position : position + 1]
            out = model(input_ids=step_B1, past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits.float())
    difference = float((torch.cat(parts, dim=1) - full_BTV).abs().max() / full_BTV.std())
    dtype = str(builders.compute_dtype(model)).removeprefix("torch.")
    allowed = DECODE_TOLERANCE[dtype] * (3 if technique in ROUNDS_ACTIVATIONS else 1)
    if not difference <= allowed:
        raise ContractError(
            f"decoding with the cache differs from a full forward by {difference:.2g} standard deviations of the logits; "
            f"{allowed:g} is allowed in {dtype}"
        )


def training(technique: str, shape: str) -> None:
    can = modes(technique, shape)
    if True not in can:
        kind = "inference only" if can else "refused"
        raise NotAsked(f"{kind}: {builders.refusal(spec_of(shape, technique, trains=True))}")
    losses = _train(technique, shape)
    if not losses[-1] < losses[0]:
        raise ContractError(f"{TRAINING_STEPS} steps on one batch took the loss from {losses[0]:.4g} to {losses[-1]:.4g}")
    again = _train(technique, shape)
    if losses != again:
        raise ContractError(f"the same seed gave the losses {losses} and then {again}; draw from torch's generators only")


def _train(technique: str, shape: str) -> list[float]:
    """Losses of some steps on one batch."""
    import torch
    from torch.nn import functional as F

    model = built(technique, shape, trains=True).train()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ContractError("nothing is trained: no parameter asks for a gradient")
    if (dtypes := {p.dtype for _, p in trained}) != {torch.float32}:
        raise ContractError(f"trained weights are kept in fp32, not in {', '.join(sorted(map(str, dtypes)))}")
    optimizer = torch.optim.AdamW([p for _, p in trained], lr=LEARNING_RATE)
    ids_BT, losses = some_bytes(4, 33), []
    for _ in range(TRAINING_STEPS):
        with builders.mixed_precision(model):
            logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        bad = [name for name, p in trained if p.grad is None or not bool(torch.isfinite(p.grad).all())]
        if bad:
            raise ContractError(f"no finite gradient for {', '.join(bad[:3])} ({len(bad)} of {len(trained)} parameters)")
        optimizer.step()
        losses.append(loss.item())
    return losses


def seeded(technique: str, shape: str) -> None:
    import torch

    from effbench.models.storage import stored

    models = [built(technique, shape, seed=seed).eval() for seed in (1, 1, 2)]
    one, same, other = (
        {f"{item.name}.{i}": t.detach().clone() for item in stored(model) for i, t in enumerate(item.tensors)}
        for model in models
    )
    if one.keys() != same.keys():
        raise ContractError(f"the same seed gave other tensors: {', '.join(sorted(one.keys() ^ same.keys())[:3])}")
    if differing := [name for name in one if not torch.equal(one[name], same[name])]:
        raise ContractError(
            f"the same seed gave other weights in {', '.join(differing[:3])}; draw from torch's generators only"
        )
    if all(torch.equal(one[name], other[name]) for name in one if name in other):
        raise ContractError("another seed gave the same weights")
    first, second, again = (logits_of(model) for model in (*models[:2], models[0]))
    if not (torch.equal(first, second) and torch.equal(first, again)):
        raise ContractError("the same weights and tokens gave other logits; draw nothing at random in a forward pass")


def parameters(technique: str, shape: str) -> None:
    model = built(technique, shape)
    facts = builders.model_facts(model)
    if not 0 < facts["params_active"] <= facts["params_total"]:
        raise ContractError(f"{facts['params_active']:,} active of {facts['params_total']:,} weights")
    if facts["weight_bytes"] < facts["params_total"] // 4:
        raise ContractError(f"{facts['weight_bytes']:,} B for {facts['params_total']:,} weights: less than two bits a weight")
    inference, trained = (builders.model_flops_per_token(model, context_len=64, training=t) for t in (False, True))
    if not trained > inference:
        raise ContractError(f"{trained:g} FLOPs a token in training and {inference:g} in inference")


def planned(technique: str, shape: str) -> None:
    if not modes(technique, shape):
        raise NotAsked(f"refused: {builders.refusal(spec_of(shape, technique, trains=True))}")
    for trains in modes(technique, shape):
        spec = spec_of(shape, technique, trains=trains)
        layout = context.layout(spec)
        if layout is None:
            raise NotAsked("the tensors of this family are not known")
        made = builders.build(spec, trains=trains, seed=1, device="cpu")
        pairs = [
            ("weights", layout.num_weights(), builders.params_total(made.model)),
            ("stored bytes", round(layout.stored_bytes()), builders.weight_bytes(made.model)),
        ]
        if trains:
            for part in made.techniques:
                part.trainable(made.model)
            trained = sum(p.numel() for p in made.model.parameters() if p.requires_grad)
            pairs.append(("trained weights", layout.num_weights(trained_only=True), trained))
        for what, expected, found in pairs:
            if abs(expected - found) > PLAN_TOLERANCE * found:
                raise ContractError(f"the hook layout says {expected:,} {what} and the built model has {found:,}")
