"""What vla_srpo.py trains with, and how it is loaded."""
from dataclasses import dataclass

import torch

import world_model
from plumbing import adapters, ranks
from plumbing.optimizer import make_optimizer
from robots import evaluate, find_suite
from robots import policy as policies
from robots.references import Oracle, References
from robots.suite import Suite


@dataclass
class Parts:
    """What a run trains with."""
    suite: Suite
    workers: object             # simulators in processes, `rollouts.Workers`
    policy: torch.nn.Module
    key: str                    # of its action statistics
    average: object | None      # running average of its weights: what is evaluated
    reference: object | None    # the starting policy, for the KL
    encoder: object | None      # the world model; None for 0/1 rewards
    optimizer: torch.optim.Optimizer
    memory: References | None = None    # of earlier successes
    split: str = "heldout"              # that is evaluated

    @property
    def evaluated(self) -> torch.nn.Module:
        return self.policy if self.average is None else self.average.module


def reference_logprobs(parts: Parts, batch, s, temperature: float):
    """Of all rows under the starting policy, (N, 56); None where beta is 0."""
    if not s.beta:
        return None
    with adapters.starting_policy(parts.policy, parts.reference) as model:
        parts_ = torch.arange(len(batch.bins)).split(s.micro_batch)
        return torch.cat([policies.logprobs(model, batch, part, temperature) for part in parts_])


def ready(policy: torch.nn.Module, s) -> torch.nn.Module:
    """With the adapters and the checkpointing asked for."""
    if s.gradient_checkpointing:
        policy.set_gradient_checkpointing(True)
    if s.lora_rank:
        # All but the head, of which the policy reads rows, and what it never runs
        layers = [name for name, m in policy.named_modules() if "lm_head" not in name
                  and isinstance(m, torch.nn.Linear) and m.weight.requires_grad]
        adapters.add_adapters(policy, layers, s.lora_rank, s.seed)
    return policy


def prepare(run) -> Parts:
    """All that is loaded, simulators last; a checkpoint's weights, if resumed."""
    s = run.s
    suite = find_suite(s.suite, tuple(s.tasks), s.options())
    suite.count(s.workers, s.tables)                    # before minutes of loading
    split = "heldout" if s.split == "disjoint" else "all"
    evaluate.try_suite(suite, split)
    policy = policies.load_policy(s.model, getattr(torch, s.dtype), ranks.device())
    key = policies.find_key(policy.norm_stats, suite.name)
    ready(policy, s)
    reference = encoder = memory = None
    if s.beta and not s.lora_rank:
        reference = policies.load_policy(s.model, getattr(torch, s.dtype))
    if s.reward != "binary" and s.world_model == "oracle":
        encoder, memory = Oracle(), References.solved(len(suite.instructions))
    elif s.reward != "binary":
        pixels = s.world_model == "pixels"
        kind = world_model.PixelModel if pixels else world_model.WorldModel
        encoder = kind.from_pretrained(world_model.SHIPPED if pixels else s.world_model,
                                       batch_size=s.clips, pool=s.pool)
        if s.references:
            memory = References(len(suite.instructions), s.references, encoder.width)
        if s.data and memory and run.fresh:     # else it is in the checkpoint
            count = memory.add_logged(s.data, s.camera, suite.instructions, encoder)
            run.say(f"{count} logged successes are the first references")
    if s.split == "all":
        policy.norm_stats[key]["split"] = "all"         # for who evaluates it
    if run.first_rank:
        evaluate.note_training(policy, key, s.fast_sim, [split])
    average = adapters.running_average(policy, s.average) if s.average else None
    optimizer = make_optimizer(ranks.shard(policy), s.lr, betas=(0.9, 0.99),
                               offload=s.offload_optimizer)
    if average is not None:
        ranks.shard(average.module)
    run.keep(adapters.kept(policy, average) | getattr(memory, "tensors", {}), optimizer)
    workers = suite.workers(s.workers, policy.camera, s.tables)
    return Parts(suite, workers, policy, key, average, reference, encoder, optimizer, memory, split)
