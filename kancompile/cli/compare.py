"""``kancompile compare``: rounding methods and widths side by side on the user's model."""

from __future__ import annotations

import argparse
from pathlib import Path

from kancompile.cli.command import Command
from kancompile.cli.diagnose import judged_samples
from kancompile.cli.exit_codes import OK
from kancompile.cli.options import add_diagnosis, count, number_or, recipe_overrides
from kancompile.cli.session import load_float_model, show_result, working
from kancompile.errors import KanCompileError
from kancompile.recipe import METHODS, TERNARY, read_recipe

_FIGURES = ("svg", "pdf", "png")
TEXT = """\
examples:
  kancompile compare models.py:make_kan --checkpoint kan.pt --calibration train.npz --data test.npz --out comparison
  kancompile compare models.py:make_kan --checkpoint kan.pt --calibration train.npz --data test.npz --out comparison \\
      --methods uniform gptq brecq hawq-v2 --bits 8 4 3 2 ternary --processes 2

Compiles the model with every method at every width and measures each on the same samples: accuracy with 95 % intervals where
there are labels, SQNR, bytes of the file. Writes OUT/comparison.csv, and the figure OUT/comparison.svg, .pdf and .png
(pip install 'kancompile[plots]'). OUT/cells keeps one file for each cell: the same command again goes on where it was
interrupted, and more methods or widths measure only what is new. Recipe options hold for all cells."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the command."""
    add_diagnosis(parser)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=("auto", *METHODS),
        default=["uniform", "gptq", "awq+gptq"],
        metavar="METHOD",
        help="rounding methods, as --method of compile (default uniform gptq awq+gptq)",
    )
    parser.add_argument(
        "--bits",
        nargs="+",
        type=number_or((TERNARY,)),
        default=[8, 6, 4, 3, 2],
        metavar="N",
        help="bits of a weight, as --weight-bits of compile (default 8 6 4 3 2)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the table, the figure and the cells")
    parser.add_argument("--processes", type=count, default=1, metavar="N", help="processes that measure (default 1)")
    parser.add_argument(
        "--figure", nargs="*", choices=_FIGURES, default=_FIGURES, help="formats of the figure (default all)"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace existing files, and cells of another model or other data"
    )


def run(options: argparse.Namespace) -> int:
    """Measure all cells, print the table, and write it with its figure."""
    recipe = read_recipe(options.recipe, **recipe_overrides(options))
    if options.method is not None or options.weight_bits is not None:
        raise KanCompileError(
            "compare: found --method or --weight-bits, expected --methods and --bits, which name what is compared"
        )

    from kancompile.compiler import check_destinations, write_atomically
    from kancompile.diagnosis import CELLS, compare
    from kancompile.reporting import comparison_figure
    from kancompile.validation import check_matplotlib

    folder = Path(options.out)
    table, figures = folder / "comparison.csv", {kind: folder / f"comparison.{kind}" for kind in options.figure}
    if figures:
        check_matplotlib("compare", "; or leave the figure out: --figure without a format")
    # a folder with cells holds an earlier run of this command, whose table this one continues
    force = options.force or (folder / CELLS).is_dir()
    check_destinations([table, *figures.values()], force)
    with working(options):
        model = load_float_model(options)
        fitting, judging, judged_on = judged_samples(options, recipe, model)
        found = compare(
            model,
            fitting,
            judging,
            methods=options.methods,
            bits=options.bits,
            recipe=recipe,
            folder=folder,
            processes=options.processes,
            force=options.force,
            seed=options.seed,
            device=options.device,
            judged_on=judged_on,
        )
        data = found.to_dict()
        contents = {table: found.csv().encode()}
        contents |= {path: comparison_figure(data, kind) for kind, path in figures.items()}
    write_atomically(contents, force)
    written = [f"wrote {path} ({len(content):,} bytes)" for path, content in contents.items()]
    show_result(options, data | {"files": [str(path) for path in contents]}, "\n".join([found.table(), *written]))
    return OK


COMMAND = Command("compare", "measure rounding methods and widths side by side", TEXT, add_options, run)
