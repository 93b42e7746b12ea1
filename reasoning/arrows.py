"""The small world of reflection_srpo.py: pictures of arrows, questions on them, a teacher who knows
the way and a base who guesses, and a tiny Qwen2.5-VL. Nothing here comes from the paper.

A picture is a grid of 4 x 4 coloured cells with an arrow in each; asked is from which cell five
arrows lead to a given one. The way is sought back from there. Where several arrows point at a cell
it forks, and a wrong turn ends, later, where no arrow points at:

    to c2 in 5 reflection ?
    <think> c2 c1 b1 b2 a2 </think> <answer> a2 </answer>
    <reflection> check from b2 </reflection>
    <think> b2 b3 b4 </think> <answer> b4 </answer>

One pass is enough for who sees ahead at every fork; a second one need not, as the dead end tells.
"""
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from reasoning.rows import Row

SIDE, CELL = 4, 16                  # a cell is 16 px: 2 x 2 patches of 8, one image token
NAMES = [f"{row}{column}" for row in "abcd" for column in range(1, SIDE + 1)]
COLORS = {(0, 1): (250, 60, 60), (1, 0): (250, 250, 250), (0, -1): (20, 20, 20),
          (-1, 0): (250, 230, 40)}  # of an arrow (down, right): redundant, and quicker to learn
FORMS = ("plain", "twice", "reflection")
LURE = 2                            # a wrong way looks right for so many cells, at least
STEPS = 5                           # arrows between the start and the cell asked for


