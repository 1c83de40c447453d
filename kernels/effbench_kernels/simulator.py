"""What an exchange of tokens costs on a network that is not here: rows between devices from a routing, and a time from those.

    rows = exchange_rows(expert_by_source, place_E, topology, "deduplicated")
    predicted = predict(rows, row_bytes=4096, topology=topology)

naive          each token goes to every one of its experts: k rows
deduplicated   once to each device among its experts (Occult, arXiv 2505.13345)
two_level      once to each other node, to the device with the sender's number there, and from there once to each device

Way back: the same rows the other way round, expert outputs being summed where they were made (naive: k rows again).

The model of time, an estimate: links carry both directions at once. A device has one port inside its node; the devices of a node
share one port between nodes. In one direction a device needs, for each of the two kinds of link, the messages to other devices
times the latency plus the bytes at its port over the bandwidth; the two kinds follow each other, and an exchange lasts as long as
its slowest device. Rows that stay on their device cost nothing. No contention inside the network, no overlap with compute.

Shapes: T tokens, K experts a token, E experts, N devices, G nodes of P devices.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from effbench_kernels.checks import check_index
from effbench_kernels.placement import check_place

EXCHANGES = ("naive", "deduplicated", "two_level")


class Topology(NamedTuple):
    """`devices` in nodes of `per_node`, numbered node by node, and the links inside a node and between nodes."""

    devices: int
    per_node: int
    inside_latency_s: float
    inside_bytes_per_s: float
    between_latency_s: float
    between_bytes_per_s: float

    def check(self) -> None:
        """Raises ValueError for nodes that are not all full, bandwidths that are not positive and negative latencies."""
        if self.per_node < 1 or self.devices < 1 or self.devices % self.per_node:
            raise ValueError(f"{self.devices} devices do not make full nodes of {self.per_node}")
        if min(self.inside_bytes_per_s, self.between_bytes_per_s) <= 0:
            raise ValueError("bandwidths must be above 0 bytes per second")
        if min(self.inside_latency_s, self.between_latency_s) < 0:
            raise ValueError("latencies must be at least 0 seconds")


class Prediction(NamedTuple):
    """One exchange there and back. Rows count both ways together; remote rows leave their device; times are estimates."""

    rows: int
    remote_rows: int
    bytes: int
    remote_bytes: int
    between_bytes: int
    dispatch_s: float
    combine_s: float

    @property
    def total_s(self) -> float:
        """Both ways."""
        return self.dispatch_s + self.combine_s


def exchange_rows(
    expert_by_source: Sequence[torch.Tensor], place: torch.Tensor, topology: Topology, how: str = "deduplicated"
) -> tuple[torch.Tensor, ...]:
    """The rows that each device sends to each on the way there, (N, N) int64 from row to column, one matrix for each stage.

    expert_by_source: for each device the experts (T, K) of its own tokens; T may differ. A dropped pair sends nothing.
    place (E,): the device of each expert. Two levels have two stages, the others one. On the diagonal are rows that stay.
    Raises ValueError for another number of sources than devices, an unknown exchange, and as `check_place` does.
    """
    topology.check()
    num_experts, num_devices = int(place.numel()), topology.devices
    check_place(place, num_experts, num_devices)
    if len(expert_by_source) != num_devices:
        raise ValueError(f"{len(expert_by_source)} sources of tokens for {num_devices} devices; give one each")
    if how not in EXCHANGES:
        raise ValueError(f"the exchange must be one of {', '.join(EXCHANGES)}, got {how!r}")
    for expert in expert_by_source:
        check_index(expert, num_experts)
    if len({expert.size(1) for expert in expert_by_source}) > 1:
        raise ValueError("all sources must have the same number of experts a token")
    expert_TK = torch.cat([expert.to("cpu", torch.int64) for expert in expert_by_source])
    source_T = torch.arange(num_devices).repeat_interleave(torch.tensor([expert.size(0) for expert in expert_by_source]))
    kept_TK = (expert_TK >= 0) & (expert_TK < num_experts)
    device_TK = place.to("cpu", torch.int64)[expert_TK.where(kept_TK, 0)].where(kept_TK, num_devices)

    def count(sender_TK: torch.Tensor, receiver_TK: torch.Tensor, keep_TK: torch.Tensor) -> torch.Tensor:
        pair_M = (sender_TK * num_devices + receiver_TK)[keep_TK]
        return torch.bincount(pair_M, minlength=num_devices**2).view(num_devices, num_devices)

    sender_TK = source_T[:, None].expand_as(device_TK)
    if how == "naive":
        return (count(sender_TK, device_TK, kept_TK),)
    device_TK, first_TK = _distinct(device_TK, num_devices)
    if how == "deduplicated":
        return (count(sender_TK, device_TK, first_TK),)
    node_TK = device_TK // topology.per_node
    relay_TK = node_TK * topology.per_node + sender_TK % topology.per_node  # the sender itself in its own node
    node_TK, once_TK = _distinct(node_TK.where(first_TK, num_devices), num_devices)
    far_TK = once_TK & (node_TK != sender_TK // topology.per_node)
    to_relay_TK = node_TK * topology.per_node + sender_TK % topology.per_node
    return count(sender_TK, to_relay_TK, far_TK), count(relay_TK, device_TK, first_TK)


def predict(
    rows: Sequence[torch.Tensor], row_bytes: float, topology: Topology, return_row_bytes: float | None = None
) -> Prediction:
    """Rows, bytes and estimated time of an exchange there and back, from the rows of its stages.

    row_bytes: of one row on the way there, ids and weights that travel with it included; return_row_bytes: on the way back, the same
    unless given. Raises ValueError as `Topology.check` does and for matrices of another size.
    """
    topology.check()
    size = (topology.devices, topology.devices)
    if any(tuple(stage.shape) != size for stage in rows):
        raise ValueError(f"rows must be matrices of {size}, got {[tuple(stage.shape) for stage in rows]}")
    there, back = row_bytes, row_bytes if return_row_bytes is None else return_row_bytes
    total = sum(int(stage.sum()) for stage in rows)
    remote = total - sum(int(stage.diagonal().sum()) for stage in rows)
    between = total - sum(int(_inside(stage, topology).sum()) for stage in rows)
    return Prediction(
        rows=2 * total,
        remote_rows=2 * remote,
        bytes=round(total * (there + back)),
        remote_bytes=round(remote * (there + back)),
        between_bytes=round(between * (there + back)),
        dispatch_s=sum(exchange_s(stage, there, topology) for stage in rows),
        combine_s=sum(exchange_s(stage.T, back, topology) for stage in rows),
    )


def exchange_s(rows: torch.Tensor, row_bytes: float, topology: Topology) -> float:
    """Seconds of one all-to-all with these rows (N, N) from device to device, by the model above: an estimate."""
    return max(float(_port_s(direction, row_bytes, topology).max()) for direction in (rows, rows.T))


def fit_link(nbytes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Latency in s and bandwidth in bytes/s of a link, from measured sizes and times: least squares, the latency never negative.

    Raises ValueError for fewer than two sizes, and where time does not grow with size.
    """
    size_M, time_M = torch.tensor(nbytes, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
    if size_M.numel() != time_M.numel() or len(set(nbytes)) < 2:
        raise ValueError(f"a link is fitted to at least two sizes with one time each, got {list(nbytes)} and {list(seconds)}")
    centred_M = size_M - size_M.mean()
    slope = float((centred_M * time_M).sum() / centred_M.square().sum())
    latency = float(time_M.mean() - slope * size_M.mean())
    if latency < 0:
        latency, slope = 0.0, float((size_M * time_M).sum() / size_M.square().sum())
    if slope <= 0:
        raise ValueError("the times do not grow with the sizes; no bandwidth can be told from them")
    return latency, 1 / slope


def _port_s(rows_NN: torch.Tensor, row_bytes: float, topology: Topology) -> torch.Tensor:
    """(G, P) seconds that each device needs in the direction of the rows of the matrix."""
    shape = (-1, topology.per_node)
    stay_GP = rows_NN.diagonal().reshape(shape)
    sent_NN = rows_NN > 0
    inside_GP, inside_peers_GP = (_inside(matrix, topology) for matrix in (rows_NN, sent_NN.long()))
    between_G1 = (rows_NN.sum(1).view(shape) - inside_GP).sum(1, keepdim=True)
    between_peers_GP = sent_NN.sum(1).view(shape) - inside_peers_GP
    near_GP = (inside_GP - stay_GP) * (row_bytes / topology.inside_bytes_per_s)
    near_GP = near_GP + (inside_peers_GP - (stay_GP > 0).long()) * topology.inside_latency_s
    far_G1 = between_G1 * (row_bytes / topology.between_bytes_per_s)
    # A node's port is held up by all its devices, a message only by the device that sends it.
    return near_GP + far_G1.double() + between_peers_GP * topology.between_latency_s


def _inside(matrix_NN: torch.Tensor, topology: Topology) -> torch.Tensor:
    """(G, P) of each device the sum over the devices of its own node, itself included."""
    nodes = topology.devices // topology.per_node
    blocks = matrix_NN.reshape(nodes, topology.per_node, nodes, topology.per_node)
    return blocks.diagonal(dim1=0, dim2=2).sum(1).T


def _distinct(value_TK: torch.Tensor, none: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of each row in ascending order, and True at the first of each; `none`, above all values, is no value."""
    sorted_TK = value_TK.sort(1).values
    first_TK = sorted_TK < none
    first_TK[:, 1:] &= sorted_TK[:, 1:] != sorted_TK[:, :-1]
    return sorted_TK, first_TK
