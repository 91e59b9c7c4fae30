"""Expressions of configs match what Python's `re` matches, in a bounded number of steps."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from lorakit.adapters.patterns import PatternTable
from lorakit.adapters.regexes import LONGEST, UnboundedError, match, matched
from lorakit.adapters.targets import targeting

NAMES = [
    "model.layers.3.self_attn.q_proj",
    "model.language_model.layers.12.mlp.up_proj",
    "visual.blocks.0.attn.qkv",
    "q_proj",
    "aaaaaab",
    "É.é",
    "a\n",
    "",
]
EXPRESSIONS = [
    r"(a+)+$",
    r"(a|a)*",
    r"(a*)*b",
    r"()*",
    r"(|a)*b",
    r"a{2,5}?b?",
    r"(a?){3}a*",
    r".*\.(q|v)_proj",
    r"^(?!.*visual).*q_proj$",
    r"^(model.language_model(?=\.).*\.(up_proj|q_proj))$",
    r"(?:.*?(?:language|text).*?(?:attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,})",
    r".*(?<=_)proj|(?<!a)b",
    r"(?=(?=m).)model.*",
    r"(?i)MODEL.*",
    r"(?i:É)\.É",
    r"(?s).*",
    r"(?x) a  + b # a comment",
    r"(?a:\w)+",
    r"[^.]+\.[a-z]+\..*",
    r"[]\-^]*",
    r"(?!)",
    r"",
    r"a\Z|a$",
    r"\Aq|\Bq",
    r"(?:^|.*?\.)layers\.(?P<idx>\d+)\.",
    r"(?:^|.*?\.)model|layers\.(?P<idx>\d+)\.",
    r"(?:^|.*?\.)(?:h|blocks|layers)\.(?P<idx>\d+)\.",
]


def agrees(regex: str, text: str, full: bool) -> bool:
    """Whether the matches of an expression end alike, and have the same index."""
    theirs = (re.fullmatch if full else re.match)(regex, text)
    ours = match(regex, text, full=full)
    expected = theirs and (theirs.end(), theirs.groupdict().get("idx"))
    return expected == (ours and (ours.end, ours.layer))


@pytest.mark.parametrize("regex", EXPRESSIONS)
def test_an_expression_matches_what_re_matches(regex: str) -> None:
    for text, full in product(NAMES, (True, False)):
        assert agrees(regex, text, full), (text, full)


atoms = st.sampled_from(["a", "b", ".", r"\d", "[ab]", "[^a]", r"\.", r"\b", "^", "$", "1"])
looks = st.sampled_from(["(?=a)", "(?!b)", "(?=.a)", "(?!1*b)", "(?<=a)", "(?<!b1)"])
repeats = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{1,3}", "{2}", "{0,2}?"])
expressions = st.recursive(
    atoms | looks,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format),
        st.tuples(inner, repeats).map("({0[0]}){0[1]}".format),
    ),
    max_leaves=8,
)
texts = st.text("ab.1", max_size=8)


@settings(max_examples=400, deadline=None)
@given(expressions, texts, st.booleans())
def test_any_expression_matches_where_re_matches(regex: str, text: str, full: bool) -> None:
    theirs = (re.fullmatch if full else re.match)(regex, text)
    assert (match(regex, text, full=full) is not None) == (theirs is not None)


@settings(max_examples=400, deadline=None)
@given(expressions, texts)
def test_any_pattern_of_layers_gives_the_index_that_re_gives(part: str, text: str) -> None:
    regex = rf"(?:^|.*?\.){part}\.(?P<idx>\d+)\."
    try:
        assert agrees(regex, text, False)
    except UnboundedError as error:
        assume(str(error) != "it repeats what may be empty")
        raise


HOSTILE = {
    "nested repeats": (r"(a+)+$", "a" * 400 + "b"),
    "the same twice": (r"(a|a)*$", "a" * 400 + "b"),
    "many repeats": (".*" * 50 + "x", "a" * 400),
    "choices in a row": ("(a|a)" * 300 + "x", "a" * 400),
    "a tower": ("((((a*)*)*)*)*$", "a" * 400 + "b"),
}


@pytest.mark.parametrize(("regex", "text"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_match_takes_no_more_steps_than_program_times_text(regex: str, text: str) -> None:
    found, steps = matched(regex, text, True)
    assert found is None
    assert steps <= 5 * len(regex) * (len(text) + 1)


REFUSED = {
    "a reference": r"(a)\1",
    "a possessive repeat": r"a*+b",
    "an atomic group": r"(?>a)b",
    "a condition": r"(a)?(?(1)b|c)",
    "repeats counted out": r"(?:a{900}){90}",
    "a long count": r"a{60000}",
    "a long expression": "a" * (LONGEST + 1),
    "looks of many": r"((?=a{900})b){900}",
}


@pytest.mark.parametrize("regex", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_matched_in_bounded_time_is_refused(regex: str) -> None:
    with pytest.raises(UnboundedError):
        match(regex, "a")


def test_counting_out_what_is_empty_ends() -> None:
    assert match("(?:(?:(?:){4999}){4999}){4999}", "a") is not None


def test_a_look_ahead_at_every_character_is_refused_where_it_takes_too_long() -> None:
    with pytest.raises(UnboundedError, match="takes too long on a name of 400 characters"):
        match("(?:(?!" + ".*" * 60 + "x).)*", "a" * 400)


PATTERNS = {
    "names": ["q_proj", "layers.3.self_attn.q_proj", "v_proj"],
    "full names": ["model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.v_proj"],
    "an anchor": ["^q_proj", "^model.layers.3.self_attn.q_proj", "q_proj"],
    "escaped dots": [r"self_attn\.q_proj", r"model\.layers"],
    "dots for any character": ["self.attn.q.proj", "q.proj"],
    "the first of several": ["proj", "q_proj", "self_attn.q_proj", "attn.qkv"],
    "names after expressions": [".*v_proj", "q_proj", "(q|v)_proj", "qkv"],
    "expressions after names": ["qkv", "q_proj|up_proj", "up_proj"],
    "brackets across": ["a)(b", "q_proj)|(qkv"],
    "empty": ["", "q_proj"],
}


@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS.keys())
def test_the_first_pattern_that_matches_is_pefts(patterns: list[str]) -> None:
    for module in [*NAMES, "model.layers.3.self_attn.v_proj", "self_attn_q_proj", "a.b", "x."]:
        number, _ = PatternTable(patterns).first(module)
        assert get_pattern_key(patterns, module) == (module if number is None else patterns[number])


@given(st.lists(st.text("ab._^\\", max_size=5), max_size=5), st.text("ab._", max_size=6))
def test_any_names_are_looked_up_as_peft_matches_them(patterns: list[str], module: str) -> None:
    try:
        theirs = get_pattern_key(patterns, module)
    except re.error:
        assume(False)
    number, _ = PatternTable(patterns).first(module)
    assert theirs == (module if number is None else patterns[number])


def test_thousands_of_names_take_few_steps_a_module() -> None:
    modules = [f"model.layers.{n}.mlp.experts.{m}.up_proj" for n in range(30) for m in range(100)]
    table = PatternTable(modules)
    results = [table.first(module) for module in modules]
    assert [number for number, _ in results] == list(range(len(modules)))
    assert sum(steps for _, steps in results) <= 100 * len(modules)


@pytest.mark.parametrize(
    ("fields", "selected"),
    [
        ({"target_modules": None, "layers_to_transform": [5]}, True),
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": None, "exclude_modules": ".*q_proj"}, False),
        ({"target_modules": ["q_proj"], "exclude_modules": "all-linear"}, True),
        ({"target_modules": ["q_proj"], "layers_to_transform": [2]}, False),
        ({"target_modules": [NAMES[0]], "layers_to_transform": [2]}, True),
    ],
)
def test_lists_and_expressions_select_modules(fields: dict[str, object], selected: bool) -> None:
    is_target: Callable[[str], bool] = targeting(fields)
    assert is_target(NAMES[0]) == selected


def test_the_bounds_leave_room_for_what_trainers_write() -> None:
    names = "|".join(f"model.layers.{n}.self_attn.q_proj" for n in range(400))
    assert match(f"({names})", "model.layers.399.self_attn.q_proj", full=True) is not None
