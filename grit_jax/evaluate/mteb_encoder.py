"""MTEB's own runner on our embeddings.

Imported where mteb is installed alone (`pip install 'grit_jax[mteb]'`), which
brings PyTorch for its scores; the model runs in JAX.
"""

import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

import mteb
import numpy as np
from absl import logging
from mteb.abstasks import AbsTask
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from grit_jax.errors import UserError
from grit_jax.evaluate.instructions import INSTRUCTIONS
from grit_jax.evaluate.revision import find_revision
from grit_jax.inference.gritlm import GritLM


class Encoder(AbsEncoder):
  """A `GritLM` as mteb calls it.

  Embeddings are not normalised, as in the paper: similarities are cosines all
  the same, and a classifier on top does better with the lengths.
  """

  def __init__(self, model: GritLM, name: str, max_length: int = 512):
    """Wraps a model.

    Args:
      model: The model.
      name: What results call it, with the fingerprint of its weights.
      max_length: Tokens that are kept of a text, with its instruction.
    """
    self.model, self.max_length = model, max_length
    self.prompts_dict = INSTRUCTIONS
    config = model.config.model
    self.mteb_model_meta = ModelMeta.create_empty(
      {
        'name': f'grit_jax/{name}',
        'revision': find_revision(model, max_length=max_length),
        'embed_dim': config.projection_dim or config.embed_dim,
        'max_tokens': max_length,
        'similarity_fn_name': ScoringFunction.COSINE,
        'use_instructions': True,
      }
    )

  def encode(
    self,
    inputs: Iterable[Mapping[str, Sequence[str]]],
    *,
    task_metadata: mteb.TaskMetadata,
    hf_split: str,
    hf_subset: str,
    prompt_type: PromptType | None = None,
    batch_size: int = 32,
    show_progress_bar: bool | None = None,
  ) -> np.ndarray:
    """Embeds the texts of a task; see mteb's `AbsEncoder`."""
    texts = [text for batch in inputs for text in batch['text']]
    return self.model.encode(
      texts,
      self.choose_instruction(task_metadata, prompt_type),
      self.max_length,
      batch_size,
      normalized=False,
      show_progress_bar=show_progress_bar,
    )

  def choose_instruction(
    self, task_metadata: mteb.TaskMetadata, prompt_type: PromptType | None
  ) -> str:
    """Returns what the texts are told to be embedded for.

    Documents get nothing, except where a task reranks texts of the queries'
    kind, which is where its instruction is the same for both.
    """
    if prompt_type == PromptType.document and not (
      task_metadata.type == 'Reranking'
      and isinstance(task_metadata.prompt, str)
    ):
      return ''
    return self.get_instruction(task_metadata, prompt_type or PromptType.query)


def find_tasks(
  names: str, languages: Sequence[str] | None = None
) -> list[AbsTask]:
  """Finds tasks of mteb.

  Args:
    names: Names of tasks and of benchmarks, as `MTEB(eng, v1)`, with commas
      between them.
    languages: Codes of the languages that tasks of several are cut down to, as
      `eng`; None: all. A benchmark has its own.

  Raises:
    UserError: mteb has no such task or benchmark.
  """
  benchmarks = {benchmark.name for benchmark in mteb.get_benchmarks()}
  tasks: dict[str, AbsTask] = {}
  # A benchmark's name has a comma within parentheses.
  for name in re.split(r',\s*(?![^()]*\))', names):
    try:
      if name in benchmarks:
        found = list(mteb.get_benchmark(name).tasks)
      else:
        found = [mteb.get_task(name, languages=languages)]
    except KeyError as error:
      raise UserError(
        f'mteb {mteb.__version__} has no task or benchmark {name!r}: '
        f'{error.args[0]} See `mteb available-tasks`.'
      ) from error
    tasks |= {task.metadata.name: task for task in found}
  return list(tasks.values())


def evaluate(
  encoder: Encoder,
  tasks: Sequence[AbsTask],
  output: pathlib.Path,
  batch_size: int = 32,
) -> dict[str, tuple[str, float]]:
  """Runs tasks, each once: one whose results are there is not run again.

  Args:
    encoder: The model.
    tasks: What to run.
    output: Where mteb keeps its files of results, in a folder for the model and
      one for its revision.
    batch_size: See `GritLM.encode`.

  Returns:
    Of each task its type and its main score, in [0, 1].
  """
  cache = mteb.ResultCache(cache_path=output)
  scores = {}
  for task in tasks:
    (result,) = mteb.evaluate(
      encoder,
      task,
      cache=cache,
      encode_kwargs={'batch_size': batch_size},
      co2_tracker=False,
      show_progress_bar=False,
    ).task_results
    name, score = task.metadata.name, float(result.get_score())
    logging.info('%s: %.4f', name, score)
    scores[name] = task.metadata.type, score
  return scores
