"""What a federation planned when it invited this clinic, held against the clinic's own limits.

A plan can change with every run of the coordinator, so what lies beyond is told and stops nothing; each round is looked
at again when it comes (`client.limits`).
"""

from collections.abc import Mapping
from typing import Any

from client.limits import Limits
from model.adapters import TARGETS


def beyond(own: Limits, plan: Mapping[str, Any]) -> str:
    """One sentence on what this clinic would refuse of the plan; empty where that is nothing."""
    ranges = {
        "rank": (1, own.max_rank),
        "alpha": (0, own.max_alpha),
        "local-steps": (own.min_steps, own.max_steps),
        "lr": (own.min_lr, own.max_lr),
        "batch-size": (1, own.max_batch),
    }
    numbers = {name: plan[name] for name in ranges if type(plan.get(name)) in (int, float)}
    seen = numbers.get("local-steps", own.max_steps) * numbers.get("batch-size", own.max_batch)
    if seen < own.min_cases:
        return f"the federation planned {seen:g} samples a round, and nothing leaves here below {own.min_cases}."
    found = [
        f"{name} {value} (here {ranges[name][0]} to {ranges[name][1]})"
        for name, value in numbers.items()
        if not ranges[name][0] <= value <= ranges[name][1]
    ]
    asked, allowed = _layers(str(plan.get("targets", ""))), _layers(own.targets)
    if allowed and asked - allowed:
        found.append(f"targets {plan['targets']} (here not {', '.join(sorted(asked - allowed))})")
    if not found:
        return ""
    what = ", ".join(found)
    return (
        f"the federation planned {what}; such rounds are refused here: change [client] of afya.toml or talk to the "
        "coordinator."
    )


def _layers(targets: str) -> set[str]:
    """The named layers of `targets`; none where it is an expression."""
    parts = set(targets.split("+"))
    return parts if parts <= set(TARGETS) else set()
