"""Does joint training cost anything? Unified against both specialists.

  pip install -e .
  python benchmarks/joint_vs_single.py --folder=/tmp/joint --output=joint.json

The paper's central claim (arXiv 2402.09906, tables 1 and 2) at the scale of
`--scale`: `cpu` takes about 40 minutes on two cores, and `h200` is for one such
GPU. On all of the installed Python code, held out by package, it trains

- `unified`, `embedding only` and `generative only`, several seeds each. A seed
  decides the first weights, the order of the data and the negatives. The runs
  of one seed start from the same weights and see the same batches: a specialist
  the pairs, or the conversations, of the unified run, in as many steps;
- the same of unified with one change (`VARIANTS` in `joint/plan.py`).

The weights are drawn at random, where the paper's are of a pretrained model: a
small model that was trained to generate for a few minutes embeds no better than
chance, and would spend half of a run to get where a random one begins.

Each run is `grit_jax.train.train` in a workdir of its own. Started again with
the same folder, the benchmark goes on, and repeats no run that has ended. It
writes tables and a figure beside them: the mean over seeds and the standard
deviation, and for the differences those of each seed's difference.
"""

import json
import pathlib

import jax
from absl import app, flags
from joint import plan, results

from grit_jax.logs import quiet_libraries

_FOLDER = flags.DEFINE_string('folder', None, 'Where everything is kept.')
_SCALE = flags.DEFINE_enum(
  'scale', 'cpu', sorted(plan.SCALES), 'Sizes of the runs.'
)
_RUNS = flags.DEFINE_multi_enum(
  'runs',
  [],
  list(plan.CORE | plan.VARIANTS),
  'A run to do, once for each; all without it.',
)
_OUTPUT = flags.DEFINE_string(
  'output', '', 'A JSON file; empty: `results.json` in the folder.'
)


def main(argv: list[str]) -> None:
  """Runs what has not run yet; writes tables and figure after each run."""
  del argv
  quiet_libraries()
  scale = plan.SCALES[_SCALE.value]
  planned = plan.plan_runs(scale, _RUNS.value)
  folder = pathlib.Path(_FOLDER.value).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  plan.check_settings(scale, folder)
  # Runs that differ in their seed alone are mostly the same programs.
  jax.config.update('jax_compilation_cache_dir', str(folder / 'compiled'))
  sizes = plan.make_corpus(scale, folder)
  output = pathlib.Path(_OUTPUT.value or folder / 'results.json')
  runs, tables = [], ''
  for number, (variant, changes, seed) in enumerate(planned, 1):
    print(f'Run {number} of {len(planned)}: {variant}, seed {seed}', flush=True)
    name = f'{variant.replace(",", "").replace(" ", "_")}-{seed}'
    config = plan.make_config(scale, folder, changes, seed)
    found = plan.run_once(config, folder / name)
    runs.append({'variant': variant, 'seed': seed, **found})
    summary = results.summarise(runs)
    tables = results.make_tables(summary)
    output.write_text(
      json.dumps(
        {'scale': _SCALE.value, 'corpus': sizes, **summary, 'runs': runs},
        indent=2,
      )
    )
    output.with_suffix('.md').write_text(tables)
    results.draw(summary, output.with_suffix('.png'))
  print(tables)


if __name__ == '__main__':
  flags.mark_flags_as_required(['folder'])
  app.run(main)
