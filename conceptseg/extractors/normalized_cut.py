"""Normalised cuts of a graph: which nodes to part so that little is cut of either side's degree (Shi and Malik 2000)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

THRESHOLDS, INNER = 100, 0.99
"""How many places an eigenvector is cut at, and the share of its extremes that they lie between, in the released DiffCut."""


def second_eigenvector(edges: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """Return the y of the second-least λ in (D - W) y = λ D y, of edges W >= 0 between n nodes and their degrees D."""
    scaled = edges.sum(1).rsqrt()
    _, vectors = torch.linalg.eigh(scaled[:, None] * (torch.diag(edges.sum(1)) - edges) * scaled)
    return scaled * vectors[:, 1]


def cheapest_cut(edges: Float[Tensor, "n n"]) -> tuple[Bool[Tensor, " n"], float]:
    """Return one side of the best cut of the second eigenvector, and its cost: the cut's share of each side's degree, added up.

    The side holds the entry of greatest magnitude. Where no threshold parts the nodes the cost is infinite.
    """
    vector = second_eigenvector(edges)
    vector = vector * vector[vector.abs().argmax()].sign()
    at = torch.linspace(INNER * float(vector.min()), INNER * float(vector.max()), THRESHOLDS).to(vector)
    sides = (vector > at[:, None]).to(edges)
    degree = edges.sum(1)
    one, other = sides @ degree, (1 - sides) @ degree
    cut = ((sides @ edges) * (1 - sides)).sum(1)
    cost = torch.where((one > 0) & (other > 0), cut / one + cut / other, torch.inf)
    best = cost.argmin()
    return sides[best].bool(), float(cost[best])


def recursive_cut(edges: Float[Tensor, "n n"], limit: float) -> Int[Tensor, " n"]:
    """Return the part of each of n nodes, 0, 1, ...; parts are cut again while the cheapest cut costs less than `limit`."""
    part = torch.zeros(len(edges), dtype=torch.long, device=edges.device)
    waiting, parts = [torch.arange(len(edges), device=edges.device)], 0
    while waiting:
        nodes = waiting.pop()
        side, cost = cheapest_cut(edges[nodes][:, nodes]) if len(nodes) > 1 else (None, torch.inf)
        if side is not None and cost < limit:
            waiting += [nodes[~side], nodes[side]]
        else:
            part[nodes] = parts
            parts += 1
    return part
