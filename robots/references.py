"""What failures are measured by, beyond the paper: successes of earlier steps, and the simulator's
own word on how far a rollout came.

1. `References`: the last successes of each task; where success is rare most batches have none.
   Demonstrations may be the first of them, which is not self-referential any more.
2. `Oracle`: stands where a world model stands; its latent of a rollout is its true progress.
"""
import numpy as np
import torch
from torch import Tensor

from robots import trajectories
from robots.suite import Episode


class References:
    """The latents of each task's last `size` successes, in tensors that a checkpoint can hold."""

    def __init__(self, tasks: int, size: int, width: int):
        self.last = torch.zeros(tasks, size, width)
        self.count = torch.zeros(tasks, dtype=torch.int64)      # that ever came

    @classmethod
    def solved(cls, tasks: int) -> "References":
        """The oracle's, which knows what a success is before there is one."""
        known = cls(tasks, 1, 1)
        known.add(np.ones((tasks, 1), np.float32), np.arange(tasks))
        return known

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"references.last": self.last, "references.count": self.count}

    def add(self, latents: np.ndarray, task: np.ndarray) -> None:
        """Successes' latents (N, D) and tasks (N,); the oldest give way."""
        for h, t in zip(torch.from_numpy(latents), task.tolist(), strict=True):
            self.last[t, self.count[t] % self.last.shape[1]] = h
            self.count[t] += 1

    def add_logged(self, source: str, camera: str, instructions: tuple[str, ...], encoder) -> int:
        """Those of logged trajectories (robots/trajectories.py) -> how many ever came. ValueError,
        one line, for a damaged one, or if there is no success of these tasks."""
        for name, load in trajectories.find(source, camera)[1].items():
            try:
                logged = load()
                if logged.success and logged.instruction in instructions:
                    task = instructions.index(logged.instruction)
                    self.add(encoder.encode([logged.images]).numpy(), np.array([task]))
            except ValueError as error:         # of the file, or of the size of its frames
                raise ValueError(f"--data {source}, {name}: {error}") from None
        if not self.count.any():
            raise ValueError(f"--data {source}: it has no success of these tasks")
        return int(self.count.sum())

    def latents(self) -> dict[int, np.ndarray]:
        """By task, (K, D); of the tasks that have any."""
        return {t: self.last[t, :n].numpy() for t, n in enumerate(self.count.tolist()) if n}


class Oracle:
    """The ceiling of the method: no world model ranks failures better."""

    def encode(self, episodes: list[Episode]) -> Tensor:
        """(N, 1) float32; 1 for successes."""
        return torch.tensor([[e.progress] for e in episodes], dtype=torch.float32)
