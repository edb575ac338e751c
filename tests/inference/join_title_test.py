"""Tests of what of a document is embedded."""

import pytest

from grit_jax.inference.gritlm import join_title


@pytest.mark.parametrize('title', [None, '', ' \n'])
def test_a_title_that_says_nothing_is_none(title: str | None):
  assert join_title({'title': title, 'text': 'The tower'}) == 'The tower'


def test_a_title_goes_before_the_text():
  assert join_title({'title': 'Paris', 'text': 'A tower'}) == 'Paris A tower'


@pytest.mark.parametrize(
  ('document', 'message'),
  [
    ({'title': float('nan'), 'text': 'a'}, 'title is of type float'),
    ({'title': ['a', 'b'], 'text': ['c', 'd']}, 'text is of type list'),
    ({'title': 1, 'text': 'a'}, 'title is of type int'),
    ({'text': None}, 'text is of type NoneType'),
    (7, 'not int'),
  ],
)
def test_anything_but_text_is_refused(document: object, message: str):
  with pytest.raises(TypeError, match=message):
    join_title(document)
