"""One write transaction of SQLite: journals, programs' states and devices' databases all write by it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Run the block as one transaction: on the disk at its end, or, after any error in it or at its end, never.

    Args:
        connection: In autocommit mode (`isolation_level=None`), outside any transaction.

    Raises:
        sqlite3.Error: The file cannot be written.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # Some errors have rolled it back already.
            connection.execute("ROLLBACK")
        raise
