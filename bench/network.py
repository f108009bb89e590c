"""What a collective costs: its bytes, and a model of its time on nodes of eight H100s. Nothing here is measured.

Bytes: of the ring algorithm, which sends the least that any can (an all-reduce as a reduce-scatter and an all-gather).
Time: latency of the steps + bytes / bandwidth, the least over algorithms (ring; for an all-reduce tree as well) and
protocols, as the library chooses. Collectives of a step follow each other, and nothing overlaps with them.

Assumed                              from
    NVLink 450 GB/s a direction      the vendor's data sheet of the H100 SXM, 900 GB/s both ways together
    network 50 GB/s a GPU            one 400 Gb/s adapter for every GPU, the usual node; a ring crosses a node's border
                                     once and its traffic is split over all eight adapters, so a node sends 400 GB/s
    latencies, protocols' shares     the constants of NCCL's own cost model, in its public source (tuning of algorithms
    of the bandwidth                 and protocols); LL's share is its cap over several nodes, 35 to 45 GB/s

Peak bandwidths, no congestion, no launch or host time: true times are longer, the more so the more GPUs there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GPUS_A_NODE = 8
NVLINK, ADAPTER = 450e9, 50e9  # bytes a second, one direction, of a GPU


@dataclass(frozen=True)
class Protocol:
    base: float  # µs of any collective
    nvlink: float  # µs of a step inside a node
    network: float  # µs of a step between nodes
    share: float  # of the bandwidth that carries data


# LL, LL128, Simple: flags beside every word, beside every 120 bytes, none.
RING = (Protocol(6.6, 0.6, 2.7, 0.1), Protocol(14.0, 1.9, 4.0, 0.92), Protocol(8.4, 3.4, 14.0, 1.0))
TREE = (Protocol(6.8, 0.6, 5.0, 0.1), Protocol(14.0, 1.25, 8.5, 0.92), Protocol(8.4, 4.0, 14.0, 0.92))


@dataclass(frozen=True)
class Collective:
    """payload: bytes that every rank hands over: all of its tensor, for an all-gather its own part of the result."""

    kind: str  # all-reduce, all-gather, reduce-scatter
    payload: int

    @property
    def rounds(self) -> int:
        """Times that data goes round the ring."""
        return 2 if self.kind == "all-reduce" else 1

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends."""
        parts = self.payload if self.kind == "all-gather" else self.payload / ranks
        return self.rounds * (ranks - 1) * parts

    def microseconds(self, gpus: int) -> float:
        """By the model, for 1 to 8 GPUs or whole nodes."""
        if gpus == 1:
            return 0.0
        nodes = math.ceil(gpus / GPUS_A_NODE)
        bandwidth = NVLINK if nodes == 1 else min(NVLINK, GPUS_A_NODE * ADAPTER)
        crossings = self.rounds * nodes if nodes > 1 else 0
        inside = self.rounds * (gpus - 1) - crossings
        times = [
            p.base + inside * p.nvlink + crossings * p.network + 1e6 * self.sent(gpus) / (p.share * bandwidth)
            for p in RING
        ]
        if self.kind == "all-reduce":  # up the tree and down again
            hops = min(gpus, GPUS_A_NODE) - 1
            times += [
                p.base
                + 2 * (hops * p.nvlink + math.log2(nodes) * p.network)
                + 1e6 * 2 * self.payload / (p.share * bandwidth)
                for p in TREE
            ]
        return min(times)
