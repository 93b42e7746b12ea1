"""reasoning/answers.py: what equals the ground truth and what does not, what is found in a response, which option is meant."""
import pytest

from reasoning import answers
from reasoning.answers import default_verify, extract, option_letter
from tests.conftest import needs_math_verify


@pytest.mark.parametrize("guess, gold, right", [
    ("7", "7", True), (" $7.0$ ", "7", True), ("17", "7", False), ("0.75", "3/4", True), ("\\dfrac{3}{4}", "0.75", True),
    ("1,250", "1250", True), ("(b)", "B", True), ("B.", "B", True), ("A or B", "B", False), ("Red", "red", True),
    ("der", "red", False), ("\\boxed{\\frac{2}{3}}", "\\frac23", False), ("7/0", "7", False), ("-4", "4", False),
    ("6 1", "61", False), ("1 1/2", "5.5", False), ("1\\frac{1}{2}", "5.5", False), ("1\\frac{1}{2}", "1 1/2", True), ("- \\frac {1}{2}", "-0.5", True),
    ("\\boxed{\\text{B}}", "B", True), ("(\\textbf{B})", "B", True), ("(B) 60", "B", True), ("\\boxed{B. 60}", "B", True), ("(B) or (C)", "B", False),
    ("(C) 60", "B", False), ("Bob", "B", False), ("\\boxed{\\text{yes}}", "yes", True),
    ("9" * 500, "7", False), ("see $\\boxed{1}$, then $\\boxed{7}$", "7", True)])
def test_plain_verifier(guess, gold, right, monkeypatch):
    default_verify.cache_clear()
    monkeypatch.setattr(answers.importlib.util, "find_spec", lambda name: None)
    assert default_verify(guess, gold) is right
    default_verify.cache_clear()


@pytest.mark.parametrize("guess, gold, right", [
    ("$x^2+2x+1$", "(x+1)^2", True), ("$\\boxed{\\frac{2}{3}}$", "\\frac23", True), ("$\\sqrt{4}$", "2", True),
    ("der", "red", False), ("A", "B", False), ("$x^2$", "(x+1)^2", False), ("The answer is 7.", "7", True), ("9 or 7", "7", False),
    ("not 7", "7", False), ("1 2 3 4 5 6 7", "7", False), ("3, 4, 5", "5", False), ("7; 8", "8", False), ("{7, 8}", "8", False), ("6 and 7", "7", False),
    ("6 < 7", "7", False), ("6: 7", "7", False), ("\\boxed{6=7}", "7", False), ("x = 7", "7", True), ("1,250 cm", "1250", True), ("(1, 2)", "(1,2)", True),
    ("5 cm", "5 m", False), ("\\boxed{5\\text{ cm}}", "5\\text{ m}", False), ("5 cm", "5", True), ("\\boxed{3\\sqrt{2}}", "3\\sqrt{2}", True),
    ("A. B. C. D.", "A", False), ("(A), B", "A", False), ("(B) 60, also C", "B", False), ("B. a square", "B", True), ("B. Vitamin C", "B", True)])
def test_math_verify_where_installed(guess, gold, right):
    pytest.importorskip("math_verify")
    assert default_verify(guess, gold) is right


@pytest.mark.parametrize("guess", ["$9^{9^{9^{9}}}$", "$2^{10^{9}}$", "$(x+1)^{3000}$", "(" * 60 + "7" + ")" * 60, "+".join(["7"] * 1001)])
def test_what_takes_algebra_seconds_is_wrong_at_once(guess, monkeypatch):
    verify = pytest.importorskip("math_verify")
    monkeypatch.setattr(verify, "parse", pytest.fail)
    assert default_verify(guess, "7") is False


TWO = "<think>a</think><answer>${}$</answer><reflection>b</reflection><think>c</think><answer>${}$</answer>"


