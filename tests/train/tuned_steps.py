"""What `test_finetune_meshes.py` runs in processes of several CPU devices: fine-tuning, as JSON."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_collections

from efficient_vlm.train import loop
from efficient_vlm.train.metrics import read_metrics

if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    if "process" in asked:
        number, count, port = asked["process"]
        jax.distributed.initialize(f"127.0.0.1:{port}", count, number)
    found = []
    for job in asked["jobs"]:
        config = ml_collections.ConfigDict(asked["config"])
        config.train.mesh = job["mesh"]
        workdir = Path(job["workdir"])
        workdir.mkdir(parents=True, exist_ok=True)
        stop = SimpleNamespace(requested=False, exit_code=None)
        trained = loop.train(config, workdir, stop=stop, say=lambda line: None)
        steps = [[row["loss"], row["grad_norm"]] for row in read_metrics(workdir)]
        found.append(
            {"steps": steps, "compilations": sum(trained.summary["compilations"].values())}
        )
    print(json.dumps(found))
