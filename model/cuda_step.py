"""The launches of one decoding step: from a token of each row to the next one, on buffers that never move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.cuda_decoder import SPLITS, Layer, Weights, joined, pack


@dataclass(frozen=True)
class Tuning:
    """Rows of weights and columns that one program takes, and its warps: for one row of a batch and for several."""

    one: tuple[int, int, int]
    many: tuple[int, int, int]


TUNED = {
    4: Tuning((2, 1024, 2), (4, 512, 4)),
    8: Tuning((4, 1024, 4), (16, 256, 4)),
    16: Tuning((4, 512, 4), (16, 128, 4)),
}


class Memory:
    """What a batch of `slots` rows needs: keys and values of `room` tokens, lengths, the tokens to run and results."""

    def __init__(self, decoder: Decoder, slots: int, room: int) -> None:
        """Empty rows."""
        import torch

        def empty(*shape: int, dtype: Any = decoder.dtype) -> Any:
            return torch.zeros(*shape, dtype=dtype, device=decoder.device)

        text = decoder
        self.slots, self.room = slots, room
        self.keys = empty(len(decoder.layers), slots, text.key_heads, room, text.width)
        self.values = empty(len(decoder.layers), slots, text.key_heads, room, text.width)
        self.lengths, self.tokens = empty(slots, dtype=torch.int32), empty(slots, dtype=torch.int64)
        self.found = empty(2, slots, dtype=torch.float32)  # chosen ids (exact up to 2^24) and their probabilities
        self.qkv = empty(slots, (text.heads + 2 * text.key_heads) * text.width)
        self.query, self.mixed = empty(slots, text.heads * text.width), empty(slots, text.heads * text.width)
        self.state, self.normed = empty(slots, text.hidden), empty(slots, text.hidden)
        self.gated = empty(slots, text.middle)
        self.sums = empty(slots * text.heads * SPLITS, text.width, dtype=torch.float32)
        self.states = empty(slots * text.heads * SPLITS, 2, dtype=torch.float32)
        self.scores = empty(slots, text.head.n, dtype=torch.float32)
        self.low = empty(slots, max(1, decoder.rank), dtype=torch.float32)
        self.cos, self.sin = decoder.angles(room)


class Decoder:
    """A network's decoder as kernels. Made anew when the adapter changes."""

    def __init__(self, core: Any, banned: list[int], tuned: Mapping[int, Tuning] = TUNED) -> None:
        """Lay the weights side by side (see `cuda_decoder.pack`); `banned` ids are never chosen."""
        import torch

        network, config = core.model.language_model, core.config.text_config
        self.core, self.tuned = core, tuned
        self.embedding = core.get_input_embeddings().weight
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.hidden, self.middle = config.hidden_size, config.intermediate_size
        self.window = int(getattr(config, "sliding_window", None) or 0) if _slides(config) else 0
        self.final = network.norm.weight
        self.layers: list[Layer] = pack(network, config)
        self.rank = max((w.up.shape[1] for layer in self.layers for w in layer.products if w.up is not None), default=0)
        self.head = joined([core.lm_head])
        self.ban = torch.zeros(self.head.n, device=self.device)
        self.ban[torch.tensor(banned, dtype=torch.long, device=self.device)] = -torch.inf

    def angles(self, room: int) -> tuple[Any, Any]:
        """Cosines and sines (room, width / 2) of the rotary positions, rounded as the network rounds them."""
        import torch

        places = torch.arange(room, device=self.device)[None]
        like = torch.zeros(1, dtype=self.dtype, device=self.device)
        cos, sin = self.core.model.language_model.rotary_emb(like, places)
        half = self.width // 2
        return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()

    def choose(self, scores: Any) -> tuple[Any, Any]:
        """The most probable allowed id of each row of scores (rows, vocabulary), and its probability."""
        scores = scores.float() + self.ban
        best = scores.max(-1)
        return best.indices, 1.0 / (scores - best.values[:, None]).exp().sum(-1)

    def step(self, memory: Memory, rows: int) -> None:
        """Run the tokens of the first `rows` rows, choose the next ones, and count them in."""
        import torch

        memory.state[:rows] = torch.nn.functional.embedding(memory.tokens[:rows], self.embedding)
        for number, layer in enumerate(self.layers):
            self._layer(memory, rows, number, layer)
        self._norm(memory.state, self.final, memory.normed, rows, self.layers[0].eps)
        self._product(self.head, memory.normed, memory.scores, memory, rows)
        ids, odds = self.choose(memory.scores[:rows])
        memory.tokens[:rows] = ids
        memory.found[0, :rows], memory.found[1, :rows] = ids, odds
        memory.lengths[:rows] = (memory.lengths[:rows] + 1).clamp(max=memory.room - 1)

    def _layer(self, memory: Memory, rows: int, number: int, layer: Layer) -> None:
        qkv, out, gate, down = layer.products
        self._norm(memory.state, layer.norms[0], memory.normed, rows, layer.eps)
        self._product(qkv, memory.normed, memory.qkv, memory, rows)
        self._attend(memory, rows, number)
        self._product(out, memory.mixed, memory.state, memory, rows, residual=True)
        self._norm(memory.state, layer.norms[1], memory.normed, rows, layer.eps)
        self._product(gate, memory.normed, memory.gated, memory, rows, gated=True)
        self._product(down, memory.gated, memory.state, memory, rows, residual=True)

    def _norm(self, x: Any, weight: Any, y: Any, rows: int, eps: float) -> None:
        from model import cuda_kernels as kernels

        width = x.shape[1]
        kernels.norm[(rows,)](x, weight, y, width, eps, KP=power_of_two(width), num_warps=8 if width > 1024 else 4)

    def _attend(self, memory: Memory, rows: int, number: int) -> None:
        from model import cuda_kernels as kernels

        keys, values, group = memory.keys[number], memory.values[number], self.heads // self.key_heads
        heads = self.heads + 2 * self.key_heads
        kernels.rotate[(rows, heads)](
            memory.qkv, memory.cos, memory.sin, memory.lengths, memory.query, keys, values, memory.room,
            HQ=self.heads, HK=self.key_heads, HALF=self.width // 2, num_warps=1,
        )  # fmt: skip
        kernels.attend[(rows, self.key_heads, SPLITS)](
            memory.query, keys, values, memory.lengths, memory.sums, memory.states, self.width**-0.5, memory.room,
            WINDOW=self.window, HK=self.key_heads, GROUP=group, WIDTH=self.width, SPLITS=SPLITS, BLOCK_KEYS=64,
        )  # fmt: skip
        kernels.merge[(rows * self.heads,)](
            memory.sums, memory.states, memory.mixed, WIDTH=self.width, SPLITS=SPLITS, num_warps=2
        )

    def _product(
        self, w: Weights, x: Any, y: Any, memory: Memory, rows: int, *, residual: bool = False, gated: bool = False
    ) -> None:
        if w.down is not None:
            first = Weights(w.down.shape[0], w.k, 16, w.down, ())
            self._launch(first, x, memory.low.view(-1)[: rows * first.n].view(rows, first.n), memory, rows)
        self._launch(w, x, y, memory, rows, residual=residual, gated=gated)

    def _launch(
        self, w: Weights, x: Any, y: Any, memory: Memory, rows: int, *, residual: bool = False, gated: bool = False
    ) -> None:
        import torch

        from model import cuda_kernels as kernels

        tuning = self.tuned[w.bits]
        bn, bk, warps = tuning.one if rows == 1 else tuning.many
        together = min(power_of_two(rows), 8) if w.bits == 4 else 1 if rows == 1 else 16  # a matrix unit takes 16
        n = w.n // 2 if gated else w.n
        maxima, levels, outer, offsets, code = w.scales if w.bits == 4 else (w.data,) * 5
        scale = w.scales[0] if w.bits == 8 else w.data
        lora = w.up is not None
        rank = w.up.shape[1] if lora else 0
        grid = (-(-n // bn), -(-rows // together))
        kernels.linear[grid](
            x.view(torch.int32) if w.bits == 4 else x, y, y, w.data, maxima, levels, outer, offsets, code, scale,
            w.bias if w.bias is not None else w.data, memory.low, w.up if lora else w.data, rows, n, w.k, rank,
            BITS=w.bits, COLS=together, GATED=gated, RESIDUAL=residual, BIAS=w.bias is not None, LORA=lora,
            RP=max(16, power_of_two(rank)), BN=bn, BK=bk, num_warps=warps,
        )  # fmt: skip


def _slides(config: Any) -> bool:
    """Whether all layers look at a window of the last tokens only."""
    kinds = getattr(config, "layer_types", None)
    return bool(getattr(config, "use_sliding_window", True)) and (kinds is None or "full_attention" not in kinds)


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()
