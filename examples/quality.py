"""How much worse does a compressed cache make a model? A few methods on the demo model, in some minutes on a CPU.

    python examples/quality.py [FOLDER]

Writes a table, results and a picture into FOLDER (default demo/quality); started again, it goes on where it stood.
Larger studies: `minikv eval --help`.
"""

import sys
from pathlib import Path

from minikv_jax import load, presets
from minikv_jax.evals.run import run
from minikv_jax.evals.task import Lab, Settings
from minikv_jax.evals.tasks import by_names

METHODS = (
    "full,kivi:residual=32,minikv:residual=32,minikv:heavy=0.1,recent=0.1,residual=32,mikv,h2o:heavy=0.25,recent=0.25,"
    "minikv_plus:group_size=16,value_group=64,residual=32"
)


def main(out: Path) -> None:
    model, tokenizer = load("smollm2")
    lab = Lab(model, tokenizer, Settings(lengths=(512,), limit=2, new_tokens=64))
    run(lab, "smollm2", presets.parse(METHODS), by_names("kl,lines"), out, "python examples/quality.py")
    print((out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo/quality"))