@pytest.mark.parametrize("response, choice, expected", [
    (TWO.format(r"\boxed{1}", r"\boxed{\frac{2}{3}}"), False, r"\frac{2}{3}"),
    (TWO.format("(A)", "(B)"), True, "$(B)$"),
    ("<answer>first \\boxed{1}, no: \\boxed{2}</answer>", False, "2"),
    ("<answer>The answer is 7.</answer>", False, "7"),
    ("<answer>12 cm</answer> or so \\boxed{9}", False, "12 cm"),                   # tags win over what stands around them
    ("<answer></answer>", False, None),
    ("<answer>3</answer><answer> </answer>", False, None),                        # an empty final answer is not the first one
    ("<answer>4", False, "4"),                                                     # an open tag is none; the last line's number
    ("so \\boxed{3} then \\boxed{4}.", False, "4"),
    ("so \\boxed{3} then \\boxed{4", False, None),                                # the last box never closes
    ("\\boxed{}", False, None),
    ("The answer is (C) 120°.", True, "(C) 120°"),
    ("Answer: D", True, "D"),
    ("**Final answer:** 3.14", False, "3.14"),
    ("The correct option is B because it fits.", True, "B"),
    ("The answer is 5. Or rather, the answer is 6.", False, "6"),
    ("The answer is 3.5.", False, "3.5"),
    ("All angles are equal.\nB", True, "B"),
    ("All angles are equal.\n(B)", True, "B"),
    ("B. 60°", True, "B"),
    ("Line AB is longer than C", True, None),                                      # a point, not an option
    ("A triangle has three sides", True, None),
    ("2 + 5 = 7", False, "7"),
    ("It costs 1,250 dollars", False, "1,250"),
    ("x = -3", False, "-3"),
    ("It is 3/4 full", False, "3/4"),
    ("It is \\frac{3}{4}", False, None),                                           # 4 it is not
    ("Seven\n\n", False, None),
    ("", False, None)])
def test_extract(response, choice, expected):
    assert extract(response, choice) == expected


def test_truncated_responses_need_a_box_or_a_tag():
    assert extract("The sides add up to 7", False) == "7" and extract("The sides add up to 7", False, truncated=True) is None
    assert extract("The answer is 1", False, truncated=True) is None                # of 12, perhaps
    assert extract("so \\boxed{12} and then", False, truncated=True) == "12"
    assert extract("<answer>12</answer><reflection>and", False, truncated=True) == "12"


ANGLES = ["40°", "60°", "120°", "6cm"]


@pytest.mark.parametrize("answer, options, expected", [
    ("B", ANGLES, "B"), ("(B)", ANGLES, "B"), ("B.", ANGLES, "B"), ("$\\text{B}$", ANGLES, "B"), ("\\textbf{(B)}", ANGLES, "B"),
    ("B) 60°", ANGLES, "B"), ("(B) 60^\\circ", ANGLES, "B"), ("Option C", ANGLES, "C"), ("b", ANGLES, "B"), ("(b)", ANGLES, "B"),
    ("60", ANGLES, "B"), ("60°", ANGLES, "B"), ("60 degrees", ANGLES, "B"), ("60^{\\circ}", ANGLES, "B"), ("60.0", ANGLES, "B"),
    ("6 cm", ANGLES, "D"), ("6", ANGLES, "D"), ("6 m", ANGLES, None),
    ("E", ANGLES, None), ("70", ANGLES, None), ("A or B", ANGLES, None), ("(A) or (B)", ANGLES, None), ("A, B", ANGLES, None),
    ("(A) and B", ANGLES, None), ("not A", ANGLES, None), ("ABCD", ANGLES, None), ("?", ANGLES, None), ("", ANGLES, None),
    ("J", [], "J"), ("K", [], None), ("a", [], "A"), ("60", [], None),
    ("yes", ["Yes", "No"], "A"), ("No", ["Yes", "No"], "B"), ("maybe", ["Yes", "No"], None),
    ("Great diving beetle", ["Tilapia", "Great diving beetle"], "B"), ("beetle", ["Tilapia", "Great diving beetle"], None),
    ("C or D", ["A", "B", "C", "D", "C or D"], "E"), ("(E) C or D", ["A", "B", "C", "D", "C or D"], "E"),
    ("A triangle", ["A square", "A triangle"], "B"), ("0.5", ["1/2", "0.50", "3"], None),
    ("a", ["b", "a"], "B"), ("E", ["A", "B", "C", "D", "E"], "E"),
    pytest.param("\\frac{\\sqrt{3}}{2}", ["$\\frac{1}{2}$", "$\\frac{\\sqrt3}{2}$"], "B", marks=needs_math_verify)])
def test_option_letter(answer, options, expected):
    assert option_letter(answer, options) == expected


def test_main_prints_examples(capsys):
    answers.main()
    said = capsys.readouterr().out
    assert "truth B: '(B) 60' right, 'b' right, 'A or B' wrong" in said and "'I cannot say' answers None" in said
