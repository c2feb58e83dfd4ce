"""What a logged model says, in a process that knows nothing but its folder. logged_model.py starts it:

python -m swa_dist.service.round_trip FOLDER QUESTION ANSWER
"""

import json
import sys
from pathlib import Path

import mlflow.pyfunc
import mlflow.pytorch
import pandas as pd
import safetensors.torch
import torch


def main(folder: str, question: str, answer: str) -> None:
    """Load the model as both of its flavours, ask it, and write what it says to the file `answer`, as JSON."""
    asked = safetensors.torch.load_file(question)
    program = mlflow.pytorch.load_model(folder)
    kept = safetensors.torch.load_file(Path(folder) / "artifacts/model/model.safetensors")
    found = program.state_dict()
    strange = [n for n in sorted(kept | found) if n not in kept or n not in found or not torch.equal(kept[n], found[n])]
    with torch.inference_mode():
        logits = program(asked["images"])
    table = pd.DataFrame({"image": [asked["png"].numpy().tobytes()]})
    said = mlflow.pyfunc.load_model(folder).predict(table).iloc[0].to_dict()
    Path(answer).write_text(json.dumps({"logits": logits.tolist(), "strange_tensors": strange} | said))


if __name__ == "__main__":
    main(*sys.argv[1:])
