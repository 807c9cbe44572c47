"""Rows decoded together by recorded steps on a CUDA device; the interface of `model.decode.Batch`.

A row has a slot of its own in buffers that never move, so a step is one replay of a CUDA graph. Prompts are computed by
PyTorch, and their keys and values copied into the slot. Graphs are recorded when first needed, for 1, 2, 4, 8, 16...
rows; the buffers grow, never shrink, and stay for the next batch (`Recorded`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from model import decode
from model.cuda_step import Decoder, Memory, power_of_two
from model.decode import Layers, Row, Step

_ROOM = 256  # tokens by which a slot grows
AHEAD = 2  # steps on their way: one computes, one waits for the device


_Chosen = tuple[int, int, float, int]  # row, id, its probability, and how many tokens were run for it


@dataclass(frozen=True)
class Flight:
    """A step on its way: where ids and probabilities of its rows will be, and the event after which they are."""

    found: Any
    landed: Any

    def results(self) -> tuple[list[int], list[float]]:
        """Ids and probabilities chosen; waits for them."""
        if self.landed is not None:
            self.landed.synchronize()
        ids, odds = self.found.tolist()
        return [int(value) for value in ids], odds


class Stage:
    """Buffers for `slots` rows of `room` tokens, and the steps recorded on them."""

    def __init__(self, decoder: Decoder, slots: int, room: int) -> None:
        """Empty buffers; nothing is recorded yet."""
        self.decoder, self.memory = decoder, Memory(decoder, slots, room)
        self._graphs: dict[int, Any] = {}
        self._pool: Any = None

    def start(self, rows: int) -> Flight:
        """Begin a step of the first `rows` rows; it goes on while the caller does something else."""
        import torch

        if self.decoder.device.type != "cuda":  # Triton's interpreter, which records nothing
            self.decoder.step(self.memory, rows)
            return Flight(self.memory.found[:, :rows].clone(), None)
        size = min(power_of_two(rows), self.memory.slots)
        if size not in self._graphs:
            self._graphs[size] = self._record(size)
        self._graphs[size].replay()
        host = torch.empty(2, rows, dtype=torch.float32, pin_memory=True)
        host.copy_(self.memory.found[:, :rows], non_blocking=True)
        landed = torch.cuda.Event()
        landed.record()
        return Flight(host, landed)

    def _record(self, rows: int) -> Any:
        """A step of `rows` rows as a graph. One is run first, which compiles; what it changed is put back."""
        import torch

        memory = self.memory
        tokens, lengths = memory.tokens.clone(), memory.lengths.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.decoder.step(memory, rows)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self.decoder.step(memory, rows)
        self._pool = self._pool or graph.pool()
        memory.tokens.copy_(tokens)
        memory.lengths.copy_(lengths)
        return graph

    def take_over(self, former: Stage, rows: int) -> None:
        """Copy the rows of a smaller stage."""
        mine, theirs = self.memory, former.memory
        room = theirs.room
        mine.keys[:, :rows, :, :room] = theirs.keys[:, :rows]
        mine.values[:, :rows, :, :room] = theirs.values[:, :rows]
        mine.tokens[:rows], mine.lengths[:rows] = theirs.tokens[:rows], theirs.lengths[:rows]

    def move(self, source: int, target: int) -> None:
        """Copy a row to another slot."""
        memory = self.memory
        for part in (memory.keys, memory.values):
            part[:, target] = part[:, source]
        for line in (memory.tokens, memory.lengths):
            line[target] = line[source]


class Recorded:
    """A network ready for recorded steps, and the buffers that are free for the next batch."""

    def __init__(self, core: Any, banned: Sequence[int]) -> None:
        """Lay out the weights of a LlavaForConditionalGeneration; see `cuda_decoder.unsuitable` first."""
        self.decoder = Decoder(core, sorted(set(banned) - decode.end_ids(core)))
        self._spare: Stage | None = None

    def take(self, slots: int, room: int) -> Stage:
        """Buffers of at least this size."""
        spare, self._spare = self._spare, None
        if spare and spare.memory.slots >= slots and spare.memory.room >= room:
            return spare
        if spare:
            slots, room = max(slots, spare.memory.slots), max(room, spare.memory.room)
            del spare  # before more is asked for
        return Stage(self.decoder, power_of_two(slots), -(-room // _ROOM) * _ROOM)

    def give(self, stage: Stage) -> None:
        """Buffers that a batch does not need any more."""
        self._spare = stage


class GraphBatch:
    """Rows decoded together. Close it after use, so that its buffers serve the next batch."""

    def __init__(self, recorded: Recorded) -> None:
        """An empty batch."""
        self._recorded = recorded
        self._ends = decode.end_ids(recorded.decoder.core)
        self._stage: Stage | None = None
        self._slots: list[int] = []  # which row lies in which slot
        self._length: dict[int, int] = {}  # tokens of each row whose keys and values are there
        self._left: dict[int, int] = {}
        self._flights: deque[tuple[list[int], Flight]] = deque()  # steps begun, each with its rows by slot
        self._gone: set[int] = set()  # rows that ended or left but still lie in a slot
        self._ready: list[_Chosen] = []  # what is not told yet: first tokens of rows that joined

    @property
    def rows(self) -> int:
        """How many rows are still being decoded."""
        return len(self._slots) - len(self._gone)

    def join(self, rows: Sequence[Row]) -> None:
        """Compute what is left of the rows' prompts, as one padded batch, and decode them with the others from now."""
        import torch

        if not rows:
            return
        with torch.no_grad():
            while self._flights:
                self._ready += self._landed()
            self._clear()
            room = max(len(row.prompt) + row.limit for row in rows) + AHEAD
            stage = self._grown(len(self._slots) + len(rows), room)
            if all(decode.length(row.prefix) == len(row.prompt) - 1 for row in rows):
                for row in rows:
                    self._settle(stage, row, decode.length(row.prefix), row.prefix, 0, row.prompt[-1])
                    self._length[row.index] -= 1  # the last token of the prompt is run by the next step
                    stage.memory.lengths[len(self._slots) - 1] -= 1
            else:
                self._prefill(stage, rows)

    def _prefill(self, stage: Stage, rows: Sequence[Row]) -> None:
        """Compute prompts by PyTorch; the first tokens are chosen, too."""
        decoder = self._recorded.decoder
        _, layers, hidden = decode.prefill(decoder.core, rows)
        ids, odds = decoder.choose(decoder.core.lm_head(hidden))
        most = max(decode.length(row.prefix) for row in rows)
        for place, row in enumerate(rows):
            self._settle(stage, row, most, layers, place, ids[place])
        chosen = zip(rows, ids.tolist(), odds.tolist(), strict=True)
        self._ready += [(row.index, token, probability, 0) for row, token, probability in chosen]

    def step(self) -> list[Step]:
        """The next token of every row: first of those that joined since, else of all.

        The next steps begin before this returns, so that the device never waits for what the caller does with these.
        """
        import torch

        with torch.no_grad():
            if self._ready:
                found, self._ready = self._ready, []
            else:
                if not self._flights:
                    self._clear()
                    self._begin()
                found = self._landed()
            steps = [self._told(*item) for item in found if item[0] not in self._gone]
            self._begin()
        return steps

    def leave(self, index: int) -> None:
        """Stop decoding a row; a row that has ended or never joined is no error."""
        if index in self._slots:
            self._gone.add(index)
        self._ready = [item for item in self._ready if item[0] != index]

    def layers(self, index: int) -> Layers:
        """A copy of the keys and values of a row (not of its last token); ask before the next step."""
        assert self._stage is not None
        slot, count, memory = self._slots.index(index), self._length[index], self._stage.memory
        keys, values = (part[:, slot : slot + 1, :, :count].clone() for part in (memory.keys, memory.values))
        return list(zip(keys, values, strict=True))

    def close(self) -> None:
        """Hand the buffers back."""
        if self._stage is not None:
            self._recorded.give(self._stage)
        self._stage, self._slots, self._ready = None, [], []
        self._flights.clear()
        self._gone.clear()

    def _begin(self) -> None:
        """Begin steps ahead, unless a row that ended should make room first or all rows end with those begun."""
        while len(self._flights) < AHEAD and not self._gone:
            if not any(self._left[index] > len(self._flights) for index in self._slots):
                return
            assert self._stage is not None
            self._flights.append((list(self._slots), self._stage.start(len(self._slots))))

    def _landed(self) -> list[_Chosen]:
        """What the step begun first chose for the rows that still want it; waits for it."""
        if not self._flights:
            return []
        flown, flight = self._flights.popleft()
        return [(*item, 1) for item in zip(flown, *flight.results(), strict=True) if item[0] not in self._gone]

    def _told(self, index: int, token: int, probability: float, run: int) -> Step:
        self._length[index] += run
        self._left[index] -= 1
        why = "stop" if token in self._ends else "length" if self._left[index] <= 0 else ""
        if why:
            self._gone.add(index)
        return Step(index, token, probability, why)

    def _grown(self, slots: int, room: int) -> Stage:
        """The stage, with at least this many slots and tokens."""
        stage = self._stage
        if stage is None:
            self._stage = self._recorded.take(slots, room)
        elif slots > stage.memory.slots or room > stage.memory.room:
            bigger = self._recorded.take(max(slots, stage.memory.slots), max(room, stage.memory.room))
            bigger.take_over(stage, len(self._slots))
            self._stage = bigger
        assert self._stage is not None
        return self._stage

    def _settle(self, stage: Stage, row: Row, most: int, layers: Layers, place: int, token: Any) -> None:
        """Put a row that joins into the next slot; `most` columns of `layers` are prefixes, padded on the left."""
        import torch

        slot, count, memory = len(self._slots), len(row.prompt), stage.memory
        held = decode.length(row.prefix)
        for target, side in ((memory.keys, 0), (memory.values, 1)):
            parts = [pair[side][place] for pair in layers]
            target[:, slot, :, :held] = torch.stack([part[:, most - held : most] for part in parts])
            rest = torch.stack([part[:, most:] for part in parts])
            if rest.shape[2]:
                target[:, slot, :, held:count] = rest[:, :, rest.shape[2] - (count - held) :]
        memory.tokens[slot], memory.lengths[slot] = token, count
        self._slots.append(row.index)
        self._length[row.index], self._left[row.index] = count, row.limit

    def _clear(self) -> None:
        """Fill the slots of rows that ended with the last ones; no step may be on its way."""
        for index in [index for index in self._slots if index in self._gone]:
            slot = self._slots.index(index)
            last = self._slots.pop()
            if last != index:
                assert self._stage is not None
                self._stage.move(len(self._slots), slot)
                self._slots[slot] = last
            del self._length[index], self._left[index]
        self._gone.clear()
