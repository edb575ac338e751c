"""Tests of the presets."""

from collections.abc import Callable

import jax
import pytest
from jax.sharding import Mesh

from grit_jax.config import ModelConfig
from grit_jax.models import presets
from grit_jax.models.decoder import Decoder, count_parameters

PARAMETERS = {
  presets.mistral_7b: 7_241_732_096,
  presets.mixtral_8x7b: 46_702_792_704,
}


@pytest.mark.parametrize('preset', PARAMETERS)
def test_a_published_model_has_its_number_of_parameters(
  preset: Callable[[], ModelConfig], one_device: Mesh
):
  config = preset()
  shapes = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
  sizes = [leaf.size for leaf in jax.tree.leaves(shapes)]
  assert sum(sizes) == PARAMETERS[preset]
  assert count_parameters(config) == PARAMETERS[preset]


@pytest.mark.parametrize(
  'preset',
  [
    presets.mistral_7b,
    presets.mixtral_8x7b,
    presets.of_init_from,
    presets.small,
    presets.tiny,
    presets.tiny_moe,
  ],
)
def test_presets_are_valid(preset):
  preset().validate()
