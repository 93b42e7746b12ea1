"""What samples responses: the flags that training, the teacher's first answers and benchmarks
share."""
from dataclasses import dataclass

from plumbing.flags import flag


@dataclass
class EngineSettings:
    engine: str = flag("transformers", "what samples; vllm: reasoning/engine.py",
                       choices=["transformers", "vllm"])
    engine_memory: float = flag(0.4, "vllm: its share of the GPU while it samples")


def check_engine(s) -> None:
    """ValueError, one line."""
    if not 0 < s.engine_memory < 1:
        raise ValueError(f"--engine_memory must lie between 0 and 1, got {s.engine_memory}")
