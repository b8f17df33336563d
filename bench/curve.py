"""Two hundred steps on real weights and rows: the losses of the fused path compared with the plain path's and another seed's.

    python -m bench.curve MODEL DATA FOLDER [option=value ...]

Prints, in nats per token: the mean and the largest difference of the training loss between the two paths, step by step; the
same between two seeds, whose initialisation and order of rows differ; and the held-out losses of all three runs.
"""

from __future__ import annotations

import json
import pathlib
import sys

from rich.console import Console

from nybble.recipe import load_recipe
from nybble.run.log import read_metrics
from nybble.training.train import train


def losses(folder: pathlib.Path, options: list[str]) -> tuple[list[float], float]:
    """Train. Returns the training losses by step and the last held-out loss."""
    run = train(load_recipe(None, [*options, f"out={folder}"]), console=Console(stderr=True))
    lines = read_metrics(run)
    held_out = [line.eval_loss for line in lines if line.eval_loss is not None]
    return [line.loss for line in lines if line.loss is not None], held_out[-1]


def main() -> None:
    """Train three runs and print the comparison."""
    model, data, folder, *options = sys.argv[1:]
    common = [
        f"model.path={model}", f"data.path={data}", "train.max_steps=200", "train.evaluate_every=200", "train.samples=0",
        "lora.targets=all-linear", "lora.dropout=0", "train.keep_best=false", *options,
    ]  # fmt: skip
    runs = {
        "fused": ["engine.fused=true", "train.seed=1"],
        "plain": ["engine.fused=false", "train.seed=1"],
        "another seed": ["engine.fused=true", "train.seed=2"],
    }
    results = {
        name: losses(pathlib.Path(folder) / name.replace(" ", "-"), [*common, *own]) for name, own in runs.items()
    }

    def difference(name: str) -> dict[str, float]:
        differences = [abs(a - b) for a, b in zip(results["fused"][0], results[name][0], strict=True)]
        return {"mean": round(sum(differences) / len(differences), 5), "largest": round(max(differences), 5)}

    print(
        json.dumps(
            {
                "steps": len(results["fused"][0]),
                "fused to plain": difference("plain"),
                "seed to seed": difference("another seed"),
                "held out": {name: round(result[1], 5) for name, result in results.items()},
                "first and last loss": [round(results["fused"][0][0], 4), round(results["fused"][0][-1], 4)],
            }
        )
    )


if __name__ == "__main__":
    main()
