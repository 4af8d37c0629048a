"""Nothing goes in, a strategy of recipes of sound models comes out: what any reader has to take."""

from __future__ import annotations

from hypothesis import strategies as st

from prill_fixtures import sound


def recipes(*, small: bool = True) -> st.SearchStrategy[sound.Recipe]:
    """Recipes that shrink to the first choices: a plain F32 Llama."""
    return st.randoms(use_true_random=False).map(lambda random: sound.draw(random, small=small))
