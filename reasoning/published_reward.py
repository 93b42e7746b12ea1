"""The reflection reward as SRPO-MLLM's two published codes compute it (SUSTechBruce/SRPO_MLLMs).

`openrlhf` is srpo_reward_func.py, `verl` is srpo_rm.py; rewards.py follows the paper, and
docs/differences.md has the three side by side. Both count the tags in the length. Left out:
stripping of chat templates (pass the completion alone), and mathruler, the verifier of srpo_rm.py
(pass any).
"""
import re
from collections.abc import Callable

from reasoning.answers import boxed, default_verify, normalise
from rewards import TAG, TAG_ORDER, ReflectionRecord, inside, length_term

Count, Verify = Callable[[str], int], Callable[[str, str], bool | None]


def openrlhf(response: str, answer: str, *, count_tokens: Count = lambda text: len(text.split()),
             verify: Verify = default_verify) -> ReflectionRecord:
    """srpo_reward_func.py's reward of one response; arguments as rewards.reflection_reward's. The
    record's accuracy is the code's one number for accuracy and effectiveness.

    >>> fixed = "<think>a</think><answer>8</answer><reflection>b</reflection>"
    >>> record = openrlhf(fixed + "<think>c</think><answer>7</answer>", "7")
    >>> record.format, record.accuracy, record.reflection
    (0.5, 1.0, 0.0)
    """
    response = response.strip()
    thinks, answers = inside(response, "think"), inside(response, "answer")
    first, final = (bool(answers) and verify(answers[i], answer) for i in (0, -1))
    tokens, form, accuracy, length = count_tokens(response), 0.0, 0.0, 0.0
    if len(thinks) > 1 and len(answers) > 1:    # else its length term raises: 0 in total
        form = 0.5 * format_holds(response)
        table = {(True, True): 0.75, (False, True): 1.0, (True, False): 0.25, (False, False): 0.0}
        accuracy = table[bool(first), bool(final)]
        if first is None or final is None:      # unreadable ground truth
            accuracy = 1.0
        elif accuracy == 0 and (letter := normalise(answer)) in ("a", "b", "c", "d"):
            # Right if the final answer holds the letter, even inside a word, and no other of these
            accuracy = float([c for c in "abcd" if c in answers[-1].lower()] == [letter])
        length = 0.1 * length_term(tokens, count_tokens(thinks[0]) + count_tokens(answers[0]))
    return ReflectionRecord(form, accuracy, 0.0, 0.0, length, bool(first), bool(final), tokens)


class Halved(ReflectionRecord):
    """srpo_rm.py weighs both its parts by its format_weight, which is 0.5."""
    total = property(lambda self: (self.format + self.accuracy) / 2)


def verl(response: str, answer: str, *, count_tokens: Count = lambda text: len(text.split()),
         verify: Verify = default_verify) -> Halved:
    """srpo_rm.py's reward of one response, but for the length term: it needs `math`, which is not
    imported there, so that as published every call raises."""
    # Blanks round these characters go first
    response = "".join(part.strip() for part in re.split("([<>/])", response))
    # The first and the last box anywhere, whatever the tags; the word "None" where there is none
    starts = response.find("\\boxed{"), response.rfind("\\boxed{")
    answers = [(boxed(response[i:]) if i >= 0 else None) or "None" for i in starts]
    first, final = (bool(verify(x, answer)) for x in answers)
    # In `a == True & b == False` & binds first and == chains, so that -0.25, meant for T -> F, is
    # paid for F -> F, and 1.0, meant for F -> T, never
    accuracy = 0.75 if first and final else 0.0 if first or final else -0.25
    return Halved(0.5 * format_holds(response), accuracy, 0.0, 0.0, 0.0, first, final,
                  count_tokens(response))


def format_holds(response: str) -> bool:
    """Both codes' pattern: unlike the paper's, any text may precede it, and a blank is text."""
    _, *pieces = TAG.split(response)    # inside, between, inside, .., after the last tag
    return (TAG.findall(response) == TAG_ORDER and all(pieces[0::2])
            and not "".join(pieces[1::2]).strip())
