"""Tests of the presets."""

import jax
import pytest
from jax.sharding import Mesh

from grit_jax.models import presets
from grit_jax.models.decoder import Decoder, count_parameters

MISTRAL_7B_PARAMETERS = 7_241_732_096


def test_mistral_7b_has_the_published_number_of_parameters(one_device: Mesh):
  config = presets.mistral_7b()
  shapes = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
  sizes = [leaf.size for leaf in jax.tree.leaves(shapes)]
  assert sum(sizes) == MISTRAL_7B_PARAMETERS
  assert count_parameters(config) == MISTRAL_7B_PARAMETERS


@pytest.mark.parametrize(
  'preset', [presets.mistral_7b, presets.small, presets.tiny]
)
def test_presets_are_valid(preset):
  preset().validate()
