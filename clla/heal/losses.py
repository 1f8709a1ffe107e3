"""KL of a student's next-token distribution to a teacher's, without all logits at once.

Shape legend: N positions, h hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
ROWS = 1024  # positions whose logits live at once


def kl_of_logits(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over positions of KL(teacher || student), nats, fp32, of logits [N, V]."""
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def chunked_kl(student: Tensor, teacher: Tensor, student_head: Head, teacher_head: Head, *, rows: int = ROWS) -> Tensor:
    """Mean over positions of KL(teacher || student), nats per token (Hinton et al., arXiv 1503.02531, temperature 1).

    Logits are made a few rows at a time, and once more in the backward pass, so the memory for them does not grow
    with the number of positions.

    Args:
        student: final hidden states [N, h].
        teacher: likewise, without gradient.
        student_head: logits [M, V] of hidden states [M, h].
        teacher_head: likewise.
        rows: M at most.
    """

    def part(own: Tensor, other: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher_head(other)
        return kl_of_logits(student_head(own), wanted)

    total = torch.zeros((), dtype=torch.float32, device=student.device)
    for own, other in zip(student.split(rows), teacher.split(rows), strict=True):
        total = total + checkpoint(part, own, other, use_reentrant=False)
    return total / len(student)
