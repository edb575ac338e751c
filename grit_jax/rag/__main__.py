"""Answers from documents: `python -m grit_jax.rag index|ask|benchmark`."""

import argparse
import json
import sys
from collections.abc import Iterator

from absl import logging
from etils import epath

from grit_jax import cli
from grit_jax.config import Seed, Weight
from grit_jax.errors import UserError
from grit_jax.files import check_keys
from grit_jax.inference import arguments
from grit_jax.inference.cache import KVCache
from grit_jax.inference.gritlm import GritLM
from grit_jax.inference.index import INDEX, Index
from grit_jax.inference.sampling import Sampling
from grit_jax.inference.shards import DTYPES
from grit_jax.initial import find_change, open_initial
from grit_jax.rag.answering import Answer, Answerer, encode_documents
from grit_jax.rag.caches import DiskCaches, HostCaches
from grit_jax.rag.indexing import format_size, write_index
from grit_jax.rag.prompts import Mode

AUTO = 'auto'
CACHE_DTYPES = ('bfloat16', 'float32')
# Characters of a source's first line that are shown.
SHOWN = 100
GIGABYTE = 10**9


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the command and its flags."""
  parser = cli.Parser(
    prog='python -m grit_jax.rag',
    description='Answers from documents.',
  )
  commands = parser.add_subparsers(dest='command', required=True)
  _add_index(commands)
  _add_ask(commands)
  _add_benchmark(commands)
  return parser


def _add_number(
  command: argparse.ArgumentParser, name: str, default: int, help_text: str
) -> None:
  command.add_argument(
    f'--{name}',
    type=cli.parse_positive,
    default=default,
    help=f'{help_text} (default: {default})',
  )


def _add_index(commands: argparse._SubParsersAction) -> None:
  command = commands.add_parser(
    'index',
    help='documents into an index; goes on after a kill',
  )
  command.add_argument(
    '--source',
    type=cli.parse_given,
    required=True,
    action='append',
    help='a .txt, .md or .jsonl file, or a folder of such; repeat for more',
  )
  arguments.add_model(command)
  command.add_argument(
    '--index', type=cli.parse_given, required=True, help='the folder to write'
  )
  command.add_argument(
    '--caches',
    default='',
    choices=[mode.value for mode in Mode if mode.caches_document],
    help="write the documents' KV caches too, for this mode; those for "
    'doc-caching serve doc-query-caching and the other way round',
  )
  command.add_argument(
    '--cache_dtype',
    choices=CACHE_DTYPES,
    default=CACHE_DTYPES[0],
    help=f'of stored caches (default: {CACHE_DTYPES[0]})',
  )
  command.add_argument(
    '--stored_dtype',
    choices=DTYPES,
    default=DTYPES[0],
    help=f'of stored embeddings (default: {DTYPES[0]})',
  )
  for name, default, help_text in (
    ('max_length', 512, 'tokens of a passage; longer texts are cut into more'),
    ('batch_size', 32, 'passages embedded at one time'),
    ('shard_documents', 1000, 'passages of a shard; a kill costs one'),
  ):
    _add_number(command, name, default, help_text)


def _add_ask(commands: argparse._SubParsersAction) -> None:
  command = commands.add_parser('ask', help='answers questions over an index')
  command.add_argument(
    'questions', nargs='*', help='none: one a line of the standard input'
  )
  command.add_argument(
    '--index', type=cli.parse_given, required=True, help='what `index` wrote'
  )
  command.add_argument(
    '--model', default='', help='where it is now (default: as the index has it)'
  )
  arguments.add_mesh(command)
  command.add_argument(
    '--mode',
    choices=[AUTO, *(mode.value for mode in Mode)],
    default=AUTO,
    help="(default: auto: that of the index's caches, or document-first)",
  )
  _add_number(command, 'documents', 1, 'passages to answer from')
  _add_number(command, 'max_new_tokens', 256, 'tokens of an answer at most')
  command.add_argument(
    '--temperature',
    type=cli.number(Weight),
    default=0.0,
    help='0: greedy (default: 0)',
  )
  command.add_argument(
    '--seed', type=cli.number(Seed), default=0, help='of the draws (default: 0)'
  )
  command.add_argument(
    '--instruction', default='', help='to embed questions with (default: none)'
  )
  command.add_argument(
    '--answer_start', default='', help='what every answer begins with'
  )
  _add_number(
    command, 'cache_memory', 8, 'GB for caches that the index has not'
  )
  command.add_argument(
    '--json', action='store_true', help='print a line of JSON for each answer'
  )


def _add_benchmark(commands: argparse._SubParsersAction) -> None:
  command = commands.add_parser(
    'benchmark',
    help="the paper's latencies, side by side with PyTorch's",
  )
  command.add_argument(
    '--output', type=cli.parse_given, required=True, help='a file for JSON'
  )
  command.add_argument(
    '--model',
    default='',
    help='a Hugging Face folder (default: 320 M random weights)',
  )
  command.add_argument(
    '--dtype',
    choices=CACHE_DTYPES,
    default='float32',
    help='of weights and caches on both sides (default: float32)',
  )
  _add_number(command, 'tokens', 4000, 'of the long document or query')
  _add_number(
    command, 'repeats', 3, 'turns that count, after one that does not'
  )


def choose_mode(name: str, caches: str) -> Mode:
  """Returns the mode to answer in.

  Args:
    name: What the user chose.
    caches: The mode that the index has caches for; empty: it has none.

  Raises:
    UserError: The index's caches are for another mode.
  """
  if name == AUTO:
    return Mode(caches or Mode.DOCUMENT_FIRST.value)
  mode = Mode(name)
  behind = mode is Mode.QUERY_DOC
  if mode.caches_document and caches:
    if behind != (caches == Mode.QUERY_DOC.value):
      raise UserError(f"the index's caches are for {caches}, not for {name}")
  return mode


def ask(flags: argparse.Namespace) -> None:
  """Answers questions, and shows the sources."""
  index = Index.open(flags.index)
  where = f'{index.folder / INDEX}: metadata'
  check_keys(
    index.metadata,
    where,
    model=str,
    model_sha256=str,
    model_files=dict,
    model_dtype=str,
    model_quantization=str,
    documents=int,
  )
  whole = index.metadata['documents']
  if len(index) < whole:
    raise UserError(
      f'{index.folder}: {len(index)} of {whole} passages are in the index. '
      'Start `rag index` again, or wait until it ends.'
    )
  caches = index.metadata.get('caches', '')
  if caches not in ('', *(mode.value for mode in Mode)):
    raise UserError(f'{where}: caches is {caches!r:.60}.')
  mode = choose_mode(flags.mode, caches)
  path = flags.model or _find_model(index)
  change = find_change(
    open_initial(path),
    index.metadata['model_sha256'],
    index.metadata['model_files'],
  )
  if change:
    raise UserError(
      f'{flags.index}: {path} is not the model that made this index, '
      f'{index.metadata["model"]}: it has {change}.'
    )
  typed = ([question] for question in _read_questions())
  sampling = Sampling(flags.max_new_tokens, flags.temperature, seed=flags.seed)
  answerer = _make_answerer(flags, path, index, mode)
  for batch in [flags.questions] if flags.questions else typed:
    for answer in answerer.answer(batch, sampling):
      show(answer, mode, flags.json)
  if isinstance(answerer.caches, HostCaches):
    logging.info(
      '%d caches of documents are in memory, %s; `index --caches` keeps them '
      'on the disk.',
      len(answerer.caches), format_size(answerer.caches.nbytes),
    )  # fmt: skip


def _find_model(index: Index) -> str:
  """Returns where the model of an index is.

  Raises:
    UserError: It is not there any more.
  """
  path = index.metadata['model']
  if not epath.Path(path).exists():
    raise UserError(
      f'{index.folder}: the model that made this index, {path}, is not there. '
      'Say where it is now with --model.'
    )
  return path


def benchmark(flags: argparse.Namespace) -> None:
  """Measures latencies."""
  from grit_jax.rag.benchmark import run_benchmark

  run_benchmark(flags)


def _read_questions() -> Iterator[str]:
  """Yields the lines of the standard input that are not blank."""
  prompt = sys.stdin.isatty()
  while True:
    if prompt:
      print('> ', end='', file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
      return
    if line.strip():
      yield line.strip()


def _make_answerer(
  flags: argparse.Namespace, path: str, index: Index, mode: Mode
) -> Answerer:
  # A question is embedded as the documents were.
  model = GritLM.load(
    path,
    mesh=flags.mesh,
    dtype=index.metadata['model_dtype'],
    quantization=index.metadata['model_quantization'],
  )
  caches: DiskCaches | HostCaches | None = None
  if mode.caches_document and index.metadata.get('caches'):
    caches = DiskCaches(flags.index)
  elif mode.caches_document:

    def make(number: int) -> KVCache:
      documents = index.documents([number])
      # They are read whole, as in the modes without caches.
      positions = model.config.model.max_positions
      (cache,) = encode_documents(model, documents, mode, positions)[1]
      return cache

    caches = HostCaches(make, CACHE_DTYPES[0], flags.cache_memory * GIGABYTE)
  return Answerer(
    model,
    index,
    mode,
    caches,
    documents=flags.documents,
    instruction=flags.instruction,
    answer_start=flags.answer_start,
  )


def show(answer: Answer, mode: Mode, as_json: bool) -> None:
  """Prints an answer and its sources."""
  sources = [
    {
      'id': source.document['id'],
      'title': source.document.get('title', ''),
      'score': round(source.score, 6),
      'line': _first_line(source.document['text']),
    }
    for source in answer.sources
  ]
  if as_json:
    fields = {
      'question': answer.question,
      'answer': answer.text,
      'mode': mode.value,
      'sources': sources,
    }
    print(json.dumps(fields, ensure_ascii=False), flush=True)
    return
  print(answer.text.strip())
  for number, source in enumerate(sources, 1):
    print(
      f'  [{number}] {source["score"]:.3f}  {source["id"]}  {source["title"]}\n'
      f'      {source["line"]}'
    )
  print(flush=True)


def _first_line(text: str) -> str:
  line = text.strip().split('\n', 1)[0]
  return line if len(line) <= SHOWN else f'{line[: SHOWN - 3]}...'


def answer(flags: argparse.Namespace) -> None:
  """Does as the flags say.

  Raises:
    UserError: what the flags name cannot be.
  """
  commands = {'index': write_index, 'ask': ask, 'benchmark': benchmark}
  commands[flags.command](flags)


if __name__ == '__main__':
  cli.main(
    make_parser(),
    answer,
    stopped='stopped; what is whole is kept',
    less_memory='--batch_size, --max_length and --quantization',
  )
