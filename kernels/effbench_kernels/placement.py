"""Where experts live: how many devices a token reaches, and placements that make them few (Occult, arXiv 2505.13345).

A token is sent once to each device among its experts. C_T, the mean number of these copies, is to be small: experts that are
often chosen together belong on one device. Results never change with a placement.

    place_E = refine(greedy(coactivation(expert_TK, 64), 4), expert_TK, 4)

C_T minus one is the connectivity metric of hypergraph partitioning, tokens being hyperedges over experts. `greedy` is the
paper's, on a matrix of pairs; `refine` exchanges experts on the count of devices itself.

Shapes: T tokens, K experts a token, E experts, N devices. An expert outside 0..E-1 is a dropped pair; an expert that stands
twice in a row counts once.
"""

import math

import torch

from effbench_kernels.checks import check_index

FILLS = ("best", "turns", "device")  # of `greedy`
SWEEPS = 8  # of `refine`
KICKS = 24
KICK_SHARE = 0.25  # of the experts change places in a kick


def check_place(place: torch.Tensor, num_experts: int, num_devices: int) -> None:
    """Refuse what is no placement: place (E,) integer, the device of each expert.

    Raises TypeError for a floating tensor, ValueError for a wrong length, a device that is not there, more devices than experts,
    and counts of experts that differ by more than one.
    """
    _check_devices(num_experts, num_devices)
    if place.is_floating_point() or place.dtype == torch.bool:
        raise TypeError(f"a placement must hold integers, got {place.dtype}")
    if tuple(place.shape) != (num_experts,):
        raise ValueError(f"a placement of {num_experts} experts must have shape ({num_experts},), got {tuple(place.shape)}")
    low, high = int(place.min()), int(place.max())
    if low < 0 or high >= num_devices:
        raise ValueError(
            f"a placement on {num_devices} devices names devices 0 to {num_devices - 1}, got {low if low < 0 else high}"
        )
    count_N = torch.bincount(place, minlength=num_devices)
    fewest, most = int(count_N.min()), int(count_N.max())
    if most - fewest > 1:
        raise ValueError(f"the numbers of experts on the devices may differ by one, here they lie between {fewest} and {most}")


def in_order(num_experts: int, num_devices: int) -> torch.Tensor:
    """(E,) int64: experts in their order, the first ones on device 0. Where E is no multiple of N the first devices hold one more.

    Raises ValueError for more devices than experts.
    """
    _check_devices(num_experts, num_devices)
    return torch.arange(num_devices).repeat_interleave(torch.tensor(_counts(num_experts, num_devices)))


def coactivation(expert: torch.Tensor, num_experts: int) -> torch.Tensor:
    """(E, E) float64: the share of pairs of experts chosen by one token that each pair has; symmetric, sums to 1, zero diagonal.

    expert (T, K). All zero where no token has two experts. Source: Occult, section on expert placement (its matrix P).
    """
    chosen_TE = _chosen(expert, num_experts).double()
    pairs_EE = (chosen_TE.T @ chosen_TE).fill_diagonal_(0)
    return pairs_EE / pairs_EE.sum().clamp_min(1)


