"""A Ray cluster of two nodes on this machine; several may run at once."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SMALL = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
"""What each node has."""


@contextmanager
def two_nodes() -> Iterator[Any]:
    """The cluster, a `ray.cluster_utils.Cluster`, as long as the block lasts; its workers find this package."""
    from ray.cluster_utils import Cluster

    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    cluster = Cluster(initialize_head=True, head_node_args=SMALL | {"include_dashboard": False})
    try:
        cluster.add_node(**SMALL)
        yield cluster
    finally:
        cluster.shutdown()
        os.environ.pop("PYTHONPATH") if known is None else os.environ.update(PYTHONPATH=known)
