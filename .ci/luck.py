"""Which claims of a notebook would another processor overturn?

    python .ci/luck.py 03_frontier             five runs of it, each as long as the notebook
    python .ci/luck.py 03_frontier --runs 8

Processors round differently, and after some hundred steps of training that is another draw of everything random. Each run here moves
the first weights of every model by some ten millionths, which has the same effect. Assertions are counted, not raised; for each
comparison by size the table has the smallest distance between its sides, in standard deviations over the runs (99: that or more;
-: not to be measured): below three, the claim hangs on luck. Two runs at a time, one thread each. Notebook 7 trains in processes of
its own, which this does not reach.
"""
import argparse
import ast
import json
import math
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUIET = {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def is_all(claim) -> bool:
    """Whether the claim is all(... for ...)."""
    return isinstance(claim, ast.Call) and ast.unparse(claim.func) == "all" and isinstance(claim.args[0], ast.GeneratorExp)


def parts(claim) -> list:
    """A and B -> A, B;  all(A and B for x in y) -> all(A for x in y), all(B for x in y)."""
    if isinstance(claim, ast.BoolOp) and isinstance(claim.op, ast.And):
        return [part for value in claim.values for part in parts(value)]
    if is_all(claim) and len(parts(claim.args[0].elt)) > 1:
        each = claim.args[0]
        return [ast.Call(claim.func, [ast.GeneratorExp(part, each.generators)], []) for part in parts(each.elt)]
    return [claim]


class Record(ast.NodeTransformer):
    """assert A and B  ->  record("A", A, sides of A); record("B", B, sides of B). Sides: of a comparison, or of each one in all(...)."""

    def visit_Assert(self, node):
        return [ast.parse(f"record({ast.unparse(claim)!r}, {ast.unparse(claim)}, lambda: {self.sides(claim)})").body[0]
                for claim in parts(node.test)]

    def sides(self, claim):
        def pair(comparison):
            if not all(isinstance(operator, (ast.Lt, ast.LtE, ast.Gt, ast.GtE)) for operator in comparison.ops):
                return "[]"                                                      # "equal" has no distance
            return f"[{', '.join(map(ast.unparse, (comparison.left, *comparison.comparators)))}]"
        if isinstance(claim, ast.Compare):
            return f"[{pair(claim)}]"
        if is_all(claim) and isinstance(claim.args[0].elt, ast.Compare):
            return f"[{pair(claim.args[0].elt)} {' '.join(map(ast.unparse, claim.args[0].generators))}]"
        return "[]"


def run(notebook: Path, nudge: int):
    """Run the notebook's cells, the weights nudged by that seed; print one JSON line a claim."""
    import torch

    sys.path.insert(0, str(ROOT))
    os.chdir(notebook.parent)
    import dpo
    initialise, generator = dpo.GPT.__init__, torch.Generator().manual_seed(nudge)

    def nudged(model, *arguments, **options):
        initialise(model, *arguments, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(1 + 2e-7 * torch.randn(parameter.shape, generator=generator))
    dpo.GPT.__init__ = nudged

    def record(claim, holds, sides):
        try:
            values = [list(map(float, row)) for row in sides()]
        except (TypeError, ValueError):                                          # of words, lists, ...
            values = []
        print("claim " + json.dumps([claim, bool(holds), values]), flush=True)
    names = {"__name__": "notebook", "record": record, "display": print}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile(ast.fix_missing_locations(Record().visit(ast.parse("".join(cell["source"])))), "cell", "exec"), names)


def distance(rows: list) -> float:
    """rows (runs, sides): the least distance of two neighbouring sides, mean over the runs / standard deviation."""
    gaps = [[right - left for left, right in zip(row, row[1:])] for row in rows]
    return min((abs(statistics.mean(gap)) / max(statistics.stdev(gap), 1e-12) for gap in zip(*gaps)), default=math.inf)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", help="its name, such as 03_frontier")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--nudge", type=int, help=argparse.SUPPRESS)             # one run, in a process of its own
    options = parser.parse_args()
    if options.runs < 2:
        parser.error("--runs: a deviation needs two runs at least")
    notebook = ROOT / "notebooks" / f"{options.notebook}.ipynb"
    if options.nudge is not None:
        return run(notebook, options.nudge)

    def one(nudge):
        done = subprocess.run([sys.executable, __file__, options.notebook, "--nudge", str(nudge)], capture_output=True, text=True,
                              env=os.environ | QUIET)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return [json.loads(line.removeprefix("claim ")) for line in done.stdout.splitlines() if line.startswith("claim ")]
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(one, range(options.runs)))
    claims = defaultdict(lambda: (0, float("inf")))
    for number, (claim, _, sides) in enumerate(runs[0]):
        failed = sum(not run[number][1] for run in runs)
        comparisons = list(zip(*(run[number][2] for run in runs)))               # (comparisons, runs, sides)
        claims[claim] = claims[claim][0] + failed, min([claims[claim][1], *map(distance, comparisons)])
    print(f"{'fails':>5s} {'deviations':>10s}")
    for claim, (failed, deviations) in sorted(claims.items(), key=lambda item: item[1][1]):
        shown = "-" if math.isinf(deviations) else f"{min(deviations, 99):.1f}"
        print(f"{failed:5d} {shown:>10s}  {claim}")


if __name__ == "__main__":
    main()
