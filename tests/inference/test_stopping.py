"""Stop tokens and stop strings, against a search in the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_vlm.errors import UserError
from efficient_vlm.inference.stopping import Stopper, stop_strings, stop_tokens


def stream(stopper, pieces):
    """What is shown for each piece, and at last what was held."""
    return [stopper.feed(piece) for piece in pieces], stopper.finish()


def answer(text, stops):
    """(text in front of the stop string, stop string): complete first, then the longest."""
    for end in range(len(text) + 1):
        complete = [s for s in stops if text[:end].endswith(s)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "held", "found"),
    [
        ("END", ["it E", "N", "D of"], ["it ", "", ""], "", "END"),
        ("END", ["it E", "N", "d"], ["it ", "", "ENd"], "", None),
        ("END", ["it ", "EN"], ["it ", ""], "EN", None),
        ("aab", ["aaa", "b"], ["a", ""], "", "aab"),
        ("aab", ["a", "a", "a", "a", "b"], ["", "", "a", "a", ""], "", "aab"),
        ("abab", ["aba", "aba", "b"], ["", "aba", ""], "", "abab"),
        (["abc", "b"], ["abc"], ["a"], "", "b"),
        (["bc", "abc"], ["xab", "c"], ["x", ""], "", "abc"),
        (["x", "ab"], ["1ab2x"], ["1"], "", "ab"),
        ("\n\n", ["one\n", "two\n", "\n"], ["one", "\ntwo", ""], "", "\n\n"),
        ("é", ["caf", "é!"], ["caf", ""], "", "é"),
        ((), ["any", "thing"], ["any", "thing"], "", None),
    ],
)
def test_streams(stops, pieces, shown, held, found):
    stopper = Stopper(stops)
    assert stream(stopper, pieces) == (shown, held)
    assert stopper.found == found and stopper.stopped == (found is not None)


TEXTS = st.text("ab", max_size=14)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


@settings(max_examples=400, deadline=None)
@given(TEXTS, STOPS, st.lists(st.integers(0, 14), max_size=8))
def test_any_text_in_any_pieces(text, stops, cuts):
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stopper, shown = Stopper(stops), ""
    expected, found = answer(text, stops)
    for start, end in zip(places, places[1:]):
        shown += stopper.feed(text[start:end])
        assert expected.startswith(shown)
        behind = text[len(shown) : end]
        # Only what may become a stop string is held back.
        if not stopper.stopped:
            assert not behind or any(s.startswith(behind) for s in stops)
    assert shown + stopper.finish() == expected
    assert stopper.found == found


def test_a_stop_token_ends_the_answer_and_releases_what_was_held():
    stopper = Stopper("END", [7, 8])
    assert not stopper.token(3)
    assert stopper.feed("so E") == "so "
    assert stopper.token(8) and stopper.found == 8
    assert stopper.feed("ND") == ""  # The token's own text.
    assert stopper.finish() == "E" and stopper.finish() == ""
    assert stopper.token(7) and stopper.found == 8


@pytest.mark.parametrize(
    "stop", ["", ["a", ""], ["a", 3], 3, b"a", {"a"}, "a" * 257, ["a"] * 17, [None]]
)
def test_wrong_stop_strings(stop):
    with pytest.raises(UserError) as caught:
        Stopper(stop)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and lines[0].startswith("stop: ")


@pytest.mark.parametrize("ids", [3, "3", ["3"], [-1], [True], [2**31], [1.0]])
def test_wrong_stop_tokens(ids):
    with pytest.raises(UserError) as caught:
        Stopper(token_ids=ids)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and lines[0].startswith("stop_token_ids: ")


def test_what_is_given_becomes_tuples():
    assert stop_strings(None) == () and stop_tokens(None) == ()
    assert stop_strings("a") == ("a",) and stop_strings(["a", "b"]) == ("a", "b")
    assert stop_tokens(range(2)) == (0, 1)
