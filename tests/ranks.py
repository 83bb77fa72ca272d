"""Ranks that are threads of this process, for tests of what runs on several ranks."""

from __future__ import annotations

import threading

from bort.jobs import serve


class ThreadRanks:
    """A context in which ranks from 1 on serve jobs; `rank(0)` is the communicator of rank 0."""

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=20)
        self.sent, self.values = None, [None] * size
        self.servers = [
            threading.Thread(target=serve, args=(self.rank(number),), daemon=True)
            for number in range(1, size)
        ]

    def __enter__(self):
        for server in self.servers:
            server.start()
        return self

    def __exit__(self, *error):
        for server in self.servers:
            server.join(10)

    def finished(self):
        return not any(server.is_alive() for server in self.servers)

    def rank(self, number):
        return _ThreadRank(self, number)


class _ThreadRank:
    def __init__(self, ranks, rank):
        self.ranks, self.rank, self.size = ranks, rank, ranks.size

    def broadcast_object(self, value):
        if self.rank == 0:
            self.ranks.sent = value
        self.ranks.barrier.wait()
        received = self.ranks.sent
        self.ranks.barrier.wait()
        return received

    def allgather_object(self, value):
        self.ranks.values[self.rank] = value
        self.ranks.barrier.wait()
        values = list(self.ranks.values)
        self.ranks.barrier.wait()
        return values

    def barrier(self):
        self.ranks.barrier.wait()
