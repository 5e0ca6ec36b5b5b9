r"""Answers: the one in a response, and whether it equals a ground truth.

    extract                 finds the answer in the form that the template asks for.
    equal_as_strings        decides in microseconds where strings or integers decide.
    equal_as_mathematics    asks math-verify about the rest, in milliseconds.

The text is hostile: reinforcement learning finds every string that hangs, floods or crashes a
grader. `equal_as_strings` therefore bounds what reaches the parser. `equal_as_mathematics` belongs
into a worker process of `drgrpo.grade.Grader`, which has limits of time and memory.
"""

import ast
import functools
import logging
import operator
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from drgrpo.types import Answer

RULES = ("boxed", "tag", "hash", "gsm8k", "number", "formula")
MODES = ("correct", "paper")

MAX_CHARS = 1000  # of an answer; the longest ground truth of MATH and the five benchmarks has 204
MAX_NESTING = 20  # brackets; the ground truths have 3
MAX_FORMULA = 100  # characters; the longest of ASDiv has 180, and 9 of 10 have fewer than 15


# ---- the answer in a response

# the filter "flexible-extract" in lm_eval/tasks/gsm8k/gsm8k.yaml of lm-evaluation-harness
_ANY_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def extract(text: str, rule: str) -> str | None:
    r"""The answer in a response, or None if there is none. ValueError for an unknown rule.

    boxed  The answer is inside the last `\boxed{...}`.
    tag    The answer follows the last `<answer>`. The response must close its thought with
           `</think> <answer>` (one space) and must have an `</answer>`. A box in it is unwrapped.
    hash   The answer follows the only `#`.
    gsm8k  The answer follows the last `####`, up to the end of its line.
    number The answer is the last number, as lm-evaluation-harness's flexible extraction finds it.
           What it finds without a digit, such as an ellipsis, is passed over.
    formula The answer is the value of the response, up to its first equals sign: 24 for `46-22`.
    """
    match rule:
        case "hash":
            return text.partition("#")[2].strip() if text.count("#") == 1 else None
        case "boxed":
            return last_box(text)
        case "number":
            return last_number(text)
        case "gsm8k":
            answer = text.rpartition("####")[2].partition("\n")[0]
            return answer.strip() if "####" in text else None
        case "tag":
            return tagged(text)
        case "formula":
            return formula_value(text)
    raise ValueError(f"unknown rule {rule!r}; there are {', '.join(RULES)}")


def tagged(text: str) -> str | None:
    if "</think> <answer>" not in text or "</answer>" not in text:
        return None
    answer = text.rpartition("<answer>")[2].partition("</answer>")[0]
    return last_box(answer) if "\\boxed" in answer else answer


def last_number(text: str) -> str | None:
    """The last number, without dollar signs, separators of thousands and a final full stop."""
    matches = [m[0] for m in _ANY_NUMBER.finditer(text) if re.search(r"\d", m[0])]
    return re.sub(r"[$,]", "", matches[-1]).rstrip(".") if matches else None


OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def formula_value(text: str) -> str | None:
    """What a calculator makes of the text up to its first equals sign, or None if that is more than
    numbers, `+ - * /` and parentheses. Exact up to the tenth digit of a fraction."""
    formula = text.partition("=")[0].strip()
    if len(formula) > MAX_FORMULA or not re.fullmatch(r"[\d.+\-*/() ]+", formula):
        return None
    try:
        value = _calculate(ast.parse(formula, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None
    return str(value) if value.denominator == 1 else f"{float(value):.10g}"


def _calculate(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float()):
            return Fraction(str(node.value))
        case ast.UnaryOp(op=ast.USub()):
            return -_calculate(node.operand)
        case ast.BinOp() if type(node.op) in OPERATIONS:
            return OPERATIONS[type(node.op)](_calculate(node.left), _calculate(node.right))
    raise ValueError(ast.dump(node))


def last_box(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < text.rfind("\\boxed"):  # the last one is a "\boxed 12", which is no box
        return None
    return inside_braces(text, start + len("\\boxed")) if start >= 0 else None


def inside_braces(text: str, start: int) -> str | None:
    r"""The text between the brace at `start` and the brace that closes it, or None if none does.

    Escaped braces do not count, unless the brace then stays open. Some ground truths of MATH are
    damaged (`\frac{\}{p}i`, "90{square"), and for these the last brace closes."""
    for token in (r"\\.|[{}]", r"[{}]"):
        depth = 0
        for match in re.compile(token, re.DOTALL).finditer(text, start):
            depth += {"{": 1, "}": -1}.get(match[0], 0)
            if depth == 0:
                return text[start + 1 : match.start()]
    end = text.rfind("}", start)
    return text[start + 1 : end] if end >= 0 else None


def truths_of(answer: Answer) -> tuple[str, ...]:
    """The strings of a ground truth, any of which is right."""
    return tuple(map(str, answer)) if isinstance(answer, list | tuple) else (str(answer),)


# ---- equal as strings

_LEAD_IN = re.compile(
    r"^(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?answer(?: is|:)[: ]*", re.I
)
_PROSE = re.compile(r"\$[^$]*\$|\b(?:and|or)\b")
_INTEGER = re.compile(r"-?\d+")
_NUMBER = re.compile(r"[+-]?(?=\.?\d)(?:\d+|\d{1,3}(?:,\d{3})+)?(?:\.\d*)?(?:e[+-]?\d{1,2})?")
_SPACING = re.compile(
    r"\\[,;:! ]|\\(?:left|right|displaystyle)(?![a-zA-Z])|\^\{?\\circ\}?|\s|\\?%$"
)
_UNIT = re.compile(
    r"(.*[\w)}\]])\s*"
    r"\\(?:text|mbox|mathrm)\s*\{(?![^}]*\b(?:and|or)\b)[a-zA-Z ./^]*\}(?:\^\{?-?\d\}?)?",
    re.DOTALL,
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox|mathbf)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")

# Numbers that explode when they are worked out: a hundred digits, a five-digit power, a tower of
# three powers with braces, and one without.
_HUGE = re.compile(
    r"\d{100}"
    r"|(?:\^|\*\*)[\s{(+-]*\d{5}"
    r"|\^\s*\{[^{}]*\^\s*\{[^{}]*\^"
    r"|(?:\^[\s{(+-]*(?:\d+|[a-zA-Z])[\s)}]*){3}"
)

# Row breaks are among the synonyms: some copies of MATH write a matrix with single backslashes.
_SYNONYMS = {
    "dfrac": "frac",
    "tfrac": "frac",
    "bmatrix": "pmatrix",
    "\\cdot": "\\times",
    "\\\\": "\\",
    "{,}": ",",
}


def unwrap(text: str) -> str:
    """An answer without boxes, "the answer is", dollar signs, outer braces and a final full
    stop."""
    text = " ".join(text.split())
    if "\\boxed" in text:
        text = last_box(text) or ""
    text = _LEAD_IN.sub("", text).replace("\\$", "").replace("\\!", "").replace("°", "^\\circ")
    if text.count("$") % 2 or not re.search("[a-zA-Z]", _PROSE.sub("", text)):
        # "$1$, $2$" is one list. In "so $x$ is $2$" the dollar signs mark what is mathematics.
        text = text.replace("$", "")
    text = text.strip().rstrip(".\\ ")
    return text[1:-1] if text.startswith("{") and inside_braces(text, 0) == text[1:-1] else text


@functools.lru_cache(maxsize=8192)
def normalize(text: str) -> str:
    """Answers that normalize to one string are equal. The converse needs math-verify."""
    text = unwrap(text)
    unit = _UNIT.fullmatch(text)
    if unit and "\\text" not in unit[1]:
        text = unit[1]
    text = _SPACING.sub("", _TEXT.sub(r"\1", text))
    for spelling, standard in _SYNONYMS.items():
        text = text.replace(spelling, standard)
    text = re.sub(r"^[a-zA-Z]{1,2}=(?=[^=]*$)", "", text)
    if "\\" not in text:
        text = text.lower()
    if _NUMBER.fullmatch(text):
        text = format(Decimal(text.replace(",", "")), "f")  # exact: no padding, no exponent, no "+"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def too_complex(text: str) -> bool:
    """Whether a parser must not see this text: its brackets nest too deep, or its numbers
    explode."""
    depth = deepest = 0
    for bracket in re.findall(r"[({\[\])}]", text):
        depth += 1 if bracket in "({[" else -1
        deepest = max(deepest, depth)
    return deepest > MAX_NESTING or _HUGE.search(text) is not None


def equal_as_strings(answer: str, truths: Sequence[str], rule: str) -> bool | None:
    """Whether the answer is one of the truths, or None if only mathematics can decide it.

    An answer that is too long or too complex for the parser is wrong. The rule "hash" asks for the
    exact string."""
    if rule == "hash":
        return answer in [truth.strip() for truth in truths]
    if len(answer) > max(MAX_CHARS, *map(len, truths)):
        return False
    given, wanted = normalize(answer), [normalize(truth) for truth in truths]
    if not given or given in wanted:
        return given != ""
    all_integers = all(_INTEGER.fullmatch(text) for text in (given, *wanted))
    return False if all_integers or too_complex(answer) else None


# ---- equal as mathematics


def equal_as_mathematics(answer: str, truths: Sequence[str], mode: str) -> bool:
    """Whether math-verify finds the answer equal to one of the truths. Only for a worker process.

    `mode` "paper" grades a truth with a newline as the paper's grader does: see
    `paper_is_right`."""
    parse, verify = math_verify()
    parsed = parse(unwrap(answer))
    if not parsed:
        return False
    for truth in truths:
        newline = mode == "paper" and "\n" in truth
        if newline and verify(parse(truth, reference=True), parsed):
            return True
        if (not newline or paper_is_right(answer, truth)) and verify(parse(unwrap(truth)), parsed):
            return True
    return False


@functools.cache
def math_verify() -> tuple[Callable[..., list], Callable[[list, list], bool]]:
    """math-verify's (parse, verify), without their own time limits.

    Those limits are alarms, which need the main thread and do not stop a long multiplication. An
    answer must be LaTeX: math-verify would send a number in prose through Python's eval."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that there is no limit
    latex, prose = LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()

    def parse_latex(text: str, reference: bool = False) -> list:
        parsed = parse(
            text if "$" in text else f"${text}$",
            extraction_config=(latex, prose) if reference else (latex,),
            fallback_mode="no_fallback",
            parsing_timeout=None,
        )
        return parsed if all(map(harmless, parsed)) else []

    return parse_latex, functools.partial(verify, timeout_seconds=None)


def harmless(expression: Any) -> bool:
    r"""Whether every name in a sympy expression is no more than a name.

    `x_{(a)if(exit(7))else(b)}` parses as one symbol. To sum a series, sympy would paste that name
    into the source of a function."""
    from sympy.core.function import AppliedUndef

    names = [node.name for node in expression.atoms() if hasattr(node, "name")]
    names += [node.func.__name__ for node in expression.atoms(AppliedUndef)]
    return all(re.fullmatch(r"[\w\\{}, ]*", str(name)) for name in names)


def paper_is_right(answer: str, truth: str) -> bool:
    r"""Whether the paper's grader accepts a right answer to a Minerva truth that ends in a newline.

    236 of the 272 truths do. The paper's LaTeX parser does not see a formula before a newline and
    takes the last number for the truth: "-3/2\n" is -3 and "7 \times 10^{37}\n" is 10. Its second
    parser, for plain sums, knows no two-digit powers and at most two letters. That parser compares
    fractions as strings, and so integers with anything else."""
    texts = [_bare(answer), _bare(truth)]
    letters = {letter for letter in "".join(texts) if letter.isalpha()}
    fractions = all(re.fullmatch(r"-?(?:\{\d+\}\{\d+\}|\d+/\d+)", text) for text in texts)
    integers = {re.fullmatch(r"-?\d+", normalize(text)) is not None for text in texts}
    powers = any(re.search(r"\^\{?[\d(]\d", text) for text in texts)
    return len(letters) <= 2 and not fractions and len(integers) == 1 and not powers


def _bare(text: str) -> str:
    return re.sub(r"\\(?:[dt]?frac|sqrt|times|cdot|left|right)", "", unwrap(text))
