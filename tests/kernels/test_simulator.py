"""The simulator against cases worked out by hand, what must be conserved, and thousands of devices."""

import time

import pytest
import torch
from effbench_kernels import Routing, in_order, replicas
from effbench_kernels.exchange import rows_of, shards
from effbench_kernels.simulator import EXCHANGES, Topology, exchange_rows, exchange_s, fit_link, predict
from hypothesis import given, settings
from hypothesis import strategies as st


def topology(devices, per_node=None, inside=(1e-6, 1e9), between=(1e-5, 1e8)):
    return Topology(devices, per_node or devices, *inside, *between)


def routing(num_devices, tokens, num_experts, k, seed=0, drop=0.0):
    generator = torch.Generator().manual_seed(seed)
    found = [torch.rand(tokens, num_experts, generator=generator).topk(k).indices for _ in range(num_devices)]
    return [expert.masked_fill(torch.rand(expert.shape, generator=generator) < drop, -1) for expert in found]


BY_HAND = [
    torch.tensor([[0, 1], [2, 3]]),
    torch.tensor([[0, 7]]),
    torch.tensor([[-1, 6]]),
    torch.zeros(0, 2, dtype=torch.int64),
]


def test_rows_by_hand():
    """Experts 0 and 1 on device 0, 2 and 3 on device 1, and so on; device 1 has one token, device 3 none."""
    (naive,), (once,) = (exchange_rows(BY_HAND, in_order(8, 4), topology(4), how) for how in ("naive", "deduplicated"))
    assert naive.tolist() == [[2, 2, 0, 0], [1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert once.tolist() == [[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_two_levels_by_hand():
    """Two nodes of two. Device 1's token for device 3 goes to device 3, its number in the other node; the rest stays inside."""
    expert = [torch.tensor([[4, 6]]), torch.tensor([[0, 7]]), torch.zeros(0, 2, dtype=torch.int64), torch.tensor([[0, 2]])]
    far, near = exchange_rows(expert, in_order(8, 4), topology(4, 2), "two_level")
    assert far.tolist() == [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert near.tolist() == [[0, 0, 0, 0], [2, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]


def test_time_by_hand_in_one_node():
    rows = torch.tensor([[9, 2, 0], [0, 5, 1], [0, 4, 0]])
    # In at device 1: two messages, 6 rows of 100 bytes. Rows that stay are free.
    assert exchange_s(rows, 100, topology(3)) == pytest.approx(2e-6 + 600 / 1e9)


def test_time_by_hand_between_nodes():
    rows = torch.zeros(4, 4, dtype=torch.int64)
    rows[0, 1], rows[0, 2], rows[0, 3], rows[1, 3] = 5, 1, 2, 7
    # Out of device 0: one message and 5 rows inside; two messages between, and the node's port carries its rows and device 1's.
    assert exchange_s(rows, 100, topology(4, 2)) == pytest.approx((1e-6 + 500 / 1e9) + (2e-5 + 1000 / 1e8))


def test_nothing_sent_takes_no_time():
    assert exchange_s(torch.eye(4, dtype=torch.int64) * 7, 100, topology(4, 2)) == 0.0


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 6), st.integers(0, 99), st.sampled_from([0, 0.3])
)
def test_rows_are_conserved(nodes, per_node, k, tokens, seed, drop):
    devices = nodes * per_node
    k, place = min(k, 2 * devices), in_order(2 * devices, devices)
    expert, where = routing(devices, tokens, 2 * devices, k, seed, drop), topology(devices, per_node)
    naive, once, levels = (exchange_rows(expert, place, where, how) for how in EXCHANGES)
    every = torch.cat(expert)
    copies = int(replicas(every, place, devices).sum())
    assert int(naive[0].sum()) == int((every >= 0).sum())
    assert int(once[0].sum()) == copies == int(levels[1].sum()), "each device among a token's experts gets it once"
    for source, own in enumerate(expert):
        assert int(once[0][source].sum()) == int(replicas(own, place, devices).sum())
    assert torch.equal(once[0].sum(0), levels[1].sum(0)), "two levels deliver the same to each device"
    node = torch.arange(devices) // per_node
    far = node[:, None] != node[None, :]
    assert not levels[1][far].any() and not levels[0][~far].any()
    reached = replicas(every, torch.arange(devices).repeat_interleave(2) // per_node, nodes)
    own = sum(int((place[e[e >= 0]] // per_node == s // per_node).any()) for s, t in enumerate(expert) for e in t)
    assert int(levels[0].sum()) == int(reached.sum()) - own
    found = [predict(rows, 10, where, 6) for rows in (naive, once, levels)]
    assert found[1].rows == 2 * copies and found[1].bytes == copies * 16
    assert found[0].bytes >= found[1].bytes
    assert found[2].between_bytes <= found[1].between_bytes <= found[0].between_bytes
    assert found[2].dispatch_s == sum(exchange_s(stage, 10, where) for stage in levels)
    assert found[2].combine_s == pytest.approx(sum(exchange_s(stage.T, 6, where) for stage in levels), rel=1e-12)
    assert found[1].remote_bytes == int((once[0].sum() - once[0].diagonal().sum()) * 16)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(0, 15), st.floats(1.0, 3.0))
def test_time_grows_with_bytes_and_with_slower_links(seed, cell, factor):
    rows = torch.randint(0, 5, (4, 4), generator=torch.Generator().manual_seed(seed))
    more = rows.clone()
    more.view(-1)[cell] += 3
    where = topology(4, 2)
    least = exchange_s(rows, 64, where)
    assert exchange_s(more, 64, where) >= least
    assert exchange_s(rows, 64 * factor, where) >= least
    for change in ("inside_latency_s", "between_latency_s"):
        assert exchange_s(rows, 64, where._replace(**{change: getattr(where, change) * factor})) >= least
    for change in ("inside_bytes_per_s", "between_bytes_per_s"):
        assert exchange_s(rows, 64, where._replace(**{change: getattr(where, change) / factor})) >= least


def test_symmetric_traffic_is_symmetric():
    rows = torch.full((6, 6), 4)
    where = topology(6, 3)
    found = predict([rows], 100, where)
    assert found.dispatch_s == found.combine_s and found.total_s == 2 * found.dispatch_s
    renumbered = torch.tensor([2, 0, 1, 5, 3, 4])
    uneven = torch.arange(36).view(6, 6)
    assert exchange_s(uneven, 9, where) == pytest.approx(exchange_s(uneven[renumbered][:, renumbered], 9, where))
    assert exchange_s(uneven, 9, where) == pytest.approx(exchange_s(uneven.T, 9, where))


@pytest.mark.parametrize("how", ["naive", "deduplicated"])
def test_rows_are_those_that_the_exchange_between_processes_sends(how):
    expert, place = routing(4, 30, 16, 5, seed=2, drop=0.2), in_order(16, 4)[torch.randperm(16)]
    (rows,) = exchange_rows(expert, place, topology(4), how)
    for source, own in enumerate(expert):
        sent = rows_of(Routing(own, torch.ones(own.shape)), shards(place, 4), deduplicate=how == "deduplicated")
        assert sent.send == rows[source].tolist()


def test_in_one_node_two_levels_are_one():
    expert, place = routing(4, 9, 8, 3), in_order(8, 4)
    once, (far, near) = (exchange_rows(expert, place, topology(4), how) for how in ("deduplicated", "two_level"))
    assert not far.any() and torch.equal(near, once[0])


@pytest.mark.alone
def test_thousands_of_devices_in_seconds():
    devices, where = 4096, topology(4096, 8)
    expert, place = routing(devices, 16, 64, 8), in_order(devices * 2, devices)
    expert = [e * 97 % (devices * 2) for e in expert]
    for how in EXCHANGES:
        began = time.process_time()
        found = predict(exchange_rows(expert, place, where, how), 4096, where)
        took_s = time.process_time() - began
        print(f"{how}: {took_s:.1f} s for {devices} devices; {found}")
        assert took_s < 10 and found.total_s > 0


def test_a_link_is_found_again_from_its_times():
    sizes = [1e3, 1e5, 1e6]
    assert fit_link(sizes, [3e-6 + size / 5e9 for size in sizes]) == (pytest.approx(3e-6), pytest.approx(5e9))
    latency, bandwidth = fit_link([1e3, 1e6], [1e-9, 1e-3])
    assert latency == 0 and bandwidth == pytest.approx(1e9, rel=0.01), "no negative latency"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"expert_by_source": BY_HAND[:3]}, "3 sources of tokens for 4 devices"),
        ({"how": "magic"}, "must be one of naive, deduplicated, two_level, got 'magic'"),
        ({"topology": topology(4, 3)}, "4 devices do not make full nodes of 3"),
        ({"topology": topology(4, inside=(0, 0))}, "bandwidths must be above 0"),
        ({"topology": topology(4, inside=(-1, 1))}, "latencies must be at least 0"),
        ({"place": in_order(3, 3)}, "4 devices are more than 3 experts"),
        ({"expert_by_source": [*BY_HAND[:3], torch.zeros(1, 3, dtype=torch.int64)]}, "same number of experts a token"),
    ],
)
def test_bad_input_is_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        exchange_rows(**{"expert_by_source": BY_HAND, "place": in_order(8, 4), "topology": topology(4), **change})


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match=r"matrices of \(4, 4\)"):
        predict([torch.zeros(3, 3, dtype=torch.int64)], 1, topology(4))
    with pytest.raises(ValueError, match="at least two sizes"):
        fit_link([1.0], [1.0])
    with pytest.raises(ValueError, match="do not grow"):
        fit_link([1.0, 2.0], [2.0, 1.0])
