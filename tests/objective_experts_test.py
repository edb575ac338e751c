"""Tests of the objective with experts: their terms, on meshes, in chunks."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from objective_run import (
  Result,
  assert_equal,
  gradient_on,
  make_config,
  prepare_data,
)

from grit_jax.config import Config, MemoryConfig
from grit_jax.models import presets


def make_expert_config(**changes) -> Config:
  config = make_config(**changes)
  model = dataclasses.replace(
    presets.tiny_moe(), vocab_size=300, projection_dim=12
  )
  # Weights of their terms that make them as large as the others.
  terms = dataclasses.replace(
    config.objective,
    generative_router_weight=0.5,
    embedding_router_weight=0.3,
    router_z_weight=0.1,
  )
  return dataclasses.replace(config, model=model, objective=terms)


@pytest.fixture(scope='module')
def compute(
  tmp_path_factory: pytest.TempPathFactory, random_decoder: Callable
) -> Callable[..., Result]:
  """Computes the gradient of a config on a mesh."""
  data = prepare_data(tmp_path_factory.mktemp('objective'))

  def of(config: Config, *shape: int) -> Result:
    return gradient_on(data, random_decoder, config, shape)

  return of


@pytest.fixture(scope='module')
def expected(compute: Callable) -> Result:
  """The gradient on one device in one pass."""
  return compute(make_expert_config(), 1, 1, 1, 1)


# Experts that stay on their devices: `lora_test` and `models/moe_test`.
def test_loss_and_gradient_do_not_depend_on_the_mesh(
  compute: Callable, expected: Result
):
  found = compute(make_expert_config(), 1, 2, 2, 2)
  assert len(found.metrics) == 5 + 2 * (4 + 8)
  assert_equal(found, expected)


@pytest.mark.e2e
def test_chunks_give_the_one_pass_gradient(compute: Callable, expected: Result):
  config = make_expert_config(memory=MemoryConfig(chunk_rows=4))
  found = compute(config, 1, 2, 1, 2)
  assert int(found.host.batch.generative.chunks) > 2
  assert_equal(found, expected)


def test_every_router_term_is_in_the_loss(expected: Result):
  metrics, config = expected.metrics, make_expert_config()
  terms = config.objective
  total = (
    terms.embedding_weight * metrics['loss_rep']
    + terms.generative_weight * metrics['loss_gen']
    + terms.embedding_router_weight * metrics['router_rep/balance_loss']
    + terms.generative_router_weight * metrics['router_gen/balance_loss']
    + terms.router_z_weight
    * (metrics['router_rep/z_loss'] + metrics['router_gen/z_loss'])
  )
  np.testing.assert_allclose(metrics['loss'], total, rtol=1e-6)
  # Well above the even share, or the gradient of the balance would be that of
  # nothing.
  assert metrics['router_gen/busiest'] > 1.25 / config.model.num_experts
