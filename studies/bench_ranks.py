"""Seconds that several ranks add to a run: dividing the weights, putting them together for the
rollouts, saving and reading weights and Adam's moments. The slowest rank's, the median of three.

    torchrun --nproc-per-node 2 -m studies.bench_ranks                      # small, on the CPU
    torchrun --nproc-per-node 8 -m studies.bench_ranks --model openvla-7b
"""
import sys
from dataclasses import dataclass
from pathlib import Path

from plumbing.flags import flag, script


@dataclass
class Settings:
    model: str = flag("openvla-small", "random weights of real shapes", choices=[
        "openvla-small", "qwen2.5-vl-small", "openvla-7b", "qwen2.5-vl-7b"])
    out: str = flag("out/bench_ranks", "folder for the checkpoint, which all ranks see")


def study(s: Settings) -> None:
    import numpy as np  # here: --help takes no seconds
    import torch

    from plumbing import checkpoint, ranks
    from plumbing.optimizer import make_optimizer
    from studies import bench
    torch.set_num_threads(1)
    ranks.start()
    torch.manual_seed(0)                                    # every rank holds the same weights
    _, model = bench.build(bench.Case(s.model), ranks.device())
    count = f"{sum(p.numel() for p in model.parameters()):,}"
    seconds = {"shard": [bench.seconds_of(lambda: ranks.shard(model)).seconds]}
    optimizer, kept = make_optimizer(model, 1e-6), ranks.trainable(model)
    for p in kept.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()                                        # makes the moments
    folder = Path(s.out) / "checkpoint"

    def gather() -> None:
        with ranks.whole_weights(model):
            pass
    parts = {"gather": gather, "save": lambda: checkpoint.save(folder, kept, optimizer, {}),
             "load": lambda: checkpoint.load(folder, kept, optimizer)}
    for name, part in parts.items():
        ranks.barrier()
        seconds[name] = [bench.seconds_of(part).seconds for _ in range(3)]
    size = sum(file.stat().st_size for file in folder.iterdir()) / bench.GiB
    slowest = {name: max(ranks.gather([np.median(x)])) for name, x in seconds.items()}
    print(f"{s.model}, {count} parameters, {ranks.world_size()} ranks, {size:.2f} GiB saved: "
          + ", ".join(f"{name} {x:.3f} s" for name, x in slowest.items()))
    ranks.stop()


main = script(Settings, study, __doc__)
if __name__ == "__main__":
    sys.exit(main())
