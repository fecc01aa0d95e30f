"""Responses while they are drawn: what all backends do with logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from training.generation.interface import Completion, Endings, SamplingConfig
from training.generation.sampler import sample_tokens

STATE = ("tokens", "logprobs", "uniforms", "drawn", "limits", "finished")


class Responses:
    """State of the rows that are being decoded, on their device; nothing here is read by the host while they are.

    A row that is done draws on without effect, so a backend may look for rows that are done as seldom as it likes.
    """

    def __init__(self, rows: int, sampling: SamplingConfig, endings: Endings, device: torch.device) -> None:
        """All rows are idle, which is done."""
        self.sampling = sampling
        # One column more than a response can fill: there, rows that are done write.
        shape = (rows, sampling.max_new_tokens + 1)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(shape, device=device)
        self.uniforms = torch.zeros(shape, device=device)
        self.drawn = torch.zeros(rows, dtype=torch.long, device=device)
        self.limits = torch.zeros(rows, dtype=torch.long, device=device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self._eos_ids = torch.tensor(sorted(endings.eos_ids), dtype=torch.long, device=device)
        self._stops = [torch.tensor(sequence, device=device) for sequence in endings.stop_sequences]

    def start(self, first: int, seeds: Sequence[int], limits: Sequence[int]) -> None:
        """Begin new responses in the rows from `first` on."""
        rows = slice(first, first + len(seeds))
        uniforms = torch.stack([draw_uniforms(seed, self.sampling.max_new_tokens) for seed in seeds])
        self.uniforms[rows, :-1] = uniforms.to(self.uniforms.device)
        self.limits[rows] = torch.tensor(limits, device=self.limits.device)
        self.drawn[rows] = 0
        self.finished[rows] = False

    def done(self, rows: int) -> Tensor:
        """[rows] bool: which of the first rows have ended."""
        return self.finished[:rows] | (self.drawn[:rows] >= self.limits[:rows])

    def draw(self, logits: Tensor) -> Tensor:
        """Draw the next token of the first rows from [rows, vocab] logits, which may be written to: [rows] long."""
        rows = logits.shape[0]
        running, drawn = ~self.done(rows), self.drawn[:rows]
        if self.sampling.min_new_tokens:
            too_short = (drawn < self.sampling.min_new_tokens)[:, None]
            logits[:, self._eos_ids] = logits[:, self._eos_ids].masked_fill(too_short, -torch.inf)
        column = drawn[:, None]
        tokens, logprobs = sample_tokens(logits, self.uniforms[:rows].gather(1, column)[:, 0], self.sampling)
        self.tokens[:rows].scatter_(1, column, tokens[:, None])
        self.logprobs[:rows].scatter_(1, column, logprobs[:, None])
        drawn += running
        self.finished[:rows] |= self._at_an_end(rows)
        return tokens

    def _at_an_end(self, rows: int) -> Tensor:
        """[rows] bool: whether the newest token is EOS or the last one of a stop sequence."""
        tokens, drawn = self.tokens[:rows], self.drawn[:rows, None]
        # A row that has not begun has no newest token, and does not mind what is found.
        found = (tokens.gather(1, (drawn - 1).clamp(min=0)) == self._eos_ids).any(1)
        for sequence in self._stops:
            columns = drawn - len(sequence) + torch.arange(len(sequence), device=drawn.device)
            same = (tokens.gather(1, columns.clamp(min=0)) == sequence) & (columns >= 0)
            found = found | same.all(1)
        return found

    def move(self, source: int, target: int) -> None:
        """Give the row `source` the place `target`."""
        for name in STATE:
            getattr(self, name)[target] = getattr(self, name)[source]

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        for name in STATE:
            setattr(self, name, getattr(self, name)[rows])

    def completions(self, rows: Sequence[int]) -> list[Completion]:
        """What has been drawn in these rows."""
        index = torch.tensor(rows, device=self.drawn.device)
        columns = (self.tokens[index], self.logprobs[index], self.drawn[index], self.finished[index])
        return [
            Completion(tokens[:count], logprobs[:count], finished)
            for tokens, logprobs, count, finished in zip(*(column.tolist() for column in columns), strict=True)
        ]


def draw_uniforms(seed: int, count: int) -> Tensor:
    """`count` random numbers in [0, 1) that depend on `seed` alone. Drawn on the CPU: equal on every device."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))
