"""lm-eval's own runner, and the paper's generative benchmarks in it.

What is as in the paper (section 3.2 and its appendix): the chat format with all
examples in one turn of the user, the number of examples, and what is sampled.
What is not: the words of the prompts are lm-eval's, TyDi QA's passages are not
cut to 512 tokens, and HumanEval's tasks are not reworded as in HumanEvalPack.
AlpacaEval is not in lm-eval: it needs a judge.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import lm_eval
from absl import logging
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from grit_jax.errors import UserError
from grit_jax.evaluate.lm_eval_model import LanguageModel
from grit_jax.files import (
  read_json,
  write_file,
)


@dataclasses.dataclass(frozen=True)
class PaperTask:
  """A benchmark as the paper has it.

  Attributes:
    name: lm-eval's task, group or tag.
    changes: Fields of its tasks' configuration that the paper has otherwise.
    pass_at: The k of pass@k; 0: another metric.
    unsafe: Whether it runs what the model writes.
  """

  name: str
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  pass_at: int = 0
  unsafe: bool = False


PAPER = {
  'mmlu': PaperTask('mmlu', {'num_fewshot': 0, 'gen_prefix': 'The answer is:'}),
  'gsm8k': PaperTask('gsm8k_cot', {'num_fewshot': 8}),
  'bbh': PaperTask('bbh_cot_fewshot', {'num_fewshot': 3}),
  'tydiqa': PaperTask('tydiqa_goldp', {'num_fewshot': 1}),
  'humaneval': PaperTask(
    'humaneval_64_instruct',
    {
      'repeats': 20,
      'generation_kwargs': {
        'do_sample': True,
        'temperature': 0.8,
        'top_p': 0.95,
        'max_gen_toks': 512,
      },
    },
    pass_at=10,
    unsafe=True,
  ),
}


def check_names(
  manager: TaskManager, names: Sequence[str], run_unsafe_code: bool
) -> None:
  """Raises, before anything is loaded, for what cannot be run.

  Args:
    manager: What knows the tasks.
    names: What is to be run.
    run_unsafe_code: Whether the user allows to run what the model writes.

  Raises:
    UserError: There is no such task.
    UserError: It runs code, which is not allowed.
  """
  for name in names:
    if name in PAPER:
      _check_code(name, PAPER[name].unsafe, run_unsafe_code)
    elif name not in manager.all_tasks:
      raise UserError(
        f'lm-eval {lm_eval.__version__} has no task {name!r}, nor has the '
        f'paper, which has {", ".join(PAPER)}. See `lm-eval ls tasks`; tasks '
        'of your own are YAML files in --task_folder.'
      )


def _check_code(name: str, unsafe: bool, allowed: bool) -> None:
  if unsafe and not allowed:
    raise UserError(
      f'{name} runs the code that the model writes on this machine; allow that '
      'with --run_unsafe_code, better in a container.'
    )


def load_task(manager: TaskManager, name: str) -> list[Task | Group]:
  """Loads a task with its data, as the paper has it where it has it."""
  paper = PAPER.get(name, PaperTask(name))
  loaded = manager.load([paper.name])
  for task in loaded['tasks'].values():
    for key, value in paper.changes.items():
      task.set_config(key, value, update=isinstance(value, dict))
  if paper.pass_at:
    return [
      _with_k(manager, task, paper.pass_at) for task in loaded['tasks'].values()
    ]
  if paper.name in loaded['groups']:
    return [loaded['groups'][paper.name]]
  return list(loaded['tasks'].values())


def _with_k(manager: TaskManager, task: Task, k: int) -> Task:
  """Returns a task whose metric is pass@k."""
  config = task.config.to_dict(keep_callable=True)
  config['metric_list'] = [
    {**metric, 'k': [k]} for metric in config['metric_list']
  ]
  (changed,) = manager.load([config])['tasks'].values()
  return changed


def evaluate(
  model: LanguageModel,
  names: Sequence[str],
  folder: pathlib.Path,
  *,
  manager: TaskManager,
  limit: int = 0,
  run_unsafe_code: bool = False,
) -> dict[str, Mapping[str, Any]]:
  """Runs tasks, each once: one whose file of results is there is not run again.

  What is scored or generated greedily is kept too, request by request, and not
  done again after an interruption.

  Args:
    model: The model.
    names: The paper's benchmarks, and tasks, groups and tags of lm-eval.
    folder: For `NAME.json`, lm-eval's results, and `responses_rank0.db`; that
      of one model and one set of its settings.
    manager: What knows the tasks.
    limit: Only the first so many documents of each task; 0: all.
    run_unsafe_code: Whether tasks may run what the model writes.

  Returns:
    lm-eval's results of each name.
  """
  check_names(manager, names, run_unsafe_code)
  if run_unsafe_code:
    # The library that runs the code asks for it.
    os.environ['HF_ALLOW_CODE_EVAL'] = '1'
  folder.mkdir(parents=True, exist_ok=True)
  found: dict[str, Mapping[str, Any]] = {}
  for name in names:
    file = folder / (f'{name}-first-{limit}.json' if limit else f'{name}.json')
    if file.exists():
      logging.info('%s: the results are in %s.', name, file)
      found[name] = read_json(file, results=dict)
      continue
    tasks = load_task(manager, name)
    for task in manager.load(tasks)['tasks'].values():
      _check_code(name, bool(task.config.unsafe_code), run_unsafe_code)
    results = lm_eval.simple_evaluate(
      model=model,
      tasks=tasks,
      use_cache=str(folder / 'responses'),
      limit=limit or None,
      log_samples=False,
      apply_chat_template=True,
      fewshot_as_multiturn=False,
      task_manager=manager,
      confirm_run_unsafe_code=run_unsafe_code,
    )
    text = json.dumps(results, indent=2, default=handle_non_serializable)
    write_file(file, text + '\n')
    found[name] = json.loads(text)
  return found
