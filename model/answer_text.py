"""An answer's text as its tokens come, piece by piece, without decoding all of them again for every token."""

from __future__ import annotations

from typing import Any


class AnswerText:
    """The text of growing ids. Pieces joined are the text, which neither begins nor ends with a space."""

    def __init__(self, tokenizer: Any) -> None:
        """Nothing is said yet. `tokenizer` is one of transformers'."""
        self.told = ""
        self._tokenizer, self._ids = tokenizer, list[int]()
        self._held = ""  # spaces that may turn out to be the last ones
        self._stream: Any = None
        if getattr(tokenizer, "backend_tokenizer", None) and not tokenizer.clean_up_tokenization_spaces:
            from tokenizers.decoders import DecodeStream

            self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, token: int, final: bool) -> str:
        """What can be shown with this token that could not before; a character still incomplete waits for the rest."""
        self._ids.append(token)
        if self._stream is None or final:
            return self._whole(final)
        fresh = self._held + (self._stream.step(self._tokenizer.backend_tokenizer, token) or "")
        if not self.told:
            fresh = fresh.lstrip()
        piece = fresh.rstrip()
        self._held = fresh[len(piece) :]
        self.told += piece
        return piece

    def _whole(self, final: bool) -> str:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True).strip()
        if text.endswith("\ufffd") and not final:
            return ""
        piece, self.told = text[len(self.told) :] if text.startswith(self.told) else "", text
        return piece
