"""Embeds a corpus: `python -m grit_jax.encode --model=... --input=... ...`.

The corpus is a file of JSON lines (see `grit_jax.inference.corpus`), and the
output an index (see `grit_jax.inference.index`) that can be searched, extended
and checked. Killed, and started again with the same command, it goes on after
the last whole shard.
"""

import argparse

from grit_jax import cli
from grit_jax.data.sources import FileSource
from grit_jax.inference import arguments
from grit_jax.inference.corpus import CorpusWriter, writing_index
from grit_jax.inference.shards import DTYPES
from grit_jax.initial import open_initial


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the flags."""
  parser = cli.Parser(
    prog='python -m grit_jax.encode',
    description='Embeds a corpus into an index, and goes on after a kill.',
  )
  arguments.add_model(parser)
  parser.add_argument(
    '--input',
    type=cli.parse_given,
    required=True,
    help='documents: .jsonl, .jsonl.gz, .jsonl.zst',
  )
  parser.add_argument(
    '--output',
    type=cli.parse_given,
    required=True,
    help='the folder of the index',
  )
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
      type=cli.parse_positive,
      default=default,
      help=f'{help_text} (default: {default})',
    )
  return parser


def encode(flags: argparse.Namespace) -> None:
  """Embeds as the flags say.

  Raises:
    UserError: what the flags name cannot be.
  """
  settings = {
    **arguments.describe(flags, open_initial(flags.model)),
    'instruction': flags.instruction,
    'max_length': flags.max_length,
  }
  with writing_index(flags.output) as folder:
    writer = CorpusWriter(
      FileSource(flags.input),
      folder,
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


if __name__ == '__main__':
  cli.main(
    make_parser(),
    encode,
    stopped='stopped; the same command resumes after what is whole',
    less_memory='--batch_size, --max_length and --quantization',
  )
