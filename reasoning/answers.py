r"""Answers to questions of mathematics and choice: found in a response, brought to one spelling, compared. By rule alone: what cannot be read is wrong.

1. `default_verify`: whether a prediction equals the ground truth, as text, as numbers, or for math-verify. What rewards.py asks.
2. `extract`: the final answer of a response, from its tags, its last box, or "the answer is ...".
3. `same`, `option_letter`: equal quantities with their units; the option that an answer names by letter, text or value. What reasoning/benchmarks.py asks.
"""
import importlib.util
import re
import threading
from fractions import Fraction
from functools import lru_cache
from string import ascii_uppercase as LETTERS


# Against the ground truth

def normalise(text: str) -> str:
    r"""The answer as a plain string, from the last \boxed{} if there is one; "" if that box never closes.

    >>> [normalise(t) for t in (r"The answer is $\boxed{\frac{2}{3}}$.", r"(\textbf{B})", "1,250", r"1\frac{1}{2}", r"\boxed{7")]
    ['2/3', 'b', '1250', '1 1/2', '']
    """
    start = text.rfind(r"\boxed{")
    if start >= 0:
        text = boxed(text[start:]) or ""
    text = re.sub(r"\\(?:text(?:bf|it|rm)?|math(?:bf|it|rm))\s*\{([^{}]*)\}", r"\1", text).replace("$", " ").lower()
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}", r" \1/\2 ", text)     # blanks: 1\frac{1}{2} is not 11/2
    text = re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text).rstrip(".")                     # "( B )", but not "6 1"
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?|-?\d{1,3}( \d{3})+(\.\d+)?", text):
        text = re.sub("[ ,]", "", text)
    return re.sub(r"^\(?([a-z])[).]?$", r"\1", text)


