"""Embeds a corpus: `python -m grit_jax.encode --model=... --input=... ...`.

The corpus is a file of JSON lines (see `grit_jax.inference.corpus`), and the
output an index (see `grit_jax.inference.index`) that can be searched, extended
and checked. Killed, and started again with the same command, it goes on after
the last whole shard.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence

from absl import app, logging
from absl.flags import argparse_flags
from etils import epath

from grit_jax.checkpoint import CheckpointError
from grit_jax.config import ConfigError
from grit_jax.convert import ConvertError
from grit_jax.data.folders import PreparationError
from grit_jax.data.formats import FormatError
from grit_jax.data.records import RecordError
from grit_jax.data.sources import FileSource
from grit_jax.data.tokenizer import TokenizerError
from grit_jax.inference import arguments
from grit_jax.inference.corpus import CorpusWriter
from grit_jax.inference.shards import DTYPES, SearchIndexError
from grit_jax.initial import open_initial
from grit_jax.logs import quiet_libraries

# What ends in one message instead of a traceback: the user can mend these.
USER_ERRORS = (
  CheckpointError,
  ConfigError,
  ConvertError,
  FileNotFoundError,
  FormatError,
  PreparationError,
  RecordError,
  SearchIndexError,
  TokenizerError,
)

# Of a file of a model: its start, its middle and its end tell it from others.
_SAMPLE_BYTES = 1 << 20


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
  """Returns the flags."""
  # `resolve`: a module of the same process may define flags of such names.
  parser = argparse_flags.ArgumentParser(
    conflict_handler='resolve',
    prog='python -m grit_jax.encode',
    description='Embeds a corpus into an index, and goes on after a kill.',
  )
  arguments.add_model(parser)
  parser.add_argument(
    '--input', required=True, help='documents: .jsonl, .jsonl.gz, .jsonl.zst'
  )
  parser.add_argument('--output', required=True, help='the folder of the index')
  parser.add_argument(
    '--instruction', default='', help='for documents (default: none)'
  )
  parser.add_argument(
    '--stored_dtype',
    choices=DTYPES,
    default=DTYPES[0],
    help='of stored embeddings',
  )
  for name, default, help_text in (
    ('max_length', 512, 'tokens of a document; more are cut'),
    ('batch_size', 32, 'the memory is that of so many documents'),
    ('shard_documents', 10_000, 'documents of a shard; a kill costs one'),
  ):
    parser.add_argument(
      f'--{name}',
      type=arguments.parse_positive,
      default=default,
      help=f'{help_text} (default: {default})',
    )
  return parser.parse_args(argv[1:])


def fingerprint(model: str) -> str:
  """Identifies the files of a model, of which samples are read.

  Args:
    model: As `--model`; a workdir stands for its newest checkpoint.

  Returns:
    A SHA-256, in hexadecimal.
  """
  folder = epath.Path(open_initial(model).where)
  digest = hashlib.sha256()
  for path in _find_files(folder):
    size = path.stat().length
    digest.update(f'{path.relative_to(folder)}\0{size}\0'.encode())
    with path.open('rb') as file:
      for start in (0, size // 2, size - _SAMPLE_BYTES):
        file.seek(max(start, 0))
        digest.update(file.read(_SAMPLE_BYTES))
  return digest.hexdigest()


def _find_files(folder: epath.Path) -> Iterator[epath.Path]:
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      yield from _find_files(path)
    else:
      yield path


def encode(flags: argparse.Namespace) -> None:
  """Embeds as the flags say.

  Raises:
    One of `USER_ERRORS`.
  """
  settings = {
    'model': flags.model,
    'model_sha256': fingerprint(flags.model),
    'model_dtype': flags.dtype,
    'model_quantization': flags.quantization,
    'instruction': flags.instruction,
    'max_length': flags.max_length,
  }
  writer = CorpusWriter(
    FileSource(flags.input),
    flags.output,
    settings,
    flags.stored_dtype,
    flags.shard_documents,
  )
  if writer.done < writer.total:
    model = arguments.load(flags)
    writer.write(
      lambda documents: model.encode_corpus(
        documents,
        instruction=flags.instruction,
        max_length=flags.max_length,
        batch_size=flags.batch_size,
      )
    )
  print(f'{flags.output}: an index of {writer.done} documents')


def main(flags: argparse.Namespace) -> None:
  """Embeds; a mistake of the user's ends in one message."""
  quiet_libraries()
  logging.set_verbosity(logging.INFO)
  try:
    encode(flags)
  except USER_ERRORS as error:
    sys.exit(f'grit_jax: error: {error}')
  except KeyboardInterrupt:
    sys.exit('grit_jax: stopped; the same command goes on from what is whole')


if __name__ == '__main__':
  app.run(main, flags_parser=parse_flags)
