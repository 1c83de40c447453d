"""Occult's placements and pruning on routing recorded from models trained here (E = 64, k = 8, 4 devices), held out.

    block      8192 tokens to calibrate on, 4096 held-out tokens, of every mixture layer of two models (see workloads/_recorded.py)
    arms       experts in order · at random · the paper's greedy · refined; greedy from other calibration tokens (the A/A)
    pruned     to 2 devices on the refined placement, by score and by similarity

C_T is the mean number of devices of a held-out token, a figure its mean over the layers. Counts, no times: a busy machine moves
nothing. The blocks differ in the text, not in the training, and intervals cover that alone. The times at the end are a simulation,
beside the paper's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks import common
from benchmarks.common import Figure, Options, Report, Samples, Target, against

DEVICES, ALLOWED, TOKENS, HELD_OUT = 4, 2, 8192, 4096
SOURCES = ("balanced", "free")
ARMS = {"in_order": "experts in order", "random": "at random", "greedy": "greedy", "refined": "refined"}
PAPER = ((3.68, 15.93), (3.02, 12.53), (1.98, 9.22), (1.0, 5.82))  # C_T and seconds, OLMoE on 4 A6000 over PCIe
INTERCEPT_S = 1.99  # of the line through the paper's points, 1.99 + 3.67 · C_T
OLMOE_HIDDEN, OLMOE_TOKENS = 2048, 2**14
BETTER, TENTH, THIRD = (
    Target(text="< 1", upper=1.0),
    Target(text="≤ 0.90", upper=0.90),
    Target(text="≤ 0.65", upper=0.65),
)


def run(options: Options) -> Report:
    """See the module's docstring."""
    import torch

    torch.set_num_threads(1)
    blocks = options.plan(8)
    tokens, held_out = (512, 256) if options.tiny else (TOKENS, HELD_OUT)
    figures, notes = list[Figure](), list[str]()
    for source in SOURCES[:1] if options.tiny else SOURCES:
        common.say(f"{source}: recording the routing, after a training if there is none yet")
        found = _measured(source, blocks, tokens, held_out, options.seed)
        figures += _figures(source, found)
        notes += _by_layer(source, found)
    return Report(
        name="occult_placement",
        compares=f"devices of a held-out token (C_T) among {DEVICES}, {tokens} tokens of calibration, {held_out} held out",
        pairs=blocks,
        figures=figures,
        notes=[*notes, *_simulated(), "Both policies keep the same routes: they differ in what stands in for the others."],
    )


def _measured(source: str, blocks: int, tokens: int, held_out: int, seed: int) -> Samples:
    """One mapping a block: by arm, and by arm and layer ("greedy/0"), the figures of `_layer`."""
    from effbench.workloads._recorded import recorded

    # One more block of calibration than there are blocks: the A/A takes the next one.
    found = recorded(source, calibration_tokens=(blocks + 1) * tokens, held_out_tokens=blocks * held_out, seed=seed)
    done = []
    for block in range(blocks):
        layers = [
            _layer(
                calibration[block * tokens :][:tokens],
                calibration[(block + 1) * tokens :][:tokens],
                measured[block * held_out :][:held_out],
                {"k": found.top_k, "score": found.score, "renorm": found.renorm},
                block,
            )
            for calibration, measured in zip(found.calibration, found.held_out, strict=True)
        ]
        row = {f"{arm}/{n}": figures for n, layer in enumerate(layers) for arm, figures in layer.items()}
        for arm in layers[0]:
            row[arm] = {key: sum(layer[arm][key] for layer in layers) / len(layers) for key in layers[0][arm]}
        done.append(row)
        common.say(f"{source}, block {block + 1} of {blocks}")
    return Samples(tuple(done))


