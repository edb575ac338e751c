"""The training loop."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from grit_jax.checkpoint import Checkpoints
from grit_jax.config import Config
from grit_jax.data.pipeline import HostBatch, Pipeline, place_batch
from grit_jax.errors import UserError
from grit_jax.metrics import MetricsWriter
from grit_jax.models.decoder import Decoder
from grit_jax.objective import TrainState
from grit_jax.processes import StopOnSignal
from grit_jax.profile import Profile

# Returns the figures of a model on the held-out records.
Evaluate = Callable[[Decoder], dict[str, float]]


class Loop:
  """The training loop, which never waits for the step just dispatched."""

  def __init__(
    self,
    config: Config,
    pipeline: Pipeline,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    profile: Profile,
    evaluate: Evaluate | None,
  ):
    """Prepares to run the steps that `pipeline` plans."""
    self.config, self.pipeline = config, pipeline
    self.checkpoints, self.writer = checkpoints, writer
    self.profile, self.evaluate = profile, evaluate
    self.logged_at = time.perf_counter()
    self.useful_tokens = 0

  def run(
    self,
    train_step: Any,
    state: TrainState,
    batches: Any,
    mesh: jax.sharding.Mesh,
    save: Any,
    stop: StopOnSignal,
  ) -> tuple[TrainState, int]:
    """Trains until the last step or a signal; returns the steps done."""
    step = int(state.step)
    pending = None
    while step < self.config.steps and not stop.reached(step):
      self.checkpoints.check_lease()
      with self.profile.step(step + 1):
        host = next(batches)
        state, metrics = train_step(state, place_batch(mesh, host.batch))
      step += 1
      self.profile.after(step, metrics)
      if pending is not None:
        self._report(*pending)
      pending = (step, metrics, host)
      saves = step % self.config.checkpoint.every_steps == 0
      evaluate = self._find_evaluation(step)
      if saves or evaluate:
        self._report(*pending)
        pending = None
      # First, so that a run that goes on from the checkpoint has its figures.
      if evaluate:
        self._write_evaluation(step, evaluate, state)
      if saves:
        save(step, state)
    if pending is not None:
      self._report(*pending)
    if step and step != self.checkpoints.latest():
      save(step, state)
    self.checkpoints.wait(step)
    return state, step

  def _find_evaluation(self, step: int) -> Evaluate | None:
    """Returns what evaluates the model after a step; None: nothing does."""
    every = self.config.evaluation.every_steps
    last = step == self.config.steps
    return self.evaluate if every and (step % every == 0 or last) else None

  def _write_evaluation(
    self, step: int, evaluate: Evaluate, state: TrainState
  ) -> None:
    """Writes the figures of the held-out records."""
    start = time.perf_counter()
    self.writer.write_evaluation(step, evaluate(state.model))
    # Training's speed is not to count it.
    self.logged_at += time.perf_counter() - start

  def _report(self, step: int, metrics: Any, host: HostBatch) -> None:
    """Checks and, every `log_every` steps, writes a step's metrics."""
    metrics = {name: float(value) for name, value in metrics.items()}
    self._check_finite(step, metrics)
    self.useful_tokens += host.useful_tokens
    last = step == self.config.steps
    if step % self.config.log_every and step != 1 and not last:
      self.writer.advance(step)
      return
    now = time.perf_counter()
    self.writer.write(
      step,
      {
        **metrics,
        'tokens_per_second': self.useful_tokens / (now - self.logged_at),
        # Of this step alone, so that a resumed run's lines are the same.
        'padding_fraction': 1 - host.useful_tokens / host.computed_tokens,
      },
    )
    self.logged_at = now
    self.useful_tokens = 0

  def _check_finite(self, step: int, metrics: dict[str, float]) -> None:
    """Stops a run whose loss or gradient is not finite any more."""
    if np.isfinite(metrics['loss']) and np.isfinite(metrics['grad_norm']):
      return
    self.checkpoints.wait()
    latest = self.checkpoints.latest()
    good = 'none' if latest is None else self.checkpoints.path(latest)
    names = self.pipeline.plan.describe_records(step - 1)
    raise UserError(
      f'step {step}: loss={metrics["loss"]}, '
      f'grad_norm={metrics["grad_norm"]}. Last good checkpoint: {good}. '
      f'Records of the batch: {", ".join(names)}'
    )
