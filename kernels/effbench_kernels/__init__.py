"""Expert kernels for mixture-of-experts layers: route, sort, experts. Needs torch and nothing else.

routing = route(logits_TE, k=2, renorm=True)
plan = sort(routing.expert, num_experts)
y_TO = experts(x_TD, w_in_EPD, w_out_EOF, plan, routing.weight, act="swiglu")
"""

from effbench_kernels.activations import ACTIVATIONS
from effbench_kernels.layer import collect, combine, experts, grouped_linear
from effbench_kernels.norms import Norm
from effbench_kernels.placement import (
    check_place,
    coactivation,
    devices_of,
    greedy,
    in_order,
    refine,
    replica_bounds,
    replicas,
    uniform_replicas,
)
from effbench_kernels.plan import Plan, dense_plan, sort
from effbench_kernels.pruning import POLICIES, prune, router_similarity
from effbench_kernels.routing import SCORES, Groups, Routing, load_balance_loss, route, z_loss

__version__ = "0.1.0"
__all__ = [
    "ACTIVATIONS",
    "POLICIES",
    "SCORES",
    "Groups",
    "Norm",
    "Plan",
    "Routing",
    "check_place",
    "coactivation",
    "collect",
    "combine",
    "dense_plan",
    "devices_of",
    "experts",
    "greedy",
    "grouped_linear",
    "in_order",
    "load_balance_loss",
    "prune",
    "refine",
    "replica_bounds",
    "replicas",
    "route",
    "router_similarity",
    "sort",
    "uniform_replicas",
    "z_loss",
]
