"""Recurrences of single channels over time, in chunks side by side.

    running_max    m_t = max(m_{t-1} - decay_t, key_t)
    running_sums   s_t = keep_t s_{t-1} + added_t

All chunks of C tokens go step by step at once, as if nothing were before them; the same recurrence
over the chunks' ends (in chunks again, if they are many) tells what each of them meets; and this is
added, decayed. Cost and memory are linear in T, the steps after each other about C for each factor
of C in T. What is kept is multiplied, never divided by: it may be 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Sums = tuple[Tensor, ...]


class Outputs:
    """What a recurrence with large states gives token by token, [B, H, 1, V] each.

    Without grads it is written into one tensor: outputs that stay between states that go would keep
    malloc from using the room of those again, as much as all states together.
    """

    def __init__(self, length: int) -> None:
        self.length, self.number = length, 0
        self.apart = torch.is_grad_enabled()
        self.parts: list[Tensor] = []

    def add(self, out: Tensor) -> None:
        """The next token's."""
        if self.apart:
            self.parts.append(out)
            return
        if not self.parts:
            self.parts = [out.new_empty(*out.shape[:2], self.length, out.shape[3])]
        self.parts[0][:, :, self.number] = out[:, :, 0]
        self.number += 1

    def whole(self) -> Tensor:
        """All of them, [B, H, T, V]."""
        return torch.cat(self.parts, dim=2) if self.apart else self.parts[0]


def running_max(key: Tensor, decay: Tensor, start: Tensor, chunk_size: int) -> Tensor:
    """The largest of all keys so far, each less the decays since.

    Args:
        key: [B, T, d], may be minus infinity.
        decay: At least 0, may be infinite; [B, T, d], or [1, 1, d] for all tokens alike.
        start: Before the first token [B, d].

    Returns:
        [B, T + 1, d], the start and after each token; without gradients.
    """
    length = key.shape[1]
    if length <= 2 * chunk_size:
        found = [start]
        decays = decay.expand(-1, length, -1).unbind(1)
        for own_key, own_decay in zip(key.unbind(1), decays, strict=True):
            found.append(torch.maximum(found[-1] - own_decay, own_key))
        return torch.stack(found, dim=1)
    if decay.shape[1] == 1:
        decay = decay.expand(-1, chunk_size, -1)[:, None]  # the same in all chunks
    else:
        decay = _chunks(decay, chunk_size)
    keys = _chunks(key, chunk_size).unbind(2)
    inside = [keys[0]]
    for own_key, own_decay in zip(keys[1:], decay.unbind(2)[1:], strict=True):
        inside.append(torch.maximum(inside[-1] - own_decay, own_key))
    since = decay.cumsum(2)
    met = running_max(inside[-1], since[:, :, -1], start, chunk_size)[:, :-1, None]
    after = torch.maximum(torch.stack(inside, dim=2), met - since).flatten(1, 2)
    return torch.cat((start[:, None], after[:, :length]), dim=1)


def running_sums(
    keep: Tensor, added: Sums, start: Sums, chunk_size: int, reverse: bool = False
) -> tuple[Sums, Sums]:
    """Decaying sums, several with the same decay.

    Args:
        keep: [B, T, d].
        added: Each [B, T, d].
        start: Before the first token, each [B, d].
        reverse: From the last token to the first.

    Returns:
        The sums that each token meets, without its own, each [B, T, d], and after all, each [B, d].
    """
    length = keep.shape[1]
    if length <= 2 * chunk_size:
        found = [_steps(keep, x, s, reverse) for x, s in zip(added, start, strict=True)]
        return tuple(x for x, _ in found), tuple(x for _, x in found)
    keep = _chunks(keep, chunk_size, 1.0, reverse)
    none = torch.zeros_like(keep[:, :, 0])
    inside = [_steps(keep, _chunks(x, chunk_size, 0.0, reverse), none, reverse) for x in added]
    since, total = _steps(keep, None, torch.ones_like(none), reverse)
    ends = tuple(end for _, end in inside)
    met, last = running_sums(total, ends, start, chunk_size, reverse)
    own = slice(-length, None) if reverse else slice(length)
    sums = (
        torch.addcmul(x, since, before[:, :, None]).flatten(1, 2)[:, own]
        for (x, _), before in zip(inside, met, strict=True)
    )
    return tuple(sums), last


def _steps(
    keep: Tensor, added: Tensor | None, start: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """One sum step by step, time at dimension -2: what each token meets, and after all."""
    order = -1 if reverse else 1
    kept = keep.unbind(-2)[::order]
    found = [start]
    if added is None:
        for own_keep in kept:
            found.append(own_keep * found[-1])
    else:
        for own_keep, own in zip(kept, added.unbind(-2)[::order], strict=True):
            found.append(torch.addcmul(own, own_keep, found[-1]))
    last = found.pop()
    return torch.stack(found[::order], dim=-2), last


def _chunks(x: Tensor, chunk_size: int, fill: float = 0.0, reverse: bool = False) -> Tensor:
    """[B, T, d] -> [B, N, C, d], filled up behind the token that comes last."""
    short = -x.shape[1] % chunk_size
    if short:
        x = F.pad(x, (0, 0, short, 0) if reverse else (0, 0, 0, short), value=fill)
    return x.unflatten(1, (-1, chunk_size))
