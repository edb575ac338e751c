"""Evaluates models: `python -m grit_jax.evaluate mteb|lm --help`."""

import argparse
import pathlib
from collections.abc import Mapping

from grit_jax import cli
from grit_jax.config import Size
from grit_jax.errors import UserError
from grit_jax.files import is_local, writing
from grit_jax.inference import arguments


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the command and its flags."""
  parser = cli.Parser(
    prog='python -m grit_jax.evaluate',
    description='Evaluates models with the runners of the field.',
  )
  commands = parser.add_subparsers(dest='command', required=True)
  for name, help_text, add in (
    ('mteb', 'embeddings', _add_mteb),
    ('lm', 'generation', _add_lm),
  ):
    command = commands.add_parser(name, help=help_text)
    arguments.add_model(command)
    command.add_argument(
      '--output',
      type=cli.parse_given,
      default='evaluation',
      help='for results (default: %(default)s)',
    )
    add(command)
  return parser


def _add_mteb(command: argparse.ArgumentParser) -> None:
  command.add_argument(
    '--tasks',
    type=cli.parse_given,
    required=True,
    help="names of mteb's tasks and benchmarks, as 'MTEB(eng, v1)', which is "
    "the paper's; with commas between them",
  )
  command.add_argument(
    '--languages',
    default='',
    help='of tasks with several, as eng,deu (default: all)',
  )
  command.add_argument(
    '--max_length',
    type=cli.parse_positive,
    default=512,
    help='tokens kept of a text',
  )
  command.add_argument(
    '--batch_size',
    type=cli.parse_positive,
    default=32,
    help='texts of that length at a time',
  )


def _add_lm(command: argparse.ArgumentParser) -> None:
  command.add_argument(
    '--tasks',
    type=cli.parse_given,
    required=True,
    help='mmlu, gsm8k, bbh, tydiqa and humaneval, as the paper has them, and '
    "lm-eval's own names; with commas between them",
  )
  command.add_argument(
    '--max_length',
    type=cli.number(Size),
    default=0,
    help="tokens of a context with its answer (default: the model's positions)",
  )
  command.add_argument(
    '--batch_size',
    type=cli.parse_positive,
    default=16,
    help='texts generated at a time',
  )
  command.add_argument(
    '--limit',
    type=cli.number(Size),
    default=0,
    help='documents of a task (default: all)',
  )
  command.add_argument(
    '--task_folder',
    type=cli.parse_given,
    help="for tasks of your own, lm-eval's YAML files",
  )
  command.add_argument(
    '--run_unsafe_code',
    action='store_true',
    help='let tasks run the code that the model writes',
  )


def evaluate_mteb(flags: argparse.Namespace) -> None:
  """Runs mteb's tasks and prints their scores."""
  try:
    from grit_jax.evaluate import mteb_encoder
  except ModuleNotFoundError as error:
    raise _missing(error, 'mteb') from error
  languages = cli.split_names(flags.languages) or None
  tasks = mteb_encoder.find_tasks(flags.tasks, languages)
  encoder = mteb_encoder.Encoder(
    arguments.load(flags), _name(flags.model), flags.max_length
  )
  scores = mteb_encoder.evaluate(
    encoder, tasks, pathlib.Path(flags.output), flags.batch_size
  )
  kinds: dict[str, list[float]] = {}
  for name, (kind, score) in sorted(
    scores.items(), key=lambda item: (item[1][0], item[0])
  ):
    print(f'{kind:24}{name:48}{100 * score:8.2f}')
    kinds.setdefault(kind, []).append(score)
  for kind, values in kinds.items():
    print(f'{kind:24}{"mean":48}{100 * sum(values) / len(values):8.2f}')
  mean = sum(score for _, score in scores.values()) / len(scores)
  print(f'{"all":24}{"mean":48}{100 * mean:8.2f}')


def evaluate_lm(flags: argparse.Namespace) -> None:
  """Runs lm-eval's tasks and prints their scores."""
  try:
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from grit_jax.evaluate import generative_tasks
    from grit_jax.evaluate.lm_eval_model import LanguageModel
    from grit_jax.evaluate.revision import find_revision
  except ModuleNotFoundError as error:
    raise _missing(error, 'lm') from error
  names = cli.split_names(flags.tasks)
  manager = TaskManager(include_path=flags.task_folder)
  generative_tasks.check_names(manager, names, flags.run_unsafe_code)
  model = LanguageModel(
    arguments.load(flags), flags.max_length, flags.batch_size
  )
  folder = pathlib.Path(flags.output) / 'lm' / _name(flags.model)
  found: Mapping[str, Mapping] = generative_tasks.evaluate(
    model,
    names,
    folder / find_revision(model.model, max_length=model.max_length),
    manager=manager,
    limit=flags.limit,
    run_unsafe_code=flags.run_unsafe_code,
  )
  for results in found.values():
    print(make_table(results))


def _name(path: str) -> str:
  """Returns what results call a model: the last part of its path."""
  return path.rstrip('/').rpartition('/')[2]


def _missing(error: ModuleNotFoundError, extra: str) -> UserError:
  return UserError(
    f'{error.name} is not installed; it comes with '
    f"`pip install 'grit_jax[{extra}]'`."
  )


def evaluate(flags: argparse.Namespace) -> None:
  """Evaluates as the flags say.

  Raises:
    UserError: what the flags name cannot be, or the network is missing.
  """
  # Before a model is loaded.
  if not is_local(flags.output):
    raise UserError(f'{flags.output} is not a local folder.')
  output = pathlib.Path(flags.output)
  with writing(output):
    output.mkdir(parents=True, exist_ok=True)
  try:
    (evaluate_mteb if flags.command == 'mteb' else evaluate_lm)(flags)
  except ConnectionError as error:
    raise UserError(
      f'{error}. The data of a task is downloaded at first use; where there is '
      'no network, copy the cache of a machine that has one, the folder that '
      'HF_HOME names.'
    ) from error


if __name__ == '__main__':
  cli.main(
    make_parser(),
    evaluate,
    stopped='stopped; the same command resumes with what is not done',
    less_memory='--batch_size, --max_length and --quantization',
  )
