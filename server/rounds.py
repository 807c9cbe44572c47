"""The rounds: ask every connected clinic, gate what comes back, aggregate, checkpoint, and in the end release.

A round ends when all have answered or its deadline is over; below the quorum it changes nothing and says so. After a
crash the same call goes on behind the last sound checkpoint. Not here: choosing some of many clinics, and what a
candidate must pass before it is released (`server.publish`).
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MessageType, RecordDict
from flwr.serverapp import Grid

from model import adapters, wire
from server import checkpoint as store
from server import publish, strategy
from server.aggregate import factors_of_round
from server.checkpoint import Rejection, RoundCheckpoint
from server.events import Events
from server.exchange import POLL, Exchange
from server.office import Office, decided
from server.settings import Settings, SettingsRejected
from server.spool import Spool
from server.strategy import Ask, Gate, Update, aggregate, norm_cap, rate_of_round


class Federation:
    """One run over a Flower Grid. `sleep` and `clock` are there for tests that must not wait."""

    def __init__(
        self,
        grid: Grid,
        settings: Settings,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        exchange: Callable[..., Iterator[tuple[int, Any]]] | None = None,
    ) -> None:
        self.settings, self.sleep, self.clock = settings, sleep, clock
        self.root = Path(settings.checkpoint_dir).expanduser()
        self.events = Events(self.root)
        self.link = Exchange(grid, sleep, clock)
        self.exchange = exchange or self.link.replies
        self.silence = strategy.NOT_GIVEN if exchange else strategy.SILENT
        self.office = Office(self.root, settings, self.events, self.link.clinics, self.link.replies)

    def run(self) -> RoundCheckpoint:
        """All rounds that are still to do, then the release; returns the last checkpoint.

        With the setting `rollback` no round: an earlier release is brought to the clinics again.
        """
        if self.settings.rollback:
            return self._roll_back()
        now, last = self._start(), self.settings.num_server_rounds
        if now.round > last:
            raise SettingsRejected(f"num-server-rounds is {last}, but {now.round} rounds are done; set it to more.")
        if self._due(now.round) and not decided(self.office, now):  # a crash came between round and release
            publish.release_now(self.office, now)
        for number in range(now.round + 1, last + 1):
            now = self._round(number, now)
            if self._due(number):
                publish.release_now(self.office, now)
        publish.release_now(self.office, now)
        self.events.add("finished", round=now.round, updates=now.updates)
        return now

    def _due(self, number: int) -> bool:
        """Whether a release follows this round, before the one at the end."""
        every = self.settings.release_every
        return bool(every and number and number % every == 0 and number < self.settings.num_server_rounds)

    def _roll_back(self) -> RoundCheckpoint:
        """Bring an earlier release to the clinics again; the rounds stay where they are."""
        now, _ = store.latest(self.root)
        if now is None:
            raise SettingsRejected(f"{self.root} holds no rounds, so nothing was released from there.")
        publish.rollback(self.office, self.settings.rollback)
        self.events.add("finished", round=now.round, updates=now.updates)
        return now

    def single(self) -> RoundCheckpoint:
        """The next round alone, without a release."""
        now = self._start()
        return self._round(now.round + 1, now)

    def next_ask(self) -> Ask:
        """What the next round will ask of the clinics that are there now."""
        now = self._start()
        factor = factors_of_round(self.settings.aggregation, now.updates)
        return self._ask(now.round + 1, factor, now, self.link.clinics())

    def _start(self) -> RoundCheckpoint:
        """The last sound checkpoint, or round 0: the initial factors."""
        from model.llava import base_sha256

        base = base_sha256(self.settings.base)
        if self.settings.base_sha256 not in ("", base):
            raise SettingsRejected(f"base-sha256 is {self.settings.base_sha256[:12]}, the base model is {base[:12]}.")
        found, skipped = store.latest(self.root)
        for sentence in skipped:
            self.events.add("checkpoint-skipped", reason=sentence)
        if found is not None:
            self._same_adapter(found, base)
            self.events.add("resumed", round=found.round)
            return found
        s = self.settings
        state = adapters.initial(s.base, s.rank, s.alpha, s.targets, s.seed)
        spec = adapters.spec_of(state, s.alpha, base)
        first = RoundCheckpoint(0, 0, "", False, "the initial factors", spec, state, config=asdict(s))
        store.save(self.root, first)
        self.events.add("started", base_sha256=base, arrays=len(state), bytes=wire.packed_bytes(state))
        return first

    def _same_adapter(self, found: RoundCheckpoint, base: str) -> None:
        s, was = self.settings, found.config
        same = ("targets", "rank", "alpha", "aggregation")
        faults = [f"{n} was {was[n]!r}" for n in same if n in was and was[n] != getattr(s, n)]
        if found.spec.base_sha256 != base:
            faults.append(f"the base model was {found.spec.base_sha256[:12]}")
        if faults:
            what = ", ".join(faults)
            raise SettingsRejected(f"{self.root} holds rounds of another adapter ({what}); use another folder.")

    def _round(self, number: int, before: RoundCheckpoint) -> RoundCheckpoint:
        """One round from the state of `before`; its checkpoint is on the disk when this returns."""
        start = self.clock()
        factor = factors_of_round(self.settings.aggregation, before.updates)
        there = self._clinics(start)
        asked_at = self.clock()
        clinics = there if len(there) >= self.settings.quorum else {}  # training in vain costs, and may cost privacy
        ask = self._ask(number, factor, before, clinics)
        self.events.add("round", round=number, factor=factor, lr=ask.lr, clinics=sorted(clinics.values()))
        spool = Spool(self.root / "incoming")
        spool.clear()
        gate = Gate(ask, spool)
        self._collect(gate, asked_at)
        for late in gate.silent(self.silence):
            self.events.add("rejected", round=number, clinic=late.clinic, reason=late.reason)
        after = self._conclude(gate, before, asked_at)
        store.save(self.root, after)
        spool.clear()
        row = store.summary(after)
        self.events.add("round-done", **{key: row[key] for key in row if key not in ("accepted", "rejected")})
        return after

    def _clinics(self, start: float) -> dict[int, str]:
        """Connected nodes and their registered names; waits for a quorum, for at most `wait_hours`."""
        told: list[str] | None = None
        while True:
            found = self.link.clinics()
            names, left = sorted(found.values()), 3600 * self.settings.wait_hours - (self.clock() - start)
            if len(found) >= self.settings.quorum or left <= 0:
                return found
            if names != told:
                self.events.add("waiting", clinics=names, needed=self.settings.quorum, seconds=round(left))
                told = names
            self.sleep(POLL)

    def _ask(self, number: int, factor: str, before: RoundCheckpoint, clinics: Mapping[int, str]) -> Ask:
        s = self.settings
        lr = rate_of_round(s.lr, number, s.num_server_rounds, s.lr_final)
        sizes = {f: sum(a.size for n, a in before.state.items() if adapters.factor(n) == f) for f in factor}
        reach = sum(size * (s.lr_ratio**2 if f == "B" else 1) for f, size in sizes.items())
        cap = s.max_update_norm or norm_cap(lr, s.local_steps, reach)
        return Ask(number, factor, wire.rounded(before.state), before.spec, clinics, lr, cap)

    def _collect(self, gate: Gate, asked_at: float) -> None:
        """Send the round's message and take replies one by one until all are there or the deadline is over."""
        ask, s = gate.ask, self.settings
        config = asked(ask, s)
        arrays = {wire.key(factor): Array(wire.pack(ask.state, factor)) for factor in wire.FACTORS}
        content = RecordDict({"arrays": ArrayRecord(arrays), "config": ConfigRecord(config)})
        left = s.round_deadline - (self.clock() - asked_at)
        replies = self.exchange(content, MessageType.TRAIN, ask.clinics, ask.round, left) if ask.clinics else ()
        for node, reply in replies:
            got = gate.unreadable(node, reply) if isinstance(reply, Exception) else gate.take(node, reply)
            if isinstance(got, Rejection):
                self.events.add("rejected", round=ask.round, clinic=got.clinic, reason=got.reason)
            elif isinstance(got, Update):
                own = {"round": ask.round, "clinic": got.clinic, "examples": got.examples, "cases": got.cases}
                own |= {"norm": round(got.norm, 4), "bytes": got.bytes}
                self.events.add("accepted", **{**got.metrics, **own})  # a metric's name is the clinic's choice

    def _conclude(self, gate: Gate, before: RoundCheckpoint, start: float) -> RoundCheckpoint:
        """The checkpoint after a round: with the mean of the accepted updates, or unchanged below the quorum."""
        ask, updates = gate.ask, list(gate.updates.values())
        s = self.settings
        enough = len(updates) >= s.quorum
        base = replace(
            before,
            round=ask.round,
            factor=ask.factor,
            changed=enough,
            accepted=(),
            quality={},
            rejected=tuple(gate.rejected),
            config=asdict(self.settings),
            seconds=self.clock() - start,
            bytes_down=wire.packed_bytes(ask.state) * len(ask.clinics),
            bytes_up=sum(update.bytes for update in updates),
        )
        if enough:
            return self._combined(updates, ask, before, base)
        rules = f" (min-clinics {s.min_clinics}, trim {s.trim}, set-aside {s.set_aside})"
        why = rules if s.quorum > s.min_clinics else ""
        reason = f"{len(updates)} accepted replies, fewer than the quorum of {s.quorum}{why}: unchanged"
        return self._noted(before, replace(base, reason=reason))

    def _combined(
        self, updates: list[Update], ask: Ask, before: RoundCheckpoint, base: RoundCheckpoint
    ) -> RoundCheckpoint:
        """`base` with what the updates make of the factors."""
        s, scale = self.settings, before.spec.alpha / before.spec.rank
        try:
            found = aggregate(updates, ask.state, mode=s.aggregation, cut=s.trim, aside=s.set_aside, scale=scale)
        except adapters.AdapterRejected as error:
            return self._noted(before, replace(base, changed=False, reason=f"{error} Unchanged."))
        for odd in found.aside:
            self.events.add("set-aside", round=ask.round, clinic=odd.clinic, reason=odd.reason)
        reason = f"{len(found.accepted)} of {len(ask.clinics)} replies aggregated"
        base = replace(base, rejected=base.rejected + found.aside, updates=before.updates + 1, reason=reason)
        return self._noted(before, replace(base, state=found.state, accepted=found.accepted, quality=found.quality))

    def _noted(self, before: RoundCheckpoint, after: RoundCheckpoint) -> RoundCheckpoint:
        return replace(after, history=store.history(before.history, after))


def asked(ask: Ask, settings: Settings) -> dict[str, str | int | float]:
    """What a round asks of a clinic, beside the arrays: the same over the link and on a stick."""
    config: dict[str, str | int | float] = {
        "server-round": ask.round,
        "factor": ask.factor,
        "base-sha256": ask.spec.base_sha256,
        "alpha": settings.alpha,
        "layout": wire.layout(ask.spec),
        "local-steps": settings.local_steps,
        "lr": ask.lr,
        "batch-size": settings.batch_size,
        "seed": settings.seed,
        "proximal-mu": settings.proximal_mu,
    }
    # Left out where it is 1: clinics of an earlier version, who take part by stick, do not know it.
    return config | ({} if settings.lr_ratio == 1 else {"lr-ratio": settings.lr_ratio})


def federate(grid: Grid, settings: Settings, **options: Any) -> RoundCheckpoint:
    """Run or resume a federation; returns the last checkpoint. Raises SettingsRejected, CheckpointDamaged."""
    return Federation(grid, settings, **options).run()
