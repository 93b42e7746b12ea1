r"""The reflection reward as SRPO-MLLM's two published codes compute it (SUSTechBruce/SRPO_MLLMs).

`openrlhf` is srpo_reward_func.py, `verl` is srpo_rm.py; rewards.py follows the paper. Accuracy and
effectiveness together, by first -> final answer, T = right:

             paper   openrlhf    verl
    T -> T   0.75    0.75        0.75
    F -> T   0.5     1.0         0       openrlhf: a policy is paid to answer wrong first
    T -> F   0.25    0.25        0       verl: operators bind otherwise than meant
    F -> F   0       0          -0.25

Neither pays for the reflection itself, and both count the tags in the length. Left out: stripping
of chat templates (pass the completion alone), and mathruler, the verifier of srpo_rm.py (pass any).
"""
import re
from collections.abc import Callable
from dataclasses import dataclass

from reasoning.answers import boxed, default_verify, normalise
from rewards import TAG, TAG_ORDER, inside, length_term

Count, Verify = Callable[[str], int], Callable[[str, str], bool | None]


@dataclass
class PublishedRecord:
    """What rewards.ReflectionRecord holds, under its names. total: as the code weights the parts;
    accuracy: its one number for accuracy and effectiveness."""
    total: float = 0.0
    format: float = 0.0
    accuracy: float = 0.0
    effectiveness: float = 0.0
    reflection: float = 0.0
    length: float = 0.0
    first_correct: bool = False
    final_correct: bool = False
    n_tokens: int = 0


def openrlhf(response: str, answer: str, *, count_tokens: Count = lambda text: len(text.split()),
             verify: Verify = default_verify) -> PublishedRecord:
    """srpo_reward_func.py's reward of one response; arguments as rewards.reflection_reward's.

    >>> fixed = "<think>a</think><answer>8</answer><reflection>b</reflection>"
    >>> record = openrlhf(fixed + "<think>c</think><answer>7</answer>", "7")
    >>> record.format, record.accuracy, record.reflection
    (0.5, 1.0, 0.0)
    """
    response = response.strip()
    thinks, answers = inside(response, "think"), inside(response, "answer")
    record = PublishedRecord(n_tokens=count_tokens(response))
    if answers:
        first, final = verify(answers[0], answer), verify(answers[-1], answer)
        record.first_correct, record.final_correct = bool(first), bool(final)
    if len(thinks) < 2 or len(answers) < 2:     # its length term raises: 0 in total
        return record
    record.format = 0.5 if format_holds(response) else 0.0
    table = {(True, True): 0.75, (False, True): 1.0, (True, False): 0.25, (False, False): 0.0}
    record.accuracy = table[record.first_correct, record.final_correct]
    if first is None or final is None:          # unreadable ground truth
        record.accuracy = 1.0
    elif record.accuracy == 0 and (letter := normalise(answer)) in ("a", "b", "c", "d"):
        # Right if the final answer holds the letter, even inside a word, and no other of the four
        record.accuracy = float([c for c in "abcd" if c in answers[-1].lower()] == [letter])
    first_tokens = count_tokens(thinks[0]) + count_tokens(answers[0])
    record.length = 0.1 * length_term(record.n_tokens, first_tokens)
    record.total = record.format + record.accuracy + record.length
    return record


def verl(response: str, answer: str, *, count_tokens: Count = lambda text: len(text.split()),
         verify: Verify = default_verify) -> PublishedRecord:
    """srpo_rm.py's reward of one response, but for the length term: it needs `math`, which is not
    imported there, so that as published every call raises."""
    # Blanks round these characters go first
    response = "".join(part.strip() for part in re.split("([<>/])", response))
    record = PublishedRecord(n_tokens=count_tokens(response))
    record.format = 0.5 if format_holds(response) else 0.0
    # The first and the last box anywhere, whatever the tags; the word "None" where there is none
    starts = response.find("\\boxed{"), response.rfind("\\boxed{")
    answers = [(boxed(response[i:]) if i >= 0 else None) or "None" for i in starts]
    a, b = record.first_correct, record.final_correct = [bool(verify(x, answer)) for x in answers]
    # `a == True & b == False`: & binds first and == chains, so it means what stands here
    if a and b:
        record.accuracy = 0.75
    elif a == (True & b) and not (True & b):    # meant for T -> F, true for F -> F
        record.accuracy = -0.25
    elif a == (False & b) and (False & b):      # meant for F -> T, never true
        record.accuracy = 1.0
    record.total = 0.5 * record.format + 0.5 * record.accuracy      # its format_weight halves both
    return record


def format_holds(response: str) -> bool:
    """Both codes' pattern: unlike the paper's, any text may precede it, and a blank is text."""
    _, *pieces = TAG.split(response)    # inside, between, inside, .., after the last tag
    return (TAG.findall(response) == TAG_ORDER and all(pieces[0::2])
            and not "".join(pieces[1::2]).strip())
