"""Results of one model have one name, wherever it runs, and no other has it."""

import jax
import jax.numpy as jnp

from grit_jax.config import MeshConfig
from grit_jax.evaluate.revision import find_revision
from grit_jax.inference.gritlm import GritLM


def test_it_is_that_of_the_weights_and_settings(random_run):
  model = GritLM.load(random_run)
  name = find_revision(model, max_length=8)
  assert len(name) == 12 and int(name, 16)
  mesh = MeshConfig(data=2, fsdp=2, tensor=2)
  assert find_revision(GritLM.load(random_run, mesh=mesh), max_length=8) == name
  others = [
    find_revision(model, max_length=9),
    find_revision(GritLM.load(random_run, attention='cccc'), max_length=8),
    find_revision(GritLM.load(random_run, dtype='bfloat16'), max_length=8),
    find_revision(GritLM.load(random_run, quantization='int8'), max_length=8),
    find_revision(GritLM.load(random_run, quantization='nf4'), max_length=8),
  ]
  with jax.set_mesh(model.mesh):
    norm = model.model.final_norm
    # The least that a weight can change by.
    norm[...] = norm[...].at[3].set(jnp.nextafter(norm[...][3], 2.0))
  others.append(find_revision(model, max_length=8))
  assert len({name, *others}) == 1 + len(others)
