"""What a run needs of a GPU and of the machine, said before anything is loaded: `--plan` of vla_srpo.py and reflection_srpo.py.

1. Sizes come from config.json and the headers of the safetensors files: no weight is read.
2. Weights, gradients and optimiser state are counted tensor by tensor, as the flags make them: full or LoRA, bf16 or fp32, over N ranks.
3. Activations are what autograd keeps of a micro-batch: block by block, or with gradient checkpointing each block's input and one block.
4. The peak is the larger of two phases: rollout and its rewards (whole weights, KV cache, then the world model) and update (gradients, activations, logits).
5. If that is more than is free, the flags that make it fit are found by trying them. Then what else would stop the run is looked at.

Left out: the allocator's fragmentation and the libraries' own buffers, for which 5% is added; the simulator's memory.

    python vla_srpo.py --plan --model FOLDER --dtype bfloat16 --gradient_checkpointing
    torchrun --nproc-per-node 4 reflection_srpo.py rl --paper --model FOLDER --data rows.jsonl --plan
"""
import math
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import psutil
import torch

import job
import vla

GiB = 2**30
MARGIN = 1.05
PROMPT_TOKENS = 32      # of an OpenVLA instruction, about
# What may be changed to save memory, the least costly first; each is tried on top of the ones before
SAVINGS = {"vla": [{"gradient_checkpointing": True}, {"micro_batch": 8}, {"micro_batch": 1}, {"average": 0.0}, {"average": 0.0, "dtype": "bfloat16"},
                   {"offload_optimizer": True}, {"lora_rank": 32}],
           "vlm": [{"gradient_checkpointing": True}, {"micro_tokens": 4096}, {"rollout_batch": 16}, {"micro_tokens": 1}, {"dtype": "bfloat16"},
                   {"offload_optimizer": True}, {"lora_rank": 32}]}


@dataclass
class Needs:
    """Bytes on each GPU (CPU without one)."""
    weights: float          # this rank's shard
    gathered: float         # the rest of the weights, while all are whole for the rollouts
    working: float          # whole weights of a block or two, and of the root, in the update of several ranks
    gradients: float
    optimizer: float
    copies: float           # running average, reference
    activations: float
    logits: float           # of the completions: forward, copy, gradient
    kv_cache: float
    forward: float          # what a block of the language model works with in the rollout, for all prompts at once
    world_model: float      # its weights
    encoding: float         # what a pass of it works with, after the rollout

    @property
    def rollout(self) -> float:
        working = max(self.gathered + self.kv_cache + self.forward, self.encoding)
        return MARGIN * (self.weights + self.optimizer + self.copies + self.world_model + working)

    @property
    def update(self) -> float:
        return MARGIN * (self.weights + self.working + self.gradients + self.optimizer + self.copies + self.activations + self.logits + self.world_model)

    @property
    def peak(self) -> float:
        return max(self.rollout, self.update)


def read_checkpoint(path: str | Path) -> tuple[Path, dict, dict[str, tuple[int, ...]]]:
    """(folder, config.json, shape of every tensor), from the headers; of a hub id no weights are downloaded. Errors as vla.read_headers'."""
    folder = vla.local_folder(path, weights=False)
    try:
        shapes = {name: shape for name, (_, shape) in vla.read_headers(folder).items()}
    except FileNotFoundError:
        if Path(path).is_dir():
            raise
        from huggingface_hub import get_safetensors_metadata                            # a hub id whose weights are not in the cache
        try:
            files = get_safetensors_metadata(str(path)).files_metadata.values()
        except (OSError, ValueError) as error:                                          # the hub's errors derive from these two
            raise FileNotFoundError(f"the hub did not give the tensors' shapes of {path}: {' '.join(str(error).split())[:200]}") from None
        shapes = {name: tuple(tensor.shape) for file in files for name, tensor in file.tensors.items()}
    return folder, vla.read_json(folder / "config.json"), shapes


# Counting