def draw(rng: np.random.Generator, form: str, text: bool = False
         ) -> tuple[Row, np.ndarray, list[int]]:
    """(picture and question, the cell that each cell's arrow points at: int (16,), the right way
    back: STEPS + 1 cells). One start alone is right, and some way back from the end is wrong. No
    two arrows point at each other, so ways do not swing to and fro."""
    follow = np.full(SIDE * SIDE, -1)
    for cell in rng.permutation(SIDE * SIDE):
        neighbours = [(cell // SIDE + down, cell % SIDE + right) for down, right in COLORS]
        options = [r * SIDE + c for r, c in neighbours
                   if 0 <= r < SIDE and 0 <= c < SIDE and follow[r * SIDE + c] != cell]
        if not options:
            return draw(rng, form, text)
        follow[cell] = options[rng.integers(len(options))]
    steps = [np.arange(SIDE * SIDE)]
    for _ in range(STEPS):
        steps.insert(0, follow[steps[0]])
    ends = steps[0].tolist()                            # where each cell leads
    ways = [way for way in np.stack(steps, 1).tolist()  # (16, STEPS + 1), back to each cell
            if ends.count(way[0]) == 1 and temptation(follow, way) >= LURE]
    if not ways:
        return draw(rng, form, text)
    way = ways[rng.integers(len(ways))]
    row = Row("", f"to {NAMES[way[0]]} in {STEPS} {form} ?", [], NAMES[way[-1]], source="arrows")
    if text:
        arrows = " ".join(f"{NAMES[cell]} {NAMES[target]}" for cell, target in enumerate(follow))
        return replace(row, query=f"{arrows} {row.query}"), follow, way
    image = Image.new("RGB", (SIDE * CELL, SIDE * CELL))
    pen = ImageDraw.Draw(image)
    for cell, target in enumerate(follow):
        r, c = divmod(cell, SIDE)
        pen.rectangle([c * CELL, r * CELL, (c + 1) * CELL - 1, (r + 1) * CELL - 1],
                      fill=(40 + 60 * r, 40 + 60 * c, 128))
        y, x = (i * CELL + CELL // 2 + int(rng.integers(-1, 2)) for i in (r, c))
        move = target // SIDE - r, target % SIDE - c
        down, right = (5 * step for step in move)
        pen.polygon([(x + right, y + down), (x - right + down, y - down + right),
                     (x - right - down, y - down - right)], fill=COLORS[move])
    image.save(png := io.BytesIO(), "PNG")
    return replace(row, images=[png.getvalue()], sizes=[image.size]), follow, way


def temptation(follow: np.ndarray, way: list[int]) -> int:
    """Cells of the longest wrong way that leaves this one."""
    def longest(cell: int, steps: int, right: int = -1) -> int:
        return max((1 + longest(int(source), steps - 1) for source in np.flatnonzero(
            follow == cell) if source != right), default=0) if steps else 0
    return max(longest(cell, STEPS - i, way[i + 1]) for i, cell in enumerate(way[:-1]))


def guess(follow: np.ndarray, cell: int, steps: int, rng: np.random.Generator) -> list[int]:
    """A way back from a cell, any of the arrows that point at it each time, until none does."""
    sources = np.flatnonzero(follow == cell)
    if not steps or not len(sources):
        return [cell]
    return [cell, *guess(follow, int(rng.choice(sources)), steps - 1, rng)]


def attempt(way: list[int]) -> str:
    """One think and its answer."""
    names = [NAMES[cell] for cell in way]
    return f"<think> {' '.join(names)} </think> <answer> {names[-1]} </answer>"


def respond(follow: np.ndarray, way: list[int], form: str, knows: bool,
            rng: np.random.Generator) -> str:
    """A response to imitate. The first attempt of two is a guess. Who knows the way ends with it,
    and reflects where the guess left it. Who does not guesses again: after a dead end otherwise
    from any fork on, if the format has a reflection to say so."""
    first = guess(follow, way[0], STEPS, rng)
    if form == "plain":
        return attempt(way if knows else first)
    back, second = 0, way if knows else guess(follow, way[0], STEPS, rng)
    if form == "reflection":
        back = min(sum(a == b for a, b in zip(first, way)), STEPS) - 1      # the last cell of both
        second = way[back:]
        if not knows and first != way:
            forks = [i for i, cell in enumerate(first) if (follow == cell).sum() > 1]
            back = int(rng.choice(forks))
            others = np.flatnonzero(follow == first[back])
            turn = int(rng.choice(others[others != first[back + 1]]))
            second = [first[back], *guess(follow, turn, STEPS - back - 1, rng)]
    middle = [f"<reflection> check from {NAMES[second[0]]} </reflection>"] * (form == "reflection")
    return " ".join([attempt(first), *middle, attempt(second)])


def dataset(n: int, seed: int, form: str = "reflection", target: str = "",
            text: bool = False) -> list[Row]:
    """n rows. target: "", none; "teacher", responses in this form by one who knows the way;
    "base", in all forms by turns by one who does not. text: the arrows stand in the question, cell
    by cell, and there is no picture."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        used = FORMS[i % len(FORMS)] if target == "base" else form
        row, follow, way = draw(rng, used, text)
        said = respond(follow, way, used, target == "teacher", rng) if target else None
        rows.append(replace(row, id=f"arrows-{seed}-{i}", target=said))
    return rows


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]
TAGS = [f"<{end}{name}>" for name in ("think", "answer", "reflection") for end in ("", "/")]
WORDS = [*SPECIAL, *TAGS, "<unk>", "user", "assistant", "to", "in", str(STEPS), *FORMS, "?",
         "check", "from", *NAMES]
TEMPLATE = """{% for message in messages %}<|im_start|> {{ message.role }} \
{% if message.content is string %}{{ message.content }} {% else %}{% for part in message.content %}\
{{ '<|vision_start|> <|image_pad|> <|vision_end|>' if part.type == 'image' else part.text }} \
{% endfor %}{% endif %}<|im_end|> {% endfor %}\
{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"""


def tiny_vlm(path: str | Path, width: int = 64, layers: int = 2, heads: int = 4) -> None:
    """Write a checkpoint folder like Qwen2.5-VL's: its architecture with random weights (torch's
    seed), tokenizer, chat template and image processor."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    ids = {word: i for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        unk_token="<unk>", additional_special_tokens=SPECIAL[1:], chat_template=TEMPLATE)
    third = width // heads // 2 // 3        # of a head's rotary frequencies: time, height and width
    rope = {"rope_type": "default", "rope_theta": 1000.0,
            "mrope_section": [width // heads // 2 - 2 * third, third, third]}
    same = dict(hidden_size=width, intermediate_size=2 * width)
    text = dict(
        **same, vocab_size=len(WORDS), num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, rope_parameters=rope, bos_token_id=None,
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"])
    vision = dict(**same, depth=1, num_heads=heads, patch_size=CELL // 2, window_size=8 * CELL,
                  out_hidden_size=width, fullatt_block_indexes=[0])
    tokens = {f"{name}_token_id": ids[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
    tokens |= {f"{name}_token_id": ids[f"<|{name}_pad|>"] for name in ("image", "video")}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    Qwen2VLImageProcessorPil(patch_size=CELL // 2, merge_size=2, min_pixels=CELL**2,
                             max_pixels=10**6).save_pretrained(path)
