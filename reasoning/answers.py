r"""The verifier, which is the training signal: does a response's answer equal the ground truth?

By rule alone and without a clock, for training and benchmarks alike (`default_verify`). An answer
is read whole or not at all: no number is picked out of a longer text, so 5\pi is not 5, nor are
7±1, "at least 7" and "7 or 8" 7. What is unread is wrong.
  1. The answer is the last \boxed{}; without one, the whole text. Words may lead up to it ("Hence
     the area is"), without digits, negation or "or". Only a unit may follow.
  2. One spelling: $..$, text commands, LaTeX spacing, full-width characters, \dfrac, \frac12, √;
     without "quotes" around it and the last full stop, but 7' and '7' may be primes: unread.
  3. Equal as text, but for case and blanks. Of options, the letter: B, (b), "(B) 60", \text{B}.
  4. Numbers and expressions: 1,250; 1e-5; 1.6\times 10^{-27}; "minus 7"; 1\frac{1}{2}; \sqrt{12};
     letters are variables. Equal if 1,000 digits agree at three points; six digits of a root or
     fraction are enough, rounded or cut off. "About" and ≈ change nothing. A missing unit is no
     fault, another is; none is converted. 7% is 0.07, or 7 if the truth is a bare number above 1.
  5. Lists, in order within () and [], in any order if bare or within {}; "and", "or" and ∪ are
     commas. Relations side by side; of x = 7 the 7 may do, of 2 + 5 = 7 all sides must be right.
Right only as the same text: sums, integrals, matrices, "...", 1/2x (two readings), and what
explodes: exponents above 999, !!, factorials above 99!. A truth that is empty or NaN gives None.
"""
import ast
import random
import re
from contextlib import suppress
from functools import lru_cache
from string import ascii_uppercase as LETTERS

from mpmath import MPContext  # torch brings it

LIMIT = 1000                        # characters: longer answers are compared as text alone
MP = MPContext()
MP.dps = 1100                       # digits
NUMBER = (MP.mpf, MP.mpc)
FUNCTIONS = "arcsin|arccos|arctan|sin|cos|tan|ln|log|exp|sqrt|frac|root|fabs|factorial"
NAME = rf"\\(?!(?:{FUNCTIONS}|pm|le|ge|ne|times|cdot)(?![a-z]))[A-Za-z]+(?![A-Za-z])"
OPERATIONS = {ast.Add: "fadd", ast.Sub: "fsub", ast.Mult: "fmul", ast.Div: "fdiv"}
CHARACTERS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {ord(a): b for a, b in {
    "、": ",", "。": ".", "−": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ",
    "±": r"\pm ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "∞": r"\infty ", "∠": r"\angle ", "∪": r"\cup ", "…": r"\ldots ", "√": r"\sqrt ",
    "½": r"\frac12 ", "¼": r"\frac14 ", "¾": r"\frac34 ", "⅓": r"\frac13 ", "⅔": r"\frac23 ",
    "~": " ", "Ω": r"\Omega ", "µ": r"\mu ", "μ": r"\mu "}.items()}
TEXT = re.compile(r"\\(?:text\w*|math(?!bb)[a-z]+|operatorname|[mfh]box|emph|underline|bm)\*? ?"
                  r"\{([^{}]*)\}|\{\\(?:bf|it|rm|sf|tt)(?![a-z])([^{}]*)\}")
SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
SPELLINGS = [(re.compile(pattern), new) for pattern, new in (
    (r"(?<=\d)(?:\{,\}|,\\!) ?(?=\d{3})", ","), (r"\\%", "%"), (r"\.\.\.", r"\\ldots "),
    (r"(\\\\)|\\(?:[!,;:>()\[\] ]|(?:displaystyle|q?quad|left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?)|"
     r"\\?\$", r"\1 "), (r"(?<=[\w)}\]]) ?\*\* ?(?=[\w({-])", "^"), (r"\*\*", " "),     # 2**10
    (r" ?\^ ?\{? ?\\circ(?![a-z]) ?\}?|(?:\\| ?\b)degrees?(?![a-z])", "°"),
    (r" ?\b(?:per ?cent|pct|percentage)\b", "%"), (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (r"\\frac ?(\d)(?= ?[\d{])", r"\\frac{\1}"), (r"(\\frac ?\{[^{}]*\}) ?(\d)", r"\1{\2}"),
    (r"\\lt(?![a-z])", "<"), (r"\\gt(?![a-z])", ">"),
    (r"\\leq?(?:slant)?(?![a-z])|<=", r"\\le "), (r"\\geq?(?:slant)?(?![a-z])|>=", r"\\ge "),
    (r"\\neq?(?![a-z])| !=", r"\\ne "), (rf"(?<![A-Za-z\\])(pi|{FUNCTIONS})(?![A-Za-z])", r"\\\1 "),
    (r"[⁻⁰¹²³⁴-⁹]+", lambda m: "^" + m[0].translate(SUPERSCRIPTS)),
    (r" ?\^ ?(-?\d+)", r"^{\1}"), (r" ?\^ ?\{ ?", "^{"), (r"\b(?:minus|negative) (?=[\d.\\])", "-"),
    (r"\s+", " "), (r"^[ \"`]+|[ \"`.,;]+$", ""), (r"^\\?\{([^{}]*[^{}\\])\\?\}$", r"\1"))]


def tidy(text: str) -> str:
    """The last box, or else the whole text, in one spelling, without dollars and text commands."""
    text = text.replace(r"\boxed {", r"\boxed{")
    start = text.rfind(r"\boxed{")
    text = " ".join((text if start < 0 else boxed(text[start:]) or "").split())
    if len(text) > LIMIT:
        return text
    text, nested = text.translate(CHARACTERS), 1
    while nested:
        text, nested = TEXT.subn(r" \1\2 ", text)
    for pattern, new in SPELLINGS:
        text = pattern.sub(new, text)
    return text


def boxed(text: str) -> str | None:
    r"""What the \boxed{...} at the start of text holds, braces balanced; None if it has no end."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if char == "}" and depth == 0:
            return text[len(r"\boxed{"):i].strip()
    return None


def normalise(text: str) -> str:
    r"""The answer as a plain string, from the last \boxed{} if there is one; "" if it never closes.

    >>> [normalise(text) for text in (r"It is $\boxed{x^2}$.", r"(\textbf{B})", r"\boxed{7")]
    ['x^{2}', 'b', '']
    """
    text = tidy(text)
    text = text if "\\" in text else text.lower()                               # \Omega, \omega
    text = re.sub(r"(?<![\w.]) | (?![\w.])|(?<=\d) (?=[a-z])|(?<=\\pm) ", "", text)     # not "6 1"
    return re.sub(r"^\(?([a-z])[).:]?$", r"\1", text)


# From LaTeX to Python: a letter becomes vx_, a command sin or pi_, a fraction frac(a)(b)
REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r",? ?\b(?:and|or)\b|;|\\cup\b", ","), (r"\\log ?_ ?\{?(\d+|e)\}? ?", r"(1/\\ln{\1})*\\ln "),
    (r"^[A-Za-z ]{2,}$|(?<![A-Za-z\\])(?:[A-Za-z]{3,}|at|by|if|no|of)(?![A-Za-z])", "?"),
    (r"(?<![\d.,])\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,]| \d)",
     lambda m: re.sub("[ ,]", "", m[0])),
    (r"(?<![\d.])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d\d?)(?![\d.])", r"(\1*10^{\2})"),
    (r"(?<=\d) ?x ?(?=10\^)", "*"), (r"(?<![\w.^}])(\d+) ?(\\frac ?\{\d+\}\{\d+\})", r"(\1+\2)"),
    (r"(?<![\w.])(\d+) (\d+ ?/ ?\d+)(?![\d.])", r"(\1+\2)"), (r"\d \.?\d", "?"),        # not "6 1"
    (r"(?<![\d.])(\d*)\.(\d+)(?![\d.])", lambda m: f"({m[1]}{m[2]}/1{'0' * len(m[2])})"),
    (r"\\sqrt ?\[(\d)\]", r"\\root{\1}"), (r"\|([^|]+)\|", r"\\fabs{\1}"),
    (rf"(\\(?:{FUNCTIONS})) ?((?:\d|[A-Za-z]|{NAME})+)", r"\1(\2)"),
    (r"(?<![\d!])(\d\d?)!(?!!)", r"\\factorial(\1)"), (r"\\times|\\cdot", "*"), (r"\\div", "/"),
    (r"\} ?\{", ");("), (r"[\[{]", "("), (r"[\]}]", ")"), (r"\^", "**"), (r"(?<!\d)0+(?=\d)", ""),
    ("=", "=="), (r"\\le ", "<="), (r"\\ge ", ">="), (r"\\ne ", "!="),
    (r"\\([A-Za-z]+)|([A-Za-z])(?:_(?:(\w)|\((\w+)\)))?", lambda m: f"v{m[2]}{m[3] or m[4] or ''}_"
        if m[2] else m[1] + "_" * (m[1] not in FUNCTIONS.split("|"))),
    (r"[)_] ?\d|/ ?\w+(?<=[\d_]) ?[A-Za-z(]|(?:pm|approx)_", "?"),        # no single reading
    (r"(?<=[\d)_]) ?(?=[A-Za-z(])", "*"), (";", ""), (r"\*in_\*", " in "))]


def compute(node: ast.expr, point: int):
    """The value of a Python expression, letters standing for numbers drawn by their names; a tuple
    for a list or relation. ValueError (or what Python raises) for what is unread or may explode."""
    match node:
        case ast.Constant(int(value)):
            return MP.mpf(value)
        case ast.Name(name):
            draw = random.Random(f"{name} {point}")
            letter = MP.mpf(draw.randint(300, 3000) * (1, -1, draw.choice((1, -1)))[point]) / 997
            known = {"pi_": +MP.pi, "infty_": MP.inf, "ve_": +MP.e, "vi_": MP.j, "log": MP.log10,
                     "frac": lambda x: lambda y: x / y, "root": lambda n: lambda x: MP.root(
                         abs(x) if n % 2 else x, int(n)) * (MP.sign(x) if n % 2 else 1)}.get(name)
            return known or (letter if name[-1] == "_" else getattr(MP, name.replace("arc", "a")))
        case ast.UnaryOp(sign, x):
            return MP.fmul(compute(x, point), -1 if isinstance(sign, ast.USub) else 1)
        case ast.Call(function, [x]) if abs(x := compute(x, point)) < MP.mpf(10) ** 1000:
            return compute(function, point)(x)
        case ast.BinOp(x, ast.Pow(), y) if abs(y := compute(y, point)) <= 999:
            x = compute(x, point)
            return x ** int(y.real) if y == int(y.real) else MP.mpc(x) ** y
        case ast.BinOp(x, sign, y):
            return getattr(MP, OPERATIONS[type(sign)])(compute(x, point), compute(y, point))
        case ast.Tuple(items):
            return ("", *(compute(x, point) for x in items))
        case ast.Compare(x, signs, items):          # x = 7: its left side is a name, not a number
            parts = {*map(type, ast.walk(x))} - {ast.Name, ast.Load, ast.BinOp, ast.Mult, ast.Tuple}
            return (" ".join(type(sign).__name__ for sign in signs), compute(x, point) if parts
                    else ast.unparse(x), *(compute(y, point) for y in items))
    raise ValueError("unread")


@lru_cache(1024)
def values(text: str) -> list | None:
    """What each item of a bare list is worth at three points; a single expression is a list of one.
    None if any of it is unread."""
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    with suppress(ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError,
                  SyntaxError, TypeError, ValueError):
        if not re.search(r"[^\w ()+*/,<>=!-]", text, re.ASCII):
            nodes = ast.parse(f"[{text.strip()}]", mode="eval").body.elts
            return [tuple(compute(node, point) for point in range(3)) for node in nodes] or None
    return None


def agree(x, y) -> bool:
    """Whether two values are equal to 1,000 digits, y being the truth's."""
    chain, wanted = (isinstance(value, tuple) and value[0].startswith("Eq") for value in (x, y))
    if chain and not wanted:
        return all(agree(side, y) for side in x[1:] if not isinstance(side, str))
    if wanted and not chain:
        return isinstance(y[1], str) and agree(x, y[-1])
    if isinstance(x, tuple) and isinstance(y, tuple):
        return len(x) == len(y) and all(map(agree, x, y))
    if x == y or not (isinstance(x, NUMBER) and isinstance(y, NUMBER)):
        return x == y
    return abs(x - y) < MP.inf and abs(x - y) <= MP.mpf(10) ** -1000 * max(1, abs(x), abs(y))


# A unit: a symbol, or a word in the plural that is no other number; 5m and 5abc may be products
SYMBOL = (r"(?:(?:[kcdmnMG]|\\mu ?)?(?:mol|Pa|Hz|eV|Wh|[mgslLJNWVAKCFh]| ?\\Omega)|min|in|ft|yd|mi|"
          r"hr|rad)(?![A-Za-z])")
WORD = (r"(?!(?:time|hal(?:f|ve)|third|quarter|dozen|plu|minu|les|root|pair|zero|one|two|three|"
        r"five|eight|nine|(?:fif|eigh|nin|twelf|\w+(?:een|tie))th|(?:four|six|seven|ten|hundred|"
        r"thousand|\w{1,3}illion)(?:th)?)s)(?:[a-z]+s|people|children|men|women|feet|foot|inch|"
        r"meter|second|minute|hour|day|month|year|unit)\b")
ATOM = (rf"(?:(?:(?:square|cubic) )?(?:{SYMBOL}|{WORD})|°[CF]?|[%€£¥])"
        r"(?:\^\{-?\d\}|[23](?!\d))?")
UNIT = re.compile(r"(.*?\S)(?: |(?<=[^A-Za-z\\])(?![A-Za-z](?![A-Za-z])))(?<![A-Za-z\\])"
                  rf"({ATOM}(?:(?: ?(?:/|\\cdot|\*) ?| per | (?=\w+\^)){ATOM})?)")
LEAD = re.compile(
    r"((?!.*\b(?:no|not|never|neither|nor|or|but|either|cannot|wrong|false|incorrect|except|unless|"
    rf"if|half|twice|inverse|opposite)\b|.*n't)(?:[A-Za-z\s',.:=()°]|_\{{?\d+\}}?|{NAME})*"
    r"(?:\b(?:is|are|was|be|equals?|equal to|it's|gets?|has|have|gives?|that|so|thus|hence|answer|"
    r"therefore|option|choice|about|around|approximately|roughly|exactly|costs?)\b[.,]?:?|"
    r"[A-Za-z]{3} ?[=:]|(?:[a-z] ?)?\\(?:approx|in)\b))? ?(.*)", re.I)


def split_unit(text: str) -> tuple[str, str]:
    """A text and the unit at its end: m2 for "m²", cm for "centimeters", "" for none."""
    match = UNIT.fullmatch(re.sub(r"^([+-]?) ?([€£¥]) ?(.*)$", r"\1\3 \2", text))
    unit = re.sub(r"\b(centi|kilo|milli|)(m|g)(?:eter|etre|ram)s?\b", lambda m: m[1][:1] + m[2],
                  match[2] if match else "")
    for name, symbol in (("s(?:econds?)?", "second"), ("min(?:s|utes?)?", "minute"), (
            "h(?:(?:ou)?rs?)?", "hour"), ("f(?:oo|ee)?t", "feet"), ("in(?:ch(?:es)?)?", "inch")):
        unit = re.sub(rf"(?<![A-Za-z]){name}(?![A-Za-z])", symbol, unit.replace(" per ", "/"))
    unit = re.sub(r"(square|cubic) (\w+)", lambda m: m[2] + "23"[m[1] == "cubic"], unit)
    return match[1] if match else text, re.sub(r"[{}^ ]|\\cdot|\bunits?2?\b", "", unit)


def quantity(text: str) -> tuple | None:
    """The value (mpf) and the unit ("" for none) of "16 cm^2" or "x = 3/4"; else None."""
    if len(text) > LIMIT:
        return None
    text, unit = split_unit(re.sub(r"^[A-Za-z\\∠ ]{1,12}= ?", "", tidy(text)))
    found = values(text) or []
    single = len(found) == 1 and found[0][0] == found[0][1] and isinstance(found[0][0], MP.mpf)
    return (found[0][0], unit) if single else None


def equal(a: str, b: str) -> bool:
    """Whether two tidy answers are equal, b being the truth."""
    (x, unit), (y, wanted) = split_unit(a), split_unit(b)
    unit, wanted = (re.sub("(?<=[a-z]{3})s$", "", each) for each in (unit, wanted))     # plurals
    p, q = values(x), values(y)
    if a == b or not p or not q:
        return normalise(a) == normalise(b)
    (mine, other, _), (theirs, third, _) = p[0], q[0]
    brackets = isinstance(mine, tuple) and [re.sub(r"[^[\]]", "", text) for text in (a, b)]
    if len(p) != len(q) or (unit and wanted and unit != wanted) or (
            brackets and brackets[0] != brackets[1]):
        return False                                                            # [1, 2), (1, 2)
    if mine == other and theirs == third and {type(mine), type(theirs)} <= {*NUMBER}:
        if "%" in (unit, wanted) and unit != wanted:
            return agree(mine / (100 if unit else 1), theirs / (100 if wanted else 1)) or (
                bool(wanted or abs(theirs) > 1) and agree(mine, theirs))
        decimals = [text for text in (x, y) if re.fullmatch(r"-?\d*\.\d{1,99}", text)]
        if len(decimals) == 1 and len(decimals[0].strip("-.0").replace(".", "")) > 5:
            return abs(mine - theirs) * 10 ** len(decimals[0].partition(".")[2]) < 0.999
    elif unit != wanted and not brackets:
        return False                                                            # 2x m: a product?
    pairs = [[all(map(agree, one, two)) for two in q] for one in p]
    free = a.count("=") == b.count("=")                                         # in any order
    return all(pairs[i][i] for i in range(len(p))) or (
        free and all(map(any, pairs)) and all(map(any, zip(*pairs, strict=True))))


@lru_cache(4096)                # a response's two answers are often one, and those of a group are
def default_verify(prediction: str, answer: str) -> bool | None:
    r"""Whether the prediction equals the answer, as the top of this file says; None if the answer
    is empty or NaN. What responses.py, teacher.py and benchmarks.py ask.

    >>> [default_verify(p, "3/4") for p in (r"so $\boxed{0.75}$", r"\frac{3}{4}", "13/4", "")]
    [True, True, False, False]
    """
    guess, truth = tidy(prediction), tidy(answer)
    if normalise(truth) in ("", "nan"):
        return None
    if max(len(guess), len(truth)) > LIMIT or not normalise(guess):
        return guess == truth
    guesses, truths = ({text, LEAD.fullmatch(text)[2]} for text in (guess, truth))
    if re.fullmatch(r"[A-Z]|\([A-Z]\)", truth):
        return truth.strip("()") in map(option, guesses)
    return any(equal(a, b) for a in guesses for b in truths if b == truth or re.search(r"\d", b))


# Options, and answers out of a response

def option(text: str, names: tuple[str, ...] = ()) -> str | None:
    """The letter that a tidy text begins with, if it names no other: "B", "(b) 60", "B. Rome"."""
    match = re.match(r"(?:\(([A-Za-z])\)|([A-Za-z])(?=[.:)]|$)[.:)]?)\s*(.*)", text)
    other = match and re.search(r"\([A-Za-z]\)|\b[A-H]\)|^\W*(?:and|or|not)\b|(?:^|[,.;:] ?|"
                                r"\b(?:also|and|or) )\(?[A-Ha-h]\)?(?:[^\w\s]|$)", match[3])
    named = match and (not other or normalise(match[3]) in names)
    return (match[1] or match[2]).upper() if named else None


def option_letter(answer: str, options: list[str]) -> str | None:
    """The one option an answer names, by letter or, failing that, by text or value; None if that is
    none or several. Of options of one text, the first."""
    text = re.sub(r"^(?:option|choice) ", "", tidy(answer), flags=re.I)
    options = list(map(str, options))
    names = tuple(map(normalise, options))
    letter = option(text, names)
    if letter and not (text.islower() and normalise(text) in names):
        names = names or LETTERS[:10]
        index = LETTERS.index(letter)
        return LETTERS[names.index(names[index])] if index < len(names) else None
    hits = {normalise(text)} & {*names} - {""} or {
        name for name, each in zip(names, options, strict=True) if default_verify(text, each)}
    return LETTERS[names.index(*hits)] if len(hits) == 1 else None


def extract(response: str, choice: bool, truncated: bool = False) -> str | None:
    r"""The final answer as written: of the last <answer>, else of the whole response, the last box
    or "answer is ...". Without these, the last option letter (choice) or number of the last line.
    Outside tags a truncated response needs a box.

    >>> [extract(text, False) for text in ("<answer>1</answer>, <answer>2</answer>", "9 - 2 = 7")]
    ['2', '7']
    """
    parts = [part.partition("<answer>") for part in response.split("</answer>")[:-1]]
    tagged = [inside for _, tag, inside in parts if tag]
    text = re.sub(r"[^\S\n]+", " ", tagged[-1] if tagged else response).strip()
    if (start := text.rfind(r"\boxed{")) >= 0:
        return boxed(text[start:]) or None                                      # it may never close
    text = re.sub(r"(?<!\w)\*\*|\*\*(?!\w)", "", text)
    if not text or (truncated and not tagged):
        return None
    phrases = re.split(r"\b(?:answer|option|choice) ?(?:is|should be|:|=) ?:?\s*", text, flags=re.I)
    if len(phrases) > 1:
        end = r"\n|\.(?=\s|$)|,? (?:because|since|as|which)\b"
        return re.split(end, phrases[-1], maxsplit=1)[0].strip() or None
    if tagged:
        return text
    last = text.splitlines()[-1]
    # A bare letter inside a sentence is more often a point or a variable than an option.
    letters = re.findall(r"\(([A-Z])\)|^\W*([A-Z])\W*$|^([A-Z])[.:)]\s", last) if choice else []
    number = r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?(?!\w)"
    numbers = re.findall(number, last) if "{" not in last else []
    return "".join(letters[-1]) if letters else numbers[-1] if numbers else None