def trained(shapes: dict[str, tuple[int, ...]], s) -> dict[str, int]:
    """Elements of each trained tensor by the model's tensor it belongs to: of the tensor, or of its two adapters."""
    unused = ["visual."] if getattr(s, "freeze_vision", False) else []
    for tower in {name.split(".blocks.")[0] for name in shapes if name.startswith("vision_backbone.")}:     # OpenVLA's last blocks are never run
        depth = len({name.split(".")[3] for name in shapes if name.startswith(f"{tower}.blocks.")})
        unused += [f"{tower}.blocks.{depth - 1}.", f"{tower}.norm.", f"{tower}.attn_pool."] if depth else []
    names = [name for name in shapes if not any(part in name for part in unused)]
    if not s.lora_rank:
        return {name: math.prod(shapes[name]) for name in names}
    if any("visual." in name for name in shapes):                                       # reflection_srpo.py: the language model's layers
        names = [name for name in names if re.search(r"\.(q|k|v|o|gate|up|down)_proj\.weight$", name) and "visual." not in name]
    return {name: s.lora_rank * sum(shapes[name]) for name in names
            if name.endswith(".weight") and len(shapes[name]) == 2 and not re.search("embed_tokens|lm_head|^words", name)}


@dataclass
class Stack:
    """Transformer blocks of one kind, and the rows of `length` tokens that a micro-batch sends through them.

    llama: RMSNorm, gated MLP, padding; qwen-vit: the same without padding, q, k and v cut from one tensor; vit: LayerNorm, GELU MLP; dino: that,
    with both branches scaled by a vector."""
    kind: str
    rows: int
    length: int
    width: int
    depth: int
    mlp: int
    lora: bool = False

    def inputs(self, size: int) -> float:
        """Bytes of a block's input, `size` a number."""
        return self.rows * self.length * self.width * size

    def norm(self, size: int) -> float:
        """What an RMSNorm keeps: its input in fp32, the normalised value, the output."""
        return self.rows * self.length * self.width * (4 + 2 * size)

    def block(self, size: int) -> float:
        """What autograd keeps of one block with SDPA attention, k and v repeated to the query heads."""
        width, mlp = self.inputs(size), self.rows * self.length * self.mlp * size
        if self.kind == "llama":
            kept = 2 * self.norm(size) + 4 * width + 4 * mlp + self.rows * self.length**2 * size        # the last is the additive mask
            if self.lora:                   # frozen norms do not keep the normalised value
                kept -= 2 * width
            if self.lora and size == 2:     # peft: an fp32 copy of each adapted layer's input, in place of the input
                kept += 2 * (6 * width + mlp) - 2 * width - mlp
        elif self.kind == "qwen-vit":
            kept = 2 * self.norm(size) + 6 * width + 4 * mlp
        else:
            kept = (10 if self.kind == "dino" else 8) * width + 2 * mlp
            if self.lora and size == 2:
                kept += 2 * (3 * width + mlp) - 2 * width - mlp
        return kept


