"""Ray clusters on this machine; several may run at once."""

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

SMALL = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
"""What each node has."""


def two_nodes() -> AbstractContextManager[Any]:
    """A cluster of two nodes with a CPU each."""
    return nodes_with(1, 1)


@contextmanager
def nodes_with(*cpus: int) -> Iterator[Any]:
    """The cluster, a `ray.cluster_utils.Cluster`, as long as the block lasts; its workers find this package."""
    from ray.cluster_utils import Cluster

    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    head, *others = (SMALL | {"num_cpus": count} for count in cpus)
    cluster = Cluster(initialize_head=True, head_node_args=head | {"include_dashboard": False})
    try:
        for node in others:
            cluster.add_node(**node)
        yield cluster
    finally:
        cluster.shutdown()
        os.environ.pop("PYTHONPATH") if known is None else os.environ.update(PYTHONPATH=known)
