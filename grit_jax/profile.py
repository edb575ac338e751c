"""A trace of a few steps, which TensorBoard and xprof open.

The trace has the host's phases (`build_batch`, `place_batch`), the steps, and
the device's operations under the names of the model's parts: `embed`,
`attention`, `mlp`, `pool`, `contrastive_loss`, `next_token_loss`, `optimizer`.
"""

import importlib.util
import pathlib
import tempfile
from typing import Any

import jax
from absl import logging
from etils import epath

from grit_jax.config import ProfileConfig
from grit_jax.errors import ConfigError


def check_profiler(config: ProfileConfig, platform: str) -> None:
  """Checks that the steps can be traced on this machine.

  JAX starts the profiler of every library that it has loaded. It loads
  `libtpu`, where that is installed, to look for a TPU; the profiler of one that
  has found none accesses memory that is not there, and the process is gone.

  Args:
    config: which steps, if any.
    platform: what the run is on.

  Raises:
    ConfigError: That would happen at the first of the steps.
  """
  platforms = jax.config.values['jax_platforms']
  loaded = not platforms and importlib.util.find_spec('libtpu')
  if config.steps and platform != 'tpu' and loaded:
    raise ConfigError(
      f'profile.steps={config.steps!r}: libtpu is installed and there is no '
      'TPU, so its profiler would crash this process. Start it with '
      'JAX_PLATFORMS=cpu in the environment, or with JAX_PLATFORMS=cuda,cpu on '
      'a GPU.'
    )


class Profile:
  """Traces the steps that the configuration names; a context manager.

  Of several processes the first alone traces: its devices do what all do.
  """

  def __init__(self, config: ProfileConfig, workdir: epath.Path):
    """Traces nothing yet.

    Args:
      config: which steps.
      workdir: the trace goes into its folder `profile`, local or gs://.
    """
    self._steps = config.step_range() if jax.process_index() == 0 else range(0)
    self._folder = workdir / 'profile'
    self._results = None
    self._traced = False
    # Where the trace goes that is being written, until it is copied.
    self._local: tempfile.TemporaryDirectory | None = None

  def __enter__(self) -> 'Profile':
    """Returns itself."""
    return self

  def __exit__(self, *_: object) -> None:
    """Writes what there is of a trace whose last step has not come."""
    self._stop()
    if self._steps and not self._traced:
      logging.warning('This start of the run had no step of profile.steps.')

  def step(self, step: int) -> jax.profiler.StepTraceAnnotation:
    """Marks the work on a step, from reading its batch on.

    Args:
      step: the first is 1. The trace begins with the first of its steps that
        this start of the run comes to.
    """
    if step in self._steps and self._local is None:
      # The step before may still run.
      jax.block_until_ready(self._results)
      options = jax.profiler.ProfileOptions()
      # Onto the disk, to be copied: its writer has its own notion of what gs://
      # is and who may write there.
      self._local = tempfile.TemporaryDirectory()
      # Tracing every call of Python would slow the host down.
      options.python_tracer_level = 0
      jax.profiler.start_trace(self._local.name, profiler_options=options)
      self._traced = True
    return jax.profiler.StepTraceAnnotation('train', step_num=step)

  def after(self, step: int, results: Any) -> None:
    """Ends the trace after its last step, once the devices have done it.

    Args:
      step: that has been dispatched.
      results: of it, to wait for; small, for they are kept until the next.
    """
    self._results = results
    if self._local and step == self._steps[-1]:
      jax.block_until_ready(results)
      self._stop()

  def _stop(self) -> None:
    if self._local is None:
      return
    with self._local as folder:
      jax.profiler.stop_trace()
      for path in pathlib.Path(folder).rglob('*'):
        if path.is_file():
          target = self._folder / path.relative_to(folder)
          target.parent.mkdir(parents=True, exist_ok=True)
          target.write_bytes(path.read_bytes())
    self._local = None
    logging.info('A trace is in %s.', self._folder)