def _layer(
    calibration: Any, other: Any, held_out: Any, router: dict[str, Any], block: int
) -> Mapping[str, Mapping[str, float]]:
    """Of one layer and block, by arm: C_T held out, the largest share of pairs on a device, bytes between devices, what pruning keeps."""
    import torch
    from effbench_kernels import coactivation, greedy, in_order, prune, refine, route, router_similarity

    num_experts = calibration.size(1)
    chosen, again, routing = route(calibration, **router).expert, route(other, **router).expert, route(held_out, **router)
    shuffle = torch.randperm(num_experts, generator=torch.Generator().manual_seed(block))
    places = {"in_order": in_order(num_experts, DEVICES), "random": in_order(num_experts, DEVICES)[shuffle]}
    places["greedy"] = greedy(coactivation(chosen, num_experts), DEVICES)
    for fill in ("turns", "device"):
        places[fill] = greedy(coactivation(chosen, num_experts), DEVICES, fill)
    places["again"] = greedy(coactivation(again, num_experts), DEVICES)
    places["refined"] = refine(places["greedy"], chosen, DEVICES)
    places["refined_once"] = refine(places["greedy"], chosen, DEVICES, kicks=0)
    found = {name: _counts(routing.expert, place) for name, place in places.items()}
    scores, similarity = torch.softmax(held_out, -1), router_similarity(calibration)
    for policy in ("score", "similarity"):
        pruned = prune(scores, *routing, places["refined"], ALLOWED, policy, similarity, router["renorm"])
        found[policy] = {
            **_counts(pruned.expert, places["refined"]),
            "routes_share": float((pruned.expert == routing.expert).double().mean()),
            "scores_share": float(scores.gather(1, pruned.expert).sum() / scores.gather(1, routing.expert).sum()),
        }
    return found


def _counts(expert: Any, place: Any) -> dict[str, float]:
    import torch
    from effbench_kernels import replicas
    from effbench_kernels.simulator import exchange_rows, predict

    here = _links(DEVICES)
    load = torch.bincount(place[expert.flatten()], minlength=DEVICES).double()
    sent = predict(exchange_rows(list(expert.chunk(DEVICES)), place, here, "deduplicated"), 1, here)
    return {
        "replicas": float(replicas(expert, place, DEVICES).double().mean()),
        "rows": float(sent.rows),
        "remote_rows": float(sent.remote_rows),
        "load_share": float(load.max() / load.sum()),
    }


def _figures(source: str, found: Samples) -> Iterator[Figure]:
    for arm, title in ARMS.items():
        yield Figure(key=f"{source}_{arm}_ct_count", title=f"{source}: C_T, {title}", interval=found.interval(arm, "replicas"))
    for arm in ("in_order", "greedy", "refined"):
        title = f"{source}: busiest device's share of the pairs, {ARMS[arm]}"
        yield Figure(
            key=f"{source}_{arm}_load_share", title=title, interval=found.interval(arm, "load_share"), note="even: 0.25"
        )
    ratio = found.ratio("greedy", "in_order", "replicas")
    yield against(
        f"{source}_greedy_of_in_order_share",
        f"{source}: C_T, greedy over in order",
        ratio,
        TENTH,
        "the paper: 3.02 / 3.68 = 0.82",
    )
    ratio = found.ratio("refined", "greedy", "replicas")
    yield against(f"{source}_refined_of_greedy_share", f"{source}: C_T, refined over greedy", ratio, BETTER)
    ratio = found.ratio("refined_once", "greedy", "replicas")
    yield Figure(key=f"{source}_refined_once_of_greedy_share", title=f"{source}: the same, one descent alone", interval=ratio)
    for fill in ("turns", "device"):
        title = f'{source}: C_T, refined over greedy read as "{fill}"'
        yield Figure(
            key=f"{source}_refined_of_greedy_{fill}_share", title=title, interval=found.ratio("refined", fill, "replicas")
        )
    yield Figure(
        key=f"{source}_greedy_of_greedy_share", title=f"{source}: C_T, greedy from other tokens over greedy (A/A)",
        interval=found.ratio("again", "greedy", "replicas"),
    )  # fmt: skip
    for key, what in (("rows", "bytes, own rows included"), ("remote_rows", "bytes that leave a device")):
        ratio = found.ratio("score", "in_order", key)
        yield against(f"{source}_pruned_{key}_share", f"{source}: {what}, pruned to {ALLOWED} over deduplicated", ratio, THIRD)
    ratio = found.ratio("score", "refined", "rows")
    yield Figure(key=f"{source}_pruned_of_refined_share", title=f"{source}: bytes, pruned over refined alone", interval=ratio)
    kept = found.interval("score", "routes_share")
    yield Figure(key=f"{source}_routes_share", title=f"{source}: routes that pruning keeps", interval=kept)
    for policy in ("score", "similarity"):
        title = f"{source}: router score that pruning by {policy} keeps"
        yield Figure(key=f"{source}_{policy}_scores_share", title=title, interval=found.interval(policy, "scores_share"))


