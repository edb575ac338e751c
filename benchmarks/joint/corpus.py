"""Pairs, conversations and plain text from all of the installed Python code.

The standard library's packages and those in site-packages, each wholly in train
or wholly in test, by the hash of its name. What functions, records and
negatives are is `grit_jax.data.standard_library`'s. Three data sets of pairs:

- `functions` and `methods`: a docstring finds its source;
- `summaries`: a source finds its docstring. These are functions and methods of
  their own, so that no query is a candidate;

and `conversations` about all of them.
"""

import json
import pathlib
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from grit_jax.data import standard_library
from grit_jax.data.standard_library import Function, crc32

SPLITS = ('train', 'test')
# Copies of other packages.
SKIPPED = standard_library.SKIPPED | {'_vendor', '_vendored'}
# A package with fewer functions in a data set has too few negatives there.
MINIMUM_FUNCTIONS = 1 + standard_library.MAXIMUM_NEGATIVES
# One function in so many is a summary.
SUMMARIES_IN = 3
SUMMARISE = (
  'Find the docstring that describes this Python function',
  'Given the source of a function, retrieve what it is documented to do',
  'Retrieve the description of this code',
)

Packages = dict[str, list[Function]]


def installed_files() -> dict[str, list[tuple[str, pathlib.Path]]]:
  """Returns the modules of each package: dotted names and files."""
  packages: dict[str, list[tuple[str, pathlib.Path]]] = {}
  library = pathlib.Path(sysconfig.get_path('stdlib'))
  for module, path in standard_library.library_files(library):
    packages.setdefault(module.partition('.')[0], []).append((module, path))
  site = pathlib.Path(sysconfig.get_path('purelib'))
  for path in sorted(site.rglob('*.py')):
    parts = path.relative_to(site).with_suffix('').parts
    if SKIPPED.isdisjoint(parts):
      module = '.'.join(parts).removesuffix('.__init__')
      packages.setdefault(parts[0], []).append((module, path))
  return packages


def package_of(function: Function) -> str:
  """Returns the name of a function's package."""
  return function.module.partition('.')[0]


def read_packages(
  per_package: dict[str, int], packages: int
) -> tuple[dict[str, Packages], int]:
  """Reads functions of the installed code.

  Args:
    per_package: for each split, functions of a package at most.
    packages: so many at most, in the order of a hash; 0: all.

  Returns:
    For each split, the functions of each package; and the files that could not
    be read. The functions are of modules chosen by a hash, and no docstring or
    source is there twice.
  """
  found = sorted(installed_files().items(), key=lambda one: crc32(one[0]))
  functions: list[Function] = []
  unreadable = 0
  for package, files in found[: packages or None]:
    split = SPLITS[standard_library.in_test(package)]
    of_package: list[Function] = []
    for module, path in sorted(files, key=lambda one: crc32(one[0])):
      if len(of_package) >= per_package[split]:
        break
      try:
        with tokenize.open(path) as file:
          text = file.read()
        of_package += standard_library.parse_functions(module, text)
      # Python 2, a template, or a table that is nested too deeply.
      except (SyntaxError, ValueError, RecursionError):
        unreadable += 1
    functions += of_package[: per_package[split]]
  splits = standard_library.split_functions(
    functions, lambda one: standard_library.in_test(package_of(one))
  )
  return {split: group(ones) for split, ones in splits.items()}, unreadable


def group(functions: Iterable[Function]) -> Packages:
  """Returns functions by their package."""
  packages: Packages = {}
  for one in functions:
    packages.setdefault(package_of(one), []).append(one)
  return packages


def data_set_of(function: Function) -> str:
  """Returns the data set of pairs that a function is in."""
  if crc32('set', function.module, function.name) % SUMMARIES_IN == 0:
    return 'summaries'
  return 'methods' if '.' in function.name else 'functions'


def make_records(packages: Packages) -> dict[str, list[dict]]:
  """Returns the records of a split, by data set."""
  made: dict[str, list[dict]] = {
    name: [] for name in ('functions', 'methods', 'summaries', 'conversations')
  }
  for functions in packages.values():
    sets: dict[str, list[Function]] = {}
    for one in functions:
      sets.setdefault(data_set_of(one), []).append(one)
    for name, ones in sets.items():
      if len(ones) >= MINIMUM_FUNCTIONS:
        make = MAKERS.get(name, standard_library.embedding_records)
        made[name] += make(ones)
    if len(functions) >= MINIMUM_FUNCTIONS:
      made['conversations'] += standard_library.generative_records(functions)
  return made


def summaries(functions: Sequence[Function]) -> Iterator[dict]:
  """Yields a record for each function, from its source to its docstring."""
  for one, neighbours in standard_library.with_neighbours(functions):
    yield {
      'query': [standard_library.pick(SUMMARISE, one), one.source],
      'pos': [['', one.docstring]],
      'neg': [['', other.docstring] for other in neighbours],
    }


# Of pairs in another direction.
MAKERS = {'summaries': summaries}


class CodeCorpus(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """One data set, to be read from its folder without this code."""

  VERSION = tfds.core.Version('1.0.0')
  # As in `grit_jax.data.standard_library`: nothing is downloaded.
  url_infos = None

  def __init__(
    self, name: str, records: dict[str, list[dict]], data_dir: pathlib.Path
  ):
    """Takes the records of each split."""
    self.name, self._records = name, records
    super().__init__(data_dir=data_dir, file_format='array_record')

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      features=tfds.features.FeaturesDict({'json': tfds.features.Text()}),
      disable_shuffling=True,
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
    del dl_manager
    tfds.disable_progress_bar()
    return {
      split: self._generate_examples(records)
      for split, records in self._records.items()
    }

  def _generate_examples(
    self, records: Sequence[dict]
  ) -> Iterator[tuple[int, dict[str, str]]]:
    for key, record in enumerate(records):
      yield key, {'json': json.dumps(record, ensure_ascii=False)}


def write_corpus(
  folder: pathlib.Path, per_package: dict[str, int], packages: int
) -> dict[str, Any]:
  """Writes the data sets into a TFDS folder, as `code_NAME`.

  Args:
    folder: `tfds` of a run's `data.cache_dir`, or of its workdir.
    per_package: as `read_packages`.
    packages: as `read_packages`.

  Returns:
    For each split, the packages and the records of each data set; and the
    `unreadable_files`.
  """
  splits, unreadable = read_packages(per_package, packages)
  made = {split: make_records(found) for split, found in splits.items()}
  for name in made['train']:
    records = {split: made[split][name] for split in SPLITS}
    CodeCorpus(f'code_{name}', records, folder).download_and_prepare()
  sizes: dict[str, Any] = {
    split: {'packages': len(splits[split])}
    | {name: len(records) for name, records in made[split].items()}
    for split in SPLITS
  }
  return sizes | {'unreadable_files': unreadable}
