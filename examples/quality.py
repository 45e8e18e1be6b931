"""How much worse does a compressed cache make a model? A few methods on the demo model, in some minutes on a CPU.

    python examples/quality.py [FOLDER]

Writes a table, results and a picture into FOLDER (default demo/quality); started again, it goes on where it stood.
Larger studies: `minikv eval --help`.
"""

import argparse
from pathlib import Path

from minikv_jax import load, outputs, presets, program
from minikv_jax.evals.run import run
from minikv_jax.evals.task import Lab, Settings
from minikv_jax.evals.tasks import by_names

METHODS = (
    "full,kivi:residual=32,minikv:residual=32,minikv:heavy=0.1,recent=0.1,residual=32,mikv,h2o:heavy=0.25,recent=0.25,"
    "minikv_plus:group_size=16,value_group=64,residual=32"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("demo/quality"))
    out = parser.parse_args().folder
    outputs.require_folder(out, "FOLDER")
    model, tokenizer = load("smollm2")
    lab = Lab(model, tokenizer, Settings(lengths=(512,), limit=2, new_tokens=64))
    run(lab, "smollm2", presets.parse(METHODS), by_names("kl,lines"), out, "python examples/quality.py")
    print((out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    program.run(main)