def greedy(pairs: torch.Tensor, num_devices: int, fill: str = "best") -> torch.Tensor:
    """(E,) int64: Occult's placement from the matrix of pairs (E, E), larger for experts that should stay together.

    Device 0 is seeded with the pair of the largest entry, every further one with the expert of the lowest mean to all placed so
    far. Then each device is filled with the experts of the highest mean to its own. In what order is not known, so there are three
    readings: "best" takes the best expert of any device with room, "turns" lets the device with the most room choose, "device" fills
    one device after the other. Of equal values the lowest device and expert are taken, so the placement is the same in every run.
    Raises ValueError for a matrix that is not square, more devices than experts and an unknown order.
    """
    if pairs.dim() != 2 or pairs.size(0) != pairs.size(1):
        raise ValueError(f"the matrix of pairs must be square, got shape {tuple(pairs.shape)}")
    if fill not in FILLS:
        raise ValueError(f"fill must be one of {', '.join(FILLS)}, got {fill!r}")
    num_experts = int(pairs.size(0))
    _check_devices(num_experts, num_devices)
    pair_EE = pairs.detach().to("cpu", torch.float64)
    room = _counts(num_experts, num_devices)
    place_E = torch.full((num_experts,), -1)
    sums_NE, held_N1 = torch.zeros(num_devices, num_experts, dtype=torch.float64), torch.zeros(num_devices, 1)

    def put(expert: int, device: int) -> None:
        place_E[expert] = device
        sums_NE[device] += pair_EE[expert]
        held_N1[device] += 1
        room[device] -= 1

    upper_EE = pair_EE.masked_fill(torch.ones_like(pair_EE, dtype=torch.bool).tril(), -math.inf)
    best = int(upper_EE.argmax())
    put(best // num_experts, 0)
    if room[0]:
        put(best % num_experts, 0)
    for device in range(1, num_devices):
        put(int(sums_NE.sum(0).masked_fill(place_E >= 0, math.inf).argmin()), device)
    while any(room):
        devices = [device for device in range(num_devices) if room[device]]
        if fill == "turns":
            devices = [max(devices, key=lambda device: room[device])]
        elif fill == "device":
            devices = devices[:1]
        mean_ME = (sums_NE[devices] / held_N1[devices]).masked_fill(place_E >= 0, -math.inf)
        device, expert = divmod(int(mean_ME.argmax()), num_experts)
        put(expert, devices[device])
    return place_E.to(pairs.device)


def refine(
    place: torch.Tensor,
    expert: torch.Tensor,
    num_devices: int,
    max_sweeps: int = SWEEPS,
    kicks: int = KICKS,
    seed: int = 0,
) -> torch.Tensor:
    """(E,) int64: `place` after exchanges of two experts, each the one that lowers the sum of `replicas` most, while one does.

    place (E,), expert (T, K), the routing to suit. The local optimum is then kicked: a quarter of the experts, drawn from the seed,
    change places, and down again; the lowest sum found is kept (iterated local search). It is never above that of `place`, and every
    device keeps its number of experts. A sweep is as many exchanges as there are experts; `max_sweeps` limits each descent, `kicks` 0
    is plain local search. Same input, same placement, in every run.
    Time of a descent: a product of (E, T) and (T, E), then O(E²) and the tokens of the two experts for each exchange.
    Raises ValueError as `check_place` does, and for a negative number of sweeps or kicks.
    """
    num_experts = int(place.numel())
    check_place(place, num_experts, num_devices)
    if max_sweeps < 0 or kicks < 0:
        raise ValueError(f"max_sweeps and kicks must be at least 0, got {max_sweeps} and {kicks}")
    chosen_TE, most = _chosen(expert, num_experts).float(), max_sweeps * num_experts
    best_E, best = _descend(place.to(expert.device, torch.int64), chosen_TE, num_devices, most)
    generator, moved = torch.Generator().manual_seed(seed), max(2, round(KICK_SHARE * num_experts))
    for _ in range(kicks if most and num_devices > 1 else 0):
        kicked_M = torch.randperm(num_experts, generator=generator)[:moved].to(best_E.device)
        start_E = best_E.clone()
        start_E[kicked_M] = best_E[kicked_M.roll(1)]
        found_E, found = _descend(start_E, chosen_TE, num_devices, most)
        if found < best:
            best_E, best = found_E, found
    return best_E.to(place.device)


def _descend(place_E: torch.Tensor, chosen_TE: torch.Tensor, num_devices: int, most: int) -> tuple[torch.Tensor, int]:
    """The placement after at most so many best exchanges, and its sum of replicas.

    With s_ta = 1 where a is the only expert of token t on its device, and z_td = 1 where t has none on device d, exchanging a on
    device p and b on device q changes the sum by Δ = m_aq + m_bp + B_ab + B_ba, where m_aq = Σ_{t∋a} (z_tq − s_ta) is what moving
    a alone would change, and B_ab = Σ_{t∋b} s_ta puts right the tokens that have both, which do not change.
    """
    place_E, num_experts = place_E.clone(), int(place_E.numel())

    def state(rows_RE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(R, E) who is alone on its device, and (R, N) which devices a token does not reach; counts below 2^24 are exact."""
        count_RN = rows_RE.new_zeros(rows_RE.size(0), num_devices).index_add_(1, place_E, rows_RE)
        return rows_RE * (count_RN[:, place_E] == 1), (count_RN == 0).float()

    alone_TE, absent_TN = state(chosen_TE)
    both_EE, enter_EN, leave_E = alone_TE.T @ chosen_TE, chosen_TE.T @ absent_TN, alone_TE.sum(0)
    total = num_devices * chosen_TE.size(0) - int(absent_TN.sum(dtype=torch.float64))
    for _ in range(most):
        move_EE = (enter_EN - leave_E[:, None])[:, place_E]
        change_EE = move_EE + move_EE.T + both_EE + both_EE.T
        change_EE = change_EE.masked_fill(place_E[:, None] == place_E[None, :], 0)
        best = int(change_EE.argmin())
        change = int(change_EE.flatten()[best])
        if change >= 0:
            break
        a, b = divmod(best, num_experts)
        rows_R = (chosen_TE[:, a] + chosen_TE[:, b]).nonzero()[:, 0]
        place_E[[a, b]] = place_E[[b, a]]
        rows_RE = chosen_TE[rows_R]
        alone_RE, absent_RN = state(rows_RE)
        step_RE = alone_RE - alone_TE[rows_R]
        both_EE += step_RE.T @ rows_RE
        leave_E += step_RE.sum(0)
        enter_EN += rows_RE.T @ (absent_RN - absent_TN[rows_R])
        alone_TE[rows_R], absent_TN[rows_R] = alone_RE, absent_RN
        total += change
    return place_E, total


def devices_of(expert: torch.Tensor, place: torch.Tensor, num_devices: int) -> torch.Tensor:
    """(T, N) bool: the devices that a token's experts (T, K) live on. Raises as `check_place` does."""
    num_experts = int(place.numel())
    check_index(expert, num_experts)
    check_place(place, num_experts, num_devices)
    nowhere_E1 = torch.cat([place.to(expert.device, torch.int64), torch.tensor([num_devices], device=expert.device)])
    reached_TN = torch.zeros(expert.size(0), num_devices + 1, dtype=torch.bool, device=expert.device)
    return reached_TN.scatter_(1, nowhere_E1[_kept_or_last(expert, num_experts)], True)[:, :num_devices]


def replicas(expert: torch.Tensor, place: torch.Tensor, num_devices: int) -> torch.Tensor:
    """(T,) int64: the number of distinct devices among a token's experts (T, K), its own included. C_T is the mean."""
    return devices_of(expert, place, num_devices).sum(1)


def replica_bounds(k: int, num_experts: int, num_devices: int) -> tuple[int, int]:
    """The fewest and the most devices that k distinct experts can lie on, for counts that differ by at most one.

    Where E is a multiple of N these are ⌈k·N/E⌉ and min(k, N), the bounds of Occult. Raises ValueError for k outside 1..E.
    """
    _check_devices(num_experts, num_devices)
    _check_k(k, num_experts)
    held, fewest = 0, 0
    for count in _counts(num_experts, num_devices):
        if held >= k:
            break
        held, fewest = held + count, fewest + 1
    return fewest, min(k, num_devices)


def uniform_replicas(place: torch.Tensor, k: int, num_devices: int) -> float:
    """E[C_T] where every set of k experts is equally likely: Σ_d 1 − C(E − c_d, k) / C(E, k), with c_d experts on device d."""
    num_experts = int(place.numel())
    check_place(place, num_experts, num_devices)
    _check_k(k, num_experts)
    counts = torch.bincount(place, minlength=num_devices).tolist()
    return sum(1 - math.comb(num_experts - count, k) / math.comb(num_experts, k) for count in counts)


def _chosen(expert: torch.Tensor, num_experts: int) -> torch.Tensor:
    """(T, E) bool: which experts a token has."""
    check_index(expert, num_experts)
    chosen_TE1 = torch.zeros(expert.size(0), num_experts + 1, dtype=torch.bool, device=expert.device)
    return chosen_TE1.scatter_(1, _kept_or_last(expert, num_experts), True)[:, :num_experts]


def _kept_or_last(expert: torch.Tensor, num_experts: int) -> torch.Tensor:
    """(T, K) int64, a dropped pair as expert E."""
    wide_TK = expert.to(torch.int64)
    return torch.where((wide_TK >= 0) & (wide_TK < num_experts), wide_TK, num_experts)


def _counts(num_experts: int, num_devices: int) -> list[int]:
    """Experts of each device, the larger ones first."""
    each, more = divmod(num_experts, num_devices)
    return [each + (device < more) for device in range(num_devices)]


def _check_devices(num_experts: int, num_devices: int) -> None:
    if num_devices < 1:
        raise ValueError(f"num_devices must be at least 1, got {num_devices}")
    if num_devices > num_experts:
        raise ValueError(f"{num_devices} devices are more than {num_experts} experts; every device needs one")


def _check_k(k: int, num_experts: int) -> None:
    if not 1 <= k <= num_experts:
        raise ValueError(f"k must lie between 1 and the {num_experts} experts, got {k}")