def stacks(config: dict, shapes: dict, s) -> list[Stack]:
    """Of the model, the language model last; none in a TinyVLA, whose activations are small."""
    if config["model_type"] == "tiny_vla":
        return []
    text = config.get("text_config") or config
    text = dict(width=text["hidden_size"], depth=text["num_hidden_layers"], mlp=text["intermediate_size"])
    if config["model_type"] == "openvla":
        (w1, d1, m1), (w2, d2, m2) = (vla.tower_size(shapes, f"vision_backbone.{tower}", Path(".")) for tower in ("featurizer", "fused_featurizer"))
        rows = min(s.micro_batch, s.minibatch)
        return [Stack("dino", rows, vla.PATCHES + 5, w1, d1 - 1, m1, s.lora_rank > 0), Stack("vit", rows, vla.PATCHES, w2, d2 - 1, m2, s.lora_rank > 0),
                Stack("llama", rows, vla.PATCHES + PROMPT_TOKENS + vla.ACTION_TOKENS + 1, **text, lora=s.lora_rank > 0)]
    language, vision = Stack("llama", sequences(s), s.max_prompt + s.max_new_tokens, **text, lora=s.lora_rank > 0), config["vision_config"]
    if s.freeze_vision or s.lora_rank:                                                  # nothing of the tower is kept
        return [language]
    merged = vision.get("spatial_merge_size", 2)**2                                     # patches of an image token
    pictures = min(s.max_prompt, s.max_pixels // (vision["patch_size"]**2 * merged))    # image tokens of a prompt, at most
    return [Stack("qwen-vit", sequences(s), pictures * merged, vision["hidden_size"], vision["depth"], vision["intermediate_size"]), language]


def activations(config: dict, shapes: dict, s, size: int) -> float:
    """What autograd keeps of a micro-batch; with gradient checkpointing the blocks' inputs, and the block that is being recomputed."""
    parts = stacks(config, shapes, s)
    if not parts:
        return 0.0
    total = parts[-1].norm(size)                                                        # the final norm
    if config["model_type"] == "openvla":
        both, d = parts[0].width + parts[1].width, parts[2].width
        total += parts[0].rows * vla.PATCHES * (9 * both + 2 * d) * size                # the projector
    if s.gradient_checkpointing:
        return total + sum(part.inputs(size) * part.depth for part in parts) + max(part.block(size) for part in parts)
    return total + sum(part.block(size) * part.depth for part in parts)


def sequences(s) -> int:
    """Responses of a micro-batch: one always goes."""
    return max(1, s.micro_tokens // (s.max_prompt + s.max_new_tokens))


def needs(s, config: dict, shapes: dict, ranks: int = 1, world_model: tuple[float, float] = (0.0, 0.0)) -> Needs:
    """Per GPU, for the settings of either script."""
    size, numbers = (2 if s.dtype == "bfloat16" else 4), {name: math.prod(shape) for name, shape in shapes.items()}
    train = trained(shapes, s)
    adapted = sum(train.values()) * 4 if s.lora_rank else 0                             # adapters are fp32
    weights = sum(numbers.values()) * size + adapted
    gradients = sum(train.values()) * (4 if s.lora_rank else size)
    master = 4 if (size == 2 and not s.lora_rank) else 0
    optimizer = 0 if s.offload_optimizer and torch.cuda.is_available() else sum(train.values()) * (8 + master)
    kv_cache = logits = 0.0
    prompts = (s.tables or (128 if s.suite == "tabletop" else s.workers)) if hasattr(s, "tables") else 0        # of a pass in the rollout
    if hasattr(s, "micro_tokens"):
        text = config.get("text_config") or config
        heads = text.get("num_key_value_heads") or text["num_attention_heads"]
        prompts = min(s.rollout_batch, math.ceil(s.prompts / ranks) * s.group_size)
        kv_cache = (prompts * (s.max_prompt + s.max_new_tokens) * text["num_hidden_layers"] * 2 * heads
                    * (text["hidden_size"] // text["num_attention_heads"]) * size)
        logits = 3 * sequences(s) * s.max_new_tokens * text["vocab_size"] * size
    copies = (weights / ranks if getattr(s, "average", 0) else 0) + (sum(numbers.values()) * size if s.beta and not s.lora_rank else 0)
    parts, forward = stacks(config, shapes, s), 0.0
    if parts:
        length = s.max_prompt if hasattr(s, "micro_tokens") else parts[-1].length
        forward = prompts * length * (4 * parts[-1].mlp + 8 * parts[-1].width) * size
    blocks = sum(part.depth for part in parts) or 1
    root = sum(n for name, n in numbers.items() if not re.search(r"\.(blocks|layers)\.\d+\.", name)) * size
    working, one = 0.0, (weights - root) / blocks
    if ranks > 1:                                                                       # whole weights, and gradients before they are divided, also in fp32
        working = (root + 2 * one) * (1 - 1 / ranks) + (0 if s.lora_rank else (root + one) * (1 + 4 / size))
    return Needs(weights / ranks, weights * (1 - 1 / ranks), working, gradients / ranks, optimizer / ranks, copies, activations(config, shapes, s, size),
                 logits, kv_cache, forward, *world_model)


def encoder_bytes(config: dict, parameters: int, clips: int) -> tuple[float, float]:
    """(fp32 weights of a V-JEPA 2; the pixels, and the widest moment of a pass over `clips`: bf16, with norms in fp32)."""
    tokens = config["frames_per_clip"] // config["tubelet_size"] * (config["crop_size"] // config["patch_size"])**2
    pixels = 3 * config["frames_per_clip"] * config["crop_size"]**2
    return 4 * parameters, clips * (4 * pixels + tokens * config["hidden_size"] * (8 + 4 * config["mlp_ratio"]))


def free_memory() -> tuple[float, str]:
    """(bytes, of what): free on this rank's GPU, or available RAM."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1)), "RAM of the CPU"


def savings(s, given: tuple, free: float) -> tuple[dict, Needs]:
    """The settings to change so that it fits, none without need, and what is then needed; all that help if it never does. given: `needs`'
    other arguments."""
    def peak(changes: dict) -> float:
        return needs(replace(s, **changes), *given).peak
    changes: dict = {}
    for more in SAVINGS["vlm" if hasattr(s, "micro_tokens") else "vla"]:
        if peak(changes) <= free:
            break
        if "gradient_checkpointing" in more and given[0]["model_type"] == "tiny_vla":
            continue
        if "offload_optimizer" in more and (given[2] > 1 or not torch.cuda.is_available()
                                            or needs(replace(s, **changes), *given).optimizer > psutil.virtual_memory().available):
            continue
        if peak(changes | more) < 0.99 * peak(changes):
            changes |= more
    for name in [name for name in changes if peak(changes) <= free]:
        if peak(without := {k: x for k, x in changes.items() if k != name}) <= free and not (without.get("dtype") and name == "average"):
            changes = without
    return changes, needs(replace(s, **changes), *given)


# Reports

def inputs(s, model: str = "") -> tuple[Path, tuple]:
    """The checkpoint's folder, and what `needs` takes after the settings; ranks are torchrun's."""
    if not (model or s.model):
        raise ValueError("--plan needs --model: a folder or hub id")
    (folder, config, shapes), encoder = read_checkpoint(model or s.model), (0.0, 0.0)
    if getattr(s, "reward", "") == "srpo" and s.world_model != "pixels":
        _, video, tensors = read_checkpoint(s.world_model)
        encoder = encoder_bytes(video, sum(map(math.prod, tensors.values())), 32)
    return folder, (config, shapes, int(os.environ.get("WORLD_SIZE", 1)), encoder)


def summary(s, given: tuple) -> str:
    """One line: what is needed, beside what is there."""
    plan, (free, what) = needs(s, *given), free_memory()
    return f"rollout {plan.rollout / GiB:.2f}, update {plan.update / GiB:.2f} GiB by plan, with 5% for the allocator; {free / GiB:.2f} free ({what})"


def announced(s, model: str = "") -> str:
    """The first line of a run, before anything is loaded: `summary`, and what to change if that is more than there is."""
    _, given = inputs(s, model)
    free = free_memory()[0]
    return f"memory: {summary(s, given)}" + (f". It does not fit: {advice(s, given, free)}" if needs(s, *given).peak > free else "")


def advice(s, given: tuple, free: float) -> str:
    changes, best = savings(s, given, free)
    flags = " ".join(f"--{name} {value}" for name, value in changes.items()) or "these flags"
    return f"{flags} needs {best.peak / GiB:.2f} GiB" + ("" if best.peak <= free else "; take a larger GPU, or more of them with torchrun")


def report(s, model: str = "") -> tuple[str, list[str]]:
    """The plan as text, and what would stop the run, a line each."""
    folder, given = inputs(s, model)
    config, shapes, ranks, _ = given
    problems = checks(s, folder, config, shapes)
    if "vision_config" not in config and (hasattr(s, "micro_tokens") or config.get("model_type") not in ("openvla", "tiny_vla")):
        return "", problems                                                             # another architecture: there is nothing to count
    plan, (free, _) = needs(s, *given), free_memory()
    lines = [f"plan for {folder}: {sum(map(math.prod, shapes.values())):,} parameters, {sum(trained(shapes, s).values()):,} trained, {ranks} rank(s); GiB each"]
    lines += [f"  {field.name.replace('_', ' '):12} {getattr(plan, field.name) / GiB:8.2f}" for field in fields(plan)]
    return "\n".join([*lines, "  " + summary(s, given)]), problems + [f"does not fit; {advice(s, given, free)}"] * (plan.peak > free)


def show(s) -> int:
    """`--plan`: the exit code is 0 if nothing would stop the run."""
    text, problems = report(s)
    if int(os.environ.get("RANK", 0)) == 0:
        print(text)
        print("".join(f"problem: {problem}\n" for problem in problems), end="", file=sys.stderr)
    return 2 if problems else 0


@contextmanager
def explained(s):
    """Within it, running out of memory, on the GPU or the CPU, is a RuntimeError of one line: what settings s needed, and what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not re.search("can't allocate memory|ALLOC_FAILED|out of memory", str(error)):
            raise
        if s.resume:
            s = replace(s, **job.read_state(Path(s.resume) / "checkpoint")["settings"])
        if not s.model:
            raise RuntimeError("out of memory: lower the batch sizes, see --help") from error
        _, given = inputs(s)
        free = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else free_memory()[0]
        free = min(free, 0.9 * needs(s, *given).peak)                                   # it did not fit, whatever the plan says
        raise RuntimeError(f"out of memory: {summary(s, given)}; {advice(s, given, free)}") from error


# What else would stop the run

def checks(s, folder: Path, config: dict, shapes: dict) -> list[str]:
    """Problems of the checkpoint, its tokenizer, the suite and its simulator, a line each with the fix."""
    kind, tokenizer = config.get("model_type"), folder / "tokenizer.json"
    problems = [] if tokenizer.is_file() or kind == "tiny_vla" else [f"{folder} has no tokenizer.json; copy it from the original checkpoint"]
    if hasattr(s, "micro_tokens"):
        if "vision_config" not in config:
            return [f"{folder} is a {kind}, which takes no pictures; give a Qwen2.5-VL or Qwen3-VL"]
        words, rows = 0 if problems else len(vla.read_json(tokenizer)["model"]["vocab"]), (config.get("text_config") or config)["vocab_size"]
        if words > rows:
            problems.append(f"{folder}: the tokenizer has {words} words and the model {rows} rows; they belong to different checkpoints")
        if not any(folder.glob("chat_template.*")) and "chat_template" not in vla.read_json(folder / "tokenizer_config.json"):
            problems.append(f"{folder} has no chat template; give an instruction-tuned checkpoint")
        return problems
    if kind not in ("openvla", "tiny_vla"):
        return [f"{folder} is a {kind}; give an OpenVLA-OFT or a TinyVLA"]
    if kind == "openvla" and not problems:
        try:
            vla.read_tokenizer(tokenizer.read_bytes())
        except ValueError as error:
            problems.append(f"{folder}: {error}")
    rows = shapes.get("language_model.lm_head.weight", (0,))[0]
    if kind == "openvla" and rows < vla.FIRST_BIN + vla.BINS:
        problems.append(f"{folder}: the head has {rows} rows, the discrete action tokens end at {vla.FIRST_BIN + vla.BINS}")
    problems += [f"{folder} holds {file.name}, a regression head: RL needs the checkpoint with discrete action tokens" for file in folder.glob("*action_head*")]
    file, suite = folder / "dataset_statistics.json", getattr(s, "suite", "tabletop")
    stats = vla.read_json(file) if file.is_file() else config.get("norm_stats", {})
    if not {f"{suite}_no_noops", suite} & set(stats):
        problems.append(f"{folder} has action statistics for {', '.join(sorted(stats)) or 'nothing'}, not for {suite}; give the checkpoint of that suite")
    try:
        import envs
        import libero_envs
        env = envs.Tabletop() if suite == "tabletop" else libero_envs.Libero(suite, task=0, assets=s.assets)
        env.reset()                                                                     # OpenGL, and the suite's assets
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        problems.append(str(error).splitlines()[0])
    return problems