def _by_layer(source: str, found: Samples) -> Iterator[str]:
    layers = sorted(name.partition("/")[2] for name in found.blocks[0] if name.startswith("greedy/"))
    for layer in layers:
        means = {arm: found.interval(f"{arm}/{layer}", "replicas").value or 0.0 for arm in ARMS}
        gain = found.ratio(f"refined/{layer}", f"greedy/{layer}", "replicas")
        counted = ", ".join(f"{ARMS[arm]} {mean:.3f}" for arm, mean in means.items())
        bounds = "" if gain.lower is None else f" ({gain.lower:.3f} to {gain.upper:.3f})"
        yield f"{source}, layer {layer}: C_T {counted}; refined over greedy {gain.value:.3f}{bounds}"


def _links(devices: int) -> Any:
    """PCIe 4.0 × 16 as it is used, one node: an assumption, not a measurement."""
    from effbench_kernels.simulator import Topology

    return Topology(devices, devices, 10e-6, 20e9, 10e-6, 20e9)


def _simulated() -> Iterator[str]:
    """Predicted time of both exchanges of one OLMoE layer over C_T, relative to the first point, beside the paper's."""
    import torch
    from effbench_kernels import in_order, prune, route
    from effbench_kernels.simulator import exchange_rows, predict

    here, place = _links(DEVICES), in_order(64, DEVICES)
    generator = torch.Generator().manual_seed(0)
    likes = torch.randn(24, 64, generator=generator)
    mixed = torch.randint(24, (OLMOE_TOKENS,), generator=generator)
    noise = torch.randn(OLMOE_TOKENS, 64, generator=generator)
    scores = torch.softmax(noise, -1)
    by_device = torch.softmax(noise + 0.75 * likes[mixed][:, :DEVICES].repeat_interleave(16, 1), -1)
    cases = [
        route(noise, 8),
        route(by_device.log(), 8),
        prune(scores, *route(noise, 8), place, 2),
        prune(scores, *route(noise, 8), place, 1),
    ]
    base_s, points = 0.0, []
    for (paper_ct, paper_s), routing in zip(PAPER, cases, strict=True):
        rows = exchange_rows(list(routing.expert.chunk(DEVICES)), place, here, "deduplicated")
        took_s = predict(rows, OLMOE_HIDDEN * 2, here).total_s
        base_s = base_s or took_s
        count = int(rows[0].sum()) / OLMOE_TOKENS
        points.append((count, took_s))
        yield (
            f"simulated (a model, not a measurement), OLMoE, 2^14 tokens, bf16: C_T {count:.2f}: {took_s * 1e3:.2f} ms a layer, "
            f"{took_s / base_s:.2f} of the first; the paper at {paper_ct}: {paper_s} s, "
            f"{(paper_s - INTERCEPT_S) / (PAPER[0][1] - INTERCEPT_S):.2f} of its first, both less {INTERCEPT_S} s"
        )
    fit = torch.tensor(points, dtype=torch.float64).T
    correlation = float(torch.corrcoef(fit)[0, 1])
    yield f"simulated time over C_T: R² of a straight line {correlation**2:.3f}; the paper's four points 0.991"
