"""The plan of every test that needs one: it matters only what it sums."""

from __future__ import annotations

from sottovoce.blobs import blob_ref
from sottovoce.plan import Aggregation, LocalWork, Plan, PrivacyTerms


def plan_of(*aggregations: Aggregation, weight_cap: int = 50) -> Plan:
    """A plan that sums these."""
    return Plan(
        fleet="choir",
        name="song",
        collection="notes",
        program=blob_ref(b"program"),
        work=LocalWork(),
        aggregations=aggregations,
        privacy=PrivacyTerms(purpose="a test", minimum_cohort=3, weight_cap=weight_cap),
    )