def boxed(text: str) -> str | None:
    r"""What the \boxed{...} at the start of text holds, braces balanced; None if it never closes."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if char == "}" and depth == 0:
            return text[len(r"\boxed{"):i].strip()
    return None


def number(text: str) -> Fraction | None:
    """The exact value of a plain number or fraction; None for anything else, and for numbers of more than 40 digits."""
    digits = r"([+-]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40}))"
    match = re.fullmatch(rf"{digits}(?:/{digits})?", text)
    if match is None or (match[2] and Fraction(match[2]) == 0):
        return None
    return Fraction(match[1]) / Fraction(match[2] or 1)


@lru_cache(4096)                # a response's two answers are often one, and those of a group are
def default_verify(prediction: str, answer: str) -> bool | None:
    r"""Whether the prediction equals the answer; None if the answer itself cannot be read.

    Right if equal after normalising or equal as numbers: the prediction must be the answer alone, or box it; of an option,
    "B", also "(B) 60". Else, where math-verify is installed, right if that finds an equal expression in it, and neither
    alternatives, a list of numbers, a chain of relations, nor another unit. Empty or unreadable predictions are never right, nor
    are those that only a computer algebra system would spend seconds on. (The "openrlhf" code hands math-verify its tags too, which
    hide an answer in neither $...$ nor a box; not so here.)

    >>> [default_verify(p, "3/4") for p in (r"so $\boxed{0.75}$", r"\frac{3}{4}", "13/4", "")]
    [True, True, False, False]
    """
    guess, gold = normalise(prediction), normalise(answer)
    if not gold:
        return None
    if not guess:
        return False
    if guess == gold or (number(guess) is not None and number(guess) == number(gold)):
        return True
    if len(gold) == 1 and answer.strip(" ().").isupper():
        match = re.match(r"(?:\(([a-z])\)|([a-z])[.:)])(.*)", guess, re.DOTALL)
        return bool(match) and (match[1] or match[2]) == gold and not OTHER_OPTION.search(match[3])
    start = prediction.rfind(r"\boxed{")
    text = (boxed(prediction[start:]) or "") if start >= 0 else prediction
    if SEVERAL.search(text) and not SEVERAL.search(answer) or HARD.search(text) or len(text) > 200:    # math-verify would pick one, or take its time
        return False
    mine, theirs = quantity(text), quantity(answer)
    if mine and theirs and mine[1] and theirs[1] and mine[1] != theirs[1]:
        return False
    # math-verify reads a word as a product of symbols ("der" would equal "red"), so words and letters end here.
    if gold.isalpha() or importlib.util.find_spec("math_verify") is None:
        return False
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse, verify
    # Its time limit is an alarm signal, which only the main thread can set; elsewhere there is none.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    parsed_gold = parse(f"${answer}$", parsing_timeout=seconds)
    if not parsed_gold:
        return None
    configs = [StringExtractionConfig(), LatexExtractionConfig(), ExprExtractionConfig()]
    return bool(verify(parsed_gold, parse(prediction, configs, parsing_timeout=seconds), timeout_seconds=seconds))


# In a prediction: alternatives; numbers in a row (of 1,250 or 1 000 the comma and the blank are part); several numbers and relations
SEVERAL = re.compile(r"\b(?:or|not|but|either|nor|and)\b|\d\s+\d+(?![\d/])|\d\s*(?:[;:<>=]|,(?!\d{3}(?!\d)))[\s({\[\\]*[-+]?\d", re.I)
OTHER_OPTION = re.compile(r"\([a-z]\)|^\W*(?:and|or|not)\b|(?:^|[,.;:]|\balso |\band |\bor )\(?[a-h]\)?(?:[^\w\s]|$)")
HARD = re.compile(r"\^\s*\{?\s*\d{3,}|\^[^\s^]*\^|(?:[(\[{]\s*){8}")       # large powers, powers of powers, deep brackets


# Out of a response, and against what a benchmark publishes

def extract(response: str, choice: bool, truncated: bool = False) -> str | None:
    r"""The final answer as written: of the last <answer>, else of the whole response, the last \boxed{} or "answer is ...". Without
    these, the last option letter (choice) or number of the last line. Outside tags a truncated response needs a box.

    >>> [extract(r, False) for r in ("<answer>1</answer><answer>so $\\boxed{2}$</answer>", "The answer is 3.5. Done.", "9 - 2 = 7", "?")]
    ['2', '3.5', '7', None]
    """
    tagged = re.findall(r"<answer>(.*?)</answer>", response, re.DOTALL)
    text = (tagged[-1] if tagged else response).replace("**", "").strip()
    if (start := text.rfind(r"\boxed{")) >= 0:
        return boxed(text[start:]) or None     # None: the box never closes
    if not text or (truncated and not tagged):
        return None
    if phrases := re.split(r"\b(?:answer|option|choice)\s*(?:is|should be|:|=)\s*:?\s*", text, flags=re.I)[1:]:
        return re.split(r"\n|\.(?=\s|$)|,? (?:because|since|as|which)\b", phrases[-1])[0].strip() or None
    if tagged:
        return text
    last = text.splitlines()[-1]
    # A bare letter inside a sentence is more often a point or a variable than an option.
    letters = re.findall(r"\(([A-Z])\)|^\W*([A-Z])\W*$|^([A-Z])[.:)]\s", last) if choice else []
    numbers = re.findall(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?(?!\w)", last) if "{" not in last else []
    return "".join(letters[-1]) if letters else numbers[-1] if numbers else None


def tidy(text: str) -> str:
    """Without dollars, LaTeX spacing and text commands; degrees, roots, powers and mixed numbers in one spelling."""
    text = re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[!,;:()\[\] ]|\\(?:left|right)(?![a-z])|\*\*|\$", "", text)
    text = re.sub(r"\^\{?\\circ\}?|\\degrees?|\bdegrees?\b", "°", text).replace("²", "^2").replace("³", "^3").replace("\\%", "%")
    text = re.sub(r"√(?:\{([^{}]*)\}|(\d+|\w))", r"\\sqrt{\1\2}", re.sub(r"\^\{(\d)\}", r"^\1", text)).replace("π", r"\pi ")
    # Blanks go when texts are compared, and 1 1/2 must not become 11/2, nor 6 1 become 61 (10 000 may).
    text = re.sub(r"(?<![\w^.}])(\d{1,40})(?: +(?=\d+/)|\s*\\[dt]?frac\{(?=\d+\}\{\d))(\d{1,40})(?:/|\}\{)(\d{1,40})\}?",
                  lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}", text)
    return re.sub(r"(?<=\d)\s+(?=\d)(?!\d{3}(?!\d))", ";", text).strip().rstrip(".").strip()


# Symbols, then words such as years; 3pi and 2sqrt(3) are no numbers with a unit.
UNIT = r"(?:[cdkm]?m|in|ft|yd|mi|k?g|m?l|s|h|%|°|(?!(?:sqrt|sin|cos|tan|log|alpha|beta|theta)(?![a-z]))[a-z]{3,20})(?:\^[23])?"


def quantity(text: str) -> tuple[Fraction, str] | None:
    """A number and its unit ("" if none), of "16 cm^2" or "x = 3/4"; None for anything else."""
    match = re.fullmatch(rf"(?:[a-z∠\\]{{1,12}}=)?([^a-z=]*?)({UNIT})?", normalise(tidy(text)))
    value = match and number(normalise(match[1]))
    return None if value is None else (value, match[2] or "")


def same(answer: str, gold: str) -> bool:
    """Equal quantities (a missing unit is no fault, another unit is), the same text, or equal for math-verify."""
    a, b = quantity(answer), quantity(gold)
    if a and b:
        return a[0] == b[0] and (a[1] == b[1] or not (a[1] and b[1]))
    answer, gold = tidy(answer), tidy(gold)
    if normalise(answer) == normalise(gold):
        return normalise(gold) != ""
    # Out of a sentence, or alternatives, math-verify would pick some number; on a page of brackets it takes its whole time limit.
    prose = re.search(r"\b(?:or|not|but|either|nor)\b", answer) or len(re.findall(r"(?<!\\)\b[A-Za-z]{2,}", answer)) > 2
    return not prose and len(answer) < 200 and bool(default_verify(rf"\boxed{{{answer}}}", gold))


def option_letter(answer: str, options: list[str]) -> str | None:
    """The one option an answer names, by letter or, failing that, by text or value; None if that is none or several."""
    text, allowed = re.sub(r"^(?:option|choice)\s+", "", tidy(answer), flags=re.I), list(LETTERS[:len(options) or 10])
    match = re.fullmatch(r"(?:\(([A-Z])\)|([A-Z])(?=[.:)]|$)[.:)]?)(.*)", text, re.DOTALL)
    if match and not re.search(r"\([A-Z]\)|^\W*(?:and|or|not)\b", match[3]):
        return (match[1] or match[2]) if (match[1] or match[2]) in allowed else None
    hits = [i for i, option in enumerate(options) if normalise(tidy(option)) == normalise(text)]
    hits = hits or [i for i, option in enumerate(options) if same(text, option)]
    if not hits and re.fullmatch(r"\(?[a-z]\)?", text):
        hits = [i for i, letter in enumerate(allowed) if letter == text.strip("()").upper()]
    return LETTERS[hits[0]] if len(hits) == 1 else None


def main() -> None:
    """A few predictions beside the truth: whether they are right, and the answer that a whole response gives."""
    for answer, predictions in {"3/4": (r"\frac{3}{4}", "0.75", r"so $\boxed{3/4}$", "3"), "1250": ("1,250", "12.50"), "B": ("(B) 60", "b", "A or B")}.items():
        print(f"truth {answer}: " + ", ".join(f"{p!r} {'right' if default_verify(p, answer) else 'wrong'}" for p in predictions))
    for response in ("<think>7 twos</think><answer>14 cm</answer>", r"first \boxed{3}, no, \boxed{4}", "The answer is 12.", "I cannot say"):
        print(f"{response!r} answers {extract(response, False)!r}")


if __name__ == "__main__":
    main()
